// A small kernel in the manner of the attention kernels, for tests of the emulation itself: right
// as it stands, and wrong in the way that its argument names.
#include <vector>

#include "../../csrc/attention/sm90.cuh"

namespace {

using namespace pixart;
using namespace pixart::attention;
namespace hopper = pixart::hopper;

constexpr int kRows = 64, kTiles = 5, kStages = 2;
constexpr int kProbeThreads = 2 * hopper::kWarpgroup;

struct Call {
  const char* fault;  // or "none"
  TensorMap q, k;
  float* out;  // [kRows, 72], the sum over the tiles of (q k^T) k
};

struct Memory {
  Tile<kRows> q, k[kStages];
  Barrier full_q, full[kStages], empty[kStages];
};

// The same descriptor with one of its fields changed.
uint64_t with(uint64_t descriptor, int shift, uint64_t value) {
  return (descriptor & ~(uint64_t(0x3fff) << shift)) | value << shift;
}

void probe(const __grid_constant__ Call call) {
  Memory& memory = *reinterpret_cast<Memory*>(hopper::dynamic_shared());
  const auto fault = [&](const char* name) { return std::strcmp(call.fault, name) == 0; };
  const int bytes = Tile<kRows>::kBytes;
  if (threadIdx.x == 0) {
    hopper::init(memory.full_q, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::init(memory.full[stage], 1);
      hopper::init(memory.empty[stage], hopper::kWarpgroup);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  Ring<kStages> ring;
  if (threadIdx.x < hopper::kWarpgroup) {
    hopper::give_registers<24>();
    if (threadIdx.x != 0) return;
    hopper::arrive_and_expect(memory.full_q, bytes);
    memory.q.load(call.q, memory.full_q, 0, 0, 0);
    for (int tile = 0; tile < kTiles; ++tile, ring.next()) {
      if (!fault("early-overwrite")) {
        hopper::wait(memory.empty[ring.stage], ring.parity ^ 1);
      }
      const int wrong = fault("too-few-bytes") ? -128 : fault("too-many-bytes") ? 128 : 0;
      hopper::arrive_and_expect(memory.full[ring.stage], bytes + wrong);
      memory.k[ring.stage].load(call.k, memory.full[ring.stage], tile * kRows, 0, 0);
      if (fault("too-many-arrivals")) hopper::arrive(memory.full[ring.stage]);
    }
    return;
  }
  hopper::take_registers<232>();
  if (fault("part-of-warpgroup") && threadIdx.x >= kProbeThreads - 32) return;
  float out[36];
  hopper::wait(memory.full_q, 0);
  for (int tile = 0; tile < kTiles; ++tile, ring.next()) {
    const auto& k = memory.k[ring.stage];
    if (!fault("no-wait-for-copy")) hopper::wait(memory.full[ring.stage], ring.parity);
    float scores[32];
    if (!fault("no-fence")) hopper::fence_products();
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t b = k.columns(step);
      hopper::multiply<Bf16, 64>(scores, memory.q.columns(step),
                                 fault("stride") ? with(b, 32, 2 * kPanelRow / 16) : b, step > 0);
    }
    hopper::commit_products();
    if (fault("early-release")) hopper::arrive(memory.empty[ring.stage]);
    if (!fault("no-wait-for-product")) hopper::wait_products<0>(scores);
    uint32_t operand[4][4];
    if (fault("late-registers")) hopper::fence_products();
    for (int i = 0; i < 16; ++i) {
      operand[i / 4][i % 4] = hopper::pack<Bf16>(scores[2 * i], scores[2 * i + 1]);
    }
    if (!fault("late-registers")) hopper::fence_products();
    for (int step = 0; step < kRows / 16; ++step) {
      uint64_t b = k.rows(step);
      if (fault("leading")) b = with(b, 16, kPanelRow / 16);
      if (fault("swizzle")) b ^= uint64_t(3) << 62;
      if (fault("different-products") && threadIdx.x % 32 == 0) b = k.rows(0);
      hopper::multiply<Bf16, 72>(out, operand[step], b, tile > 0 || step > 0);
    }
    hopper::commit_products();
    if (fault("operand-in-flight")) operand[0][0] ^= 1;
    if (fault("accumulators-in-flight")) out[0] = 0;
    if (fault("unlisted")) {
      hopper::wait_products<0>(out);
    } else {
      hopper::wait_products<0>(out, operand);
    }
    if (!fault("early-release") && !fault("no-arrival")) {
      hopper::arrive(memory.empty[ring.stage]);
    }
  }
  const int t = threadIdx.x % hopper::kWarpgroup;
  for (int i = 0; i < 36; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    call.out[row * kHeadDim + i / 4 * 8 + t % 4 * 2 + i % 2] = out[i];
  }
}

// Few enough and small enough that fp32 holds every sum and bf16 every score.
float value_at(int i) {
  return float(i * 7 % 11 % 3 - 1) * (i % 5 == 0);
}

std::vector<Bf16> values(int rows, int first) {
  std::vector<Bf16> out(rows * kHeadDim);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i].bits = BFloat16(value_at(int(i) + first)).x;
  }
  return out;
}

}  // namespace

int main(int, char** argv) {
  const int rows_of_k = kRows * kTiles - 9;
  auto q = values(kRows, 0), k = values(rows_of_k, 5);
  std::vector<float> out(kRows * kHeadDim), expected(out.size());
  const Shape shape{1, 1, kRows, rows_of_k};
  const auto map = [&](std::vector<Bf16>& data, int rows) {
    return map_of({data.data(), 0, kHeadDim, 0}, DType::kBFloat16, rows, shape, kRows);
  };
  const Call call{argv[1], map(q, kRows), map(k, rows_of_k), out.data()};
  launch<probe, kProbeThreads, sizeof(Memory)>("probe", 1, kProbeThreads, nullptr, call);
  const auto at = [](const std::vector<Bf16>& data, int row, int column) {
    return widen(data[row * kHeadDim + column]);
  };
  for (int row = 0; row < kRows; ++row) {
    for (int other = 0; other < rows_of_k; ++other) {
      float score = 0;
      for (int i = 0; i < kHeadDim; ++i) score += at(q, row, i) * at(k, other, i);
      for (int i = 0; i < kHeadDim; ++i) expected[row * kHeadDim + i] += score * at(k, other, i);
    }
  }
  if (out != expected) emulation::fail("wrong result");
  return 0;
}
