// The adaLN family's ops: checks and allocation. Schemas: csrc/registration.cpp.
//
// Arguments were checked in Python, with messages for people. The checks here guard memory
// against callers who reach the ops directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../include/stream.h"
#include "../include/tensor.h"
#include "adaln.h"

namespace pixart::adaln {
namespace {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

Tensor allocate(const Tensor& like, const Sizes& sizes, DType dtype) {
  return torch::stable::new_empty(like, sizes, scalar_type(dtype));
}

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "`x` has ", x.dim(), " dimensions; accepted: (B, N, D)");
  return {x.size(0), x.size(1), x.size(2)};
}

// The device of an op's first tensor, current while this lives, and the kernels for it.
struct Run {
  Device device;
  const Kernels& kernels;

  explicit Run(const Tensor& x) : device(x), kernels(device.runs_cuda() ? kCuda : kCpu) {}

  void operator()(const Forward& call) const { kernels.forward(call, device.stream()); }
  void operator()(const Backward& call) const { kernels.backward(call, device.stream()); }
};

// Keeps the tensor that the pointers belong to, which may be a copy.
struct Tokens {
  Tensor tensor;
  TokensIn in;

  Tokens(const Tensor& given, const char* name, const Shape& shape, const Device& device)
      : tensor(with_dense_rows(given)) {
    STD_TORCH_CHECK(given.dim() == 3 && given.size(0) == shape.B && given.size(1) == shape.N &&
                        given.size(2) == shape.D,
                    "`", name, "` must have the shape of x");
    device.check(given, name);
    in = {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(given, name)};
  }
};

TokensOut out(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor, "an output")};
}

// One (table, t) pair: table (R, D) or none, t (B, R*D) or (B, R, D).
struct Rows {
  std::optional<Tensor> table;
  Tensor t;
  Sizes t_sizes;
  int64_t R = 1;
  DType table_dtype = DType::kFloat32, t_dtype;

  Rows(const std::optional<Tensor>& given_table, const Tensor& given_t, const Shape& shape,
       const Device& device)
      : t(with_dense_rows(given_t)), t_dtype(dtype_of(given_t, "t")) {
    device.check(given_t, "t");
    if (given_table.has_value()) {
      table = with_dense_rows(*given_table);
      device.check(*table, "table");
      STD_TORCH_CHECK(table->dim() == 2 && table->size(1) == shape.D, "`table` must be (R, D)");
      R = table->size(0);
      table_dtype = dtype_of(*table, "table");
    }
    const bool flat = t.dim() == 2 && t.size(1) == R * shape.D;
    const bool split = t.dim() == 3 && t.size(1) == R && t.size(2) == shape.D;
    STD_TORCH_CHECK((flat || split) && t.size(0) == shape.B, "`t` must be (B, R*D) or (B, R, D)");
    for (int64_t i = 0; i < t.dim(); ++i) t_sizes.push_back(t.size(i));
  }

  Row row(int64_t r, int64_t D) const {
    STD_TORCH_CHECK(0 <= r && r < R, "row ", r, " is outside the ", R, " rows of `table`");
    const auto at = [](const Tensor& tensor, DType dtype, int64_t offset) -> const void* {
      return static_cast<const char*>(tensor.const_data_ptr()) + offset * item_size(dtype);
    };
    Row row;
    if (table.has_value()) {
      row.table = at(*table, table_dtype, r * table->stride(0));
      row.table_dtype = table_dtype;
    }
    row.t = at(t, t_dtype, r * (t.dim() == 3 ? t.stride(1) : D));
    row.t_stride = t.stride(0);
    row.t_dtype = t_dtype;
    return row;
  }
};

DType activation(DType residual, DType activation) {
  return is_16_bit(residual) ? residual : activation;
}

// Gradients arrive in the dtype of what they are gradients of: kernels are chosen by it.
void check_dtype(DType found, DType expected, const char* name) {
  STD_TORCH_CHECK(found == expected, "`", name, "` has not the dtype of the output it belongs to");
}

const float* stats_in(const Tensor& stats, const Shape& shape, const Device& device) {
  device.check(stats, "stats");
  STD_TORCH_CHECK(dtype_of(stats, "stats") == DType::kFloat32 && stats.is_contiguous() &&
                      stats.numel() == 2 * shape.B * shape.N,
                  "`stats` must be contiguous fp32 (2, B, N)");
  return static_cast<const float*>(stats.const_data_ptr());
}

