// Attention's ops: checks, allocation, and copies of what TMA cannot read where it lies. Schemas:
// csrc/registration.cpp. All kernels are for sm_90a.
//
// Arguments were checked in Python, with messages for people. The checks here guard memory
// against callers who reach the ops directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../include/stream.h"
#include "../include/tensor.h"
#include "attention.h"

namespace pixart::attention {
namespace {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

// TMA takes addresses and strides in multiples of 16 bytes, and none of 0. The stride of a single
// element says nothing.
bool tma_reads(const Tensor& tensor) {
  constexpr int64_t kBytes = 16, kElements = kBytes / 2;
  const int64_t last = tensor.dim() - 1;
  bool reads = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kBytes == 0 &&
               tensor.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) {
    const int64_t stride = tensor.stride(i);
    reads = reads && (tensor.size(i) <= 1 || (stride > 0 && stride % kElements == 0));
  }
  return reads;
}

struct Arguments {
  Device device;
  DType dtype;

  Arguments(const Tensor& first, const char* name) : device(first), dtype(dtype_of(first, name)) {
    STD_TORCH_CHECK(is_16_bit(dtype), "`", name, "` must be bfloat16 or float16");
  }

  // The argument itself or a copy, which the caller keeps for as long as its pointers.
  Tensor in(const Tensor& given, const char* name, const Sizes& sizes) const {
    device.check(given, name);
    STD_TORCH_CHECK(dtype_of(given, name) == dtype, "`", name, "` has another dtype");
    STD_TORCH_CHECK(sizes_of(given) == sizes, "`", name, "` has another shape");
    if (tma_reads(given)) return given;
    Tensor copy = torch::stable::new_empty(given, sizes);
    torch::stable::copy_(copy, given);
    return copy;
  }

  const float* lse(const Tensor& given, const Shape& shape) const {
    device.check(given, "lse");
    STD_TORCH_CHECK(dtype_of(given, "lse") == DType::kFloat32 && given.is_contiguous() &&
                        sizes_of(given) == Sizes({shape.B, shape.H, shape.Nq}),
                    "`lse` must be contiguous fp32 (B, H, Nq)");
    return static_cast<const float*>(given.const_data_ptr());
  }
};

Tensor new_lse(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, {shape.B, shape.H, shape.Nq}, scalar_type(DType::kFloat32));
}

// (B, N, H, 72), or the heads of (B, N, D) from a column on; operands and results alike.
Heads heads_of(const Tensor& tensor, int64_t column = 0) {
  auto* data = static_cast<uint16_t*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data + column, tensor.stride(0), tensor.stride(1),
          tensor.dim() == 4 ? tensor.stride(2) : kHeadDim};
}

// q, k and v of a packed projection.
struct Packed {
  Shape shape;
  Sizes sizes, out_sizes;

  Packed(const Tensor& qkv, int64_t num_heads) : sizes(sizes_of(qkv)) {
    STD_TORCH_CHECK(sizes.size() == 3 && num_heads > 0 && sizes[2] == 3 * num_heads * kHeadDim,
                    "`qkv` must be (B, N, 3 * num_heads * ", kHeadDim, ")");
    shape = {sizes[0], num_heads, sizes[1], sizes[1]};
    out_sizes = {sizes[0], sizes[1], num_heads * kHeadDim};
  }

  Heads part(const Tensor& qkv, int64_t i) const { return heads_of(qkv, i * out_sizes[2]); }
};

Shape shape_of(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(3) == kHeadDim, "`q` must be (B, Nq, H, ", kHeadDim, ")");
  STD_TORCH_CHECK(k.dim() == 4, "`k` must be (B, Nk, H, ", kHeadDim, ")");
  return {q.size(0), q.size(2), q.size(1), k.size(1)};
}

// Whether any query attends to any key.
bool attends(const Shape& shape) {
  return shape.B * shape.H != 0 && shape.Nq != 0 && shape.Nk != 0;
}

// Zeros where no kernel is going to fill it.
Tensor new_result(const Tensor& like, const Sizes& sizes, const Shape& shape) {
  return attends(shape) ? torch::stable::new_empty(like, sizes)
                        : torch::stable::new_zeros(like, sizes);
}

template <class Call>
void run(void (*kernels)(const Call&, void*), const Arguments& given, const Call& call) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // as TMA counts
  const Shape& shape = call.shape;
  STD_TORCH_CHECK(shape.B <= kMost && shape.H <= kMost && shape.Nq <= kMost && shape.Nk <= kMost,
                  "attention takes at most ", kMost, " samples, heads and tokens");
  STD_TORCH_CHECK(kernels != nullptr, "attention was built without its kernels for sm_90a");
  kernels(call, given.device.stream());
}

