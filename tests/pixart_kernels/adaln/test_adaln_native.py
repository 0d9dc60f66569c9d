"""The C++ kernels against the reference: values, gradients, layouts, determinism, compilation."""

from __future__ import annotations

import adaln_cases as cases
import pytest
import torch
from adaln_cases import BF16, FP16, FP32, inputs, per_dtypes, per_layout, per_op, run

import pixart_kernels as pk
from pixart_kernels import _extension

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
)

# one token; odd everything; the model's width; a width that fills no vector; several chunks of
# rows; no tokens; no samples; no columns
SHAPES = [
    (1, 1, 8),
    (3, 7, 72),
    (2, 63, 1152),
    (2, 1, 1151),
    (1, 1000, 384),
    (2, 0, 16),
    (0, 3, 16),
    (2, 3, 0),
]


@per_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(op, shape):
    cases.check_error_rule(op, inputs(shape), "native")


@per_op
@per_dtypes
def test_dtypes(op, x_dtype, branch_dtype):
    cases.check_error_rule(op, inputs((2, 67, 200), x_dtype, branch_dtype), "native")


@per_op
@pytest.mark.parametrize("table_dtype, t_dtype", [(BF16, FP16), (FP16, FP32), (FP32, BF16)])
def test_modulation_dtypes(op, table_dtype, t_dtype):
    cases.check_error_rule(op, inputs((3, 5, 40), BF16, BF16, table_dtype, t_dtype), "native")


@per_op
def test_fp64_operands_beside_fp32_tokens(op):
    cases.check_fp64_operands(op, "native")


@per_op
@per_layout
def test_strided_views_are_read_where_they_lie(op, layout):
    cases.check_strided_views(op, layout, "native", N=70)


@per_op
def test_expanded_inputs_and_gradients(op):
    cases.check_expanded(op, "native", N=70)


def test_addresses_beyond_32_bits():
    cases.check_addresses_beyond_32_bits("native")


@per_op
def test_only_one_output_used(op):
    cases.check_only_one_output_used(op, "native")


def test_rows_not_used_have_zero_gradients():
    cases.check_rows_not_used_have_zero_gradients("native")


def test_plain_residual_in_another_dtype():
    cases.check_error_rule(cases.residual_adaln, inputs((2, 70, 40), FP32, BF16), "native")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_nan_and_infinity_reach_the_output(dtype):
    cases.check_nan_and_infinity(dtype, "native")


@per_op
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bitwise_repeatable_for_any_number_of_threads(op, dtype):
    leaves = inputs((3, 301, 136), dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            found.append(run(op, leaves, "native"))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        cases.assert_same_bits(found[0], others)


def test_normalises_what_was_stored():
    cases.check_normalises_what_was_stored("native", N=70)


def test_a_sample_does_not_depend_on_its_batch():
    cases.check_a_sample_alone("native", N=130)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    cases.check_opcheck(torch.ops.pixart_kernels, needs_grad)


def test_fakes_know_every_output_dtype():
    cases.check_fakes_know_every_output_dtype(torch.ops.pixart_kernels)


def test_wrong_memory_is_refused_by_the_ops_themselves():
    x, branch, table, t = inputs((2, 5, 24))
    with pytest.raises(RuntimeError, match="`t` must be"):
        torch.ops.pixart_kernels.adaln_single_fwd(x, table, t[:, :-1], 0, 1, 1e-6)
    with pytest.raises(RuntimeError, match="row 9 is outside"):
        torch.ops.pixart_kernels.adaln_single_fwd(x, table, t, 0, 9, 1e-6)
    with pytest.raises(RuntimeError, match="`branch` must have"):
        torch.ops.pixart_kernels.gated_residual_fwd(x, branch[:1], table, t, 0)
    stats = torch.ones(2, 2, 5)
    with pytest.raises(RuntimeError, match="`dh` has not the dtype"):
        torch.ops.pixart_kernels.adaln_single_bwd(x.bfloat16(), x, table, t, stats, 0, 1)
    with pytest.raises(RuntimeError, match="`stats` must be"):
        torch.ops.pixart_kernels.adaln_single_bwd(x, x, table, t, stats[:1], 0, 1)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("native", (4, 9, 17, 30))


@per_op
def test_compiles_without_gradients(op):
    cases.check_compiles_without_gradients(op, "native")


def test_compiles_with_inductor():
    cases.check_compiles_with_inductor("native")


def test_reasons():
    assert _extension.why_not_native(torch.zeros(1, 1, 8)) is None
    assert "float64" in _extension.why_not_native(torch.zeros(1, 1, 8).double())
    assert "meta" in _extension.why_not_native(torch.zeros(1, 1, 8, device="meta"))


def test_a_named_backend_that_cannot_run_lists_every_reason():
    x, _, table, t = inputs((1, 2, 8))
    with pytest.raises(RuntimeError) as error:
        cases.adaln_single(x.double(), None, table, t, backend="native")
    message = str(error.value)
    assert "backend 'native' cannot run adaln_single: x is torch.float64" in message
    for line in ("cuda: ", "triton: ", "reference: can run"):
        assert line in message
    h = pk.adaln_single(x.double(), table, t, shift_row=0, scale_row=1)
    assert h.dtype == table.dtype


def test_a_plain_residual_keeps_no_branch():
    cases.check_a_plain_residual_keeps_no_branch("native")


@per_op
def test_forward_mode_is_refused(op):
    cases.check_forward_mode_is_refused(op, "native")