struct RowGradients {
  Tensor dtable, dt;
};

// The chunks' sums, [B, chunks, vectors, D], on their way from the backward to the fold.
struct Partials {
  Shape shape;
  int64_t chunks, vectors;
  Tensor tensor;

  Partials(const Run& run, const Tensor& like, const Shape& shape, int64_t vectors)
      : shape(shape),
        chunks(run.kernels.chunks(shape)),
        vectors(vectors),
        tensor(allocate(like, {shape.B, chunks, vectors, partial_stride(shape)}, DType::kFloat32)) {
  }

  void receive(Backward& call) {
    call.chunks = chunks;
    call.partial = static_cast<float*>(tensor.mutable_data_ptr());
  }

  RowGradients fold(const Run& run, const Rows& rows, const std::vector<Fold::Use>& uses) const {
    RowGradients grads;
    Fold call;
    call.shape = shape;
    call.partial = static_cast<const float*>(tensor.const_data_ptr());
    call.chunks = chunks;
    call.vectors = vectors;
    for (const Fold::Use& use : uses) call.uses[call.used++] = use;
    call.table_rows = rows.R;
    if (rows.table.has_value()) {
      grads.dtable = allocate(*rows.table, {rows.R, shape.D}, rows.table_dtype);
      call.dtable = grads.dtable.mutable_data_ptr();
      call.dtable_dtype = rows.table_dtype;
    }
    grads.dt = allocate(rows.t, rows.t_sizes, rows.t_dtype);
    call.dt = grads.dt.mutable_data_ptr();
    call.dt_dtype = rows.t_dtype;
    run.kernels.fold(call, run.device.stream());
    return grads;
  }
};

std::tuple<Tensor, Tensor> norm_fwd(const Run& run, const Tensor& x, const Row& shift,
                                    const Row& scale, DType activation_dtype, double eps) {
  const Shape shape = shape_of(x);
  const Tokens tokens(x, "x", shape, run.device);
  const Sizes sizes = {shape.B, shape.N, shape.D};
  Tensor h = allocate(x, sizes, activation(tokens.in.dtype, activation_dtype));
  Tensor stats = allocate(x, {2, shape.B, shape.N}, DType::kFloat32);
  Forward call{shape, tokens.in};
  call.shift = shift;
  call.scale = scale;
  call.eps = static_cast<float>(eps);
  call.h = out(h);
  call.stats = static_cast<float*>(stats.mutable_data_ptr());
  run(call);
  return {h, stats};
}

// dx and the chunks' sums of dshift and dscale.
std::tuple<Tensor, Partials> norm_bwd(const Run& run, const Tensor& dh, const Tensor& x,
                                      const Row& scale, DType activation_dtype,
                                      const Tensor& stats) {
  const Shape shape = shape_of(x);
  const Tokens tokens(x, "x", shape, run.device), grads(dh, "dh", shape, run.device);
  check_dtype(grads.in.dtype, activation(tokens.in.dtype, activation_dtype), "dh");
  Tensor dx = allocate(x, {shape.B, shape.N, shape.D}, tokens.in.dtype);
  Partials partial(run, x, shape, 2);
  Backward call{shape, grads.in};
  call.x = tokens.in;
  call.scale = scale;
  call.stats = stats_in(stats, shape, run.device);
  call.dx = out(dx);
  partial.receive(call);
  run(call);
  return {dx, partial};
}

}  // namespace

std::tuple<Tensor, Tensor> adaln_single_fwd(const Tensor& x, const Tensor& table, const Tensor& t,
                                            int64_t shift_row, int64_t scale_row, double eps) {
  const Run run(x);
  const Shape shape = shape_of(x);
  const Rows rows(table, t, shape, run.device);
  return norm_fwd(run, x, rows.row(shift_row, shape.D), rows.row(scale_row, shape.D), rows.t_dtype,
                  eps);
}

