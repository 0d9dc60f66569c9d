// Runs this project's CUDA kernels on the CPU, for tests where there is no GPU.
//
// Force-included when a .cu file is compiled as C++ (with -x c++). Every CUDA thread is a fiber; a
// block's fibers take turns in a shuffled order and change where they wait for each other, so that
// a missing barrier shows as a wrong result. Blocks run one after another, each launch in another
// order. Hopper's asynchronous units are in hopper.h. What this cannot show: races inside a warp,
// memory ordering, anything about speed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct Dim {
  unsigned x = 0;
};

namespace emulation {

inline Dim thread_index, block_index, block_dim, grid_dim;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, block_index.x,
               thread_index.x);
  std::abort();
}

enum class State { kReady, kInShuffle, kAtBarrier, kWaiting, kDone };

struct Fiber {
  static constexpr size_t kStack = 256 << 10;

  ucontext_t context;
  State state = State::kReady;
  // of kWaiting: what for, and whether it has come
  const char* what = nullptr;
  int which = 0;
  const void* condition = nullptr;
  bool (*holds)(const void* condition) = nullptr;
  int shuffles = 0;
  uint32_t sent[2];  // by turns: a lane may send again before another has read
  std::unique_ptr<char[]> stack{new char[kStack]};
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline void (*body)(const void*) = nullptr;
inline const void* arguments = nullptr;

inline void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

// Until condition() is true at this fiber's turn: what was true for a moment may have been missed.
template <class Condition>
void wait_until(const char* what, int which, const Condition& condition) {
  current->what = what;
  current->which = which;
  current->condition = &condition;
  current->holds = [](const void* given) { return (*static_cast<const Condition*>(given))(); };
  wait(State::kWaiting);
}

// Work that goes on beside the threads. What is in one queue is done in order, each at a random
// later moment; at the latest when no thread can go on without.
constexpr int kQueues = 16;
inline std::deque<std::function<void()>> queues[kQueues];

inline bool carry_out_one(std::mt19937& random) {
  const unsigned first = random();
  for (unsigned i = 0; i < kQueues; ++i) {
    auto& queue = queues[(first + i) % kQueues];
    if (queue.empty()) continue;
    auto work = std::move(queue.front());
    queue.pop_front();
    work();
    return true;
  }
  return false;
}

// The block's dynamic shared memory, poisoned with NaNs of every type, and a margin that nothing
// may touch.
constexpr size_t kMargin = 1024;
constexpr int kPoison = 0xff;
inline char* shared_memory = nullptr;
inline size_t shared_size = 0;

// What hopper.h has to do before and after a block.
inline void begin_block();
inline void end_block();

[[noreturn]] inline void fail_deadlocked(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber &fiber = *fibers[i], &last = *fibers[i - (i % 32 != 0)];
    const bool waiting = fiber.state == State::kWaiting;
    if (i % 32 != 0 && fiber.state == last.state && (!waiting || fiber.which == last.which)) {
      continue;
    }
    const char* place = waiting                            ? fiber.what
                        : fiber.state == State::kInShuffle ? "a shuffle"
                        : fiber.state == State::kAtBarrier ? "__syncthreads"
                                                           : "its end";
    std::fprintf(stderr, "from thread %u on: at %s", i, place);
    std::fprintf(stderr, waiting ? " %d\n" : "\n", fiber.which);
  }
  fail("threads wait for each other in different places");
}

inline void entry() {
  body(arguments);
  wait(State::kDone);
}

// Whether all fibers in [first, last) wait in `state`; those may then go on.
inline bool release(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (fibers[i]->state != state) return false;
  }
  for (size_t i = first; i < last; ++i) fibers[i]->state = State::kReady;
  return true;
}

