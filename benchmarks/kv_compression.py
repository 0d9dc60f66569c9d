"""KV compression's cases: the keys and values of a packed projection, to a quarter of each."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

import pixart_kernels as pk
from benchmarks.registry import BF16, FP32, Case, Op, Outputs, Precision, Traffic

RATIO = 2
# (samples, height, width, D) of square grids, the most important first
SHAPES = {
    "cpu": [(2, 32, 32, 1152), (2, 64, 64, 1152)],
    "cuda": [(8, 64, 64, 1152), (2, 128, 128, 1152), (8, 32, 32, 1152), (1, 64, 64, 1152)],
}


def _inputs(shape, precision: Precision, generator: torch.Generator) -> list[Tensor]:
    B, height, width, D = shape

    def random(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=generator.device)
        return values.to(precision.activations)

    kv = random(B, height * width, 3, D)[:, :, 1:]
    return [kv, random(D, 1, RATIO, RATIO) / RATIO, random(D), random(D), random(D)]


def _compress_kv(backend: str, kv: Tensor, *parameters: Tensor) -> Outputs:
    side = isqrt(kv.shape[1])
    return (pk.compress_kv(kv, side, side, *parameters, ratio=RATIO, backend=backend),)


def _one_token_a_window(shape, precision: Precision) -> int:
    B, height, width, D = shape
    windows = (height // RATIO) * (width // RATIO)
    return B * windows * D * precision.activations.itemsize


# k and v are each of the shape's size, and a row is k or v of all windows. The parameters, 7 rows
# of D, are left out
OP = Op(
    "compress_kv",
    _inputs,
    _compress_kv,
    _one_token_a_window,
    Traffic("aa", 2),  # kv -> out
    Traffic("aaaa", 2),  # dout, kv -> dkv
)


def _cases(device: str) -> list[Case]:
    precisions = (FP32, BF16) if device == "cpu" else (BF16,)
    return [Case(OP, shape, precision) for shape in SHAPES[device] for precision in precisions]


FAMILIES: dict[str, Callable[[str], list[Case]]] = {"kv_compression": _cases}