std::tuple<Tensor, Tensor, Tensor> adaln_single_bwd(const Tensor& dh, const Tensor& x,
                                                    const Tensor& table, const Tensor& t,
                                                    const Tensor& stats, int64_t shift_row,
                                                    int64_t scale_row) {
  const Run run(x);
  const Shape shape = shape_of(x);
  const Rows rows(table, t, shape, run.device);
  auto [dx, partial] = norm_bwd(run, dh, x, rows.row(scale_row, shape.D), rows.t_dtype, stats);
  RowGradients grads = partial.fold(run, rows, {{0, shift_row}, {1, scale_row}});
  return {dx, grads.dtable, grads.dt};
}

std::tuple<Tensor, Tensor> adaln_modulate_fwd(const Tensor& x, const Tensor& shift,
                                              const Tensor& scale, double eps) {
  const Run run(x);
  const Shape shape = shape_of(x);
  const Rows shift_rows(std::nullopt, shift, shape, run.device);
  const Rows scale_rows(std::nullopt, scale, shape, run.device);
  return norm_fwd(run, x, shift_rows.row(0, shape.D), scale_rows.row(0, shape.D),
                  shift_rows.t_dtype, eps);
}

std::tuple<Tensor, Tensor, Tensor> adaln_modulate_bwd(const Tensor& dh, const Tensor& x,
                                                      const Tensor& shift, const Tensor& scale,
                                                      const Tensor& stats) {
  const Run run(x);
  const Shape shape = shape_of(x);
  const Rows shift_rows(std::nullopt, shift, shape, run.device);
  const Rows scale_rows(std::nullopt, scale, shape, run.device);
  auto [dx, partial] = norm_bwd(run, dh, x, scale_rows.row(0, shape.D), shift_rows.t_dtype, stats);
  return {dx, partial.fold(run, shift_rows, {{0, 0}}).dt,
          partial.fold(run, scale_rows, {{1, 0}}).dt};
}

