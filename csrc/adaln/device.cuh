// Shared by the forward and the backward on the GPU: cutting rows into work, composing modulation.
#pragma once

#include "../include/device.cuh"
#include "adaln.h"

namespace pixart::adaln {

// The width of PixArt-XL/2, DiT-XL/2 and SigLIP-SO400M, known to the compiler.
constexpr int kXL = 1152;

// A sample's rows are cut into `splits`; a block walks one, `groups` times `rows` at a time.
struct Work {
  Threads threads;
  uint32_t splits;  // 32 bits, like blockIdx: dividing 64 bits calls a routine
  int64_t split_rows;
  float inverse_width;  // 1 / D
};

inline void check_width(int64_t D) {
  if (D <= kMaxWidth) return;
  throw std::invalid_argument("CUDA kernels take rows of at most " + std::to_string(kMaxWidth) +
                              " elements and D is " + std::to_string(D) +
                              "; use the triton or the reference backend");
}

// Splits for about `blocks` blocks in all, each of whole steps of `step` rows.
inline Work cut(const Shape& shape, int64_t blocks, int rows) {
  check_width(shape.D);
  const Threads threads = threads_for(shape.D);
  const int64_t step = int64_t(threads.groups) * rows;
  const int64_t steps = (shape.N + step - 1) / step;
  const int64_t B = shape.B > 0 ? shape.B : 1;
  int64_t splits = (blocks + B - 1) / B;
  splits = splits < 1 ? 1 : splits < steps ? splits : steps;
  const float inverse_width = 1.f / float(shape.D);
  if (splits == 0) return {threads, 0, 0, inverse_width};
  const int64_t split_rows = (steps + splits - 1) / splits * step;
  return {threads, uint32_t((shape.N + split_rows - 1) / split_rows), split_rows, inverse_width};
}

inline bool aligned(const TokensIn& tokens) {
  const int64_t size = item_size(tokens.dtype);
  return reinterpret_cast<uintptr_t>(tokens.data) % 16 == 0 &&
         tokens.batch_stride * size % 16 == 0 && tokens.row_stride * size % 16 == 0;
}

// A thread's columns of plus + table[d] + t[b, d].
template <int kD>
__device__ __forceinline__ void compose(const Row& row, float plus, int64_t b,
                                        const Place<kD>& place, float (&out)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    float value = 0.f;
    if (place.has(i)) {
      const int64_t d = place.column + i;
      if (row.table != nullptr) value = widen_at(row.table, row.table_dtype, d);
      if (row.t != nullptr) value += widen_at(row.t, row.t_dtype, b * row.t_stride + d);
    }
    out[i] = value + plus;
  }
}

template <class T>
__device__ __forceinline__ const T* at(const TokensIn& tokens, int64_t b, int64_t n, int column) {
  return static_cast<const T*>(tokens.data) + b * tokens.batch_stride + n * tokens.row_stride +
         column;
}

template <class T>
__device__ __forceinline__ T* at(const TokensOut& tokens, const Shape& shape, int64_t b, int64_t n,
                                 int column) {
  return static_cast<T*>(tokens.data) + (b * shape.N + n) * shape.D + column;
}

// Pairs of residual and activation types that models use get vector kernels; the others run,
// plainly.
template <class X, class A>
constexpr bool kCommon = std::is_same_v<X, A> || std::is_same_v<X, float>;

}  // namespace pixart::adaln
