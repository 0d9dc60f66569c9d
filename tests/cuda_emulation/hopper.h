// Hopper's asynchronous units on the CPU: what csrc/include/hopper.cuh says to the GPU in PTX.
//
// Copies and products are carried out at a random later moment, and read and write shared memory
// and registers then. What the program must not touch in the meantime is poisoned with NaNs, and
// what breaks one of PTX's rules ends the process with a message. Matrix descriptors are decoded
// as the PTX manual describes them ("Matrix Descriptor", canonical layouts), whoever made them.
//
// What this cannot show: whether the manual was understood (test_hopper_emulation.py compares
// layouts and descriptors with CuTe's), and whether the fence is there that products and copies
// want after plain stores to shared memory.
#pragma once

#include <cfloat>
#include <map>
#include <stdexcept>
#include <type_traits>

#include "../../csrc/include/dtype.h"

namespace pixart::hopper {

struct alignas(8) Barrier {
  uint64_t state;
};

struct alignas(64) TensorMap {
  const char* data;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];
  int swizzle;

  int bytes() const { return int(2 * box[0] * box[1] * box[2] * box[3]); }
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

}  // namespace pixart::hopper

namespace emulation {

using pixart::hopper::Barrier;
using pixart::hopper::TensorMap;

constexpr int kWarpgroup = 128, kMostWarpgroups = 8, kCopyQueues = kQueues - kMostWarpgroups;
// the system's share of shared memory lies before the block's
constexpr uint32_t kSharedBase = 1024;

inline uint32_t address_of(const void* p) {
  const std::ptrdiff_t offset = static_cast<const char*>(p) - shared_memory;
  if (offset < 0 || size_t(offset) >= shared_size) fail("an address outside of shared memory");
  return kSharedBase + uint32_t(offset);
}

struct Range {
  uint32_t first, last;  // last + 1 is the first byte after it

  bool overlaps(const Range& other) const { return first < other.last && other.first < last; }
};

inline char* memory_at(uint32_t address, int bytes) {
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > shared_size) fail("past the end of shared memory");
  return shared_memory + offset;
}

// Bits 4 to 6 of an address change places with the bits above them, so that a column of 16-byte
// pieces lies in all banks. A `span` of 128 bytes changes three bits, 64 two and 32 one.
inline uint32_t swizzled(uint32_t address, int span) {
  return address ^ (address >> 3 & uint32_t(span - 16));
}

// ---- barriers in shared memory ------------------------------------------------------------------

struct Mbarrier {
  int arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;  // counts up
  bool shown = false;  // to TMA
};
inline std::map<uint32_t, Mbarrier> mbarriers;

