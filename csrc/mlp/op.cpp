// bias_gelu's ops: checks and allocation. Schemas: csrc/registration.cpp.
//
// Arguments were checked in Python, with messages for people. The checks here guard memory
// against callers who reach the ops directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../include/stream.h"
#include "../include/tensor.h"
#include "mlp.h"

namespace pixart::mlp {
namespace {

using torch::stable::Tensor;

// What both ops are given: keeps the tensors that the pointers belong to, which may be copies.
struct Operands {
  Device device;
  const Kernels& kernels;
  Tensor x, bias;
  Shape shape;
  DType dtype;

  Operands(const Tensor& given_x, const Tensor& given_bias)
      : device(given_x),
        kernels(device.runs_cuda() ? kCuda : kCpu),
        x(rows_of(given_x, "x")),
        bias(given_bias),
        shape{x.size(0), x.size(1)},
        dtype(dtype_of(x, "x")) {
    device.check(bias, "bias");
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == shape.D, "`bias` must be (", shape.D, ",)");
    bias = with_dense_rows(bias);
  }

  static Tensor rows_of(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 2, "`", name, "` has ", tensor.dim(),
                    " dimensions; accepted: (rows, D)");
    return with_dense_rows(tensor);
  }

  Bias bias_in() const { return {bias.const_data_ptr(), dtype_of(bias, "bias")}; }
  Tensor allocate() const { return torch::stable::new_empty(x, {shape.rows, shape.D}); }
};

RowsIn in(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

}  // namespace

Tensor bias_gelu_fwd(const Tensor& x, const Tensor& bias) {
  const Operands given(x, bias);
  Tensor y = given.allocate();
  given.kernels.forward(
      {given.shape, given.dtype, in(given.x), given.bias_in(), y.mutable_data_ptr()},
      given.device.stream());
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x, const Tensor& bias) {
  const Operands given(x, bias);
  const Shape shape = given.shape;
  given.device.check(dy, "dy");
  const Tensor grads = Operands::rows_of(dy, "dy");
  STD_TORCH_CHECK(grads.size(0) == shape.rows && grads.size(1) == shape.D,
                  "`dy` must have the shape of x");
  STD_TORCH_CHECK(dtype_of(grads, "dy") == given.dtype, "`dy` must have the dtype of x");
  const int64_t chunks = given.kernels.chunks(shape);
  Tensor dx = given.allocate();
  Tensor dbias = torch::stable::new_empty(given.bias, {shape.D});
  Tensor partial =
      torch::stable::new_empty(given.bias, {chunks, shape.D}, scalar_type(DType::kFloat32));
  auto* sums = static_cast<float*>(partial.mutable_data_ptr());
  given.kernels.backward({shape, given.dtype, in(grads), in(given.x), given.bias_in(),
                          dx.mutable_data_ptr(), chunks, sums},
                         given.device.stream());
  given.kernels.fold({shape.D, chunks, sums, given.bias_in().dtype, dbias.mutable_data_ptr()},
                     given.device.stream());
  return {dx, dbias};
}

}  // namespace pixart::mlp

namespace {

template <class Library>
void register_kernels(Library& m) {
  using namespace pixart::mlp;
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pixart_kernels, CPU, m) {
  register_kernels(m);
}
#ifdef PIXART_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pixart_kernels, CUDA, m) {
  register_kernels(m);
}
#endif
