"""Bytes that a step holds at its peak, and between its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda import peak_bytes


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes live after each allocation and release of a call, relative to its beginning.

    The profiler hears of all that passes through torch's CPU allocator: eager, compiled code, and
    scratch inside C++ ops. It does not hear of oneDNN's own scratch.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _held = call()  # so that what it returns counts as live at the end
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = [0]
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live.append(live[-1] + nbytes)
    return live


def step_memory(
    forward: Callable[[], tuple], backward: Callable[[tuple], object], device: torch.device
) -> dict[str, int]:
    """``saved``: what ``forward`` leaves behind, outputs included; ``peak``: of the whole step.

    Run once before this, or buffers that live for ever are counted too.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        outputs = forward()
        saved = torch.cuda.memory_allocated() - before
        del outputs
        return {"saved": saved, "peak": peak_bytes(lambda: backward(forward()))}
    saved = _allocations(forward)[-1]
    return {"saved": saved, "peak": max(_allocations(lambda: backward(forward())))}