inline Mbarrier& mbarrier_at(const Barrier& barrier) {
  const auto found = mbarriers.find(address_of(&barrier));
  if (found == mbarriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

inline void count_bytes(Mbarrier& barrier, int bytes) {
  constexpr int kMostBytes = (1 << 20) - 1;
  barrier.bytes += bytes;
  if (std::abs(barrier.bytes) > kMostBytes) fail("more bytes than a barrier can count");
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}

inline void arrive_at(Mbarrier& barrier) {
  if (barrier.pending == 0) fail("more arrivals at a barrier than its phase takes");
  --barrier.pending;
  end_phase_if_complete(barrier);
}

// ---- named barriers -----------------------------------------------------------------------------

struct NamedBarrier {
  int expected = 0, arrived = 0;
  int of_warp[32] = {};
  uint32_t phase = 0;
};
inline NamedBarrier named_barriers[16];

// The phase that this arrival belongs to.
inline uint32_t arrive_at_named(int id, int threads) {
  if (id < 1 || id > 15) fail("a named barrier has a number from 1 to 15");
  NamedBarrier& barrier = named_barriers[id];
  if (threads % 32 != 0 || threads < 32) fail("a named barrier is met by whole warps");
  if (barrier.arrived != 0 && barrier.expected != threads) {
    fail("a named barrier is met by different numbers of threads");
  }
  barrier.expected = threads;
  ++barrier.of_warp[thread_index.x / 32];
  const uint32_t phase = barrier.phase;
  if (++barrier.arrived == threads) {
    for (int& warp : barrier.of_warp) {
      if (warp % 32 != 0) fail("a part of a warp met at a named barrier");
      warp = 0;
    }
    barrier.arrived = 0;
    ++barrier.phase;
  }
  return phase;
}

// ---- products -----------------------------------------------------------------------------------

// Accumulators while products are under way that write them. The program's own hold poison.
struct Accumulator {
  std::vector<float> value;
  int in_flight = 0;
};

struct Product {
  bool bf16, a_in_registers, accumulate;
  int n;
  uint64_t a, b;  // descriptors
  int threads = 0;
  bool done = false;
  bool waited = false;  // by any thread
  Accumulator* accumulators[kWarpgroup] = {};
  uint32_t a_registers[kWarpgroup][4];
  std::vector<Range> operands;  // in shared memory
};

// A product as one thread sees it, from its start to the wait for it.
struct Flight {
  std::shared_ptr<Product> product;
  float* d;
  const uint32_t* a;  // or null
  int batch;
};

struct Thread {
  size_t products = 0;
  int batches = 0;  // committed
  std::deque<Flight> flights;
  std::map<const float*, Accumulator> accumulators;
  bool fenced = false;
  // what registers of products held at the last fence
  std::map<const void*, std::vector<uint32_t>> at_fence;
  int register_moves = 0, registers = 0;
};
inline std::vector<Thread> threads;

struct Warpgroup {
  size_t finished = 0;  // products that are no longer in `products`
  std::deque<std::shared_ptr<Product>> products;
};
inline Warpgroup warpgroups[kMostWarpgroups];

inline Thread& this_thread() {
  return threads[thread_index.x];
}

constexpr uint32_t kPoisonedRegister = 0x7fe0dead;  // a NaN

// One operand, `count` rows or columns and 16 deep: f(i, depth, address) for each run of eight
// neighbouring elements, which follow each other in i if `transposed` and in depth if not.
template <class F>
void walk_operand(uint64_t descriptor, int count, bool transposed, const F& f) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = int(descriptor >> 62), span = mode == 0 ? 0 : 256 >> mode;
  if (descriptor & 0x3ff1'c000'c000'c000) fail("a descriptor's unused bits");
  if (span == 0) fail("descriptors without swizzle are not emulated");
  // the pattern repeats after eight rows of `span` bytes; bits 49 to 51 would say how far it is
  // shifted where an operand does not begin in its first row
  if ((descriptor >> 49 & 7) != 0 || start % (8 * span) >= uint32_t(span)) {
    fail("an operand that begins inside of a swizzle pattern");
  }
  if (transposed) {
    // runs of `span` bytes in i, eight of them one below the other
    for (int depth = 0; depth < 16; ++depth) {
      for (int i = 0; i < count; i += 8) {
        const uint32_t address =
            start + i * 2 / span * leading + i * 2 % span + depth / 8 * stride + depth % 8 * span;
        f(i, depth, swizzled(address, span));
      }
    }
  } else {
    for (int i = 0; i < count; ++i) {
      for (int depth = 0; depth < 16; depth += 8) {
        const uint32_t address = start + i / 8 * stride + i % 8 * span + depth * 2;
        f(i, depth, swizzled(address, span));
      }
    }
  }
}

inline float widened(uint16_t bits, bool bf16) {
  static const auto halves = [] {
    std::vector<float> value(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) value[i] = Half(uint16_t(i), Half::from_bits());
    return value;
  }();
  return bf16 ? __uint_as_float(uint32_t(bits) << 16) : halves[bits];
}

// out[16][count]
inline void gather(uint64_t descriptor, int count, bool transposed, bool bf16, float* out) {
  walk_operand(descriptor, count, transposed, [&](int i, int depth, uint32_t address) {
    uint16_t bits[8];
    std::memcpy(bits, memory_at(address, sizeof bits), sizeof bits);
    for (int j = 0; j < 8; ++j) {
      const int row = transposed ? depth : depth + j, column = transposed ? i + j : i;
      out[row * count + column] = widened(bits[j], bf16);
    }
  });
}

// What the accumulator, or the 16-bit element of a register operand, number i of a thread is.
struct Position {
  int row, column;
};
inline Position position(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

inline void carry_out(Product& product) {
  constexpr int kM = 64, kK = 16;
  const int n = product.n;
  std::vector<float> a(kK * kM), b(kK * n), d(kM * n);
  if (product.a_in_registers) {
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = product.a_registers[t][i / 2];
        const auto [row, column] = position(t, i);
        a[column * kM + row] = widened(uint16_t(pair >> i % 2 * 16), product.bf16);
      }
    }
  } else {
    gather(product.a, kM, false, product.bf16, a.data());
  }
  gather(product.b, n, product.a_in_registers, product.bf16, b.data());
  const auto place = [n](int t, int i) {
    const auto [row, column] = position(t, i);
    return row * n + column;
  };
  if (product.accumulate) {
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < n / 2; ++i) d[place(t, i)] = product.accumulators[t]->value[i];
    }
  }
  for (int row = 0; row < kM; ++row) {
    for (int k = 0; k < kK; ++k) {
      const float left = a[k * kM + row];
      float* to = &d[row * n];
      const float* from = &b[k * n];
      for (int column = 0; column < n; ++column) to[column] += left * from[column];
    }
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    for (int i = 0; i < n / 2; ++i) product.accumulators[t]->value[i] = d[place(t, i)];
  }
  product.done = true;
}

