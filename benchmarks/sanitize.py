"""Every kernel once, forward and backward, at awkward shapes: what a memory checker is run on.

``compute-sanitizer --tool racecheck python -m benchmarks.sanitize``; without a GPU it runs the
CPU's kernels, for a checker of CPUs. Says nothing of results: the tests do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import pixart_kernels as pk
from benchmarks import kv_compression
from benchmarks.providers import leaves_of
from benchmarks.registry import BF16, FAMILIES, FP32, MIXED, Case, Outputs
from pixart_kernels import dispatch

# one token; an odd number of rows; a width that no vector divides; nothing at all
SHAPES = ((1, 1, 1152), (3, 7, 1152), (2, 33, 136), (2, 5, 37), (2, 0, 64))
# of weights: one row, one column, tiles' edges, a convolution, a vector of several blocks
WEIGHTS = ((1, 1152), (37, 1), (33, 136), (5, 1, 2, 2), (1153,))
# samples, queries, keys: one; past a tile of either; a short tile of both; nothing to attend to
LENGTHS = ((1, 1, 1), (2, 257, 257), (1, 130, 33), (2, 5, 0))
HEADS, HEAD_DIM = 3, 72


class Call(NamedTuple):
    op: str
    facts: dict[str, int]  # what a backend's reason needs besides the first tensor
    function: Callable[..., Outputs]  # function(backend, *tensors)
    tensors: list[Tensor]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    def attention(backend: str, *qkv: Tensor) -> Outputs:
        return (pk.attention(*qkv, backend=backend),)

    def self_attention(backend: str, qkv: Tensor) -> Outputs:
        return (pk.self_attention(qkv, HEADS, backend=backend),)

    facts = {"head_dim": HEAD_DIM}
    if q.shape != k.shape:
        return Call("attention", facts, attention, [q, k, v])
    packed = torch.stack([q, k, v], 2).flatten(2)
    return Call("self_attention", facts, self_attention, [packed])


def _cross_attention(q: Tensor, kv: Tensor) -> Call:
    """All text for the first sample, none for a second."""
    lengths = torch.tensor([kv.shape[1], 0][: len(q)], dtype=torch.int32, device=q.device)

    def cross_attention(backend: str, q: Tensor, kv: Tensor) -> Outputs:
        return (pk.cross_attention(q, kv, lengths, backend=backend),)

    return Call("cross_attention", {"head_dim": HEAD_DIM}, cross_attention, [q, kv])


def _came_step(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Call:
    """Three weights; there is nothing to differentiate."""
    sizes = {"exp_avg": shape}
    if len(shape) < 2:
        sizes["exp_avg_sq"] = shape
    else:
        sizes |= {f"exp_avg_{kind}_row": shape[:-1] for kind in ("sq", "res")}
        sizes |= {f"exp_avg_{kind}_col": shape[:-2] + shape[-1:] for kind in ("sq", "res")}

    def came_step(backend: str, *weights: Tensor) -> Outputs:
        weights = [w.detach() for w in weights]
        state = {
            name: [torch.zeros(s, device=device) for _ in weights] for name, s in sizes.items()
        }
        settings = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}
        settings |= {"clip_threshold": 1.0, "weight_decay": 0.1, "backend": backend}
        pk.came_step(weights, [torch.randn_like(w) for w in weights], state, **settings)
        return ()

    weights = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]
    return Call("came_step", {}, came_step, weights)


def calls(device: torch.device) -> Iterator[Call]:
    ops = {case.op.name: case.op for family in FAMILIES.values() for case in family(device.type)}
    for op in ops.values():
        for precision in (FP32, BF16, MIXED):
            for shape in SHAPES:
                yield Call(op.name, {}, op.call, Case(op, shape, precision).inputs(device))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in WEIGHTS:
            yield _came_step(shape, dtype, device)
        for B, Nq, Nk in LENGTHS:
            sizes = ((B, N, HEADS, HEAD_DIM) for N in (Nq, Nk, Nk))
            yield _attention(*(torch.randn(size, dtype=dtype, device=device) for size in sizes))
        # past 2048 queries, partial sums of dk and dv are folded
        for B, N, L in (*LENGTHS, (1, 2049, 33)):
            q = torch.randn(B, N, HEADS, HEAD_DIM, dtype=dtype, device=device)
            kv = torch.randn(B, L, 2, HEADS, HEAD_DIM, dtype=dtype, device=device)
            yield _cross_attention(q, kv)
    for side in (2, 5):
        case = Case(kv_compression.OP, (2, side, side, 1152), BF16)
        yield Call("compress_kv", {}, kv_compression.OP.call, case.inputs(device))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ran = 0
    for call in calls(device):
        for backend in dispatch.PRIORITY:
            leaves = leaves_of(call.tensors)
            reason = dispatch.why_not(call.op, backend, leaves[0], **call.facts)
            if backend == "reference" or reason is not None:
                continue
            outputs = call.function(backend, *leaves)
            if outputs:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
            ran += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} calls, forward and backward, on {device}")
    if ran == 0:
        sys.exit("no kernel can run here: python -m pixart_kernels.doctor says why")


if __name__ == "__main__":
    main()