Tensor forward(const Arguments& given, const Shape& shape, const Heads& q, const Heads& k,
               const Heads& v, const Tensor& out) {
  Tensor lse = new_lse(out, shape);
  if (attends(shape)) {
    auto* lse_out = static_cast<float*>(lse.mutable_data_ptr());
    run(forward_sm90, given, Forward{shape, given.dtype, q, k, v, heads_of(out), lse_out});
  } else {
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  return lse;
}

// `call` without delta, which is needed as long as the kernels run.
void backward(const Arguments& given, Backward call, const Tensor& out) {
  if (!attends(call.shape)) return;
  Tensor delta = new_lse(out, call.shape);
  call.delta = static_cast<float*>(delta.mutable_data_ptr());
  run(backward_sm90, given, call);
}

}  // namespace

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Arguments given(q, "q");
  const Shape shape = shape_of(q, k);
  const Sizes q_sizes = sizes_of(q), k_sizes = {shape.B, shape.Nk, shape.H, kHeadDim};
  const Tensor q_in = given.in(q, "q", q_sizes);
  const Tensor k_in = given.in(k, "k", k_sizes), v_in = given.in(v, "v", k_sizes);
  const Tensor out = new_result(q, q_sizes, shape);
  return {out, forward(given, shape, heads_of(q_in), heads_of(k_in), heads_of(v_in), out)};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse) {
  const Arguments given(q, "q");
  const Shape shape = shape_of(q, k);
  const Sizes q_sizes = sizes_of(q), k_sizes = {shape.B, shape.Nk, shape.H, kHeadDim};
  const Tensor dout_in = given.in(dout, "dout", q_sizes), out_in = given.in(out, "out", q_sizes);
  const Tensor q_in = given.in(q, "q", q_sizes);
  const Tensor k_in = given.in(k, "k", k_sizes), v_in = given.in(v, "v", k_sizes);
  const Tensor dq = new_result(q, q_sizes, shape), dk = new_result(k, k_sizes, shape),
               dv = new_result(v, k_sizes, shape);
  const float* lse_in = given.lse(lse, shape);
  backward(given,
           {shape, given.dtype, heads_of(dout_in), heads_of(q_in), heads_of(k_in), heads_of(v_in),
            heads_of(out_in), lse_in, nullptr, heads_of(dq), heads_of(dk), heads_of(dv)},
           out_in);
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> self_attention_fwd(const Tensor& qkv, int64_t num_heads) {
  const Arguments given(qkv, "qkv");
  const Packed packed(qkv, num_heads);
  const Tensor in = given.in(qkv, "qkv", packed.sizes);
  const Tensor out = new_result(qkv, packed.out_sizes, packed.shape);
  return {out, forward(given, packed.shape, packed.part(in, 0), packed.part(in, 1),
                       packed.part(in, 2), out)};
}

Tensor self_attention_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, int64_t num_heads) {
  const Arguments given(qkv, "qkv");
  const Packed packed(qkv, num_heads);
  const Tensor in = given.in(qkv, "qkv", packed.sizes);
  const Tensor dout_in = given.in(dout, "dout", packed.out_sizes);
  const Tensor out_in = given.in(out, "out", packed.out_sizes);
  const Tensor dqkv = new_result(qkv, packed.sizes, packed.shape);
  const float* lse_in = given.lse(lse, packed.shape);
  backward(given,
           {packed.shape, given.dtype, heads_of(dout_in), packed.part(in, 0), packed.part(in, 1),
            packed.part(in, 2), heads_of(out_in), lse_in, nullptr, packed.part(dqkv, 0),
            packed.part(dqkv, 1), packed.part(dqkv, 2)},
           out_in);
  return dqkv;
}

}  // namespace pixart::attention

namespace {

template <class Library>
[[maybe_unused]] void register_kernels(Library& m) {
  using namespace pixart::attention;
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("self_attention_fwd", TORCH_BOX(&self_attention_fwd));
  m.impl("self_attention_bwd", TORCH_BOX(&self_attention_bwd));
}

}  // namespace

#ifdef PIXART_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pixart_kernels, CUDA, m) {
  register_kernels(m);
}
#endif
#ifdef PIXART_KERNELS_EMULATED
STABLE_TORCH_LIBRARY_IMPL(pixart_kernels, CPU, m) {
  register_kernels(m);
}
#endif
