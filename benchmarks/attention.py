"""Attention: its cases, what is true of them, and their timing.

A case's q, k and v are (B, N, H, d). Every provider gets them in the layout it likes best, and
conversions are not timed: ours reads the packed projection in place, and its backward writes one.
Rates count the FLOPs of the true d, whatever a kernel pads it to: 4 B H Nq Nk d forward, 2.5 times
that backward.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import cuda
from benchmarks.attention_providers import Provider, for_cpu, for_gpu
from benchmarks.environment import gpu_state
from benchmarks.providers import call_of, in_short, leaves_of
from benchmarks.timing import Timing, measure
from pixart_kernels.testing import assert_within_eager_error

H = 16
TOKENS = 16384  # of all samples, where one is not longer
LENGTHS = (4096, 1024, 16384, 256)  # the most important first
LONGEST = 65536
OTHER_HEADS = (64, 128, 96, 80)
ROOF, ROOF_SIZE = "matmul", 8192
REPLAY_FLOPS = 2e11  # a third of a millisecond on an H100, beside which a launch is small
CHECKED_SCORES = 2**30  # more than this are not checked, but for two heads
SCORES_AT_ONCE = 2**26
PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class AttentionCase:
    op: str  # "self_attention" or "attention"
    B: int
    Nq: int
    Nk: int
    d: int
    dtype: torch.dtype
    ours: bool = True  # or rivals alone

    def flops(self, which: str) -> float:
        forward = 4 * self.B * H * self.Nq * self.Nk * self.d
        return forward * {"forward": 1, "backward": 2.5, "forward+backward": 3.5}[which]

    def about(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": self.op, "shape": [self.B, self.Nq, self.Nk, H, self.d], "dtype": dtype}

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """q, k, v and the output's gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(self.B, N, H, self.d, generator=generator, device=device).to(self.dtype)
            for N in (self.Nq, self.Nk, self.Nk, self.Nq)
        ]


