"""CAME's step in C++ against came-pytorch: dtypes, threads, layouts, and what it refuses."""

from __future__ import annotations

import came_cases as cases
import pytest
import torch
from came_cases import BF16, FP16, OTHERS, drawn, fresh_state, per_shape

import pixart_kernels as pk
from pixart_kernels import _extension

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
)


@per_shape
@pytest.mark.parametrize("settings", [{}, OTHERS], ids=["default", "others"])
def test_step_for_step(count, shape, settings):
    cases.check_came_pytorch("native", count, shape, **settings)


@pytest.mark.parametrize("shape", [(5, 3), (7,)], ids=str)
def test_nothing_added_to_squares(shape):
    cases.check_came_pytorch("native", 2, shape, steps=5, eps=(0.0, 0.0))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(33, 20), (70,)], ids=str)
def test_16_bits_are_rounded_as_came_pytorch_rounds(shape, dtype):
    cases.check_came_pytorch("native", 2, shape, dtype=dtype)


@cases.per_dtypes
def test_dtypes(shape, dtype, gradient_dtype):
    cases.check_dtypes("native", shape, dtype, gradient_dtype)


def test_many_terms_are_summed_as_accurately_as_came_pytorch_does():
    for shape in ((3000, 700), (2, 1_000_001), (1_000_001, 2), (2_000_003,)):
        cases.check_came_pytorch("native", 1, shape, steps=2)


@pytest.mark.parametrize(
    "count, shape",
    [(3, (300, 137)), (1, (400, 500)), (2, (1000, 600)), (5, (3, 4, 40, 50)), (3, (100_001,))],
    ids=["several", "too few", "large ones", "matrices of a convolution", "vectors"],
)
def test_same_bits_for_any_number_of_threads(count, shape):
    threads = torch.get_num_threads()
    try:
        found = []
        for several in (1, 2, 3):
            torch.set_num_threads(several)
            found.append(cases.walk("native", count, shape))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        cases.assert_same_bits(found[0], other)


def test_a_weight_does_not_depend_on_the_others():
    cases.check_a_weight_does_not_depend_on_the_others("native")


def test_strided_gradients():
    cases.check_strided_gradients("native")


@pytest.mark.parametrize("shape", [(4, 6), (6,), (3, 2, 2)], ids=str)
def test_zeros_and_nan(shape):
    cases.check_zeros_and_nan("native", shape)


@pytest.mark.parametrize("shape", [(5, 3), (5,)], ids=str)
def test_opcheck(shape):
    weights, gradients, state = drawn(2, shape), drawn(2, shape, seed=1), fresh_state(2, shape)
    numbers = 8 if len(shape) > 1 else 6
    op = torch.ops.pixart_kernels.came_matrices if len(shape) > 1 else None
    op = op or torch.ops.pixart_kernels.came_vectors
    torch.library.opcheck(
        op.default,
        (weights, gradients, *state.values(), *([0.5] * numbers)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_wrong_memory_is_refused_by_the_op_itself():
    op = torch.ops.pixart_kernels.came_vectors
    numbers = (0.1,) * 6
    a, b, c, d = (drawn(2, (5,)) for _ in range(4))
    with pytest.raises(RuntimeError, match="`gradients` has 1 tensors"):
        op(a, b[:1], c, d, *numbers)
    with pytest.raises(RuntimeError, match="`exp_avg` must be contiguous, .* 5 elements"):
        op(a, b, [c[0][:4]] * 2, d, *numbers)
    with pytest.raises(RuntimeError, match="`gradients` must be contiguous"):
        op(a, [b[0][:1].expand(5)] * 2, c, d, *numbers)
    with pytest.raises(RuntimeError, match="`exp_avg_sq` must be float32"):
        op(a, b, c, [x.bfloat16() for x in d], *numbers)
    with pytest.raises(RuntimeError, match="`weights` must be .* of one dtype"):
        op([a[0], a[1].bfloat16()], b, c, d, *numbers)
    with pytest.raises(RuntimeError, match="`weights` has an unsupported dtype"):
        op([x.double() for x in a], b, c, d, *numbers)
    matrices = torch.ops.pixart_kernels.came_matrices
    with pytest.raises(RuntimeError, match="`weights` have 1 dimensions; accepted: 2"):
        matrices(a, b, c, d, d, d, d, *numbers, 0.1, 0.1)


def test_shards_are_refused_by_name():
    weights, gradients = drawn(2, (5, 3)), drawn(2, (5, 3), seed=1)
    with pytest.raises(RuntimeError, match="weights are shards"):
        pk.came_step(
            *(weights, gradients, fresh_state(2, (5, 3))),
            **cases.SETTINGS,
            reduce=lambda x: x,
            backend="native",
        )
