// What bias_gelu's checks (op.cpp) hand to its kernels (cpu.cpp, cuda.cu).
#pragma once

#include <cstdint>

#include "../include/dtype.h"

namespace pixart::mlp {

// GELU(z) = z / (1 + exp(-2u)) with 2u = z (kSlope + kCubic z^2), which keeps its relative accuracy
// at both small and large z.
constexpr float kSlope = 1.5957691216f;    // 2 sqrt(2 / pi)
constexpr float kCubic = 0.071354816273f;  // 0.044715 kSlope

// Past this the exponential is infinite, or too small to add to 1: the limits of GELU and of its
// derivative are reached, and an infinite z would turn them into 0 * inf.
constexpr float kFar = 16.f;

struct Shape {
  int64_t rows, D;
};

// Rows that may be a strided view; the last dimension has stride 1. The dtype is that of x.
struct RowsIn {
  const void* data = nullptr;  // [rows, D]
  int64_t stride = 0;          // elements from one row to the next
};

struct Bias {
  const void* data = nullptr;  // [D]
  DType dtype = DType::kFloat32;
};

// y = GELU(x + bias)
struct Forward {
  Shape shape;
  DType dtype;  // of x and y
  RowsIn x;
  Bias bias;
  void* y = nullptr;  // [rows, D]
};

// dx = dy * GELU'(x + bias), and in `partial` each chunk's sums of it, unrounded.
struct Backward {
  Shape shape;
  DType dtype;  // of dy, x and dx
  RowsIn dy, x;
  Bias bias;
  void* dx = nullptr;  // [rows, D]
  int64_t chunks = 0;
  float* partial = nullptr;  // [chunks, D]
};

// dbias is the sum of the chunks' sums, rounded once.
struct Fold {
  int64_t D = 0, chunks = 0;
  const float* partial = nullptr;  // [chunks, D]
  DType dtype = DType::kFloat32;   // of dbias
  void* dbias = nullptr;           // [D]
};

// One device's kernels. Rows are cut into chunks, whose sums are then added in order: no atomics,
// so that results repeat bit for bit. `stream` is not read on the CPU.
struct Kernels {
  int64_t (*chunks)(const Shape& shape);
  void (*forward)(const Forward& call, void* stream);
  void (*backward)(const Backward& call, void* stream);
  void (*fold)(const Fold& call, void* stream);
};

extern const Kernels kCpu;
extern const Kernels kCuda __attribute__((weak));  // absent from a build without CUDA

}  // namespace pixart::mlp
