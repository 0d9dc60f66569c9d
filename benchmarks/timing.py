"""Timing on a CPU that others may be using: interleaved rounds, kept only while it was quiet.

Providers take turns call by call, so that a neighbour slows all of them alike; a round during
which other processes used more than ``MAX_FOREIGN`` of a core is measured again.

Two clocks. ``wall`` with all threads is what a user waits for and needs a quiet machine. ``cpu``
is the processor time of a single thread: what remains meaningful beside a busy neighbour, who
then costs shared cache and bandwidth alone; its rounds are kept whatever others do.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

MAX_FOREIGN = 0.08  # cores' worth of other processes' time that a kept round may contain
ROUND_SECONDS = 0.5  # /proc/stat counts in hundredths of a second
PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the kept calls."""

    median: float
    p20: float
    p80: float
    calls: int


@dataclass
class Measurement:
    clock: str = "wall"
    threads: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    quiet: bool = True  # no kept round was disturbed; the cpu clock does without
    foreign_cores: float = 0.0  # worst kept round
    rounds: int = 0
    discarded: int = 0

    def as_json(self) -> dict:
        return asdict(self)


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used since it started."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _round(
    calls: dict[str, Callable[[], object]], clock: Callable[[], float]
) -> tuple[dict[str, list[float]], float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    while time.perf_counter() - start < ROUND_SECONDS:
        for name, call in calls.items():
            before = clock()
            call()
            times[name].append(1e3 * (clock() - before))
    wall = time.perf_counter() - start
    foreign = (busy_seconds() - busy - (time.process_time() - own)) / wall
    return times, foreign


def measure(
    calls: dict[str, Callable[[], object]],
    clock: str = "wall",
    rounds: int = 5,
    patience: float = 60.0,
) -> Measurement:
    """Times ``calls`` until ``rounds`` quiet rounds are kept or ``patience`` seconds are over.

    When quiet rounds ran out, the least disturbed ones fill the rest: ``foreign_cores`` tells.
    """
    read, limit = time.perf_counter, MAX_FOREIGN
    if clock == "cpu":
        read, limit = time.process_time, math.inf
    for call in calls.values():
        call()
        call()
    kept: list[tuple[dict[str, list[float]], float]] = []
    disturbed: list[tuple[dict[str, list[float]], float]] = []
    deadline = time.perf_counter() + patience
    while len(kept) < rounds:
        found = _round(calls, read)
        if found[1] <= limit:
            kept.append(found)
            continue
        disturbed.append(found)
        if time.perf_counter() > deadline:
            disturbed.sort(key=lambda item: item[1])
            kept += disturbed[: rounds - len(kept)]
            break
        time.sleep(PAUSE_SECONDS)
    result = Measurement(clock, torch.get_num_threads(), rounds=len(kept))
    result.quiet = all(foreign <= MAX_FOREIGN for _, foreign in kept)
    result.foreign_cores = round(max(foreign for _, foreign in kept), 3)
    result.discarded = max(0, len(disturbed) - sum(f > limit for _, f in kept))
    for name in calls:
        times = sorted(t for round_times, _ in kept for t in round_times[name])
        quantiles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
        median = statistics.median(times)
        result.timings[name] = Timing(median, quantiles[1], quantiles[7], len(times))
    return result