// ---- copies -------------------------------------------------------------------------------------

struct Copy {
  Range to;
  uint32_t barrier, phase;  // whose end says that it has come
  bool done = false;
};
inline std::vector<std::shared_ptr<Copy>> copies;
// the newest phase of each barrier whose end a warpgroup has seen, and one
inline std::map<uint32_t, uint32_t> phases_seen[kMostWarpgroups];

inline void carry_out(const TensorMap& map, uint32_t to, const int (&at)[4]) {
  const auto inside = [&](int64_t coordinate, int k) {
    return coordinate >= 0 && uint64_t(coordinate) < map.sizes[k];
  };
  const int rows = map.bytes() / 2 / int(map.box[0]);
  for (int row = 0; row < rows; ++row) {
    const char* from = map.data;
    bool any = true;
    for (int k = 1, left = row; k < 4; left /= int(map.box[k++])) {
      const int64_t coordinate = int64_t(at[k]) + left % int(map.box[k]);
      any = any && inside(coordinate, k);
      if (any) from += uint64_t(coordinate) * map.strides[k - 1];
    }
    for (int piece = 0; piece < int(map.box[0]); piece += 8, to += 16) {
      uint16_t value[8] = {};
      for (int i = 0; i < 8; ++i) {
        const int64_t coordinate = int64_t(at[0]) + piece + i;
        if (any && inside(coordinate, 0)) std::memcpy(&value[i], from + 2 * coordinate, 2);
      }
      std::memcpy(memory_at(swizzled(to, map.swizzle), sizeof value), value, sizeof value);
    }
  }
}

// What a product is about to read must have been brought, and the warpgroup must know it.
inline void check_brought(const Range& range, unsigned warpgroup) {
  for (const auto& copy : copies) {
    if (!copy->to.overlaps(range)) continue;
    if (phases_seen[warpgroup][copy->barrier] <= copy->phase) {
      fail("a product of memory whose copy was not waited for");
    }
  }
}

inline void begin_block() {
  mbarriers.clear();
  for (auto& barrier : named_barriers) barrier = {};
  for (auto& warpgroup : warpgroups) warpgroup = {};
  for (auto& phases : phases_seen) phases.clear();
  copies.clear();
  threads.assign(block_dim.x, {});
}

