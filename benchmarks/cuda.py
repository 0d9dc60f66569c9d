"""Timing on a GPU: CUDA graphs over rotated inputs, so that launches and the L2 cache drop out.

A replay makes one call for each of several input sets, whose bytes exceed the cache many times
over; outputs are kept apart as well. Providers take turns, replay by replay. A copy of as many
bytes takes its turn among them: its rate is the roof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.environment import gpu_state
from benchmarks.providers import Provider, call_of, leaves_of
from benchmarks.timing import Timing, measure

REPLAY_BYTES = 2**30  # a third of a millisecond on an H100, beside which a launch is small
MIN_REPLAYS, MAX_REPLAYS = 10, 200
WARM_SECONDS = 0.2  # the first instants of load run at higher clocks than the rest
TINY_CALLS = 100
COPY = "copy"


def input_sets(bytes_per_call: int, cache_bytes: int) -> int:
    """How many input sets one replay rotates through to exceed twice the cache."""
    return max(2 * cache_bytes, REPLAY_BYTES) // bytes_per_call + 1


def _captured(work: Callable[[], object], stream: torch.cuda.Stream, pool=None):
    """The graph of ``work``, and its outputs. It writes to them, so they must live as long; and so
    must what it reads.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, pool=pool):
        outputs = work()
    return graph, outputs


Replay = Callable[[], tuple[float, float]]
"""Replays a graph: milliseconds per call, of the pass alone and of what must run before it too."""


def _replay(
    graph: torch.cuda.CUDAGraph, calls: int, kept: object, before: torch.cuda.CUDAGraph | None
) -> Replay:
    start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def replay(kept: object = kept) -> tuple[float, float]:
        start.record()
        if before is not None:
            before.replay()
        between.record()
        graph.replay()
        end.record()
        end.synchronize()
        return between.elapsed_time(end) / calls, start.elapsed_time(end) / calls

    return replay


def provider_replay(
    run: Provider, sets: list[list[Tensor]], out_grads: list[list[Tensor]], which: str
) -> Replay:
    """Of a call for each of ``sets``: "forward", or "backward" with the forward before it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    leaves = [leaves_of(tensors) for tensors in sets]
    # the first calls compile, tune and load modules, none of which can be captured
    with torch.cuda.stream(stream):
        for _ in range(3):
            if which == "forward":
                with torch.no_grad():
                    run(*sets[0])
            else:
                torch.autograd.grad(run(*leaves[0]), leaves[0], out_grads[0])
    torch.cuda.synchronize()
    if which == "forward":
        with torch.no_grad():
            graph, outputs = _captured(lambda: [run(*tensors) for tensors in sets], stream)
        return _replay(graph, len(sets), (leaves, outputs), None)
    # a backward frees what its forward saved, so each replay begins with a forward
    before, outputs = _captured(lambda: [run(*tensors) for tensors in leaves], stream)
    graph, grads = _captured(
        lambda: [
            torch.autograd.grad(*arguments)
            for arguments in zip(outputs, leaves, out_grads, strict=True)
        ],
        stream,
        before.pool(),
    )
    return _replay(graph, len(sets), (leaves, out_grads, outputs, grads), before)


def _copy_replay(bytes_per_call: int, count: int, device: torch.device) -> Replay:
    """A copy that reads half of the bytes and writes the other half."""
    parts = torch.empty((count, bytes_per_call // 2), dtype=torch.uint8, device=device).random_()
    graph, copies = _captured(lambda: [part.clone() for part in parts], torch.cuda.Stream())
    return _replay(graph, count, (parts, copies), None)


def matmul_replay(size: int, dtype: torch.dtype, device: torch.device) -> Replay:
    """Of one product of two square matrices."""
    factors = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
    return provider_replay(lambda a, b: (a @ b,), [factors], [], "forward")


def take_turns(replays: dict[str, Replay], seconds: float) -> dict[str, list[tuple[float, float]]]:
    """What each replay returned, over at least ``MIN_REPLAYS`` turns."""
    warm = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < warm:
        for replay in replays.values():
            replay()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in replays}
    deadline = time.perf_counter() + seconds
    for turn in range(MAX_REPLAYS):
        if turn >= MIN_REPLAYS and time.perf_counter() > deadline:
            break
        for name, replay in replays.items():
            times[name].append(replay())
    return times


def peak_bytes(call: Callable[[], object]) -> int:
    """Device memory that a call needs at its peak, beyond what was in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


class Case(Protocol):
    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]: ...
    def bytes_moved(self, which: str) -> int: ...


def time_pass(
    case: Case, correct: dict[str, Provider], which: str, device: torch.device, seconds: float
) -> dict:
    """One row's measurements, with the caches cold."""
    moved = case.bytes_moved(which)
    count = input_sets(moved, torch.cuda.get_device_properties(device).L2_cache_size)
    sets = [case.inputs(device, seed) for seed in range(count)]
    with torch.no_grad():
        outputs = [correct["eager"](*tensors) for tensors in sets]
    out_grads = [[torch.randn_like(output) for output in several] for several in outputs]
    del outputs
    row: dict = {"method": f"CUDA graph of {count} calls on different inputs"}
    if which == "backward":
        steps = {n: call_of(run, sets[0], "forward+backward") for n, run in correct.items()}
        row["peak_bytes"] = {name: peak_bytes(step) for name, step in steps.items()}
    replays = {n: provider_replay(run, sets, out_grads, which) for n, run in correct.items()}
    replays[COPY] = _copy_replay(moved, count, device)
    before = gpu_state(device)
    times = take_turns(replays, seconds)
    row["gpu"] = {"before": before, "after": gpu_state(device)}
    row["timings"] = {
        name: asdict(Timing.of([alone for alone, _ in found])) for name, found in times.items()
    }
    return row


def time_tiny(correct: dict[str, Provider], tensors: list[Tensor], which: str, seconds: float):
    """What a call costs the host: many of them before the device is waited for."""

    def many(call: Callable[[], object]) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(TINY_CALLS):
                call()
            torch.cuda.synchronize()

        return calls

    calls = {name: many(call_of(run, tensors, which)) for name, run in correct.items()}
    measured = measure(calls, seconds, repeats=TINY_CALLS).as_json()
    return {"method": f"{TINY_CALLS} eager calls, wall clock", **measured}
