// Where emulated copies put the elements of a tile of csrc/attention/sm90.cuh, and the descriptors
// that products read it by, from the tile's beginning on.
#include <vector>

#include "../../csrc/attention/sm90.cuh"

namespace {

using namespace pixart;
using namespace pixart::attention;

constexpr int kRows = 128;

struct Call {
  TensorMap map;
  int* places;  // [kRows, 72], in bytes
  uint64_t *a, *b, *rows;
};

struct Memory {
  Tile<kRows> tile;
  Barrier full;
};

void dump(const __grid_constant__ Call call) {
  Memory& memory = *reinterpret_cast<Memory*>(hopper::dynamic_shared());
  if (threadIdx.x != 0) return;
  hopper::init(memory.full, 1);
  hopper::fence_barrier_init();
  hopper::arrive_and_expect(memory.full, Tile<kRows>::kBytes);
  memory.tile.load(call.map, memory.full, 0, 0, 0);
  hopper::wait(memory.full, 0);
  for (int place = 0; place < Tile<kRows>::kBytes; place += 2) {
    uint16_t element;
    std::memcpy(&element, memory.tile.bytes + place, sizeof element);
    if (element != 0) call.places[element - 1] = place;
  }
  const uint64_t first = hopper::shared_address(memory.tile.bytes) / 16;
  for (int step = 0; step < kSteps; ++step) {
    for (int i = 0; i < 2; ++i) call.a[2 * step + i] = memory.tile.columns(step, 64 * i) - first;
    call.b[step] = memory.tile.columns(step) - first;
  }
  for (int step = 0; step < kRows / 16; ++step) call.rows[step] = memory.tile.rows(step) - first;
}

// Elements of [64, 72] that a thread holds.
std::vector<int> elements_of_threads() {
  std::vector<int> elements;
  for (int thread = 0; thread < hopper::kWarpgroup; ++thread) {
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const auto [row, column] = emulation::position(thread, i);
      elements.push_back(row * kHeadDim + column);
    }
  }
  return elements;
}

template <class T>
void print(const char* name, const char* format, const std::vector<T>& values) {
  std::printf("%s", name);
  for (T value : values) std::printf(format, value);
  std::printf("\n");
}

}  // namespace

int main() {
  std::vector<uint16_t> elements(kRows * kHeadDim);
  for (size_t i = 0; i < elements.size(); ++i) elements[i] = uint16_t(i + 1);
  std::vector<int> places(elements.size(), -1);
  std::vector<uint64_t> a(2 * kSteps), b(kSteps), rows(kRows / 16);
  const Shape shape{1, 1, kRows, kRows};
  const Heads heads{elements.data(), 0, kHeadDim, 0};
  const Call call{map_of(heads, DType::kBFloat16, kRows, shape, kRows), places.data(), a.data(),
                  b.data(), rows.data()};
  launch<dump, 32, sizeof(Memory)>("dump", 1, 32, nullptr, call);
  print("places", " %d", places);
  print("columns_a", " %lx", a);
  print("columns_b", " %lx", b);
  print("rows_b", " %lx", rows);
  print("accumulators", " %d", elements_of_threads());
}
