"""What is timed: ops at their shapes and precisions, and the bytes that each pass must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pixart_kernels as pk

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Precision:
    """dtypes of the residual stream and of everything else that has a batch dimension."""

    name: str
    residual: torch.dtype
    activations: torch.dtype


FP32 = Precision("float32", torch.float32, torch.float32)
BF16 = Precision("bfloat16", torch.bfloat16, torch.bfloat16)
MIXED = Precision("float32+bfloat16", torch.float32, torch.bfloat16)

# where the cost of the call itself is all there is
TINY = (1, 4, 64)
# a GPU's two passes are timed apart, because each has its own floor
PASSES = {"cpu": ("forward", "forward+backward"), "cuda": ("forward", "backward")}


@dataclass(frozen=True)
class Traffic:
    """What a pass cannot avoid: ``streams`` has a letter for each tensor of x's shape, read or
    written, ``r`` in the residual's dtype and ``a`` in the activations'; ``rows`` counts vectors
    of modulation or bias, read or written. Saved statistics are no part of it: they could be
    computed again.
    """

    streams: str
    rows: int


@dataclass(frozen=True)
class Op:
    name: str
    inputs: Callable[[tuple[int, ...], Precision, torch.Generator], list[Tensor]]
    call: Callable[..., Outputs]  # call(backend, *inputs)
    row_bytes: Callable[[tuple[int, ...], Precision], int]
    forward: Traffic
    backward: Traffic


@dataclass(frozen=True)
class Case:
    op: Op
    shape: tuple[int, ...]
    precision: Precision

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return self.op.inputs(self.shape, self.precision, generator)

    def bytes_moved(self, which: str) -> int:
        """Bytes of one pass if every tensor crossed the memory bus once."""
        passes = {"forward": [self.op.forward], "backward": [self.op.backward]}
        passes["forward+backward"] = passes["forward"] + passes["backward"]
        dtypes = {"r": self.precision.residual, "a": self.precision.activations}
        elements = torch.Size(self.shape).numel()
        row = self.op.row_bytes(self.shape, self.precision)
        return sum(
            elements * sum(dtypes[letter].itemsize for letter in traffic.streams)
            + traffic.rows * row
            for traffic in passes[which]
        )

    def about(self) -> dict:
        return {"op": self.op.name, "shape": list(self.shape), "dtype": self.precision.name}


ROWS = 6


def _tokens(shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _table_and_t(shape, precision: Precision, generator: torch.Generator) -> list[Tensor]:
    B, _, D = shape
    # the learned table stays fp32 when activations are 16-bit
    table = _tokens((ROWS, D), torch.float32, generator) / D**0.5
    return [table, _tokens((B, ROWS * D), precision.activations, generator)]


def _composed_row(shape, precision: Precision) -> int:
    B, _, D = shape
    return D * (torch.float32.itemsize + B * precision.activations.itemsize)


def _plain_row(shape, precision: Precision) -> int:
    B, _, D = shape
    return D * B * precision.activations.itemsize


def _x(shape, precision, generator) -> list[Tensor]:
    x = _tokens(shape, precision.residual, generator)
    return [x, *_table_and_t(shape, precision, generator)]


def _x_and_branch(shape, precision, generator) -> list[Tensor]:
    x = _tokens(shape, precision.residual, generator)
    branch = _tokens(shape, precision.activations, generator)
    return [x, branch, *_table_and_t(shape, precision, generator)]


def _x_shift_scale(shape, precision, generator) -> list[Tensor]:
    x, _, t = _x(shape, precision, generator)
    D = shape[-1]
    # views, as one linear layer hands them to DiT's blocks
    return [x, t[:, :D], t[:, D : 2 * D]]


def _adaln_single(backend, x, table, t) -> Outputs:
    return (pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend=backend),)


def _adaln_modulate(backend, x, shift, scale) -> Outputs:
    return (pk.adaln_modulate(x, shift, scale, backend=backend),)


def _gated_residual(backend, x, branch, table, t) -> Outputs:
    return (pk.gated_residual(x, branch, table, t, gate_row=2, backend=backend),)


def _gated_residual_adaln(backend, x, branch, table, t) -> Outputs:
    return pk.gated_residual_adaln(
        x, branch, gate=(table, t, 2), modulation=(table, t, 3, 4), backend=backend
    )


ADALN = [
    # x -> h; dh, x -> dx. The backward reads one row, the scale, and writes every row's gradient
    Op(
        "adaln_single", _x, _adaln_single, _composed_row, Traffic("ra", 2), Traffic("arr", 1 + ROWS)
    ),
    Op(
        "gated_residual_adaln",
        _x_and_branch,
        _gated_residual_adaln,
        _composed_row,
        Traffic("rara", 3),  # x, branch -> x_new, h
        Traffic("rarara", 2 + ROWS),  # dx_new, dh, x_new, branch -> dx, dbranch
    ),
    Op(
        "gated_residual",
        _x_and_branch,
        _gated_residual,
        _composed_row,
        Traffic("rar", 1),  # x, branch -> x_new
        Traffic("raa", 1 + ROWS),  # dx_new, branch -> dbranch; dx is dx_new itself
    ),
    Op(
        "adaln_modulate",
        _x_shift_scale,
        _adaln_modulate,
        _plain_row,
        Traffic("ra", 2),
        Traffic("arr", 3),
    ),
]


def _x_and_bias(shape, precision, generator) -> list[Tensor]:
    return [_tokens(size, precision.activations, generator) for size in (shape, shape[-1:])]


def _bias_gelu(backend, x, bias) -> Outputs:
    return (pk.bias_gelu(x, bias, backend=backend),)


MLP = [
    Op(
        "bias_gelu",
        _x_and_bias,
        _bias_gelu,
        lambda shape, precision: shape[-1] * precision.activations.itemsize,
        Traffic("aa", 1),  # x -> y
        Traffic("aaa", 2),  # dy, x -> dx
    )
]


def _adaln(device: str) -> list[Case]:
    if device == "cpu":
        # the training shapes of 256px and 512px; then 512px at batch 2, and a small model's width
        shapes = [(8, 256, 1152), (8, 1024, 1152), (2, 1024, 1152), (4, 1024, 384)]
        order = [
            (p, shape) for pair in (shapes[:2], shapes[2:]) for p in (FP32, BF16) for shape in pair
        ]
        tiny = FP32
    else:
        shapes = [(8, 4096, 1152), (32, 4096, 1152), (8, 1024, 1152), (1, 1024, 1152)]
        order = [(p, shape) for shape in [*shapes, (8, 4096, 384)] for p in (BF16, MIXED)]
        tiny = BF16
    return [Case(op, shape, p) for p, shape in [*order, (tiny, TINY)] for op in ADALN]


def _mlp(device: str) -> list[Case]:
    # the hidden width of XL/2
    tokens = (2048, 8192) if device == "cpu" else (32768, 131072, 8192, 1024)
    precisions = (FP32, BF16) if device == "cpu" else (BF16,)
    order = [(p, (count, 4608)) for p in precisions for count in tokens]
    return [Case(op, shape, p) for p, shape in [*order, (precisions[0], TINY)] for op in MLP]


FAMILIES: dict[str, Callable[[str], list[Case]]] = {"adaln": _adaln, "mlp": _mlp}
"""Cases of a family on "cpu" or "cuda", the most important first."""
