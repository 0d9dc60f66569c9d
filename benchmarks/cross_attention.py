"""Cross-attention's cases: texts of real lengths, against a mask over all tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor

import pixart_kernels as pk
from benchmarks import cuda
from benchmarks.providers import Provider, call_of, wrong
from benchmarks.registry import PASSES, Outputs
from benchmarks.timing import measure
from pixart_kernels import dispatch

H, D = 16, 72
MASKED = "masked SDPA"
# PixArt-Sigma's 300 tokens and PixArt-alpha's 120, filled and mostly not, with the single token of
# an empty prompt; and texts without padding. Lengths repeat over the batch.
TEXTS = (
    (300, (120, 20)),
    (300, (300,)),
    (120, (120,)),
    (120, (60, 1)),
    (77, (77,)),
    (20, (20,)),
)
# (images, image tokens), the most important first
IMAGES = {"cpu": ((2, 1024), (8, 256)), "cuda": ((8, 4096), (32, 1024), (2, 16384), (2, 4096))}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def bias_of(L: int, kv_lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L): diffusers makes it once per forward, for all blocks."""
    real = torch.arange(L, device=kv_lengths.device) < kv_lengths[:, None]
    return ((1 - real.to(dtype)) * -10000.0)[:, None]


def masked_sdpa(q: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
    """What diffusers runs in each block: all L tokens, -10000 added to the scores of padding."""
    B, heads = len(q), q.shape[2]
    mask = bias.repeat_interleave(heads, dim=0).view(B, heads, 1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, *kv.unbind(2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@dataclass(frozen=True)
class CrossCase:
    N: int
    L: int
    lengths: tuple[int, ...]
    dtype: torch.dtype

    def about(self) -> dict:
        shape = [len(self.lengths), self.N, self.L, H, D]
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "op": "cross_attention",
            "shape": shape,
            "lengths": list(self.lengths),
            "dtype": dtype,
        }

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """q (B, N, H, d) and kv (B, L, 2, H, d)."""
        generator = torch.Generator(device).manual_seed(seed)
        B = len(self.lengths)
        sizes = (B, self.N, H, D), (B, self.L, 2, H, D)
        return [
            torch.randn(size, generator=generator, device=device).to(self.dtype) for size in sizes
        ]

    def bytes_moved(self, which: str) -> int:
        """Of one pass, if each tensor crossed the memory bus once, and padding only as zeros."""
        B = len(self.lengths)
        images, texts, real = B * self.N, 2 * B * self.L, 2 * sum(self.lengths)
        # q, real kv -> out; dout, q, real kv -> dq, dkv
        passes = {"forward": 2 * images + real, "backward": 3 * images + real + texts}
        passes["forward+backward"] = sum(passes.values())
        return passes[which] * H * D * self.dtype.itemsize

    def providers(self, device: torch.device) -> dict[str, Provider]:
        kv_lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)

        def run(op: Callable[..., Tensor], **options: str) -> Provider:
            return lambda q, kv: (op(q, kv, kv_lengths, **options),)

        biases = {
            dtype: bias_of(self.L, kv_lengths, dtype) for dtype in (torch.float64, self.dtype)
        }

        def masked(q: Tensor, kv: Tensor) -> Outputs:
            return (masked_sdpa(q, kv, biases[q.dtype]),)

        eager = run(pk.cross_attention, backend="reference")
        compiled = torch.compile(eager, dynamic=False)
        found = {"eager": eager, "torch.compile": compiled, MASKED: masked}
        x = torch.empty(0, dtype=self.dtype, device=device)
        for backend in dispatch.PRIORITY:
            reason = dispatch.why_not("cross_attention", backend, x, head_dim=D)
            if backend != "reference" and reason is None:
                found[backend] = run(pk.cross_attention, backend=backend)
        return found


def time_case(case: CrossCase, device: torch.device, seconds: float) -> list[dict]:
    """A row for each pass; whoever is wrong by the tests' error rule is named and not timed."""
    deadline = time.perf_counter() + seconds
    torch._dynamo.reset()
    tensors, correct, incorrect = case.inputs(device), {}, {}
    providers = case.providers(device)
    terms = 4 * max(case.N, case.L) + 1  # a sum's, and those that its terms are made of
    for name, run in providers.items():
        problem = wrong(providers["eager"], run, tensors, terms)
        if problem is None:
            correct[name] = run
        else:
            incorrect[name] = problem
    rows = []
    passes = PASSES[device.type]
    for done, which in enumerate(passes):
        left = max(0.0, deadline - time.perf_counter()) / (len(passes) - done)
        if device.type == "cuda":
            measured = cuda.time_pass(case, correct, which, device, left)
        else:
            calls = {name: call_of(run, tensors, which) for name, run in correct.items()}
            measured = {"method": "eager calls, wall clock", **measure(calls, left).as_json()}
        about = {**case.about(), "pass": which, "bytes": case.bytes_moved(which)}
        rows.append({**about, "incorrect": incorrect, **measured})
    return rows


def _cases(device: str) -> list[CrossCase]:
    return [
        CrossCase(N, L, tuple(islice(cycle(lengths), B)), dtype)
        for B, N in IMAGES[device]
        for dtype in DTYPES[device]
        for L, lengths in TEXTS
    ]


FAMILIES: dict[str, Callable[[str], Sequence[CrossCase]]] = {"cross_attention": _cases}
