"""The definition itself: its gradient by finite differences, its formula, its one rounding."""

from __future__ import annotations

import math

import pytest
import torch

import pixart_kernels as pk


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 5), (5,)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(
        pk.reference.bias_gelu, [leaf.requires_grad_() for leaf in leaves()]
    )


def test_the_formula_written_out():
    x, bias = leaves()
    z = x + bias
    expected = 0.5 * z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())
    torch.testing.assert_close(pk.reference.bias_gelu(x, bias), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_rounding(dtype):
    x, bias = leaves(dtype)
    exact = pk.reference.bias_gelu(x.float(), bias.float())
    assert torch.equal(pk.reference.bias_gelu(x, bias), exact.to(dtype))
