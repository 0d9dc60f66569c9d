"""CAME's step in Triton against came-pytorch: on a GPU as it is, without one interpreted."""

from __future__ import annotations

import came_cases as cases
import pytest
from came_cases import BF16, FP16, OTHERS, SETTINGS, drawn, fresh_state
from triton_devices import DEVICE, GPU, needs_triton, on_gpu

import pixart_kernels as pk

pytestmark = [
    *needs_triton,
    # numpy's, in lanes that are masked
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
# interpreted, a step takes a hundred times as long: one with each size of gradients
STEPS = 50 if GPU else 5

# (count, shape): a scalar; vectors, the last in several blocks; one row; one column; odd sizes;
# several tiles of rows and of columns; convolutions, and matrices of three dimensions
SHAPES = [
    (2, ()),
    (3, (7,)),
    (2, (2001,)),
    (2, (1, 37)),
    (2, (37, 1)),
    (4, (5, 3)),
    (2, (70, 137)),
    (1, (9, 300)),
    (2, (3, 2, 2, 2)),
    (1, (5, 1, 3, 3)),
    (3, (2, 3, 4)),
]


@pytest.mark.parametrize("count, shape", SHAPES, ids=str)
@pytest.mark.parametrize("settings", [{}, OTHERS], ids=["default", "others"])
def test_step_for_step(count, shape, settings):
    cases.check_came_pytorch("triton", count, shape, STEPS, device=DEVICE, **settings)


def test_fifty_steps():
    for shape in ((5, 3), (7,)):
        cases.check_came_pytorch("triton", 1, shape, 50, device=DEVICE)


@pytest.mark.parametrize("shape", [(5, 3), (7,)], ids=str)
def test_nothing_added_to_squares(shape):
    cases.check_came_pytorch("triton", 2, shape, steps=5, eps=(0.0, 0.0), device=DEVICE)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(33, 20), (70,)], ids=str)
def test_16_bits_are_rounded_as_came_pytorch_rounds(shape, dtype):
    cases.check_came_pytorch("triton", 2, shape, STEPS, dtype=dtype, device=DEVICE)


@cases.per_dtypes
def test_dtypes(shape, dtype, gradient_dtype):
    cases.check_dtypes("triton", shape, dtype, gradient_dtype, DEVICE)


@pytest.mark.parametrize("shape", [(8, 24), (24,)], ids=str)
def test_weights_off_16_byte_boundaries(shape):
    """Vector loads must not be promised what an address does not keep."""
    from pixart_kernels.came.triton import _Addresses

    def misaligned(tensors):
        found = []
        for tensor in tensors:
            wide = tensor.new_full((tensor.numel() + 8,), float("nan"))
            found.append(wide[1 : 1 + tensor.numel()].view(shape).copy_(tensor))
        return found

    results = []
    for moved in (lambda tensors: tensors, misaligned):
        weights, gradients = (moved(drawn(2, shape, seed=i, device=DEVICE)) for i in (0, 1))
        state = fresh_state(2, shape, DEVICE)
        state["exp_avg"] = moved(state["exp_avg"])
        assert _Addresses(weights, gradients).aligned == (moved is not misaligned)
        pk.came_step(weights, gradients, state, **SETTINGS, backend="triton")
        results.append((weights, state))
    cases.assert_same_bits(*results)


def test_a_weight_does_not_depend_on_the_others():
    cases.check_a_weight_does_not_depend_on_the_others("triton", DEVICE)


def test_strided_gradients():
    cases.check_strided_gradients("triton", DEVICE)


@pytest.mark.parametrize("shape", [(4, 6), (6,), (3, 2, 2)], ids=str)
def test_zeros_and_nan(shape):
    cases.check_zeros_and_nan("triton", shape, DEVICE)


@on_gpu
@pytest.mark.parametrize("shape", [(1152, 4608), (6912,)], ids=str)
def test_same_bits_a_hundred_times(shape):
    expected = cases.walk("triton", 3, shape, device=DEVICE)
    for _ in range(100):
        cases.assert_same_bits(expected, cases.walk("triton", 3, shape, device=DEVICE))
