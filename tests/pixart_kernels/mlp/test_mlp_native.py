"""bias_gelu in C++ against the reference: values, gradients, layouts, limits, compilation."""

from __future__ import annotations

import mlp_cases as cases
import pytest
import torch
from mlp_cases import BF16, FP16, FP32, inputs, per_dtype, per_dtypes, per_layout, run

import pixart_kernels as pk
from pixart_kernels import _extension

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
)

# one element; a bare vector; odd everything; a width that fills no vector; several tiles of
# columns; several chunks of rows; more rows than 64 chunks of 64; nothing at all, in two ways
SHAPES = [
    (1, 1),
    (19,),
    (3, 7, 72),
    (2, 1, 1151),
    (5, 2309),
    (2, 3, 50, 24),
    (4200, 8),
    (2, 0, 16),
    (3, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape):
    cases.check_error_rule(inputs(shape), "native")


@per_dtypes
def test_dtypes(x_dtype, bias_dtype):
    cases.check_error_rule(inputs((2, 67, 203), x_dtype, bias_dtype), "native")


def test_fp64_bias_beside_fp32_rows():
    x, bias = inputs((2, 5, 24))
    actual, expected = (run([x, bias.double()], b) for b in ("native", "reference"))
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@per_layout
def test_strided_views(layout):
    cases.check_strided_views(layout, "native", N=70)


def test_expanded_rows_and_gradients():
    cases.check_expanded("native", rows=130)


def test_addresses_beyond_32_bits():
    cases.check_addresses_beyond_32_bits("native")


def test_relative_accuracy_holds_for_tiny_and_large_values():
    cases.check_relative_accuracy("native")


@per_dtype
def test_limits_and_nan(dtype):
    cases.check_limits_and_nan(dtype, "native")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bitwise_repeatable_for_any_number_of_threads(dtype):
    leaves = inputs((3, 301, 1352), dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            found.append(run(leaves, "native"))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        cases.assert_same_bits(found[0], others)


def test_a_row_does_not_depend_on_the_others():
    x, bias = inputs((130, 72))
    y = pk.bias_gelu(x, bias, backend="native")
    assert torch.equal(y[77:78], pk.bias_gelu(x[77:78], bias, backend="native"))


def test_the_backward_keeps_x_and_bias_alone():
    x, bias = (leaf.requires_grad_() for leaf in inputs((4, 9, 24)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pk.bias_gelu(x, bias, backend="native")
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), bias.data_ptr()}


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("x_dtype, bias_dtype", [(FP32, BF16), (FP16, FP32)])
def test_opcheck(needs_grad, x_dtype, bias_dtype):
    cases.check_opcheck(torch.ops.pixart_kernels, x_dtype, bias_dtype, needs_grad)


def test_wrong_memory_is_refused_by_the_ops_themselves():
    ops = torch.ops.pixart_kernels
    x, bias = inputs((5, 24))
    with pytest.raises(RuntimeError, match="`x` has 3 dimensions"):
        ops.bias_gelu_fwd(x[None], bias)
    with pytest.raises(RuntimeError, match="`bias` must be"):
        ops.bias_gelu_fwd(x, bias[1:])
    with pytest.raises(RuntimeError, match="`x` has an unsupported dtype"):
        ops.bias_gelu_fwd(x.double(), bias)
    with pytest.raises(RuntimeError, match="`dy` must have the shape"):
        ops.bias_gelu_bwd(x[1:], x, bias)
    with pytest.raises(RuntimeError, match="`dy` must have the dtype"):
        ops.bias_gelu_bwd(x.bfloat16(), x, bias)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("native", (4, 9, 17, 30))


def test_compiles_with_inductor_and_without_gradients():
    cases.check_compiles_with_inductor_and_without_gradients("native")


@pytest.mark.parametrize(
    ("x", "bias", "error", "said"),
    [
        (torch.zeros(2, 8), torch.zeros(7), ValueError, r"`bias` is \(7,\); accepted: \(8,\)"),
        (torch.zeros(2, 8), torch.zeros(1, 8), ValueError, r"`bias` is \(1, 8\)"),
        (torch.zeros(()), torch.zeros(1), ValueError, r"`x` is \(\); accepted: \(\.\.\., D\)"),
        (torch.zeros(2, 8).int(), torch.zeros(8), TypeError, "`x` has dtype torch.int32"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), ValueError, "`bias` is on meta"),
    ],
    ids=["width", "rank", "scalar", "integers", "device"],
)
def test_wrong_arguments_are_named(x, bias, error, said):
    with pytest.raises(error, match=f"bias_gelu: {said}"):
        pk.bias_gelu(x, bias)


def test_a_named_backend_that_cannot_run_says_why():
    x, bias = inputs((2, 8))
    with pytest.raises(RuntimeError, match="'native' cannot run bias_gelu: x is torch.float64"):
        pk.bias_gelu(x.double(), bias, backend="native")


def test_forward_mode_is_refused():
    """Rather than tangents dropped."""
    leaves = tuple(inputs((3, 24)))
    with pytest.raises(RuntimeError, match="jvp|forward"):
        torch.func.jvp(lambda x, b: pk.bias_gelu(x, b, backend="native"), leaves, leaves)
