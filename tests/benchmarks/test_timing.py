"""The clock's bookkeeping, with a machine that is as quiet as the test says."""

from __future__ import annotations

import pytest

from benchmarks import timing
from benchmarks.timing import MIN_ROUNDS, ROUNDS, Budget, Timing, measure


class Machine:
    """Time passes when something is called or sleeps; others use ``foreign`` cores meanwhile."""

    def __init__(self, monkeypatch, foreign) -> None:
        self.now = self.own = self.busy = 0.0
        self.foreign = foreign
        monkeypatch.setattr(timing, "busy_seconds", lambda: self.busy)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "process_time", lambda: self.own)
        monkeypatch.setattr(timing.time, "sleep", self.pass_by)

    def pass_by(self, seconds: float, own: float = 0.0) -> None:
        cores = self.foreign(self.now) if callable(self.foreign) else self.foreign
        self.now += seconds
        self.own += own
        self.busy += own + cores * seconds

    def call(self, seconds: float):
        return lambda: self.pass_by(seconds, own=seconds)


def test_budget_hands_on_what_a_part_leaves() -> None:
    now = 0.0
    budget = Budget(90.0, 4, clock=lambda: now)
    assert budget.share(2) == 45
    now = 30.0  # 15 s less than it was given
    assert budget.share() == 30
    now = 100.0
    assert budget.share() == 0


def test_timing_has_median_and_spread() -> None:
    found = Timing.of([float(value) for value in range(1, 100)])
    assert (found.median, found.p20, found.p80, found.calls) == (50, 20, 80, 99)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)


def test_calls_take_turns_and_repeats_are_divided_out(monkeypatch) -> None:
    machine = Machine(monkeypatch, foreign=0.0)
    measured = measure({"a": machine.call(0.02), "b": machine.call(0.04)}, 60, repeats=10)
    assert measured.quiet
    assert measured.rounds == ROUNDS
    assert measured.timings["a"].median == pytest.approx(2.0)
    assert measured.timings["b"].median == pytest.approx(4.0)
    assert measured.timings["a"].calls == measured.timings["b"].calls
    assert measured.speedups["a"].median == pytest.approx(1.0)
    assert measured.speedups["b"].median == pytest.approx(0.5)


def test_disturbed_rounds_are_measured_again(monkeypatch) -> None:
    machine = Machine(monkeypatch, foreign=lambda now: 1.0 if now < 3 else 0.0)
    measured = measure({"a": machine.call(0.1)}, 60)
    assert measured.quiet
    assert measured.rounds == ROUNDS
    assert measured.discarded > 0


def test_a_machine_that_is_never_quiet_is_said_to_be(monkeypatch) -> None:
    machine = Machine(monkeypatch, foreign=0.5)
    measured = measure({"a": machine.call(0.1)}, 20)
    assert machine.now < 25
    assert not measured.quiet
    assert measured.foreign_cores == 0.5
    assert measured.rounds == MIN_ROUNDS


@pytest.mark.parametrize("foreign", [0.0, 0.5])
def test_without_time_the_fewest_rounds_are_run(monkeypatch, foreign: float) -> None:
    machine = Machine(monkeypatch, foreign)
    measured = measure({"a": machine.call(0.1)}, 0.0)
    assert measured.rounds == MIN_ROUNDS
    assert measured.discarded == 0