inline void end_block() {
  for (const auto& queue : queues) {
    if (!queue.empty()) fail("a block ended before its copies or products");
  }
  for (const auto& barrier : named_barriers) {
    if (barrier.arrived != 0) fail("a block ended with threads missing at a named barrier");
  }
  int registers = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    const Thread& first = threads[i / kWarpgroup * kWarpgroup];
    if (!threads[i].flights.empty()) fail("a block ended without waiting for its products");
    if (threads[i].products != first.products) fail("a product of a part of a warpgroup");
    if (threads[i].register_moves != first.register_moves) {
      fail("registers are given and taken by whole warpgroups");
    }
    registers += threads[i].registers;
  }
  if (registers > 64 << 10) fail("more registers were taken than there are");
}

}  // namespace emulation

namespace pixart::hopper {

inline uint32_t shared_address(const void* p) {
  return emulation::address_of(p);
}
inline char* dynamic_shared() {
  return emulation::shared_memory;
}

inline void init(Barrier& barrier, int arrivals) {
  const uint32_t address = shared_address(&barrier);
  if (arrivals < 1) emulation::fail("a barrier without arrivals");
  if (!emulation::mbarriers.emplace(address, emulation::Mbarrier{arrivals, arrivals}).second) {
    emulation::fail("a barrier that is initialised twice");
  }
}
inline void fence_barrier_init() {
  for (auto& [address, barrier] : emulation::mbarriers) barrier.shown = true;
}
inline void arrive(Barrier& barrier) {
  emulation::arrive_at(emulation::mbarrier_at(barrier));
}
inline void arrive_and_expect(Barrier& barrier, int bytes) {
  emulation::Mbarrier& found = emulation::mbarrier_at(barrier);
  emulation::count_bytes(found, bytes);
  emulation::arrive_at(found);
}
inline void wait(Barrier& barrier, uint32_t parity) {
  emulation::Mbarrier& found = emulation::mbarrier_at(barrier);
  const uint32_t address = shared_address(&barrier);
  if (parity > 1) emulation::fail("a parity is 0 or 1");
  emulation::wait_until("the mbarrier at shared address", int(address),
                        [&] { return found.phase % 2 != parity; });
  emulation::phases_seen[emulation::thread_index.x / emulation::kWarpgroup][address] = found.phase;
}

inline void sync_named(int barrier, int threads) {
  const uint32_t phase = emulation::arrive_at_named(barrier, threads);
  const uint32_t& now = emulation::named_barriers[barrier].phase;
  emulation::wait_until("the named barrier", barrier, [&] { return now != phase; });
}
inline void arrive_named(int barrier, int threads) {
  emulation::arrive_at_named(barrier, threads);
}

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  ++emulation::this_thread().register_moves;
  emulation::this_thread().registers = kRegisters;
}
template <int kRegisters>
void take_registers() {
  give_registers<kRegisters>();
}

inline TensorMap tensor_map(const void* data, DType, const uint64_t (&sizes)[4],
                            const uint64_t (&strides)[3], const uint32_t (&box)[4], int swizzle) {
  bool taken = reinterpret_cast<uintptr_t>(data) % 16 == 0 && data != nullptr;
  for (uint64_t size : sizes) taken = taken && size >= 1 && size <= uint64_t(1) << 32;
  for (uint64_t stride : strides) taken = taken && stride % 16 == 0 && stride < uint64_t(1) << 40;
  for (uint32_t extent : box) taken = taken && extent >= 1 && extent <= 256;
  taken = taken && (swizzle == 128 || swizzle == 64 || swizzle == 32);
  if (!taken || box[0] * 2 % 16 != 0 || box[0] * 2 > uint32_t(swizzle)) {
    throw std::runtime_error("pixart_kernels: the driver refused a tensor map, error 1");
  }
  if (box[0] * 2 != uint32_t(swizzle)) emulation::fail("boxes narrower than their swizzle");
  TensorMap map{};
  map.data = static_cast<const char*>(data);
  std::copy_n(sizes, 4, map.sizes);
  std::copy_n(strides, 3, map.strides);
  std::copy_n(box, 4, map.box);
  map.swizzle = swizzle;
  return map;
}

