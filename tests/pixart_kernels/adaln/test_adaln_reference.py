"""The definitions themselves: gradients by finite differences, and the formulas written out."""

from __future__ import annotations

import pytest
import torch

import pixart_kernels as pk

B, N, D, R = 2, 3, 5, 6


def leaves():
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, N, D), (B, N, D), (R, D), (B, R * D)]
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]


CASES = {
    "adaln_single": lambda x, branch, table, t: pk.reference.adaln_single(
        x, table, t, shift_row=0, scale_row=1
    ),
    "gated_residual": lambda x, branch, table, t: pk.reference.gated_residual(
        x, branch, table, t, gate_row=2
    ),
    "gated_residual_adaln": lambda x, branch, table, t: pk.reference.gated_residual_adaln(
        x, branch, gate=(table, t, 2), modulation=(table, t, 3, 4)
    ),
    "residual_adaln": lambda x, branch, table, t: pk.reference.gated_residual_adaln(
        x, branch, modulation=(table, t.reshape(B, R, D), 3, 4)
    ),
    "adaln_modulate": lambda x, branch, table, t: pk.reference.adaln_modulate(
        x, t[:, :D], t[:, D : 2 * D]
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(case):
    assert torch.autograd.gradcheck(CASES[case], leaves())


def normalised(x, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def test_the_formulas_written_out():
    x, branch, table, t = leaves()
    rows = table + t.reshape(B, R, D)

    def row(i):
        return rows[:, i, None]

    expected = normalised(x) * (1 + row(1)) + row(0)
    torch.testing.assert_close(CASES["adaln_single"](x, branch, table, t), expected)
    x_new = x + row(2) * branch
    torch.testing.assert_close(CASES["gated_residual"](x, branch, table, t), x_new)
    found_x, found_h = CASES["gated_residual_adaln"](x, branch, table, t)
    torch.testing.assert_close(found_x, x_new)
    torch.testing.assert_close(found_h, normalised(x_new) * (1 + row(4)) + row(3))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [torch.float32, torch.bfloat16])
def test_a_16_bit_residual_decides_the_output_dtype(residual, activation):
    x, branch, table, t = (leaf.detach() for leaf in leaves())
    x, branch = x.to(residual), branch.to(activation)
    x_new, h = pk.reference.gated_residual_adaln(x, branch, modulation=(table, t, 0, 1))
    assert x_new.dtype == residual
    assert h.dtype == (activation if residual == torch.float32 else residual)
