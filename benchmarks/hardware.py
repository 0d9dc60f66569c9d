"""All that a GPU can prove, in one command: ``python -m benchmarks hardware --budget 540``.

Whether the kernels can run at all, the tests that need a GPU, compute-sanitizer over every kernel,
then the timings. A stage that fails does not hide the next; the exit status says whether any did.
Everything goes to ``benchmarks/results/<device>/``: ``hardware.jsonl`` has a line for each stage
with the end of its output, beside the timings' own files. ``--stages`` runs some of the stages and
keeps the lines of the others; ``--resume`` keeps what timings were measured of this commit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import environment, folder, read, write
from benchmarks.timing import Budget

ROOT = Path(__file__).parents[1]
TAIL = 4000  # characters of output worth keeping
MARGIN = 60.0  # seconds a timing stage needs beyond its budget: imports, the case begun last
# a caching allocator hands out parts of large blocks, where an overrun is not one to the checker
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    environment: dict[str, str]
    weight: int  # its part of the time, against those of the stages after it
    timed: bool = False  # takes --budget


def stages(output: Path, resume: bool = False) -> list[Stage]:
    python = sys.executable
    # a toolkit's installer does not put it on the path
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

    def sanitizer(tool: str) -> Stage:
        command = [checker, "--tool", tool, "--error-exitcode", "1"]
        # torch probes the driver in ways that count as API errors
        command += ["--report-api-errors", "no", python, "-m", "benchmarks.sanitize"]
        return Stage(tool, command, UNCACHED, 2)

    def timings(name: str, *arguments: str, weight: int) -> Stage:
        command = [python, "-m", "benchmarks", *arguments, "--device", "cuda"]
        return Stage(name, [*command, "--output", str(output)], {}, weight, timed=True)

    def family(name: str, weight: int) -> Stage:
        return timings(name, "run", "--op", name, *["--resume"] * resume, weight=weight)

    def tests(name: str, *arguments: str) -> Stage:
        command = [python, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors"]
        # a signal does not reach a process that waits for a kernel without an end
        command += ["--timeout=120", "--timeout-method=thread"]
        return Stage(name, [*command, *arguments], {}, 4)

    # in a process of its own: these kernels wait for copies, without end if one never comes
    waiting = "tests/pixart_kernels/attention/test_attention_cuda.py"
    return [
        # twice a doctor's time, because the first import of torch reads a cold disk
        Stage("kernels", [python, "-m", "benchmarks.kernels"], {}, 2),
        Stage("doctor", [python, "-m", "pixart_kernels.doctor"], {}, 1),
        # what there is to beat, before a kernel of ours that has never run can hang
        family("attention-rivals", weight=6),
        # not all of tests/: collecting the rest imports packages that a GPU machine may lack
        tests("tests", f"--ignore={waiting}", "tests/test_gpu.py", "tests/pixart_kernels"),
        tests("attention-tests", waiting),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        family("adaln", weight=6),
        family("mlp", weight=1),
        family("attention", weight=6),
        family("cross_attention", weight=2),
        family("kv_compression", weight=1),
        timings("optimizer", "optimizer", *["--resume"] * resume, weight=1),
        timings("block", "block", weight=3),
        timings("model", "model", *["--resume"] * resume, weight=6),
        timings("generation", "generation", *["--resume"] * resume, weight=8),
        timings("conditioning", "conditioning", *["--resume"] * resume, weight=2),
    ]


def run_stage(stage: Stage, seconds: float) -> dict:
    """Runs a stage for at most ``seconds``: its outcome, and the end of what it printed."""
    command, start = list(stage.command), time.perf_counter()
    if stage.timed:
        command += ["--budget", f"{max(1.0, seconds - MARGIN):.0f}"]
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **stage.environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be stopped with all its children
        )
    except OSError as error:
        printed, outcome = b"", f"did not start: {error}"
    else:
        try:
            printed, _ = process.communicate(timeout=seconds)
            status = process.returncode
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            outcome = f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return {
        "stage": stage.name,
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "command": command,
        "output": printed.decode(errors="replace")[-TAIL:],
    }


def run_all(several: list[Stage], seconds: float) -> list[dict]:
    """A row for each stage, whatever became of those before it."""
    budget = Budget(seconds, sum(stage.weight for stage in several))
    rows = []
    for stage in several:
        row = run_stage(stage, budget.share(stage.weight))
        if row["outcome"] != "passed":
            print(row["output"])
        print(f"{stage.name}: {row['outcome']}, {row['seconds']} s", flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{row['stage']:<16} {row['seconds']:>7.1f} s  {row['outcome']}" for row in rows]
    return "\n".join(["", *lines])


def merged(file: Path, rows: list[dict]) -> list[dict]:
    """``rows``, and those of ``file`` for stages that ``rows`` lacks, in the stages' order."""
    found = {row["stage"]: row for row in (*read(file), *rows)}
    return [found[stage.name] for stage in stages(file.parent) if stage.name in found]


def main(argv: list[str]) -> None:
    names = [stage.name for stage in stages(Path())]
    parser = argparse.ArgumentParser(
        "python -m benchmarks hardware", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument(
        "--stages",
        type=lambda text: text.split(","),
        default=names,
        help=f"some of them, separated by commas; default: {','.join(names)}",
    )
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--resume", action="store_true", help="keep timings of this commit")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.stages if name not in names]
    if unknown:
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; see docs/hardware.md for what was proven without one")
    device = torch.device("cuda")
    output = (arguments.output or folder(device)).resolve()
    about = environment(device)
    every = stages(output, arguments.resume)
    several = [stage for stage in every if stage.name in arguments.stages]
    rows = run_all(several, arguments.budget)
    file = output / "hardware.jsonl"
    write(file, merged(file, [{**row, **about} for row in rows]))
    print(table(rows))
    sys.exit(any(row["outcome"] != "passed" for row in rows))
