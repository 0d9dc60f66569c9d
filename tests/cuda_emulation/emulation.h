// Runs this project's CUDA kernels on the CPU, for tests where there is no GPU.
//
// Force-included when a .cu file is compiled as C++ (with -x c++). Every CUDA thread is a fiber; a
// block's fibers take turns in a shuffled order and change at warp shuffles and block barriers, so
// that a missing barrier shows as a wrong result. Blocks run one after another. What this cannot
// show: races inside a warp, memory ordering, anything about speed.
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

enum class State { kReady, kInShuffle, kAtBarrier, kDone };

struct Fiber {
  static constexpr size_t kStack = 256 << 10;

  ucontext_t context;
  State state = State::kReady;
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
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    // half of the warps sleep, so that others get as far ahead of them as barriers allow
    const uint32_t asleep = random();
    bool progress = false, done = true;
    for (unsigned i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.state == State::kReady) {
        progress = true;
        if (asleep >> (i / 32) & 1) continue;
        current = &fiber;
        thread_index.x = i;
        swapcontext(&scheduler, &fiber.context);
      }
      done = done && fiber.state == State::kDone;
    }
    if (done && !progress) return;
    for (size_t warp = 0; warp < threads; warp += 32) {
      progress |= release(warp, std::min<size_t>(warp + 32, threads), State::kInShuffle);
    }
    progress |= release(0, threads, State::kAtBarrier);
    if (!progress) fail("threads wait for each other in different places");
  }
}

inline std::mutex one_launch;

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads() {
  emulation::wait(emulation::State::kAtBarrier);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) == 4);
  if (mask != ~0u || emulation::block_dim.x % 32 != 0) emulation::fail("a partial warp shuffles");
  const unsigned lane = emulation::thread_index.x;
  const int turn = emulation::current->shuffles++ % 2;
  std::memcpy(&emulation::current->sent[turn], &value, sizeof value);
  emulation::wait(emulation::State::kInShuffle);
  T received;
  std::memcpy(&received, &emulation::fibers[lane ^ offset]->sent[turn], sizeof received);
  return received;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
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

template <auto kKernel, int kMaxThreads, class Call>
void launch(const char*, int64_t blocks, int threads, void*, const Call& call) {
  if (threads > kMaxThreads) emulation::fail("more threads than the kernel was compiled for");
  const std::lock_guard<std::mutex> lock(emulation::one_launch);
  std::mt19937 random(0);
  emulation::body = [](const void* arguments) { kKernel(*static_cast<const Call*>(arguments)); };
  emulation::arguments = &call;
  emulation::block_dim.x = static_cast<unsigned>(threads);
  emulation::grid_dim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    emulation::block_index.x = static_cast<unsigned>(block);
    emulation::run_block(static_cast<unsigned>(threads), random);
  }
}

}  // namespace pixart
