// CAME's ops: checks. Schemas: csrc/registration.cpp.
//
// Arguments were checked in Python, with messages for people. The checks here guard memory
// against callers who reach the ops directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../include/tensor.h"
#include "came.h"

namespace pixart::came {
namespace {

using torch::stable::Tensor;
using List = std::vector<Tensor>;

// One tensor for each weight, all alike.
struct Tensors {
  const List& list;
  DType dtype = DType::kFloat32;

  Tensors(const char* name, const List& list, size_t count, int64_t numel) : list(list) {
    STD_TORCH_CHECK(list.size() == count, "`", name, "` has ", list.size(),
                    " tensors; accepted: ", count, ", one for each of `weights`");
    dtype = dtype_of(list[0], name);
    for (const Tensor& tensor : list) {
      STD_TORCH_CHECK(
          tensor.is_contiguous() && tensor.numel() == numel && dtype_of(tensor, name) == dtype, "`",
          name, "` must be contiguous, of one dtype and of ", numel, " elements each");
    }
  }

  void* data(size_t i) const { return list[i].mutable_data_ptr(); }
};

struct State : Tensors {
  State(const char* name, const List& list, size_t count, int64_t numel)
      : Tensors(name, list, count, numel) {
    STD_TORCH_CHECK(dtype == DType::kFloat32, "`", name, "` must be float32");
  }

  float* data(size_t i) const { return static_cast<float*>(Tensors::data(i)); }
};

Shape shape_of(const Tensor& weight) {
  const int64_t dims = weight.dim();
  STD_TORCH_CHECK(dims >= 2, "`weights` have ", dims, " dimensions; accepted: 2 or more");
  Shape shape{1, weight.size(dims - 2), weight.size(dims - 1)};
  for (int64_t dim = 0; dim < dims - 2; ++dim) shape.count *= weight.size(dim);
  return shape;
}

}  // namespace

void came_matrices(const List& weights, const List& gradients, const List& exp_avg,
                   const List& exp_avg_sq_row, const List& exp_avg_sq_col,
                   const List& exp_avg_res_row, const List& exp_avg_res_col, double lr,
                   double beta_moment, double beta_square, double beta_deviation, double eps_square,
                   double eps_deviation, double clip_threshold, double weight_decay) {
  const size_t n = weights.size();
  if (n == 0) return;
  const Shape shape = shape_of(weights[0]);
  const int64_t numel = shape.numel();
  const Tensors weight("weights", weights, n, numel), gradient("gradients", gradients, n, numel);
  const State moment("exp_avg", exp_avg, n, numel);
  const State sq_row("exp_avg_sq_row", exp_avg_sq_row, n, shape.count * shape.R);
  const State sq_col("exp_avg_sq_col", exp_avg_sq_col, n, shape.count * shape.C);
  const State res_row("exp_avg_res_row", exp_avg_res_row, n, shape.count * shape.R);
  const State res_col("exp_avg_res_col", exp_avg_res_col, n, shape.count * shape.C);
  if (numel == 0) return;
  MatricesCall call{{lr, beta_moment, beta_square, beta_deviation, eps_square, eps_deviation,
                     clip_threshold, weight_decay},
                    shape,
                    weight.dtype,
                    gradient.dtype,
                    {}};
  for (size_t i = 0; i < n; ++i) {
    call.parameters.push_back({weight.data(i), gradient.data(i), moment.data(i), sq_row.data(i),
                               sq_col.data(i), res_row.data(i), res_col.data(i)});
  }
  step(call);
}

void came_vectors(const List& weights, const List& gradients, const List& exp_avg,
                  const List& exp_avg_sq, double lr, double beta_moment, double beta_square,
                  double eps_square, double clip_threshold, double weight_decay) {
  const size_t n = weights.size();
  if (n == 0) return;
  const int64_t N = weights[0].numel();
  const Tensors weight("weights", weights, n, N), gradient("gradients", gradients, n, N);
  const State moment("exp_avg", exp_avg, n, N), square("exp_avg_sq", exp_avg_sq, n, N);
  if (N == 0) return;
  VectorsCall call{{lr, beta_moment, beta_square, 0, eps_square, 0, clip_threshold, weight_decay},
                   N,
                   weight.dtype,
                   gradient.dtype,
                   {}};
  for (size_t i = 0; i < n; ++i) {
    call.parameters.push_back({weight.data(i), gradient.data(i), moment.data(i), square.data(i)});
  }
  step(call);
}

}  // namespace pixart::came

STABLE_TORCH_LIBRARY_IMPL(pixart_kernels, CPU, m) {
  using namespace pixart::came;
  m.impl("came_matrices", TORCH_BOX(&came_matrices));
  m.impl("came_vectors", TORCH_BOX(&came_vectors));
}