inline void copy_box(void* shared, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2,
                     int c3) {
  const uint32_t to = shared_address(shared);
  if (to % 128 != 0) emulation::fail("TMA writes to multiples of 128 bytes");
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) emulation::fail("a misaligned tensor map");
  emulation::Mbarrier& counted = emulation::mbarrier_at(barrier);
  if (!counted.shown) emulation::fail("TMA was not shown this barrier");
  const emulation::Range range{to, to + map.bytes()};
  for (const auto& warpgroup : emulation::warpgroups) {
    for (const auto& product : warpgroup.products) {
      for (const auto& operand : product->operands) {
        if (!product->waited && operand.overlaps(range)) {
          emulation::fail("a copy to where a product may still be reading");
        }
      }
    }
  }
  auto& copies = emulation::copies;
  for (size_t i = copies.size(); i-- > 0;) {
    if (!copies[i]->to.overlaps(range)) continue;
    if (!copies[i]->done) emulation::fail("two copies to the same place");
    copies.erase(copies.begin() + i);
  }
  const auto copy = std::make_shared<emulation::Copy>();
  copy->to = range;
  copy->barrier = shared_address(&barrier);
  copy->phase = counted.phase;
  copies.push_back(copy);
  std::memset(emulation::memory_at(to, map.bytes()), emulation::kPoison, map.bytes());
  static unsigned turn = 0;  // copies overtake each other
  auto& queue = emulation::queues[emulation::kMostWarpgroups + turn++ % emulation::kCopyQueues];
  queue.push_back([copy, map, to, c0, c1, c2, c3, &counted] {
    emulation::carry_out(map, to, {c0, c1, c2, c3});
    copy->done = true;
    emulation::count_bytes(counted, -map.bytes());
    emulation::end_phase_if_complete(counted);
  });
}

template <class T>
void pin(T&) {}

inline void fence_products() {
  emulation::Thread& thread = emulation::this_thread();
  thread.fenced = true;
  for (auto& [registers, held] : thread.at_fence) {
    std::memcpy(held.data(), registers, 4 * held.size());
  }
}
inline void commit_products() {
  ++emulation::this_thread().batches;
}

}  // namespace pixart::hopper

namespace emulation {

inline void check_fenced(Thread& thread, const void* registers, int count, bool is_read) {
  if (!thread.fenced) fail("a product without fence_products() before it");
  auto [entry, is_new] = thread.at_fence.try_emplace(registers, count);
  auto& held = entry->second;
  if (!is_new && is_read && std::memcmp(held.data(), registers, 4 * count) != 0) {
    fail("a product's registers were written after fence_products()");
  }
  held.resize(count);
}

// By each thread of the warpgroup. `a` is null where both operands lie in shared memory.
inline void start_product(const Product& given, float* d, const uint32_t* a) {
  Thread& thread = this_thread();
  Warpgroup& warpgroup = warpgroups[thread_index.x / kWarpgroup];
  if (block_dim.x % kWarpgroup != 0) fail("a product of a part of a warpgroup");
  const size_t index = thread.products++ - warpgroup.finished;
  if (index == warpgroup.products.size()) {
    warpgroup.products.push_back(std::make_shared<Product>(given));
  }
  const std::shared_ptr<Product> product = warpgroup.products[index];
  if (product->n != given.n || product->bf16 != given.bf16 || product->a != given.a ||
      product->b != given.b || product->a_in_registers != given.a_in_registers ||
      product->accumulate != given.accumulate) {
    fail("threads of a warpgroup start different products");
  }
  const int count = given.n / 2;
  const auto [entry, is_new] = thread.accumulators.try_emplace(d);
  Accumulator& accumulator = entry->second;
  if (is_new) {
    check_fenced(thread, d, count, given.accumulate);
    accumulator.value.assign(d, d + count);
    std::fill_n(reinterpret_cast<uint32_t*>(d), count, kPoisonedRegister);
  } else if (int(accumulator.value.size()) != count) {
    fail("products of different shapes at once in the same accumulators");
  }
  ++accumulator.in_flight;
  const int t = int(thread_index.x) % kWarpgroup;
  product->accumulators[t] = &accumulator;
  if (a != nullptr) {
    check_fenced(thread, a, 4, true);
    std::copy_n(a, 4, product->a_registers[t]);
  }
  thread.flights.push_back({product, d, a, thread.batches});
  if (++product->threads < kWarpgroup) return;
  const auto add = [&](uint64_t descriptor, int rows, bool transposed) {
    Range range{~0u, 0};
    walk_operand(descriptor, rows, transposed, [&](int, int, uint32_t address) {
      range.first = std::min(range.first, address);
      range.last = std::max(range.last, address + 16);
    });
    memory_at(range.first, int(range.last - range.first));
    check_brought(range, thread_index.x / kWarpgroup);
    product->operands.push_back(range);
  };
  if (a == nullptr) add(given.a, 64, false);
  add(given.b, given.n, a != nullptr);
  queues[thread_index.x / kWarpgroup].push_back([product] { carry_out(*product); });
}

struct Registers {
  const void* first;
  size_t bytes;

