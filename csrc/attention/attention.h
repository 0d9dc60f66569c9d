// What the attention ops' checks (op.cpp) hand to their kernels (fwd_sm90.cu, bwd_sm90.cu).
#pragma once

#include <cstdint>

#include "../include/dtype.h"

namespace pixart::attention {

constexpr int kHeadDim = 72;

struct Shape {
  int64_t B, H, Nq, Nk;
};

// A (B, N, H, 72) view whose last dimension has stride 1; strides in elements. Kernels that read
// through tensor maps want its address and strides in multiples of 16 bytes.
struct Heads {
  void* data = nullptr;
  int64_t stride_b = 0, stride_n = 0, stride_h = 0;
};

// out = softmax(q k^T / sqrt(72)) v. Nq and Nk are not 0.
struct Forward {
  Shape shape;
  DType dtype;  // Bf16 or Fp16, of all but lse
  Heads q, k, v, out;
  float* lse = nullptr;  // [B, H, Nq], base 2
};

struct Backward {
  Shape shape;
  DType dtype;
  Heads dout, q, k, v, out;
  const float* lse = nullptr;  // [B, H, Nq]
  float* delta = nullptr;      // [B, H, Nq], scratch: sums of dout * out
  Heads dq, dk, dv;
};

// fwd_sm90.cu and bwd_sm90.cu; absent from a build without CUDA or without sm_90a.
__attribute__((weak)) void forward_sm90(const Forward& call, void* stream);
__attribute__((weak)) void backward_sm90(const Backward& call, void* stream);

}  // namespace pixart::attention
