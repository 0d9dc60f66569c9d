"""The adaLN family in plain PyTorch: the definition that every other backend is tested against.

Statistics, modulation and gates are computed in fp32 (fp64 for fp64 inputs) and rounded once,
when the result is stored. Formulas: PixArt-alpha, section 2.3 (adaLN-single); DiT, section 3.2.
Shapes: x, branch (B, N, D); table (R, D); t (B, R*D) or (B, R, D); shift, scale (B, D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_kernels._checks import compute_dtype

Gate = tuple[Tensor, Tensor, int]
Modulation = tuple[Tensor, Tensor, int, int]


def activation_dtype(residual: Tensor, activation: Tensor) -> torch.dtype:
    """dtype of a modulated output: the residual's if it is 16-bit, else the activation's.

    Under autocast the residual stream is fp32 while activations are 16-bit.
    """
    return residual.dtype if residual.dtype.itemsize == 2 else activation.dtype


def _row(table: Tensor, t: Tensor, row: int, dtype: torch.dtype) -> Tensor:
    """One composed modulation vector per sample, (B, 1, D)."""
    t_BRD = t.reshape(t.shape[0], *table.shape)
    return (table[row].to(dtype) + t_BRD[:, row].to(dtype)).unsqueeze(1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.to(shift.dtype), x.shape[-1:], eps=eps) * (1 + scale) + shift


def adaln_single(
    x: Tensor, table: Tensor, t: Tensor, *, shift_row: int, scale_row: int, eps: float = 1e-6
) -> Tensor:
    dtype = compute_dtype(x)
    shift, scale = _row(table, t, shift_row, dtype), _row(table, t, scale_row, dtype)
    return _modulate(x, shift, scale, eps).to(activation_dtype(x, t))


def gated_residual(x: Tensor, branch: Tensor, table: Tensor, t: Tensor, *, gate_row: int) -> Tensor:
    dtype = compute_dtype(x)
    gate = _row(table, t, gate_row, dtype)
    return (x.to(dtype) + gate * branch.to(dtype)).to(x.dtype)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    *,
    gate: Gate | None = None,
    modulation: Modulation,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    if gate is None:
        dtype = compute_dtype(x)
        x_new = (x.to(dtype) + branch.to(dtype)).to(x.dtype)
    else:
        gate_table, gate_t, gate_row = gate
        x_new = gated_residual(x, branch, gate_table, gate_t, gate_row=gate_row)
    # normalises x_new as it was stored, because that is what the backward reads again
    table, t, shift_row, scale_row = modulation
    dtype = compute_dtype(x)
    shift, scale = _row(table, t, shift_row, dtype), _row(table, t, scale_row, dtype)
    return x_new, _modulate(x_new, shift, scale, eps).to(activation_dtype(x, branch))


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    dtype = compute_dtype(x)
    h = _modulate(x, shift.to(dtype).unsqueeze(1), scale.to(dtype).unsqueeze(1), eps)
    return h.to(activation_dtype(x, shift))
