// What CAME's checks (op.cpp) hand to its kernels (cpu.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "../include/dtype.h"

namespace pixart::came {

struct Settings {
  double lr;
  double beta_moment, beta_square, beta_deviation;
  double eps_square, eps_deviation;
  double clip_threshold;
  double weight_decay;
};

// A weight of two dimensions or more: `count` matrices, of the last two.
struct Shape {
  int64_t count, R, C;

  int64_t numel() const { return count * R * C; }
};

struct Matrices {
  void* weight;                              // [count, R, C]
  const void* gradient;                      // [count, R, C]
  float* exp_avg;                            // [count, R, C]
  float *exp_avg_sq_row, *exp_avg_sq_col;    // [count, R], [count, C]
  float *exp_avg_res_row, *exp_avg_res_col;  // [count, R], [count, C]
};

struct Vector {
  void* weight;          // [N]
  const void* gradient;  // [N]
  float* exp_avg;        // [N]
  float* exp_avg_sq;     // [N]
};

struct MatricesCall {
  Settings settings;
  Shape shape;
  DType weight_dtype, gradient_dtype;
  std::vector<Matrices> parameters;
};

struct VectorsCall {
  Settings settings;
  int64_t N;
  DType weight_dtype, gradient_dtype;
  std::vector<Vector> parameters;
};

void step(const MatricesCall& call);
void step(const VectorsCall& call);

}  // namespace pixart::came
