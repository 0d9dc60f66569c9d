"""What is timed: ops, who can provide each, and at which shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pixart_kernels as pk

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape: ``make`` gives its tensors, ``call(backend, *tensors)`` runs it."""

    op: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype, torch.device], list[Tensor]]
    call: Callable[..., Outputs]


# sigma-512 rows at batch 2, alpha-256 at batch 8, and a small model's width
ADALN_SHAPES = [(2, 1024, 1152), (8, 256, 1152), (4, 1024, 384)]
ROWS = 6


def _adaln_tensors(B: int, N: int, D: int) -> Callable[[torch.dtype, torch.device], list[Tensor]]:
    def make(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def leaf(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        # the learned table stays fp32 when activations are 16-bit
        table = torch.randn((ROWS, D), generator=generator).to(device) / D**0.5
        return [leaf(B, N, D), leaf(B, N, D), table, leaf(B, ROWS * D)]

    return make


def _adaln_single(backend, x, branch, table, t) -> Outputs:
    return (pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend=backend),)


def _adaln_modulate(backend, x, branch, table, t) -> Outputs:
    D = x.shape[-1]
    return (pk.adaln_modulate(x, t[:, :D], t[:, D : 2 * D], backend=backend),)


def _gated_residual(backend, x, branch, table, t) -> Outputs:
    return (pk.gated_residual(x, branch, table, t, gate_row=2, backend=backend),)


def _gated_residual_adaln(backend, x, branch, table, t) -> Outputs:
    return pk.gated_residual_adaln(
        x, branch, gate=(table, t, 2), modulation=(table, t, 3, 4), backend=backend
    )


FAMILIES: dict[str, list[Case]] = {
    "adaln": [
        Case(op, shape, _adaln_tensors(*shape), call)
        for op, call in (
            ("adaln_single", _adaln_single),
            ("adaln_modulate", _adaln_modulate),
            ("gated_residual", _gated_residual),
            ("gated_residual_adaln", _gated_residual_adaln),
        )
        for shape in ADALN_SHAPES
    ]
}
