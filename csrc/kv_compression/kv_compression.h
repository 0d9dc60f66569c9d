// What compress_kv's checks (op.cpp) hand to its kernels (cpu.cpp).
#pragma once

#include <cstdint>

#include "../include/dtype.h"

namespace pixart::kv_compression {

struct Shape {
  int64_t B, height, width, D, R;

  int64_t taps() const { return R * R; }                   // tokens of a window
  int64_t columns() const { return width / R; }            // windows side by side
  int64_t each() const { return height / R * columns(); }  // windows of a sample
  int64_t windows() const { return B * each(); }
};

// Pairs of k and v that may be a strided view; the last dimension has stride 1.
struct PairsIn {
  const void* data = nullptr;  // [B, tokens, 2, D]
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t pair_stride = 0;
};

struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct VectorOut {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct Parameters {
  Vector weight;       // [D, taps]
  Vector bias;         // [D]
  Vector norm_weight;  // [D]
  Vector norm_bias;    // [D]
};

// out = LN(convolution) * norm_weight + norm_bias, of k and of v.
struct Forward {
  Shape shape;
  DType dtype;  // of kv and out
  PairsIn kv;
  Parameters parameters;
  float eps;
  void* out = nullptr;     // [B, each, 2, D]
  float* stats = nullptr;  // [2, B, each, 2]: mean, then 1 / standard deviation
};

// Writes the gradient of every token that is in a window, and in `partial` each chunk's sums.
struct Backward {
  Shape shape;
  DType dtype;  // of dout, kv and dkv
  PairsIn dout, kv;
  Parameters parameters;
  const float* stats = nullptr;  // [2, B, each, 2]
  void* dkv = nullptr;           // [B, tokens, 2, D]
  int64_t chunks = 0;
  float* partial = nullptr;  // [chunks, taps + 3, partial_stride]: as in Parameters
};

// The gradients are the sums of the chunks' sums, rounded once.
struct Fold {
  Shape shape;
  int64_t chunks = 0;
  const float* partial = nullptr;             // [chunks, taps + 3, partial_stride]
  VectorOut dweight;                          // [D, taps]
  VectorOut dbias, dnorm_weight, dnorm_bias;  // [D]
};

// Columns of a vector in `partial`: D, filled up to whole vectors of 8.
constexpr int64_t partial_stride(const Shape& shape) {
  return (shape.D + 7) / 8 * 8;
}

// The kernels of the CPU. Windows are cut into chunks, whose sums are then added in order, so that
// results repeat bit for bit.
int64_t chunks_of(const Shape& shape);
void forward(const Forward& call);
void backward(const Backward& call);
void fold(const Fold& call);

}  // namespace pixart::kv_compression
