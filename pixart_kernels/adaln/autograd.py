"""What PyTorch must know of the adaLN kernels, whatever backend they are: derivatives and shapes.

Each Function saves its inputs and (2, B, N) of fp32 mean and 1/std; of size (B, N, D) that is x (or
x_new), and branch where there is a gate. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixart_kernels._autograd import differentiated, distinct, narrow
from pixart_kernels.adaln.reference import Gate, Modulation, activation_dtype


class Kernels(NamedTuple):
    """One backend's forwards and backwards, called like the ops of csrc/registration.cpp."""

    adaln_single_fwd: Callable
    adaln_single_bwd: Callable
    adaln_modulate_fwd: Callable
    adaln_modulate_bwd: Callable
    gated_residual_fwd: Callable
    gated_residual_bwd: Callable
    gated_residual_adaln_fwd: Callable
    gated_residual_adaln_bwd: Callable


# looked up by name: a string passes through a Function under torch.compile, callables do not
KERNELS: dict[str, Kernels] = {}


class AdalnSingleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, table, t, shift_row, scale_row, eps):
        h, stats = KERNELS[kernels].adaln_single_fwd(x, table, t, shift_row, scale_row, eps)
        ctx.save_for_backward(x, table, t, stats)
        ctx.options = kernels, shift_row, scale_row
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        kernels, *rows = ctx.options
        grads = KERNELS[kernels].adaln_single_bwd(dh, *ctx.saved_tensors, *rows)
        return None, *grads, None, None, None


class AdalnModulateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, shift, scale, eps):
        h, stats = KERNELS[kernels].adaln_modulate_fwd(x, shift, scale, eps)
        ctx.save_for_backward(x, shift, scale, stats)
        ctx.kernels = kernels
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return None, *KERNELS[ctx.kernels].adaln_modulate_bwd(dh, *ctx.saved_tensors), None


class GatedResidualFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, branch, table, t, gate_row):
        ctx.save_for_backward(branch, table, t)
        ctx.options = kernels, gate_row
        return KERNELS[kernels].gated_residual_fwd(x, branch, table, t, gate_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new):
        kernels, gate_row = ctx.options
        grads = KERNELS[kernels].gated_residual_bwd(dx_new, *ctx.saved_tensors, gate_row)
        return None, dx_new, *grads, None


class GatedResidualAdalnFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, kernels, x, branch, gate_table, gate_t, gate_row, table, t, shift_row, scale_row, eps
    ):
        x_new, h, stats = KERNELS[kernels].gated_residual_adaln_fwd(
            x, branch, gate_table, gate_t, gate_row, table, t, shift_row, scale_row, eps
        )
        if gate_t is None:
            # the backward needs its type alone: what is saved has its shape and one row of memory
            branch = branch.new_empty(branch.shape[-1]).expand(branch.shape)
        ctx.save_for_backward(x_new, branch, gate_table, gate_t, table, t, stats)
        ctx.options = kernels, gate_row, shift_row, scale_row
        ctx.set_materialize_grads(False)
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new, dh):
        x_new, branch, gate_table, gate_t, table, t, stats = ctx.saved_tensors
        kernels, gate_row, *rows = ctx.options
        if dh is None:
            dh = x_new.new_zeros(x_new.shape, dtype=activation_dtype(x_new, branch))
        dx, dbranch, dgate_table, dgate_t, dtable, dt = KERNELS[kernels].gated_residual_adaln_bwd(
            dx_new, dh, x_new, branch, gate_table, gate_t, gate_row, table, t, stats, *rows
        )
        if gate_t is None:
            dgate_table = dgate_t = None
            if branch.dtype == x_new.dtype:
                dbranch = dx
        return None, dx, dbranch, dgate_table, dgate_t, None, dtable, dt, None, None, None


def adaln_single(
    kernels: str,
    x: Tensor,
    table: Tensor,
    t: Tensor,
    *,
    shift_row: int,
    scale_row: int,
    eps: float = 1e-6,
) -> Tensor:
    table, t32 = narrow(table, t)
    options = shift_row, scale_row, eps
    if differentiated(x, table, t32):
        h = AdalnSingleFunction.apply(kernels, *distinct(x, table, t32), *options)
    else:
        h = KERNELS[kernels].adaln_single_fwd(x, table, t32, *options)[0]
    return h if t32 is t else h.to(activation_dtype(x, t))