Tensor gated_residual_fwd(const Tensor& x, const Tensor& branch, const Tensor& table,
                          const Tensor& t, int64_t gate_row) {
  const Run run(x);
  const Shape shape = shape_of(x);
  const Tokens tokens(x, "x", shape, run.device);
  const Tokens branch_tokens(branch, "branch", shape, run.device);
  const Rows rows(table, t, shape, run.device);
  Tensor x_new = allocate(x, {shape.B, shape.N, shape.D}, tokens.in.dtype);
  Forward call{shape, tokens.in, branch_tokens.in};
  call.gate = rows.row(gate_row, shape.D);
  call.x_new = out(x_new);
  run(call);
  return x_new;
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_bwd(const Tensor& dx_new, const Tensor& branch,
                                                      const Tensor& table, const Tensor& t,
                                                      int64_t gate_row) {
  const Run run(branch);
  const Shape shape = shape_of(branch);
  const Tokens grads(dx_new, "dx_new", shape, run.device);
  const Tokens branch_tokens(branch, "branch", shape, run.device);
  const Rows rows(table, t, shape, run.device);
  Tensor dbranch = allocate(branch, {shape.B, shape.N, shape.D}, branch_tokens.in.dtype);
  Partials partial(run, branch, shape, 1);
  Backward call{shape};
  call.dx_new = grads.in;
  call.branch = branch_tokens.in;
  call.gate = rows.row(gate_row, shape.D);
  call.dbranch = out(dbranch);
  partial.receive(call);
  run(call);
  RowGradients grad = partial.fold(run, rows, {{0, gate_row}});
  return {dbranch, grad.dtable, grad.dt};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_adaln_fwd(const Tensor& x, const Tensor& branch,
                                                            const std::optional<Tensor>& gate_table,
                                                            const std::optional<Tensor>& gate_t,
                                                            int64_t gate_row, const Tensor& table,
                                                            const Tensor& t, int64_t shift_row,
                                                            int64_t scale_row, double eps) {
  const Run run(x);
  const Shape shape = shape_of(x);
  const Tokens tokens(x, "x", shape, run.device);
  const Tokens branch_tokens(branch, "branch", shape, run.device);
  const Rows rows(table, t, shape, run.device);
  std::optional<Rows> gate_rows;
  if (gate_t.has_value()) gate_rows.emplace(gate_table, *gate_t, shape, run.device);
  const Sizes sizes = {shape.B, shape.N, shape.D};
  Tensor x_new = allocate(x, sizes, tokens.in.dtype);
  Tensor h = allocate(x, sizes, activation(tokens.in.dtype, branch_tokens.in.dtype));
  Tensor stats = allocate(x, {2, shape.B, shape.N}, DType::kFloat32);
  Forward call{shape, tokens.in, branch_tokens.in};
  if (gate_rows.has_value()) call.gate = gate_rows->row(gate_row, shape.D);
  call.shift = rows.row(shift_row, shape.D);
  call.scale = rows.row(scale_row, shape.D);
  call.eps = static_cast<float>(eps);
  call.x_new = out(x_new);
  call.h = out(h);
  call.stats = static_cast<float*>(stats.mutable_data_ptr());
  run(call);
  return {x_new, h, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_bwd(
    const std::optional<Tensor>& dx_new, const Tensor& dh, const Tensor& x_new,
    const Tensor& branch, const std::optional<Tensor>& gate_table,
    const std::optional<Tensor>& gate_t, int64_t gate_row, const Tensor& table, const Tensor& t,
    const Tensor& stats, int64_t shift_row, int64_t scale_row) {
  const Run run(x_new);
  const Shape shape = shape_of(x_new);
  const Tokens tokens(x_new, "x_new", shape, run.device), grads(dh, "dh", shape, run.device);
  const Tokens branch_tokens(branch, "branch", shape, run.device);
  const Rows rows(table, t, shape, run.device);
  const bool gated = gate_t.has_value();
  std::optional<Rows> gate_rows;
  if (gated) gate_rows.emplace(gate_table, *gate_t, shape, run.device);
  std::optional<Tokens> residual_grads;
  if (dx_new.has_value()) {
    residual_grads.emplace(*dx_new, "dx_new", shape, run.device);
    check_dtype(residual_grads->in.dtype, tokens.in.dtype, "dx_new");
  }
  check_dtype(grads.in.dtype, activation(tokens.in.dtype, branch_tokens.in.dtype), "dh");

  const Sizes sizes = {shape.B, shape.N, shape.D};
  const int64_t vectors = gated ? 3 : 2;
  const bool branch_differs = gated || branch_tokens.in.dtype != tokens.in.dtype;
  Tensor dx = allocate(x_new, sizes, tokens.in.dtype);
  Tensor dbranch = allocate(branch, branch_differs ? sizes : Sizes{0}, branch_tokens.in.dtype);
  Partials partial(run, x_new, shape, vectors);
  Backward call{shape, grads.in};
  if (residual_grads.has_value()) call.dx_new = residual_grads->in;
  call.x = tokens.in;
  call.branch = branch_tokens.in;
  if (gated) call.gate = gate_rows->row(gate_row, shape.D);
  call.scale = rows.row(scale_row, shape.D);
  call.stats = stats_in(stats, shape, run.device);
  call.dx = out(dx);
  if (branch_differs) call.dbranch = out(dbranch);
  partial.receive(call);
  run(call);

  RowGradients grad = partial.fold(run, rows, {{0, shift_row}, {1, scale_row}});
  RowGradients gate_grad;
  if (gated) {
    gate_grad = partial.fold(run, *gate_rows, {{2, gate_row}});
  } else {
    gate_grad = {allocate(x_new, {0}, DType::kFloat32), allocate(x_new, {0}, DType::kFloat32)};
  }
  return {dx, dbranch, gate_grad.dtable, gate_grad.dt, grad.dtable, grad.dt};
}

}  // namespace pixart::adaln

namespace {

template <class Library>
void register_kernels(Library& m) {
  using namespace pixart::adaln;
  m.impl("adaln_single_fwd", TORCH_BOX(&adaln_single_fwd));
  m.impl("adaln_single_bwd", TORCH_BOX(&adaln_single_bwd));
  m.impl("adaln_modulate_fwd", TORCH_BOX(&adaln_modulate_fwd));
  m.impl("adaln_modulate_bwd", TORCH_BOX(&adaln_modulate_bwd));
  m.impl("gated_residual_fwd", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&gated_residual_bwd));
  m.impl("gated_residual_adaln_fwd", TORCH_BOX(&gated_residual_adaln_fwd));
  m.impl("gated_residual_adaln_bwd", TORCH_BOX(&gated_residual_adaln_bwd));
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
