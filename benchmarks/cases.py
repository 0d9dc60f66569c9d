"""Benchmarks of a few long cases: each timed in its share of a budget, and recorded at once."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from rich.progress import track

from benchmarks.environment import environment, folder, write
from benchmarks.providers import in_short
from benchmarks.registry import PASSES
from benchmarks.run import measured_before
from benchmarks.timing import Budget


class Case(Protocol):
    def about(self) -> dict:
        """What tells it from others, in its row."""
        ...


AnyCase = TypeVar("AnyCase", bound=Case)
# of a case, on a device, in a dtype, within so many seconds: what its row says besides
TimeCase = Callable[[AnyCase, torch.device, torch.dtype, float], dict]


def time_cases(
    cases: Sequence[AnyCase],
    time_case: TimeCase[AnyCase],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    save: Callable[[list[dict]], object] = lambda rows: None,
    needed: float = 0.0,
) -> list[dict]:
    """A row for each case, whether it was measured or not.

    A case that has begun is finished, and none begins with fewer than ``needed`` seconds left; it
    has as many where its share is less. After each one ``save`` is given the rows as they would be
    if this were the last one.
    """
    rows = [{**case.about(), "not_measured": "was stopped"} for case in cases]
    budget, deadline = Budget(seconds, len(cases)), time.perf_counter() + seconds
    for row, case in track(list(zip(rows, cases, strict=True)), description="timing"):
        share = budget.share()
        if deadline - time.perf_counter() <= needed:
            row["not_measured"] = f"{seconds:g} s were over"
        else:
            del row["not_measured"]
            try:
                row.update(time_case(case, device, dtype, max(share, needed)))
            except Exception as error:
                row["failed"] = in_short(error)
        save(rows)
    return rows


def command(
    argv: list[str],
    name: str,
    doc: str | None,
    cases: Callable[[str], Sequence[AnyCase]],
    time_case: TimeCase[AnyCase],
    budget: float,
    needed: Callable[[str], float] = lambda device: 0.0,
) -> None:
    """``python -m benchmarks NAME``: times ``cases(device's type)`` into ``NAME.jsonl``.

    Raises SystemExit, with 1 where a case failed.
    """
    description = (doc or "").splitlines()[0]
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=description)
    parser.add_argument("--device", default="cpu", choices=sorted(PASSES))
    parser.add_argument("--budget", type=float, default=budget, help="seconds for all cases")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument(
        "--resume", action="store_true", help="keep what was measured of this commit, here"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    about = {"dtype": str(dtype).removeprefix("torch."), **environment(device)}
    file = (arguments.output or folder(device)) / f"{name}.jsonl"
    earlier = measured_before(file, about) if arguments.resume else []

    def save(rows: list[dict]) -> None:
        # a case may have its own dtype
        write(file, [*earlier, *({**about, **row} for row in rows)])

    left = [
        case
        for case in cases(device.type)
        if not any(row.items() >= case.about().items() for row in earlier)
    ]
    rows = time_cases(left, time_case, device, dtype, arguments.budget, save, needed(device.type))
    print(f"{len(rows)} rows in {file}")
    sys.exit(any("failed" in row for row in rows))
