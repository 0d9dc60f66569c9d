"""CAME's step in C++ (csrc/came): ``native``, on the CPU.

Weights and gradients are fp32, bf16 or fp16; arithmetic is fp32, sums of many terms fp64; a weight
is rounded after its decay and after its update. Gradients that are not contiguous are copied first.
Results do not depend on the number of threads, nor on the other weights of a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixart_kernels import _extension
from pixart_kernels.came.reference import Settings, State

if _extension.problem is None:
    # overloads, resolved once
    _matrices = torch.ops.pixart_kernels.came_matrices.default
    _vectors = torch.ops.pixart_kernels.came_vectors.default

    for _name in ("came_matrices", "came_vectors"):
        torch.library.register_fake(f"pixart_kernels::{_name}", lambda *arguments: None)

NOT_CONTIGUOUS = "weights or averages are not contiguous"


def why_not(x: Tensor, *, contiguous: bool = True, sharded: bool = False) -> str | None:
    """Why the compiled CPU kernels cannot take a step, or None."""
    reason = _extension.why_not_native(x)
    if reason is None and sharded:
        reason = "weights are shards, and native kernels take whole ones"
    if reason is None and not contiguous:
        reason = NOT_CONTIGUOUS
    return reason


def came_step(
    weights: list[Tensor], gradients: list[Tensor], state: State, **settings: Any
) -> None:
    lr, betas, eps, *others = Settings(**settings)[:5]
    gradients = [g.contiguous() for g in gradients]
    moments = state["exp_avg"]
    if len(state) == 2:
        numbers = lr, *betas[:2], eps[0], *others
        _vectors(weights, gradients, moments, state["exp_avg_sq"], *numbers)
    else:
        factors = (state[f"exp_avg_{name}"] for name in ("sq_row", "sq_col", "res_row", "res_col"))
        _matrices(weights, gradients, moments, *factors, lr, *betas, *eps, *others)
