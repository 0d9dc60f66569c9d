"""Public ops of the adaLN family: argument checks, then whichever backend `dispatch` selects."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._checks import check_floating, shape, wrong
from pixart_kernels.adaln import autograd, native, reference
from pixart_kernels.adaln.reference import Gate, Modulation
from pixart_kernels.dispatch import register, select

if _triton.problem is None:
    from pixart_kernels.adaln import triton  # noqa: F401  (fills KERNELS)


def _check_tokens(op: str, x: Tensor, branch: Tensor | None = None) -> None:
    if x.dim() != 3:
        raise wrong(op, "x", shape(x), "(B, N, D)")
    if branch is not None and branch.shape != x.shape:
        raise wrong(op, "branch", shape(branch), f"the shape of x, {shape(x)}")


def _check_rows(
    op: str,
    x: Tensor,
    table: Tensor,
    t: Tensor,
    names: tuple[str, str] = ("table", "t"),
    **rows: int,
) -> None:
    B, _, D = x.shape
    if table.dim() != 2 or table.shape[1] != D:
        raise wrong(op, names[0], shape(table), f"(R, {D})")
    R = table.shape[0]
    if t.shape != (B, R * D) and t.shape != (B, R, D):
        raise wrong(op, names[1], shape(t), f"({B}, {R * D}) or ({B}, {R}, {D})")
    for name, row in rows.items():
        if not isinstance(row, (int, torch.SymInt)) or not 0 <= row < R:
            raise wrong(op, name, repr(row), f"0 to {R - 1}, a row of {names[0]}")


def _check_tuple(op: str, name: str, found: object, accepted: str) -> None:
    length = accepted.count(",") + 1
    if not isinstance(found, (tuple, list)) or len(found) != length:
        count = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
        raise wrong(op, name, f"a {type(found).__name__}{count}", accepted)


def adaln_single(
    x: Tensor,
    table: Tensor,
    t: Tensor,
    *,
    shift_row: int,
    scale_row: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` with shift and scale composed as ``table[row] + t[:, row]``.

    PixArt-alpha, section 2.3: ``t`` is shared by all blocks, ``table`` is the block's own.

    Args:
        x: tokens (B, N, D), normalised over D without affine parameters.
        table: learned rows (R, D).
        t: the timestep's rows, (B, R*D) as the linear layer wrote them, or (B, R, D).
        shift_row, scale_row: which of the R rows to use.
        eps: added to the variance.
        backend: see :func:`pixart_kernels.use_backend`.

    Returns:
        (B, N, D) in the activations' dtype: x's if it is 16-bit, else t's. Statistics and
        modulation are fp32; there is one rounding, at the store.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what is accepted.
        RuntimeError: ``backend`` was named and cannot run, with every reason.
    """
    check_floating("adaln_single", x=x, table=table, t=t)
    _check_tokens("adaln_single", x)
    _check_rows("adaln_single", x, table, t, shift_row=shift_row, scale_row=scale_row)
    run = select("adaln_single", x, backend)
    return run(x, table, t, shift_row=shift_row, scale_row=scale_row, eps=eps)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    table: Tensor,
    t: Tensor,
    *,
    gate_row: int,
    backend: str | None = None,
) -> Tensor:
    """``x + gate * branch`` with ``gate = table[gate_row] + t[:, gate_row]``.

    x and branch are (B, N, D), table (R, D), t (B, R*D) or (B, R, D). Returns (B, N, D) in x's
    dtype, computed in fp32. Raises like :func:`adaln_single`.
    """
    check_floating("gated_residual", x=x, branch=branch, table=table, t=t)
    _check_tokens("gated_residual", x, branch)
    _check_rows("gated_residual", x, table, t, gate_row=gate_row)
    return select("gated_residual", x, backend)(x, branch, table, t, gate_row=gate_row)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    *,
    gate: Gate | None = None,
    modulation: Modulation,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One branch's residual and the next branch's modulated input, in one pass.

    ``x_new = x + gate * branch`` and ``h = LN(x_new) * (1 + scale) + shift``.

    Args:
        x, branch: (B, N, D).
        gate: ``(table, t, gate_row)``, or None for a plain residual (cross-attention).
        modulation: ``(table, t, shift_row, scale_row)``; its table and t may be the next
            block's, which is how the fusion reaches across the block boundary.
        eps: added to the variance.
        backend: see :func:`pixart_kernels.use_backend`.

    Returns:
        ``x_new`` in x's dtype, and ``h`` in the activations': x's if it is 16-bit, else
        branch's. Both (B, N, D).

    Raises like :func:`adaln_single`.
    """
    op = "gated_residual_adaln"
    _check_tuple(op, "modulation", modulation, "(table, t, shift_row, scale_row)")
    table, t, shift_row, scale_row = modulation
    check_floating(op, x=x, branch=branch, table=table, t=t)
    _check_tokens(op, x, branch)
    _check_rows(op, x, table, t, shift_row=shift_row, scale_row=scale_row)
    if gate is not None:
        _check_tuple(op, "gate", gate, "(table, t, gate_row) or None")
        gate_table, gate_t, gate_row = gate
        check_floating(op, x=x, gate_table=gate_table, gate_t=gate_t)
        _check_rows(op, x, gate_table, gate_t, ("gate_table", "gate_t"), gate_row=gate_row)
    return select(op, x, backend)(x, branch, gate=gate, modulation=modulation, eps=eps)


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` with ready-made shift and scale: DiT's adaLN.

    x is (B, N, D), shift and scale (B, D). Returns (B, N, D) in x's dtype if it is 16-bit, else
    shift's. Raises like :func:`adaln_single`.
    """
    op = "adaln_modulate"
    check_floating(op, x=x, shift=shift, scale=scale)
    _check_tokens(op, x)
    for name, vector in (("shift", shift), ("scale", scale)):
        if vector.shape != (x.shape[0], x.shape[2]):
            raise wrong(op, name, shape(vector), f"({x.shape[0]}, {x.shape[2]})")
    return select(op, x, backend)(x, shift, scale, eps=eps)


for _op in ("adaln_single", "gated_residual", "gated_residual_adaln", "adaln_modulate"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "native", partial(getattr(autograd, _op), "native"), native.why_not_native)
    register(_op, "triton", partial(getattr(autograd, _op), "triton"), _triton.why_not_triton)
    register(_op, "cuda", partial(getattr(autograd, _op), "cuda"), native.why_not_cuda)
