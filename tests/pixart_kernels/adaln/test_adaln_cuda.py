"""The CUDA kernels on a GPU. Without one the same source is emulated: test_cuda_emulated.py."""

from __future__ import annotations

import adaln_cases as cases
import pytest
import torch
from adaln_cases import BF16, FP16, FP32, inputs, per_dtypes, per_layout, per_op, run

from pixart_kernels import _extension

DEVICE = "cuda"


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return _extension.why_not_cuda(torch.zeros(1, device=DEVICE))


REASON = _why_not()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

# one token; odd everything; the model's width; widths that no vector or half-warp divides, or one
# row of which fills a block; many rows; no tokens; no samples; no columns
SHAPES = [
    (1, 1, 8),
    (3, 11, 72),
    (2, 63, 1152),
    (8, 1024, 1152),
    (2, 1, 1151),
    (2, 9, 200),
    (2, 9, 4096),
    (1, 4095, 384),
    (2, 0, 16),
    (0, 3, 16),
    (2, 3, 0),
]


@per_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_error_rule(op, shape, dtype):
    cases.check_error_rule(op, inputs(shape, dtype, device=DEVICE), "cuda")


@per_op
@per_dtypes
@pytest.mark.parametrize("shape", [(2, 67, 200), (2, 67, 1152)], ids=str)
def test_dtypes(op, x_dtype, branch_dtype, shape):
    cases.check_error_rule(op, inputs(shape, x_dtype, branch_dtype, device=DEVICE), "cuda")


@per_op
@pytest.mark.parametrize("table_dtype, t_dtype", [(BF16, FP16), (FP16, FP32), (FP32, BF16)])
def test_modulation_dtypes(op, table_dtype, t_dtype):
    leaves = inputs((3, 5, 40), BF16, BF16, table_dtype, t_dtype, device=DEVICE)
    cases.check_error_rule(op, leaves, "cuda")


@per_op
@per_layout
def test_strided_views_are_read_where_they_lie(op, layout):
    cases.check_strided_views(op, layout, "cuda", N=70, device=DEVICE)


@per_op
def test_expanded_inputs_and_gradients(op):
    cases.check_expanded(op, "cuda", N=70, device=DEVICE)


def test_rows_that_start_between_16_byte_multiples():
    leaves = inputs((2, 9, 72), BF16, device=DEVICE)
    x, branch, table, t = leaves
    shifted = [torch.cat([y.flatten()[:1], y.flatten()])[1:].view_as(y) for y in (x, branch)]
    assert shifted[0].data_ptr() % 16 != 0
    expected = run(cases.gated_residual_adaln, leaves, "cuda")
    cases.assert_same_bits(expected, run(cases.gated_residual_adaln, [*shifted, table, t], "cuda"))


def test_addresses_beyond_32_bits():
    cases.check_addresses_beyond_32_bits("cuda", DEVICE)


def test_more_samples_than_a_grid_has_rows():
    leaves = inputs((70_000, 1, 8), device=DEVICE)
    cases.check_error_rule(cases.gated_residual_adaln, leaves, "cuda")


def test_rows_wider_than_a_block_are_left_to_others():
    x, _, table, t = inputs((1, 2, 4104), device=DEVICE)
    with pytest.raises(RuntimeError, match="at most 4096 elements"):
        cases.adaln_single(x, None, table, t, backend="cuda")
    with pytest.raises((RuntimeError, ValueError), match="at most 4096 elements"):
        torch.ops.pixart_kernels.adaln_single_fwd(x, table, t, 0, 1, 1e-6)


def test_rows_not_used_have_zero_gradients():
    cases.check_rows_not_used_have_zero_gradients("cuda", DEVICE)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_nan_and_infinity_reach_the_output(dtype):
    cases.check_nan_and_infinity(dtype, "cuda", DEVICE)


def test_normalises_what_was_stored():
    cases.check_normalises_what_was_stored("cuda", N=70, device=DEVICE)


@per_op
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_a_hundred_times(op, dtype):
    leaves = inputs((8, 301, 1152), dtype, device=DEVICE)
    out_grads = cases.gradients_like(op(*leaves))
    expected = run(op, leaves, "cuda", out_grads)
    for _ in range(100):
        cases.assert_same_bits(expected, run(op, leaves, "cuda", out_grads))


def test_runs_on_the_current_stream():
    leaves = inputs((8, 1024, 1152), BF16, device=DEVICE)
    out_grads = cases.gradients_like(cases.gated_residual_adaln(*leaves))
    expected = run(cases.gated_residual_adaln, leaves, "cuda", out_grads)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # long before the inputs are ready, were it on another stream
        torch.cuda._sleep(10_000_000)
        late = [leaf.clone() for leaf in leaves]
        actual = run(cases.gated_residual_adaln, late, "cuda", out_grads)
    torch.cuda.synchronize()
    cases.assert_same_bits(expected, actual)


@per_op
def test_captured_in_a_graph(op):
    leaves = inputs((2, 65, 1152), BF16, device=DEVICE)
    out_grads = cases.gradients_like(op(*leaves))
    expected = run(op, leaves, "cuda", out_grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, leaves, "cuda", out_grads)
    graph.replay()
    cases.assert_same_bits(expected, captured)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    cases.check_opcheck(torch.ops.pixart_kernels, needs_grad, DEVICE)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("cuda", (4, 9, 17, 30), DEVICE)


def test_compiles_with_inductor():
    cases.check_compiles_with_inductor("cuda", DEVICE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    leaves = inputs((2, 9, 72), device="cuda:1")
    cases.check_error_rule(cases.gated_residual_adaln, leaves, "cuda")
