// The storage types that kernels read and write; all arithmetic is fp32. Free of torch and CUDA.
#pragma once

#include <cstdint>

namespace pixart {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16 };

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline bool is_16_bit(DType dtype) {
  return dtype != DType::kFloat32;
}

inline int64_t item_size(DType dtype) {
  return is_16_bit(dtype) ? 2 : 4;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the storage type that dtype names.
template <class F>
auto visit(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(Type<Bf16>{});
    case DType::kFloat16:
      return f(Type<Fp16>{});
    default:
      return f(Type<float>{});
  }
}

}  // namespace pixart
