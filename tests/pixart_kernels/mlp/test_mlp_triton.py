"""bias_gelu in Triton against the reference: on a GPU as it is, without one interpreted."""

from __future__ import annotations

import mlp_cases as cases
import pytest
import torch
from mlp_cases import BF16, FP16, FP32, inputs, per_dtype, per_dtypes, per_layout, run
from triton_devices import DEVICE, needs_triton

import pixart_kernels as pk
from pixart_kernels import _triton

pytestmark = needs_triton

# one element; a bare vector; odd everything; two blocks of columns, the second masked; more tiles
# of rows than splits; nothing at all, in two ways
SHAPES = [
    (1, 1),
    (19,),
    (3, 7, 72),
    (2, 1, 1151),
    (4, 23, 8),
    (2, 0, 16),
    (3, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape):
    cases.check_error_rule(inputs(shape, device=DEVICE), "triton")


@per_dtypes
def test_dtypes(x_dtype, bias_dtype):
    cases.check_error_rule(inputs((2, 7, 203), x_dtype, bias_dtype, device=DEVICE), "triton")


@per_layout
def test_strided_views(layout):
    cases.check_strided_views(layout, "triton", N=5, device=DEVICE)


def test_expanded_rows_and_gradients():
    cases.check_expanded("triton", rows=13, device=DEVICE, atol=1e-5)


def test_relative_accuracy_holds_for_tiny_and_large_values():
    cases.check_relative_accuracy("triton", DEVICE, fast=0)


@per_dtype
def test_limits_and_nan(dtype):
    cases.check_limits_and_nan(dtype, "triton", DEVICE)


def test_bitwise_repeatable():
    shape, times = ((2, 11, 40), 1) if _triton.INTERPRETED else ((8, 301, 4608), 100)
    leaves = inputs(shape, BF16, device=DEVICE)
    expected = run(leaves, "triton")
    for _ in range(times):
        cases.assert_same_bits(expected, run(leaves, "triton"))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("x_dtype, bias_dtype", [(FP32, BF16), (FP16, FP32)])
def test_opcheck(needs_grad, x_dtype, bias_dtype):
    ops = torch.ops.pixart_kernels_triton
    cases.check_opcheck(ops, x_dtype, bias_dtype, needs_grad, DEVICE)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("triton", (3, 5, 7), DEVICE)


def test_forward_mode_is_refused():
    """Rather than tangents dropped."""
    leaves = tuple(inputs((3, 24)))
    with pytest.raises(RuntimeError, match="jvp|forward"):
        torch.func.jvp(lambda x, b: pk.bias_gelu(x, b, backend="triton"), leaves, leaves)