def cases(device: str, ours: bool = True) -> list[AttentionCase]:
    def one(N: int, d: int = 72, shorter: int = 1) -> AttentionCase:
        op = "self_attention" if shorter == 1 else "attention"
        return AttentionCase(op, max(1, TOKENS // N), N, N // shorter, d, torch.bfloat16, ours)

    if device == "cpu":
        return [
            AttentionCase(op, 2, N, N // shorter, 72, dtype, ours)
            for N in (1024, 256, 64)
            for dtype in (torch.float32, torch.bfloat16)
            for op, shorter in (("self_attention", 1), ("attention", 4))
        ]
    return [
        *(one(N) for N in LENGTHS),
        # PixArt-Sigma's KV compression
        *(one(N, shorter=4) for N in LENGTHS[:3]),
        one(LONGEST),
        *(one(N, d) for d in OTHER_HEADS for N in LENGTHS),
        *(one(LONGEST, d) for d in OTHER_HEADS),
    ]


FAMILIES: dict[str, Callable[[str], list[AttentionCase]]] = {
    "attention": cases,
    # for a device where ours have never run, and could take the rest of a run with them
    "attention-rivals": lambda device: cases(device, ours=False),
}


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, low: torch.dtype | None = None
) -> dict[str, Tensor]:
    """out, dq, dk and dv of one head, (N, d) each, in float64.

    Or as eager PyTorch computes them in ``low``: in fp32, every step's result rounded.
    """
    work = torch.float64 if low is None else torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x if low is None else x.to(low).to(work)

    q, k, v, dout = (x.to(work) for x in (q, k, v, dout))
    scale = 1 / sqrt(q.shape[1])
    out, dq, dk, dv = map(torch.zeros_like, (q, q, k, v))
    rows = max(1, SCORES_AT_ONCE // len(k))
    for begin in range(0, len(q), rows):
        some = slice(begin, begin + rows)
        p = rounded(torch.softmax(rounded(rounded(q[some] @ k.T) * scale), dim=-1))
        out[some] = rounded(p @ v)
        dp = rounded(dout[some] @ v.T)
        ds = rounded(rounded(p * (dp - (p * dp).sum(-1, keepdim=True))) * scale)
        dq[some] = rounded(ds @ k)
        dk += ds.T @ q[some]
        dv += p.T @ dout[some]
    return {"out": out, "dq": dq, "dk": rounded(dk), "dv": rounded(dv)}


class Truth(NamedTuple):
    """out, dq, dk and dv of some heads, (heads, N, d) each, and as eager PyTorch has them."""

    samples: Tensor
    heads: Tensor
    exact: dict[str, Tensor]
    eager: dict[str, Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        """Those heads of a (B, N, H, d)."""
        return tensor[self.samples, :, self.heads]


def truth_of(tensors: list[Tensor]) -> Truth:
    """Of all heads or, where those are too many scores, of some: the first and the last among them.

    ``tensors``: q, k, v and dout.
    """
    B, Nq, heads, _ = tensors[0].shape
    count = min(B * heads, max(2, CHECKED_SCORES // (Nq * tensors[1].shape[1])))
    which = torch.linspace(0, B * heads - 1, count).round().long().to(tensors[0].device)
    truth = Truth(which // heads, which % heads, {}, {})
    each = list(zip(*(truth.of(tensor) for tensor in tensors), strict=True))
    for results, low in ((truth.exact, None), (truth.eager, tensors[0].dtype)):
        found = [by_hand(*head, low=low) for head in each]
        results |= {name: torch.stack([one[name] for one in found]) for name in found[0]}
    return truth


@dataclass(frozen=True)
class Problem:
    kind: str  # "cannot" or "incorrect": the row's key
    text: str


def _refusal(error: Exception, warned: list[warnings.WarningMessage]) -> Problem:
    """What an error says; PyTorch gives its backends' reasons as warnings."""
    said = in_short(error).partition(" The other backends here:")[0]
    first_lines = [(str(warning.message).splitlines() or [""])[0] for warning in warned]
    why = dict.fromkeys(line.partition(" (Triggered internally")[0] for line in first_lines)
    return Problem("cannot", " ".join([said, *why]))


def problems(
    provider: Provider, tensors: list[Tensor], truth: Truth
) -> tuple[Problem | None, Problem | None]:
    """What is wrong with a provider's forward, and with its backward."""
    *inputs, dout = tensors
    layout = provider.layout
    terms = 4 * max(inputs[0].shape[1], inputs[1].shape[1]) + 1

    def wrong(**found: Tensor) -> Problem | None:
        broken = []
        for name, tensor in found.items():
            exact, eager = truth.exact[name], truth.eager[name].to(tensor.dtype)
            try:
                assert_within_eager_error(truth.of(tensor), exact, eager, terms=terms)
                assert tensor.isfinite().all(), "not finite in a head that is not compared"
            except AssertionError as error:
                broken.append(f"{name}: {error}")
        return Problem("incorrect", "; ".join(broken)) if broken else None

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with torch.no_grad():
                out = provider.run(*layout.pack(*inputs))
            forward = wrong(out=layout.heads(out))
        except Exception as error:
            forward = _refusal(error, warned)
        if forward is not None:
            return forward, forward
        try:
            leaves = leaves_of(layout.pack(*inputs))
            grads = torch.autograd.grad(provider.run(*leaves), leaves, layout.like_output(dout))
            dq, dk, dv = layout.unpack(*grads)
            return None, wrong(dq=dq, dk=dk, dv=dv)
        except Exception as error:
            return None, _refusal(error, warned)


def time_case(case: AttentionCase, device: torch.device, seconds: float) -> list[dict]:
    """A row for each pass; each names the providers that it has no time of, and why."""
    deadline = time.perf_counter() + seconds
    torch._dynamo.reset()
    everyone = (for_gpu if device.type == "cuda" else for_cpu)(case, H)
    able = {name: one for name, one in everyone.items() if isinstance(one, Provider)}
    absent = {n: Problem("cannot", why) for n, why in everyone.items() if isinstance(why, str)}
    tensors = case.inputs(device)
    truth = truth_of(tensors)
    found = {name: problems(provider, tensors, truth) for name, provider in able.items()}

    common = {**case.about(), "checked_heads": len(truth.heads)}
    common["default_sdpa"] = _default_sdpa(tensors)
    del tensors, truth
    on_gpu = device.type == "cuda"
    together = (PASSES[:1], PASSES[1:]) if on_gpu else (PASSES[:1], PASSES[2:])
    rows = []
    for done, passes in enumerate(together):
        bad = {name: both[done] for name, both in found.items() if both[done] is not None}
        fine = {name: provider for name, provider in able.items() if name not in bad}
        left = max(0.0, deadline - time.perf_counter()) / (len(together) - done)
        timer = _time_on_gpu if on_gpu else _time_on_cpu
        measured, failed = timer(case, fine, passes, device, left)
        for which in passes:
            row = {**common, "pass": which, "flops": case.flops(which)}
            row |= {"cannot": {}, "incorrect": {}}
            for name, problem in (absent | bad | failed).items():
                row[problem.kind][name] = problem.text
            rows.append({**row, **measured[which]})
    return rows


def _default_sdpa(tensors: list[Tensor]) -> str:
    """The backend that PyTorch picks where none is named."""
    heads = [tensor.transpose(1, 2).requires_grad_() for tensor in tensors[:3]]
    return SDPBackend(torch._fused_sdp_choice(*heads)).name


Measured = tuple[dict[str, dict], dict[str, Problem]]
"""Of each pass, and who failed."""


def _time_on_cpu(
    case: AttentionCase,
    able: dict[str, Provider],
    passes: tuple[str, ...],
    device: torch.device,
    seconds: float,
) -> Measured:
    *inputs, _ = case.inputs(device)
    found = {}
    for which in passes:
        calls = {
            name: call_of(provider.call, provider.layout.pack(*inputs), which)
            for name, provider in able.items()
        }
        measured = measure(calls, seconds / len(passes)).as_json()
        found[which] = {"method": "eager calls, wall clock", **measured}
    return found, {}


def calls_of_a_replay(case: AttentionCase, cache_bytes: int) -> int:
    """How many, each on other inputs: the caches are cold, and a launch is small beside them."""
    moved = 2 * case.B * H * case.d * case.dtype.itemsize * (case.Nq + case.Nk)
    return max(2, 2 * cache_bytes // moved + 1, ceil(REPLAY_FLOPS / case.flops("forward")))


def replay_of(
    provider: Provider, tensors: list[list[Tensor]], which: str
) -> tuple[cuda.Replay, int]:
    """A CUDA graph of the provider's calls, and the memory that one call needs at its peak.

    ``which``: "forward", or "backward", whose forward is timed too. Raises what the provider does,
    and MemoryError where the graph would not fit.
    """
    layout = provider.layout
    sets = [layout.pack(*several[:3]) for several in tensors]
    step = "forward" if which == "forward" else "forward+backward"
    peak = cuda.peak_bytes(call_of(provider.call, sets[0], step))
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free -= torch.cuda.memory_allocated()
    # what a graph's calls allocate lives as long as it
    if peak * len(sets) > free:
        raise MemoryError(f"{len(sets)} calls of {peak / 2**30:.1f} GiB do not fit")
    grads = [[layout.like_output(dout)] for *_, dout in tensors]
    return cuda.provider_replay(provider.call, sets, grads, which), peak


def _time_on_gpu(
    case: AttentionCase,
    able: dict[str, Provider],
    passes: tuple[str, ...],
    device: torch.device,
    seconds: float,
) -> Measured:
    """``passes``: "forward" alone, or both of the others."""
    count = calls_of_a_replay(case, torch.cuda.get_device_properties(device).L2_cache_size)
    tensors = [case.inputs(device, seed) for seed in range(count)]
    replays, peaks, failed = {}, {}, {}
    for name, provider in able.items():
        try:
            replays[name], peaks[name] = replay_of(provider, tensors, passes[0])
        except Exception as error:
            failed[name] = Problem("cannot", in_short(error))
        torch.cuda.empty_cache()
    replays[ROOF] = cuda.matmul_replay(ROOF_SIZE, case.dtype, device)
    before = gpu_state(device)
    times = cuda.take_turns(replays, seconds)
    row: dict = {"method": f"CUDA graph of {count} calls on different inputs"}
    row |= {"roof_flops": 2 * ROOF_SIZE**3, "peak_bytes": peaks}
    row["gpu"] = {"before": before, "after": gpu_state(device)}
    return {
        which: {**row, "timings": _timings(times, whole=which == "forward+backward")}
        for which in passes
    }, failed


def _timings(times: dict[str, list[tuple[float, float]]], whole: bool) -> dict[str, dict]:
    return {name: asdict(Timing.of([t[whole] for t in found])) for name, found in times.items()}