  bool contain(const void* p) const {
    return size_t(static_cast<const char*>(p) - static_cast<const char*>(first)) < bytes;
  }
};

inline void finish_batches(int most, std::initializer_list<Registers> listed) {
  Thread& thread = this_thread();
  const int finished = thread.batches - most;
  wait_until("wait_products", most, [&] {
    for (const Flight& flight : thread.flights) {
      if (flight.batch < finished && !flight.product->done) return false;
    }
    return true;
  });
  const auto check_listed = [&](const void* registers) {
    for (const Registers& some : listed) {
      if (some.contain(registers)) return;
    }
    fail("wait_products() must name the registers of the products that have ended");
  };
  while (!thread.flights.empty() && thread.flights.front().batch < finished) {
    const Flight flight = std::move(thread.flights.front());
    thread.flights.pop_front();
    thread.fenced = false;
    flight.product->waited = true;
    if (flight.a != nullptr) {
      const auto& a = flight.product->a_registers[thread_index.x % kWarpgroup];
      if (!std::equal(a, a + 4, flight.a)) fail("an operand was written while under way");
      bool in_use = false;
      for (const Flight& other : thread.flights) in_use = in_use || other.a == flight.a;
      if (!in_use) check_listed(flight.a);
    }
    const auto entry = thread.accumulators.find(flight.d);
    if (--entry->second.in_flight > 0) continue;
    check_listed(flight.d);
    const auto& value = entry->second.value;
    for (size_t i = 0; i < value.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, flight.d + i, sizeof bits);
      if (bits != kPoisonedRegister) fail("accumulators were written while under way");
    }
    std::copy(value.begin(), value.end(), flight.d);
    thread.accumulators.erase(entry);
  }
  Warpgroup& warpgroup = warpgroups[thread_index.x / kWarpgroup];
  while (!warpgroup.products.empty() && warpgroup.products.front()->waited) {
    warpgroup.products.pop_front();
    ++warpgroup.finished;
  }
}

}  // namespace emulation

namespace pixart::hopper {

template <int kBatches, class... Some>
void wait_products(Some&... registers) {
  emulation::finish_batches(kBatches, {emulation::Registers{&registers, sizeof registers}...});
}

template <class T, int kN>
void multiply(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN % 8 == 0 && kN <= 256);
  emulation::Product product{};
  product.bf16 = std::is_same_v<T, Bf16>;
  product.accumulate = accumulate;
  product.n = kN;
  product.a = a;
  product.b = b;
  emulation::start_product(product, d, nullptr);
}
template <class T, int kN>
void multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kN % 8 == 0 && kN <= 256);
  emulation::Product product{};
  product.bf16 = std::is_same_v<T, Bf16>;
  product.a_in_registers = true;
  product.accumulate = accumulate;
  product.n = kN;
  product.b = b;
  emulation::start_product(product, d, a);
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return std::abs(y) < FLT_MIN ? 0.f : y;
}

template <class T>
uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return uint32_t(BFloat16(low).x) | uint32_t(BFloat16(high).x) << 16;
  } else {
    return uint32_t(Half(low).x) | uint32_t(Half(high).x) << 16;
  }
}

}  // namespace pixart::hopper