inline void run_block(unsigned threads, std::mt19937& random) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    order[i] = i;
    fiber.state = State::kReady;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  begin_block();
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    // half of the warps sleep, so that others get as far ahead of them as barriers allow
    const uint32_t asleep = random();
    // and asynchronous work is done sooner or later
    const uint32_t patience = 1u << random() % 12;
    bool progress = false, done = true;
    for (unsigned i : order) {
      Fiber& fiber = *fibers[i];
      if (random() % patience == 0) progress |= carry_out_one(random);
      if (fiber.state == State::kReady ||
          (fiber.state == State::kWaiting && fiber.holds(fiber.condition))) {
        progress = true;
        if (asleep >> (i / 32) & 1) continue;
        current = &fiber;
        fiber.state = State::kReady;
        thread_index.x = i;
        swapcontext(&scheduler, &fiber.context);
      }
      done = done && fiber.state == State::kDone;
    }
    if (done && !progress) break;
    for (size_t warp = 0; warp < threads; warp += 32) {
      progress |= release(warp, std::min<size_t>(warp + 32, threads), State::kInShuffle);
    }
    progress |= release(0, threads, State::kAtBarrier);
    if (!progress && !carry_out_one(random)) fail_deadlocked(threads);
  }
  end_block();
}

inline std::mutex one_launch;
inline unsigned launches = 0;

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads() {
  emulation::wait(emulation::State::kAtBarrier);
}

inline void __syncwarp(unsigned mask = ~0u) {
  if (mask != ~0u || emulation::block_dim.x % 32 != 0) emulation::fail("a partial warp meets");
  emulation::wait(emulation::State::kInShuffle);
}

namespace emulation {

// What the thread `source` of the same warp sends.
template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4);
  if (mask != ~0u || block_dim.x % 32 != 0) fail("a partial warp shuffles");
  const int turn = current->shuffles++ % 2;
  std::memcpy(&current->sent[turn], &value, sizeof value);
  wait(State::kInShuffle);
  T received;
  std::memcpy(&received, &fibers[source]->sent[turn], sizeof received);
  return received;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return emulation::shuffle(mask, value, emulation::thread_index.x ^ offset);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::shuffle(mask, value, emulation::thread_index.x / 32 * 32 + lane % 32);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// never fused with what follows
inline float __fmul_rn(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float rsqrtf(float value) {
  return 1.f / std::sqrt(value);
}
inline float __expf(float value) {
  return std::exp(value);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
inline float __half2float(Half value) {
  return value;
}
inline Half __ushort_as_half(uint16_t bits) {
  return Half(bits, Half::from_bits());
}
inline uint16_t __half_as_ushort(Half value) {
  return value.x;
}
inline Half __float2half_rn(float value) {
  return Half(value);
}
inline uint16_t __bfloat16_as_ushort(BFloat16 value) {
  return value.x;
}
inline BFloat16 __float2bfloat16_rn(float value) {
  return BFloat16(value);
}

namespace pixart {

// few, so that sequences of a test's length are cut into several blocks
inline int multiprocessors() {
  return 4;
}

template <auto kKernel, int kMaxThreads, int kDynamicShared = 0, class Call>
void launch(const char*, int64_t blocks, int threads, void*, const Call& call) {
  static_assert(kDynamicShared <= 227 << 10, "more than a block can have");
  if (threads > kMaxThreads) emulation::fail("more threads than the kernel was compiled for");
  const std::lock_guard<std::mutex> lock(emulation::one_launch);
  std::mt19937 random(emulation::launches++);
  const size_t allocated = (kDynamicShared + 1023) / 1024 * 1024 + emulation::kMargin;
  const std::unique_ptr<char, void (*)(void*)> shared(
      static_cast<char*>(std::aligned_alloc(1024, allocated)), std::free);
  emulation::shared_memory = shared.get();
  emulation::shared_size = kDynamicShared;
  emulation::body = [](const void* arguments) { kKernel(*static_cast<const Call*>(arguments)); };
  emulation::arguments = &call;
  emulation::block_dim.x = static_cast<unsigned>(threads);
  emulation::grid_dim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    emulation::block_index.x = static_cast<unsigned>(block);
    std::memset(shared.get(), emulation::kPoison, allocated);
    emulation::run_block(static_cast<unsigned>(threads), random);
    for (size_t i = kDynamicShared; i < allocated; ++i) {
      if (shared.get()[i] != char(emulation::kPoison)) emulation::fail("a write past the end");
    }
  }
}

}  // namespace pixart

#include "hopper.h"
