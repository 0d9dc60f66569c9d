// The only list of op schemas. Ops are functional, but for an optimiser's step; kernels register
// themselves per device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pixart_kernels, m) {
  // adaLN. stats is (2, B, N): mean, then 1 / standard deviation, fp32. dt has t's shape, with
  // zeros in the rows that were not used; dtable is dt summed over the batch.
  m.def(
      "adaln_single_fwd(Tensor x, Tensor table, Tensor t, int shift_row, int scale_row, float eps)"
      " -> (Tensor h, Tensor stats)");
  m.def(
      "adaln_single_bwd(Tensor dh, Tensor x, Tensor table, Tensor t, Tensor stats, int shift_row,"
      " int scale_row) -> (Tensor dx, Tensor dtable, Tensor dt)");
  m.def(
      "adaln_modulate_fwd(Tensor x, Tensor shift, Tensor scale, float eps)"
      " -> (Tensor h, Tensor stats)");
  m.def(
      "adaln_modulate_bwd(Tensor dh, Tensor x, Tensor shift, Tensor scale, Tensor stats)"
      " -> (Tensor dx, Tensor dshift, Tensor dscale)");
  m.def(
      "gated_residual_fwd(Tensor x, Tensor branch, Tensor table, Tensor t, int gate_row)"
      " -> Tensor x_new");
  // dx is dx_new itself
  m.def(
      "gated_residual_bwd(Tensor dx_new, Tensor branch, Tensor table, Tensor t, int gate_row)"
      " -> (Tensor dbranch, Tensor dtable, Tensor dt)");
  // without gate_t the residual is plain and gate_row is not read
  m.def(
      "gated_residual_adaln_fwd(Tensor x, Tensor branch, Tensor? gate_table, Tensor? gate_t,"
      " int gate_row, Tensor table, Tensor t, int shift_row, int scale_row, float eps)"
      " -> (Tensor x_new, Tensor h, Tensor stats)");
  // without a gate dgate_table and dgate_t are empty; so is dbranch where it would equal dx
  m.def(
      "gated_residual_adaln_bwd(Tensor? dx_new, Tensor dh, Tensor x_new, Tensor branch,"
      " Tensor? gate_table, Tensor? gate_t, int gate_row, Tensor table, Tensor t, Tensor stats,"
      " int shift_row, int scale_row) -> (Tensor dx, Tensor dbranch, Tensor dgate_table,"
      " Tensor dgate_t, Tensor dtable, Tensor dt)");

  // Attention. q is (B, Nq, H, d), k and v (B, Nk, H, d), qkv (B, N, 3*H*d) with d = 72; lse, fp32
  // (B, H, Nq), is in base 2.
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse)"
      " -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("self_attention_fwd(Tensor qkv, int num_heads) -> (Tensor out, Tensor lse)");
  m.def(
      "self_attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads)"
      " -> Tensor dqkv");

  // The MLP's bias and tanh-GELU. x and dy are (rows, D), bias (D,); dx has x's dtype.
  m.def("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor y");
  m.def("bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)");

  // KV compression. kv is (B, height * width, 2, D), weight (D, 1, R, R), the vectors (D,); stats
  // is (2, B, windows, 2): mean, then 1 / standard deviation, fp32.
  m.def(
      "compress_kv_fwd(Tensor kv, SymInt height, SymInt width, Tensor weight, Tensor bias,"
      " Tensor norm_weight, Tensor norm_bias, float eps) -> (Tensor out, Tensor stats)");
  // norm_bias is there for its dtype alone
  m.def(
      "compress_kv_bwd(Tensor dout, Tensor kv, SymInt height, SymInt width, Tensor weight,"
      " Tensor bias, Tensor norm_weight, Tensor norm_bias, Tensor stats) -> (Tensor dkv,"
      " Tensor dweight, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)");

  // A step of CAME for weights of one shape: of two dimensions or more, and of fewer. All are
  // contiguous; averages are fp32.
  m.def(
      "came_matrices(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avg,"
      " Tensor(c!)[] exp_avg_sq_row, Tensor(d!)[] exp_avg_sq_col, Tensor(e!)[] exp_avg_res_row,"
      " Tensor(f!)[] exp_avg_res_col, float lr, float beta_moment, float beta_square,"
      " float beta_deviation, float eps_square, float eps_deviation, float clip_threshold,"
      " float weight_decay) -> ()");
  m.def(
      "came_vectors(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avg,"
      " Tensor(c!)[] exp_avg_sq, float lr, float beta_moment, float beta_square, float eps_square,"
      " float clip_threshold, float weight_decay) -> ()");
}
