"""Timing on a machine that others may be using: interleaved rounds, kept only while it was quiet.

Providers take turns call by call, so that a neighbour slows all of them alike; a round during
which other processes used more than ``MAX_FOREIGN`` of a core is measured again.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch

MAX_FOREIGN = 0.08  # cores' worth of other processes' time that a kept round may contain
ROUND_SECONDS = 0.5  # /proc/stat counts in hundredths of a second
PAUSE_SECONDS = 1.0
MIN_ROUNDS, ROUNDS = 3, 5
MIN_CALLS = 15  # a median of fewer is worth little; slow calls take more rounds for it


class Budget:
    """Seconds shared by parts that come in order of importance; what one leaves, the rest share."""

    def __init__(
        self, seconds: float, parts: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._parts = clock, parts
        self._deadline = clock() + seconds

    def share(self, parts: int = 1) -> float:
        """Seconds for the next ``parts``; 0 when none are left."""
        share = max(0.0, self._deadline - self._clock()) * parts / self._parts
        self._parts -= parts
        return share


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over all samples; or how many times as fast as the first call."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
        return cls(statistics.median(times), deciles[1], deciles[7], len(times))


@dataclass
class Measurement:
    threads: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    # turn by turn, which a machine's slow changes do not touch
    speedups: dict[str, Timing] = field(default_factory=dict)
    quiet: bool = True  # no kept round was disturbed
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
    calls: Mapping[str, Callable[[], object]], own: Callable[[], float]
) -> tuple[dict[str, list[float]], float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    busy, own_before, start = busy_seconds(), own(), time.perf_counter()
    while time.perf_counter() - start < ROUND_SECONDS:
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - before))
    wall = time.perf_counter() - start
    foreign = (busy_seconds() - busy - (own() - own_before)) / wall
    return times, foreign


def measure(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 60.0,
    repeats: int = 1,
    warm_ups: int = 2,
    own: Callable[[], float] = lambda: time.process_time(),
) -> Measurement:
    """Times ``calls``, each of which does its work ``repeats`` times, by the wall clock.

    ``own`` says what CPU seconds the calls and this process have used: whatever else the machine
    is busy with is foreign.

    Ends when ``ROUNDS`` quiet rounds with ``MIN_CALLS`` of each are kept or, with at least
    ``MIN_ROUNDS``, when ``seconds`` are over. Where quiet rounds are too few, the least disturbed
    ones fill the rest: ``foreign_cores`` tells.
    """
    deadline = time.perf_counter() + seconds
    for call in calls.values():
        for _ in range(warm_ups):
            call()
    kept: list[tuple[dict[str, list[float]], float]] = []
    disturbed: list[tuple[dict[str, list[float]], float]] = []

    def enough() -> bool:
        calls_kept = sum(len(next(iter(times.values()))) for times, _ in kept)
        return len(kept) >= ROUNDS and calls_kept >= MIN_CALLS

    while not enough():
        if time.perf_counter() > deadline and len(kept) + len(disturbed) >= MIN_ROUNDS:
            disturbed.sort(key=lambda item: item[1])
            kept += disturbed[: max(0, MIN_ROUNDS - len(kept))]
            break
        found = _round(calls, own)
        if found[1] <= MAX_FOREIGN:
            kept.append(found)
        else:
            disturbed.append(found)
            time.sleep(min(PAUSE_SECONDS, max(0.0, deadline - time.perf_counter())))
    result = Measurement(torch.get_num_threads(), rounds=len(kept))
    result.quiet = all(foreign <= MAX_FOREIGN for _, foreign in kept)
    result.foreign_cores = round(max(foreign for _, foreign in kept), 3)
    result.discarded = len(disturbed) - sum(foreign > MAX_FOREIGN for _, foreign in kept)
    for name in calls:
        samples = [t / repeats for times, _ in kept for t in times[name]]
        result.timings[name] = Timing.of(samples)
        first = next(iter(calls))
        pairs = [pair for times, _ in kept for pair in zip(times[first], times[name], strict=True)]
        result.speedups[name] = Timing.of([slow / fast for slow, fast in pairs])
    return result
