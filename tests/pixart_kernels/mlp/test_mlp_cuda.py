"""bias_gelu in CUDA on a GPU. Without one the same source is emulated: test_cuda_emulated.py."""

from __future__ import annotations

import mlp_cases as cases
import pytest
import torch
from mlp_cases import BF16, FP16, FP32, inputs, per_dtype, per_dtypes, per_layout, run

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

# one element; a bare vector; odd everything; the model's width, in few rows and in many; widths
# that no vector divides, in one tile of columns and in several; nothing at all, in two ways
SHAPES = [
    (1, 1),
    (19,),
    (3, 7, 72),
    (2, 63, 4608),
    (8, 1024, 4608),
    (2, 1, 1151),
    (5, 2309),
    (70_000, 8),
    (2, 0, 16),
    (3, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_error_rule(shape, dtype):
    cases.check_error_rule(inputs(shape, dtype, device=DEVICE), "cuda")


@per_dtypes
@pytest.mark.parametrize("D", [203, 1152])
def test_dtypes(x_dtype, bias_dtype, D):
    cases.check_error_rule(inputs((2, 67, D), x_dtype, bias_dtype, device=DEVICE), "cuda")


@per_layout
def test_strided_views(layout):
    cases.check_strided_views(layout, "cuda", N=70, device=DEVICE)


def test_expanded_rows_and_gradients():
    cases.check_expanded("cuda", rows=130, device=DEVICE)


def test_addresses_beyond_32_bits():
    cases.check_addresses_beyond_32_bits("cuda", DEVICE)


def test_relative_accuracy_holds_for_tiny_and_large_values():
    cases.check_relative_accuracy("cuda", DEVICE)


@per_dtype
def test_limits_and_nan(dtype):
    cases.check_limits_and_nan(dtype, "cuda", DEVICE)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_a_hundred_times(dtype):
    leaves = inputs((8, 301, 4608), dtype, device=DEVICE)
    expected = run(leaves, "cuda")
    for _ in range(100):
        cases.assert_same_bits(expected, run(leaves, "cuda"))


def test_captured_in_a_graph():
    leaves = inputs((2, 65, 4608), BF16, device=DEVICE)
    dy = cases.gradient_like(leaves[0])
    expected = run(leaves, "cuda", dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, "cuda", dy)
    graph.replay()
    cases.assert_same_bits(expected, captured)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("x_dtype, bias_dtype", [(FP32, BF16), (FP16, FP32)])
def test_opcheck(needs_grad, x_dtype, bias_dtype):
    cases.check_opcheck(torch.ops.pixart_kernels, x_dtype, bias_dtype, needs_grad, DEVICE)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("cuda", (4, 9, 17, 30), DEVICE)


def test_compiles_with_inductor_and_without_gradients():
    cases.check_compiles_with_inductor_and_without_gradients("cuda", DEVICE)