def gated_residual(
    kernels: str, x: Tensor, branch: Tensor, table: Tensor, t: Tensor, *, gate_row: int
) -> Tensor:
    branch, table, t = narrow(branch, table, t)
    if differentiated(x, branch, table, t):
        tensors = distinct(x, branch, table, t)
        return GatedResidualFunction.apply(kernels, *tensors, gate_row)
    return KERNELS[kernels].gated_residual_fwd(x, branch, table, t, gate_row)


def gated_residual_adaln(
    kernels: str,
    x: Tensor,
    branch: Tensor,
    *,
    gate: Gate | None = None,
    modulation: Modulation,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    table, t, shift_row, scale_row = modulation
    branch32, table, t = narrow(branch, table, t)
    gate_table: Tensor | None = None
    gate_t: Tensor | None = None
    gate_row = 0
    if gate is not None:
        gate_table, gate_t, gate_row = gate
        gate_table, gate_t = narrow(gate_table, gate_t)
    arguments: tuple[Any, ...] = (
        *(x, branch32, gate_table, gate_t, gate_row),
        *(table, t, shift_row, scale_row, eps),
    )
    if differentiated(x, branch32, gate_table, gate_t, table, t):
        x_new, h = GatedResidualAdalnFunction.apply(kernels, *distinct(*arguments))
    else:
        x_new, h, _ = KERNELS[kernels].gated_residual_adaln_fwd(*arguments)
    return x_new, h if branch32 is branch else h.to(activation_dtype(x, branch))


def adaln_modulate(
    kernels: str, x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> Tensor:
    shift32, scale = narrow(shift, scale)
    if differentiated(x, shift32, scale):
        h = AdalnModulateFunction.apply(kernels, *distinct(x, shift32, scale), eps)
    else:
        h = KERNELS[kernels].adaln_modulate_fwd(x, shift32, scale, eps)[0]
    return h if shift32 is shift else h.to(activation_dtype(x, shift))


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)


def _dense(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def register_fakes(namespace: str) -> None:
    """Output shapes and dtypes of the family's ops, for torch.compile."""

    def fake(name):
        return torch.library.register_fake(f"{namespace}::{name}")

    @fake("adaln_single_fwd")
    def _(x, table, t, shift_row, scale_row, eps):
        return _like(x, activation_dtype(x, t)), _stats(x)

    @fake("adaln_single_bwd")
    def _(dh, x, table, t, stats, shift_row, scale_row):
        return _dense(x), _dense(table), _dense(t)

    @fake("adaln_modulate_fwd")
    def _(x, shift, scale, eps):
        return _like(x, activation_dtype(x, shift)), _stats(x)

    @fake("adaln_modulate_bwd")
    def _(dh, x, shift, scale, stats):
        return _dense(x), _dense(shift), _dense(scale)

    @fake("gated_residual_fwd")
    def _(x, branch, table, t, gate_row):
        return _dense(x)

    @fake("gated_residual_bwd")
    def _(dx_new, branch, table, t, gate_row):
        return _dense(branch), _dense(table), _dense(t)

    @fake("gated_residual_adaln_fwd")
    def _(x, branch, gate_table, gate_t, gate_row, table, t, shift_row, scale_row, eps):
        return _dense(x), _like(x, activation_dtype(x, branch)), _stats(x)

    @fake("gated_residual_adaln_bwd")
    def _(
        dx_new,
        dh,
        x_new,
        branch,
        gate_table,
        gate_t,
        gate_row,
        table,
        t,
        stats,
        shift_row,
        scale_row,
    ):
        empty = (0,)
        if gate_t is None:
            same = branch.dtype == x_new.dtype
            dbranch = branch.new_empty(empty) if same else _dense(branch)
            gate_grads = tuple(x_new.new_empty(empty, dtype=torch.float32) for _ in range(2))
        else:
            dbranch, gate_grads = _dense(branch), (_dense(gate_table), _dense(gate_t))
        return _dense(x_new), dbranch, *gate_grads, _dense(table), _dense(t)
