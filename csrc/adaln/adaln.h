// What the adaLN family's checks (op.cpp) hand to its kernels (cpu.cpp, fwd.cu, bwd.cu).
#pragma once

#include <cstdint>

#include "../include/dtype.h"

namespace pixart::adaln {

// One modulation vector per sample, composed by the kernel: table[d] + t[b, d].
struct Row {
  const void* table = nullptr;  // [D], or null
  const void* t = nullptr;      // [B, D], or null for a row that is absent
  int64_t t_stride = 0;         // elements from one sample to the next
  DType table_dtype = DType::kFloat32;
  DType t_dtype = DType::kFloat32;

  explicit operator bool() const { return t != nullptr; }
};

// Tokens that may be a strided view; the last dimension has stride 1.
struct TokensIn {
  const void* data = nullptr;  // [B, N, D], or null when absent
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  DType dtype = DType::kFloat32;
};

// Contiguous tokens.
struct TokensOut {
  void* data = nullptr;  // [B, N, D], or null when not wanted
  DType dtype = DType::kFloat32;
};

struct Shape {
  int64_t B, N, D;
};

// x_new = x + gate * branch when there is a branch; h = LN(x_new) * (1 + scale) + shift when
// there is a scale. Without a gate the residual is plain; without a branch x_new is x.
struct Forward {
  Shape shape;
  TokensIn x, branch;
  Row gate, shift, scale;
  float eps;
  TokensOut x_new, h;
  float* stats = nullptr;  // [2, B, N]: mean, then 1 / standard deviation
};

// dh is the gradient of h, dx_new that of x_new; x is the tensor that was normalised. Writes dx,
// dbranch, and in `partial` each chunk's sums for shift, scale and gate, those that exist, in
// this order.
struct Backward {
  Shape shape;
  TokensIn dh, dx_new, x, branch;
  Row gate, scale;
  const float* stats = nullptr;  // [2, B, N]
  TokensOut dx, dbranch;
  int64_t chunks = 0;
  float* partial = nullptr;  // [B, chunks, vectors, partial_stride]
};

// The gradients of one (table, t) pair out of the chunks' sums: dt[b, r] is the sum over chunks
// for a row in use and zero for the others, dtable[r] the sum of dt[:, r], rounded once.
struct Fold {
  struct Use {
    int64_t vector, row;
  };
  Shape shape;
  const float* partial = nullptr;
  int64_t chunks = 0;   // of each sample
  int64_t vectors = 0;  // in each chunk's slice of partial
  Use uses[2] = {};
  int used = 0;
  int64_t table_rows = 1;  // R
  void* dtable = nullptr;  // [R, D], or null
  void* dt = nullptr;      // [B, R, D]
  DType dtable_dtype = DType::kFloat32;
  DType dt_dtype = DType::kFloat32;
};

// Columns of a vector in `partial`: D, filled up to whole vectors of 8.
constexpr int64_t partial_stride(const Shape& shape) {
  return (shape.D + 7) / 8 * 8;
}

// One device's kernels. A sample's rows are cut into chunks, whose sums are then added in order:
// no atomics, so that results repeat bit for bit. `stream` is not read on the CPU.
struct Kernels {
  int64_t (*chunks)(const Shape& shape);
  void (*forward)(const Forward& call, void* stream);
  void (*backward)(const Backward& call, void* stream);
  void (*fold)(const Fold& call, void* stream);
};

extern const Kernels kCpu;
extern const Kernels kCuda __attribute__((weak));  // absent from a build without CUDA

}  // namespace pixart::adaln
