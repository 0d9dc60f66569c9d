"""Runs the quickstart from nothing with several seeds: ``python -m benchmarks quickstart``.

Writes ``benchmarks/results/cpu/quickstart.jsonl``, one line for each run: retrieval and control,
seconds by stage, and how many cores other processes kept busy meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, environment, write
from benchmarks.timing import busy_seconds
from pixart.quickstart import quickstart


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks quickstart", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args(argv).seeds
    about = environment(torch.device("cpu"))
    rows: list[dict] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
            quickstart(Path(folder), seed=seed)
            wall = time.perf_counter() - start
            foreign = (busy_seconds() - busy - (time.process_time() - own)) / wall
            report = json.loads((Path(folder) / "report.json").read_text())
        rows.append({"seed": seed, **report, "foreign_cores": round(foreign, 2), **about})
        write(RESULTS / "cpu" / "quickstart.jsonl", rows)
