// Between torch's stable tensors and the kernels' plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dtype.h"

namespace pixart {

inline DType dtype_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "`", name, "` has an unsupported dtype; accepted: float32, bfloat16, ",
                      "float16");
  }
}

inline torch::headeronly::ScalarType scalar_type(DType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

// A view is read in place; only a last dimension that is itself strided is copied.
inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) == 1 || tensor.size(last) <= 1) return tensor;
  return torch::stable::contiguous(tensor);
}

}  // namespace pixart
