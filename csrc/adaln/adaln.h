// What the adaLN family's checks (op.cpp) hand to its kernels (cpu.cpp).
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

  // Rows are cut into chunks by shape alone, so that no result depends on the number of threads.
  // 64 rows amortise composing the modulation; 64 chunks a sample feed the largest machines.
  int64_t chunk_rows() const { return N > 64 * 64 ? (N + 63) / 64 : 64; }
  int64_t chunks() const { return (N + chunk_rows() - 1) / chunk_rows(); }
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
  float* partial = nullptr;  // [B, chunks, vectors, D padded to whole vectors]
};

// The gradients of one (table, t) pair out of the chunks' sums: dt[b, r] is the sum over chunks
// for a row in use and zero for the others, dtable[r] the sum of dt[:, r], rounded once.
struct Fold {
  struct Use {
    int64_t vector, row;
  };
  Shape shape;
  const float* partial = nullptr;
  int64_t vectors = 0;  // in each chunk's slice of partial
  Use uses[2] = {};
  int used = 0;
  int64_t table_rows = 1;  // R
  void* dtable = nullptr;  // [R, D], or null
  void* dt = nullptr;      // [B, R, D]
  DType dtable_dtype = DType::kFloat32;
  DType dt_dtype = DType::kFloat32;
};

int64_t partial_stride(const Shape& shape);

void forward_cpu(const Forward& call);
void backward_cpu(const Backward& call);
void fold_cpu(const Fold& call);

}  // namespace pixart::adaln
