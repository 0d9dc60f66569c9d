"""Times every provider of an op family: ``python -m benchmarks run --op adaln --budget 600``.

Before anything is timed, each provider's outputs and gradients are held against the definition
in float64 with the tests' error rule; a provider that fails is reported and not timed. Results go
to ``benchmarks/results/<device>/<family>.jsonl``, one line for each op, shape, dtype and pass;
what failed or was not reached has a line too, that says so. The file is written after each case,
and ``--resume`` goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import attention, cross_attention, cuda, kv_compression, registry
from benchmarks.environment import environment, folder, read, write
from benchmarks.providers import call_of, correct_providers, in_short
from benchmarks.registry import PASSES, TINY, Case
from benchmarks.timing import Budget, measure

AnyCase = Case | attention.AttentionCase | cross_attention.CrossCase
FAMILIES: dict[str, Callable[[str], Sequence[AnyCase]]] = {
    **registry.FAMILIES,
    **attention.FAMILIES,
    **cross_attention.FAMILIES,
    **kv_compression.FAMILIES,
}


def time_case(case: AnyCase, device: torch.device, seconds: float) -> list[dict]:
    if isinstance(case, attention.AttentionCase):
        return attention.time_case(case, device, seconds)
    if isinstance(case, cross_attention.CrossCase):
        return cross_attention.time_case(case, device, seconds)
    deadline = time.perf_counter() + seconds
    tensors = case.inputs(device)
    correct, failures = correct_providers(case, tensors)
    graphs = device.type == "cuda" and case.shape != TINY
    passes = PASSES["cuda" if graphs else "cpu"]
    rows = []
    for done, which in enumerate(passes):
        left = max(0.0, deadline - time.perf_counter()) / (len(passes) - done)
        if graphs:
            measured = cuda.time_pass(case, correct, which, device, left)
        elif device.type == "cuda":
            measured = cuda.time_tiny(correct, tensors, which, left)
        else:
            calls = {name: call_of(run, tensors, which) for name, run in correct.items()}
            measured = {"method": "eager calls, wall clock", **measure(calls, left).as_json()}
        about = {**case.about(), "pass": which, "bytes": case.bytes_moved(which)}
        rows.append({**about, "incorrect": failures, **measured})
    return rows


def _summary(row: dict) -> str:
    about = [row["op"], "×".join(map(str, row["shape"])), row["dtype"], row.get("pass", "")]
    parts = [f"{word:<{width}}" for word, width in zip(about, (20, 13, 16, 16), strict=True)]
    if "timings" not in row:
        word = "failed" if "failed" in row else "not_measured"
        return "  ".join([*parts, f"{word.replace('_', ' ')}: {row[word]}"])
    for name, timing in row["timings"].items():
        parts.append(f"{name} {1e3 * timing['median']:.0f}")
    parts.append("µs")
    if not row.get("quiet", True):
        parts.append(f"(disturbed: {row['foreign_cores']:.2f} cores)")
    if row.get("cannot"):
        parts.append(f"(cannot: {', '.join(row['cannot'])})")
    parts += [f"WRONG {name}: {problem}" for name, problem in row["incorrect"].items()]
    return "  ".join(parts)


def run(
    cases: Sequence[AnyCase],
    device: torch.device,
    seconds: float,
    save: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """A row for each pass of the cases reached in ``seconds``, and one for each other case.

    A case that has begun is finished, so the last one may run over. After each case ``save`` is
    given the rows as they would be if this were the last one.
    """
    budget, rows = Budget(seconds, len(cases)), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        for index, case in enumerate(progress.track(cases, description="benchmarking")):
            share = budget.share()
            if share == 0:
                reason = f"{seconds:g} s were over"
                rows.append({**case.about(), "not_measured": reason})
                continue
            try:
                found = time_case(case, device, share)
            except Exception as error:
                found = [{**case.about(), "failed": in_short(error)}]
            for row in found:
                progress.console.print(_summary(row), highlight=False, soft_wrap=True)
            rows += found
            ahead = [{**c.about(), "not_measured": "was stopped"} for c in cases[index + 1 :]]
            save([*rows, *ahead])
    save(rows)
    left_out = [row for row in rows if "timings" not in row]
    if left_out:
        print(f"Not measured, {len(left_out)} of {len(cases)} cases:")
        print("\n".join(_summary(row) for row in left_out))
    return rows


def measured_before(file: Path, about: dict) -> list[dict]:
    """Timings in ``file`` of the same commit on the same device."""
    same = ("commit", "device")
    rows = read(file)
    return [r for r in rows if "timings" in r and all(r[key] == about[key] for key in same)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks run", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--op", required=True, choices=sorted(FAMILIES), help="op family")
    parser.add_argument("--device", default="cpu", choices=sorted(PASSES))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all cases")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument(
        "--resume", action="store_true", help="keep what was measured of this commit, here"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    about = environment(device)
    file = (arguments.output or folder(device)) / f"{arguments.op}.jsonl"
    earlier = measured_before(file, about) if arguments.resume else []

    def save(rows: list[dict]) -> None:
        write(file, [*earlier, *({**row, **about} for row in rows)])

    def is_new(case: AnyCase) -> bool:
        return not any(row.items() >= case.about().items() for row in earlier)

    cases = list(filter(is_new, FAMILIES[arguments.op](device.type)))
    rows = run(cases, device, arguments.budget, save)
    print(f"{len(rows)} rows in {file}")
    sys.exit(any("failed" in row for row in rows))
