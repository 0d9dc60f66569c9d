"""Runs the quickstart from nothing with several seeds: ``python -m benchmarks.quickstart``.

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

from benchmarks.run import environment
from benchmarks.timing import busy_seconds
from pixart.files import write_atomically
from pixart.quickstart import quickstart

RESULTS = Path(__file__).parent / "results" / "cpu" / "quickstart.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    about, rows = environment(torch.device("cpu")), []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
            quickstart(Path(folder), seed=seed)
            wall = time.perf_counter() - start
            foreign = (busy_seconds() - busy - (time.process_time() - own)) / wall
            report = json.loads((Path(folder) / "report.json").read_text())
        rows.append({"seed": seed, **report, "foreign_cores": round(foreign, 2), **about})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(RESULTS, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    main()
