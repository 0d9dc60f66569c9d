// What CUDA kernels share: eight columns of a row in registers, sums over a row, launches.
//
// A row belongs to a group of threads, a thread to eight neighbouring columns: one 16-byte access
// for 16-bit types, two for fp32. Vectors that belong to columns (modulation, sums over rows) then
// stay in the registers of their thread while it walks from row to row.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "kernel_table.h"

namespace pixart {

constexpr int kColumns = 8;    // of a thread
constexpr int kHalfWarp = 16;  // threads of a row's group come in whole half-warps

// Eight stored elements, loaded and stored whole. Kept unconverted between load and use: 16-bit
// values take half the registers that way.
template <class T>
struct alignas(16) Stored {
  T value[kColumns];
};

template <class T>
__device__ __forceinline__ Stored<T> zeros() {
  Stored<T> zero;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) zero.value[i] = T{};
  return zero;
}

// `count` elements from p, the others zero. kVector: all eight or none, p aligned to 16 bytes.
template <bool kVector, class T>
__device__ __forceinline__ Stored<T> load(const T* p, int count) {
  Stored<T> out = zeros<T>();
  if constexpr (kVector) {
    if (count > 0) {
#pragma unroll
      for (int i = 0; i < int(sizeof out / sizeof(uint4)); ++i) {
        reinterpret_cast<uint4*>(&out)[i] = reinterpret_cast<const uint4*>(p)[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i < count) out.value[i] = p[i];
    }
  }
  return out;
}

template <bool kVector, class T>
__device__ __forceinline__ void store(T* p, const Stored<T>& in, int count) {
  if constexpr (kVector) {
    if (count > 0) {
#pragma unroll
      for (int i = 0; i < int(sizeof in / sizeof(uint4)); ++i) {
        reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&in)[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i < count) p[i] = in.value[i];
    }
  }
}

// Makes the compiler widen 16-bit values anew where it would keep them widened from an earlier use,
// in twice the registers. Widening is one instruction, a spill many.
template <class T>
__device__ __forceinline__ void forget_widened([[maybe_unused]] Stored<T>& stored) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&stored)[i]));
    }
  }
#endif
}

// Makes the compiler compute addresses from `index` anew in each turn of a loop, where it would
// keep a running pointer for each tensor, in two registers each.
__device__ __forceinline__ int64_t forget_pointers(int64_t index) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(index));
#endif
  return index;
}

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ float widen(Bf16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}
__device__ __forceinline__ float widen(Fp16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

__device__ __forceinline__ void narrow(float value, float& out) {
  out = value;
}
__device__ __forceinline__ void narrow(float value, Bf16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ void narrow(float value, Fp16& out) {
  out.bits = __half_as_ushort(__float2half_rn(value));
}

// Storage types that are known at run time only: for vectors that are read once for many rows.
__device__ __forceinline__ float widen_at(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen(static_cast<const Bf16*>(data)[index]);
    case DType::kFloat16:
      return widen(static_cast<const Fp16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ __forceinline__ void narrow_at(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16:
      return narrow(value, static_cast<Bf16*>(data)[index]);
    case DType::kFloat16:
      return narrow(value, static_cast<Fp16*>(data)[index]);
    default:
      static_cast<float*>(data)[index] = value;
  }
}

// How threads are laid over rows of D columns. `groups` rows are under way at once.
struct Threads {
  int per_row, groups;

  constexpr int count() const { return per_row * groups; }
};

constexpr int kMaxThreads = 512;
constexpr int64_t kMaxWidth = int64_t(kMaxThreads) * kColumns;

// Whole warps of about 256 threads: a row of D = 1152 takes 144, so that 2 rows fill 9 warps.
constexpr Threads threads_for(int64_t D) {
  constexpr int kAim = 256, kWarp = 2 * kHalfWarp;
  const int vectors = D < 1 ? 1 : int((D + kColumns - 1) / kColumns);
  if (vectors > kAim) return {(vectors + kWarp - 1) / kWarp * kWarp, 1};
  const int per_row = (vectors + kHalfWarp - 1) / kHalfWarp * kHalfWarp;
  const int groups = (kAim + per_row / 2) / per_row;
  return {per_row, groups + (per_row * groups % kWarp != 0)};
}

// A thread's place. kD is the width where it is known to the compiler, or 0.
template <int kD>
struct Place {
  // every thread has all of its columns
  static constexpr bool kFull = kD != 0 && kD % (kHalfWarp * kColumns) == 0;

  int per_row, groups, group, column, count;

  __device__ __forceinline__ Place(int64_t D, const Threads& threads) {
    constexpr Threads fixed = threads_for(kD ? kD : kColumns);
    per_row = kD ? fixed.per_row : threads.per_row;
    groups = kD ? fixed.groups : threads.groups;
    group = threadIdx.x / per_row;
    column = threadIdx.x % per_row * kColumns;
    const int left = (kD ? kD : int(D)) - column;
    count = kFull || left > kColumns ? kColumns : left < 0 ? 0 : left;
  }

  // 1 / D: a division calls a routine, and the registers it wants are missed elsewhere.
  __device__ __forceinline__ static float inverse(float inverse_width) {
    return kD ? 1.f / (kD ? kD : 1) : inverse_width;
  }

  // Whether this thread's i-th column lies inside the row.
  __device__ __forceinline__ bool has(int i) const { return kFull || i < count; }
};

// Sums kSums values over the threads of each row; every thread gets its row's totals.
//
// Half-warps add by shuffles, then each thread adds the half-warps' sums in order: the result
// depends on nothing but the values. One barrier a call; two buffers by turns, because a thread
// may write its next sums while another still reads the last ones.
template <int kSums, int kD>
class RowSums {
 public:
  struct Buffers {
    float sum[2][kMaxThreads / kHalfWarp][kSums];
  };

  __device__ __forceinline__ explicit RowSums(Buffers& buffers) : buffers_(buffers) {}

  __device__ __forceinline__ void operator()(float (&value)[kSums], const Place<kD>& place) {
#pragma unroll
    for (int offset = kHalfWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) value[i] += __shfl_xor_sync(~0u, value[i], offset);
    }
    auto& sum = buffers_.sum[turn_];
    if (threadIdx.x % kHalfWarp == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[threadIdx.x / kHalfWarp][i] = value[i];
    }
    __syncthreads();
    const int half_warps = place.per_row / kHalfWarp, first = place.group * half_warps;
#pragma unroll
    for (int i = 0; i < kSums; ++i) value[i] = sum[first][i];
#pragma unroll 8
    for (int h = 1; h < half_warps; ++h) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) value[i] += sum[first + h][i];
    }
    turn_ ^= 1;
  }

 private:
  Buffers& buffers_;
  int turn_ = 0;
};

#ifdef __CUDACC__
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("pixart_kernels: ") + what + ": " +
                           cudaGetErrorString(error));
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "asking for the device's size");
  return count;
}

// kMostThreads is the largest block that the kernel is launched with; kDynamicShared, in bytes,
// what it has besides its own shared variables.
template <auto kKernel, int kMostThreads, int kDynamicShared = 0, class Call>
void launch(const char* name, int64_t blocks, int threads, void* stream, const Call& call) {
  register_kernel<kKernel, kMostThreads, kDynamicShared>();
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::invalid_argument("too many rows for one launch");
  constexpr int kWithoutAsking = 48 << 10;
  if constexpr (kDynamicShared > kWithoutAsking) {
    check(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamicShared),
        name);
  }
  kKernel<<<dim3(static_cast<unsigned>(blocks)), threads, kDynamicShared,
            static_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError(), name);
}
#endif

}  // namespace pixart
