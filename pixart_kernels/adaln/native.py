"""The adaLN family in C++ (csrc/adaln): compiled CPU kernels, forward and backward.

Residual, activation and modulation dtypes are fp32, bf16 or fp16 in any mix; statistics and sums
are fp32, with one rounding at the store. Each Function saves its inputs and (2, B, N) of fp32
mean and 1/std, nothing of size (B, N, D) besides x (or x_new). Results do not depend on the
number of threads. Operands are read in place through their strides; one whose last dimension is
itself strided is copied first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixart_kernels import _extension
from pixart_kernels.adaln.reference import Gate, Modulation, activation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_ops = torch.ops.pixart_kernels
# the overloads, resolved once: an attribute look-up for each call costs as much as a small kernel
if _extension.problem is None:
    _adaln_single_fwd = _ops.adaln_single_fwd.default
    _adaln_single_bwd = _ops.adaln_single_bwd.default
    _adaln_modulate_fwd = _ops.adaln_modulate_fwd.default
    _adaln_modulate_bwd = _ops.adaln_modulate_bwd.default
    _gated_residual_fwd = _ops.gated_residual_fwd.default
    _gated_residual_bwd = _ops.gated_residual_bwd.default
    _gated_residual_adaln_fwd = _ops.gated_residual_adaln_fwd.default
    _gated_residual_adaln_bwd = _ops.gated_residual_adaln_bwd.default


def reason(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot run on ``x``, or None."""
    if _extension.problem is not None:
        return _extension.problem
    if x.device.type != "cpu":
        return f"native kernels run on the CPU and x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; native kernels take float32, bfloat16 and float16"
    return None


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)


def _dense(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("pixart_kernels::adaln_single_fwd")
    def _(x, table, t, shift_row, scale_row, eps):
        return _like(x, activation_dtype(x, t)), _stats(x)

    @fake("pixart_kernels::adaln_single_bwd")
    def _(dh, x, table, t, stats, shift_row, scale_row):
        return _dense(x), _dense(table), _dense(t)

    @fake("pixart_kernels::adaln_modulate_fwd")
    def _(x, shift, scale, eps):
        return _like(x, activation_dtype(x, shift)), _stats(x)

    @fake("pixart_kernels::adaln_modulate_bwd")
    def _(dh, x, shift, scale, stats):
        return _dense(x), _dense(shift), _dense(scale)

    @fake("pixart_kernels::gated_residual_fwd")
    def _(x, branch, table, t, gate_row):
        return _dense(x)

    @fake("pixart_kernels::gated_residual_bwd")
    def _(dx_new, branch, table, t, gate_row):
        return _dense(branch), _dense(table), _dense(t)

    @fake("pixart_kernels::gated_residual_adaln_fwd")
    def _(x, branch, gate_table, gate_t, gate_row, table, t, shift_row, scale_row, eps):
        return _dense(x), _like(x, activation_dtype(x, branch)), _stats(x)

    @fake("pixart_kernels::gated_residual_adaln_bwd")
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


if _extension.problem is None:
    _register_fakes()


class AdalnSingleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, t, shift_row, scale_row, eps):
        h, stats = _adaln_single_fwd(x, table, t, shift_row, scale_row, eps)
        ctx.save_for_backward(x, table, t, stats)
        ctx.rows = shift_row, scale_row
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return *_adaln_single_bwd(dh, *ctx.saved_tensors, *ctx.rows), None, None, None


class AdalnModulateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        h, stats = _adaln_modulate_fwd(x, shift, scale, eps)
        ctx.save_for_backward(x, shift, scale, stats)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return *_adaln_modulate_bwd(dh, *ctx.saved_tensors), None


class GatedResidualFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, table, t, gate_row):
        ctx.save_for_backward(branch, table, t)
        ctx.gate_row = gate_row
        return _gated_residual_fwd(x, branch, table, t, gate_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new):
        return dx_new, *_gated_residual_bwd(dx_new, *ctx.saved_tensors, ctx.gate_row), None


class GatedResidualAdalnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate_table, gate_t, gate_row, table, t, shift_row, scale_row, eps):
        x_new, h, stats = _gated_residual_adaln_fwd(
            x, branch, gate_table, gate_t, gate_row, table, t, shift_row, scale_row, eps
        )
        ctx.save_for_backward(x_new, branch, gate_table, gate_t, table, t, stats)
        ctx.rows = gate_row, shift_row, scale_row
        ctx.set_materialize_grads(False)
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new, dh):
        x_new, branch, gate_table, gate_t, table, t, stats = ctx.saved_tensors
        gate_row, shift_row, scale_row = ctx.rows
        if dh is None:
            dh = _like(x_new, activation_dtype(x_new, branch)).zero_()
        dx, dbranch, dgate_table, dgate_t, dtable, dt = _gated_residual_adaln_bwd(
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
        )
        if gate_t is None:
            dgate_table = dgate_t = None
            if branch.dtype == x_new.dtype:
                dbranch = dx
        return dx, dbranch, dgate_table, dgate_t, None, dtable, dt, None, None, None


def _differentiated(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _narrow(*tensors: Tensor) -> Any:
    """fp64 operands beside an x that is not are read as fp32, as the reference reads them."""
    return tuple(t.float() if t.dtype is torch.float64 else t for t in tensors)


def _distinct(*arguments: Any) -> tuple:
    """Under torch.compile, each tensor once: Dynamo refuses the same one twice in a Function.

    The usual case is one (table, t) pair that gives the gate and the next modulation.
    """
    if not torch.compiler.is_compiling():
        return arguments
    seen: list[Tensor] = []
    result: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if any(argument is tensor for tensor in seen):
                argument = argument.view_as(argument)
            seen.append(argument)
        result.append(argument)
    return tuple(result)


def adaln_single(
    x: Tensor, table: Tensor, t: Tensor, *, shift_row: int, scale_row: int, eps: float = 1e-6
) -> Tensor:
    table, t32 = _narrow(table, t)
    if _differentiated(x, table, t32):
        h = AdalnSingleFunction.apply(*_distinct(x, table, t32), shift_row, scale_row, eps)
    else:
        h = _adaln_single_fwd(x, table, t32, shift_row, scale_row, eps)[0]
    return h if t32 is t else h.to(activation_dtype(x, t))


def gated_residual(x: Tensor, branch: Tensor, table: Tensor, t: Tensor, *, gate_row: int) -> Tensor:
    branch, table, t = _narrow(branch, table, t)
    if _differentiated(x, branch, table, t):
        return GatedResidualFunction.apply(*_distinct(x, branch, table, t), gate_row)
    return _gated_residual_fwd(x, branch, table, t, gate_row)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    *,
    gate: Gate | None = None,
    modulation: Modulation,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    table, t, shift_row, scale_row = modulation
    branch32, table, t = _narrow(branch, table, t)
    gate_table: Tensor | None = None
    gate_t: Tensor | None = None
    gate_row = 0
    if gate is not None:
        gate_table, gate_t, gate_row = gate
        gate_table, gate_t = _narrow(gate_table, gate_t)
    arguments = (
        x,
        branch32,
        gate_table,
        gate_t,
        gate_row,
        table,
        t,
        shift_row,
        scale_row,
        eps,
    )
    if _differentiated(x, branch32, gate_table, gate_t, table, t):
        x_new, h = GatedResidualAdalnFunction.apply(*_distinct(*arguments))
    else:
        x_new, h, _ = _gated_residual_adaln_fwd(*arguments)
    return x_new, h if branch32 is branch else h.to(activation_dtype(x, branch))


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    shift32, scale = _narrow(shift, scale)
    if _differentiated(x, shift32, scale):
        h = AdalnModulateFunction.apply(*_distinct(x, shift32, scale), eps)
    else:
        h = _adaln_modulate_fwd(x, shift32, scale, eps)[0]
    return h if shift32 is shift else h.to(activation_dtype(x, shift))
