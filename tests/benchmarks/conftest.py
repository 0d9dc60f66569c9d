"""A folder of results, and a stand-in for the GPU to test its timing on any machine."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from benchmarks import cuda, tables


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A folder that tables link to as if it were the repository."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


class Graph:
    """Stands in for a CUDA graph, whose replays are counted."""

    replays = 0

    def pool(self) -> None: ...

    def replay(self) -> None:
        Graph.replays += 1


class Event:
    """Each one that is recorded is 6 ms after the last."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        Event.now += 6.0
        self.at = Event.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Stream:
    def __enter__(self): ...
    def __exit__(self, *error): ...
    def wait_stream(self, other) -> None: ...


@pytest.fixture
def fake_gpu(monkeypatch) -> type[Graph]:
    """A call takes 7 bytes at its peak; the L2 cache has 1 KiB; work runs when it is captured."""
    fake = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (2**20, 2**30),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 5,
        "memory_reserved": lambda: 5,
        "max_memory_allocated": lambda: 12,
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=2**10),
    }
    for name, stand_in in fake.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda, "REPLAY_BYTES", 2**13)
    monkeypatch.setattr(cuda, "gpu_state", lambda device: {"clocks.sm": "1 MHz"})
    monkeypatch.setattr(cuda, "_captured", lambda work, *_: (Graph(), work()))
    monkeypatch.setattr(cuda, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(Graph, "replays", 0)
    return Graph
