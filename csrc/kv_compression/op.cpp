// compress_kv's ops: checks and allocation. Schemas: csrc/registration.cpp.
//
// Arguments were checked in Python, with messages for people. The checks here guard memory
// against callers who reach the ops directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../include/tensor.h"
#include "kv_compression.h"

namespace pixart::kv_compression {
namespace {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

Tensor allocate(const Tensor& like, const Sizes& sizes, DType dtype) {
  return torch::stable::new_empty(like, sizes, scalar_type(dtype));
}

Tensor pairs_of(const Tensor& tensor, const char* name, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == sizes[0] && tensor.size(1) == sizes[1] &&
                      tensor.size(2) == 2 && tensor.size(3) == sizes[2],
                  "`", name, "` must be (", sizes[0], ", ", sizes[1], ", 2, ", sizes[2], ")");
  return with_dense_rows(tensor);
}

PairsIn in(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// What both ops are given: keeps the tensors that the pointers belong to, which may be copies.
struct Operands {
  Tensor weight;
  Shape shape;
  Tensor kv;
  DType dtype;
  std::vector<Tensor> vectors;
  Parameters parameters;

  Operands(const Tensor& given_kv, int64_t height, int64_t width, const Tensor& given_weight,
           const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias)
      : weight(torch::stable::contiguous(given_weight)),
        shape(shape_of(given_kv, height, width, given_weight)),
        kv(pairs_of(given_kv, "kv", {shape.B, height * width, shape.D})),
        dtype(dtype_of(kv, "kv")) {
    parameters.weight = {weight.const_data_ptr(), dtype_of(weight, "weight")};
    parameters.bias = vector(bias, "bias");
    parameters.norm_weight = vector(norm_weight, "norm_weight");
    parameters.norm_bias = vector(norm_bias, "norm_bias");
  }

  static Shape shape_of(const Tensor& kv, int64_t height, int64_t width, const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == 1 &&
                        weight.size(2) > 0 && weight.size(2) == weight.size(3),
                    "`weight` must be (D, 1, R, R)");
    STD_TORCH_CHECK(kv.dim() == 4 && height >= weight.size(2) && width >= weight.size(2),
                    "`kv` must be (B, N, 2, D) of a grid no smaller than a window");
    return {kv.size(0), height, width, weight.size(0), weight.size(2)};
  }

  Vector vector(const Tensor& given, const char* name) {
    STD_TORCH_CHECK(given.dim() == 1 && given.size(0) == shape.D, "`", name, "` must be (", shape.D,
                    ",)");
    vectors.push_back(with_dense_rows(given));
    return {vectors.back().const_data_ptr(), dtype_of(given, name)};
  }
};

VectorOut out(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor, "an output")};
}

}  // namespace

std::tuple<Tensor, Tensor> compress_kv_fwd(const Tensor& kv, int64_t height, int64_t width,
                                           const Tensor& weight, const Tensor& bias,
                                           const Tensor& norm_weight, const Tensor& norm_bias,
                                           double eps) {
  const Operands given(kv, height, width, weight, bias, norm_weight, norm_bias);
  const Shape& shape = given.shape;
  Tensor out = allocate(kv, {shape.B, shape.each(), 2, shape.D}, given.dtype);
  Tensor stats = allocate(kv, {2, shape.B, shape.each(), 2}, DType::kFloat32);
  forward({shape, given.dtype, in(given.kv), given.parameters, static_cast<float>(eps),
           out.mutable_data_ptr(), static_cast<float*>(stats.mutable_data_ptr())});
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_kv_bwd(
    const Tensor& dout, const Tensor& kv, int64_t height, int64_t width, const Tensor& weight,
    const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& stats) {
  const Operands given(kv, height, width, weight, bias, norm_weight, norm_bias);
  const Shape& shape = given.shape;
  const Tensor grads = pairs_of(dout, "dout", {shape.B, shape.each(), shape.D});
  STD_TORCH_CHECK(dtype_of(grads, "dout") == given.dtype, "`dout` must have the dtype of kv");
  STD_TORCH_CHECK(dtype_of(stats, "stats") == DType::kFloat32 && stats.is_contiguous() &&
                      stats.numel() == 4 * shape.windows(),
                  "`stats` must be contiguous fp32 (2, B, windows, 2)");
  const int64_t chunks = chunks_of(shape), D = shape.D;
  Tensor dkv = allocate(kv, {shape.B, height * width, 2, D}, given.dtype);
  // tokens that fill no window have no gradient
  if (height % shape.R != 0 || width % shape.R != 0) torch::stable::zero_(dkv);
  Tensor partial = allocate(kv, {chunks, shape.taps() + 3, partial_stride(shape)}, DType::kFloat32);
  auto* sums = static_cast<float*>(partial.mutable_data_ptr());
  backward({shape, given.dtype, in(grads), in(given.kv), given.parameters,
            static_cast<const float*>(stats.const_data_ptr()), dkv.mutable_data_ptr(), chunks,
            sums});
  Tensor dweight = torch::stable::new_empty(weight, {D, 1, shape.R, shape.R});
  Tensor dbias = torch::stable::new_empty(bias, {D});
  Tensor dnorm_weight = torch::stable::new_empty(norm_weight, {D});
  Tensor dnorm_bias = torch::stable::new_empty(norm_bias, {D});
  fold({shape, chunks, sums, out(dweight), out(dbias), out(dnorm_weight), out(dnorm_bias)});
  return {dkv, dweight, dbias, dnorm_weight, dnorm_bias};
}

}  // namespace pixart::kv_compression

STABLE_TORCH_LIBRARY_IMPL(pixart_kernels, CPU, m) {
  using namespace pixart::kv_compression;
  m.impl("compress_kv_fwd", TORCH_BOX(&compress_kv_fwd));
  m.impl("compress_kv_bwd", TORCH_BOX(&compress_kv_bwd));
}
