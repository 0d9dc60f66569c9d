"""Compares tiles of self-attention at head_dim 72 on a GPU: ``python -m benchmarks tiles``.

Each tile is held against float64 first, and takes turns with the ones that ship. Prints tables, and
writes ``benchmarks/results/<device>/tiles.jsonl``, a line for each kernel and length; lines of
kernels that were not asked for stay.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks import cuda
from benchmarks.attention import (
    LENGTHS,
    TOKENS,
    AttentionCase,
    H,
    calls_of_a_replay,
    problems,
    replay_of,
    truth_of,
)
from benchmarks.attention_providers import ours
from benchmarks.environment import environment, folder, read, write
from benchmarks.providers import in_short
from benchmarks.timing import Budget, Timing
from pixart_kernels.attention import config

SHIPPED = "as shipped"
AT_ONCE = 8  # graphs, each with outputs of its own
SHOWN = 10
Tiles = dict[str, Callable[[], AbstractContextManager]]


@contextmanager
def _triton_tile(kernel: str, tile: config.Tile) -> Iterator[None]:
    tiles = config.tiles
    config.tiles = lambda *key: replace(tiles(*key), **{kernel: tile})
    try:
        yield
    finally:
        config.tiles = tiles


def _triton_tiles(kernel: str) -> Tiles:
    every = [
        # most likely ones first: what time is left for the rest is not known
        config.Tile(*numbers)
        for numbers in product((128, 64), (64, 128, 32), (8, 4), (2, 3, 4))
    ]
    return {
        f"{t.rows}x{t.columns}, {t.num_warps} warps, {t.num_stages} stages": partial(
            _triton_tile, kernel, t
        )
        for t in every
    }


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    # kernels read it at every call
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _cuda_tiles(variable: str, *names: str) -> Tiles:
    return {name: partial(_set, variable, name) for name in names}


# (backend, kernel) -> the pass it is timed in, and its tiles
KERNELS: dict[tuple[str, str], tuple[str, Tiles]] = {
    ("cuda", "forward"): (
        "forward",
        _cuda_tiles("PIXART_ATTENTION_TILE", "1x128", "2x128", "3x128", "2x176"),
    ),
    ("cuda", "backward"): (
        "backward",
        _cuda_tiles("PIXART_ATTENTION_BWD_TILE", "1x128", "2x128", "2x64"),
    ),
    ("triton", "forward"): ("forward", _triton_tiles("forward")),
    ("triton", "dq"): ("backward", _triton_tiles("dq")),
    ("triton", "dkdv"): ("backward", _triton_tiles("dkdv")),
}


def compare(backend: str, kernel: str, N: int, device: torch.device, seconds: float) -> dict:
    """A row: time and speed-up over what ships of each tile, or why it has none."""
    which, tiles = KERNELS[backend, kernel]
    case = AttentionCase("self_attention", max(1, TOKENS // N), N, N, 72, torch.bfloat16)
    provider = ours(case, H, backend)
    truth = truth_of(case.inputs(device))
    count = calls_of_a_replay(case, torch.cuda.get_device_properties(device).L2_cache_size)
    tensors = [case.inputs(device, seed) for seed in range(count)]
    row: dict = {**case.about(), "backend": backend, "kernel": kernel, "pass": which}
    row |= {"flops": case.flops(which), "timings": {}, "speedups": {}}
    row |= {"cannot": {}, "incorrect": {}, "not_measured": []}

    def prepared(names: list[str]) -> dict[str, cuda.Replay]:
        replays = {}
        for name in names:
            with tiles.get(name, nullcontext)():
                problem = problems(provider, tensors[0], truth)[which != "forward"]
                if problem is not None:
                    row[problem.kind][name] = problem.text
                    continue
                try:
                    replays[name], _ = replay_of(provider, tensors, which)
                except Exception as error:
                    row["cannot"][name] = in_short(error)
        return replays

    names = list(tiles)
    groups = [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]
    budget = Budget(seconds, len(groups))
    for group in groups:
        share = budget.share()
        if share == 0:
            row["not_measured"] += group
            continue
        replays = prepared([SHIPPED, *group])
        times = cuda.take_turns(replays, min(share, 1.0))
        found = {name: Timing.of([alone for alone, _ in each]) for name, each in times.items()}
        for name, timing in found.items():
            row["timings"][name] = asdict(timing)
            if SHIPPED in found:
                row["speedups"][name] = found[SHIPPED].median / timing.median
        del replays
        torch.cuda.empty_cache()
    return row


def table(rows: list[dict]) -> str:
    """TFLOP/s of the fastest tiles of one kernel by length, over all of which they are ordered."""
    rows = sorted(rows, key=lambda row: row["shape"][1])
    named = dict.fromkeys(name for row in rows for name in row["timings"])

    def gain(name: str) -> float:
        return statistics.fmean(row["speedups"][name] for row in rows if name in row["speedups"])

    compared = [name for name in named if any(name in row["speedups"] for row in rows)]
    order = sorted(compared, key=gain, reverse=True)
    shown = [name for name in order if name in order[:SHOWN] or name == SHIPPED]
    lines = [f"{rows[0]['backend']} {rows[0]['kernel']}, TFLOP/s of the {rows[0]['pass']}"]
    lines.append(f"  {'':<28}" + "".join(f"{row['shape'][1]:>8}" for row in rows))
    for name in shown:
        cells = []
        for row in rows:
            timing = row["timings"].get(name)
            cells.append(f"{row['flops'] / timing['median'] / 1e9:.0f}" if timing else "-")
        lines.append(f"  {name:<28}" + "".join(f"{cell:>8}" for cell in cells))
    for kind in ("incorrect", "cannot"):
        reasons = {name: text for row in rows for name, text in row[kind].items()}
        lines += [f"  {kind}: {name}: {text}" for name, text in reasons.items()]
    left = {name for row in rows for name in row["not_measured"]}
    if left:
        lines.append(f"  not reached: {len(left)} tiles")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks tiles", description=(__doc__ or "").splitlines()[0]
    )
    every = ["-".join(key) for key in KERNELS]
    parser.add_argument("--kernels", nargs="+", default=every, choices=every, metavar="KERNEL",
                        help=f"of {every}")  # fmt: skip
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; see docs/hardware.md for what was proven without one")
    device = torch.device("cuda")
    about = environment(device)
    file = (arguments.output or folder(device)) / "tiles.jsonl"
    work = [(*name.split("-"), N) for name in arguments.kernels for N in LENGTHS]
    kept = [r for r in read(file) if f"{r['backend']}-{r['kernel']}" not in arguments.kernels]
    budget = Budget(arguments.budget, len(work))
    rows: list[dict] = []
    for backend, kernel, N in work:
        rows.append({**compare(backend, kernel, N, device, budget.share()), **about})
        write(file, [*kept, *rows])
        if N == LENGTHS[-1]:
            print(table(rows[-len(LENGTHS) :]), flush=True)
    sys.exit(any(row["incorrect"] for row in rows))
