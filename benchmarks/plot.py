"""Draws an op family's results: ``python -m benchmarks plot``, into ``docs/images``.

For a CPU, speed-ups over eager PyTorch (in 16 bits: the official formula) at each shape; for a
GPU, bandwidth over tokens under the roof of a copy of as many bytes. For attention on a GPU,
FLOP rates over tokens under the roof of a matrix product.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.attention import PASSES, ROOF
from benchmarks.attention_providers import OURS
from benchmarks.environment import RESULTS, measured, read
from benchmarks.model_tables import over_seeds
from benchmarks.op_tables import attention_file
from benchmarks.registry import FAMILIES, TINY
from benchmarks.rivals import EAGER_16BIT, baseline

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MARKS = {
    "torch.compile": ("s", "tab:orange"),
    "max-autotune": ("D", "tab:red"),
    "native": ("o", "tab:blue"),
    "native, compiled": ("o", "tab:cyan"),
    "triton": ("o", "tab:blue"),
    "cuda": ("^", "tab:green"),
    "triton, compiled": ("o", "tab:cyan"),
    "cuda, compiled": ("^", "tab:olive"),
    "eager": ("x", "tab:gray"),
    EAGER_16BIT: ("x", "tab:brown"),
}
OTHER = ("P", "tab:purple")


def _label(row: dict) -> str:
    return f"{row['op']}  {'×'.join(map(str, row['shape']))}"


def _grid(rows: list[dict], title: str, panel, size: tuple[float, float], caption: str) -> Figure:
    """One panel for each dtype (across) and pass (down)."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure, axes = pyplot.subplots(
        len(passes),
        len(dtypes),
        figsize=(size[0] * len(dtypes), size[1] * len(passes) + 1),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for across, dtype in enumerate(dtypes):
        for down, which in enumerate(passes):
            ax = axes[down, across]
            ax.set_title(f"{dtype}, {which}", fontsize=10)
            ax.grid(alpha=0.3)
            panel(ax, [r for r in rows if (r["dtype"], r["pass"]) == (dtype, which)])
    labelled: dict = {}
    for ax in axes.flat:
        labelled |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{title}\n{caption}", fontsize=9)
    return figure


def speed_ups(rows: list[dict]) -> Figure:
    """A line for each op and shape, a mark for each provider; right of 1 is faster than eager."""
    labels = list(dict.fromkeys(map(_label, rows)))

    def panel(ax: Axes, found: list[dict]) -> None:
        for name in dict.fromkeys(name for row in found for name in row["timings"]):
            if name in ("eager", EAGER_16BIT):
                continue
            here = [row for row in found if name in row["timings"]]
            mark, colour = MARKS.get(name, OTHER)
            ax.plot(
                [r["timings"][baseline(r)]["median"] / r["timings"][name]["median"] for r in here],
                [labels.index(_label(row)) for row in here],
                mark,
                color=colour,
                markersize=5,
                label=name,
            )
        ax.axvline(1, color="0.3", linewidth=1)
        # ratios: twice and half as fast are as far from 1
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}×")
        ax.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
        if not ax.yaxis_inverted():
            ax.invert_yaxis()

    one = rows[0]
    caption = (
        f"{one['device']}, {one['threads']} threads, torch {one['torch']}, commit {one['commit']}"
    )
    height = 0.19 * len(labels) + 0.5
    return _grid(rows, "times as fast as eager PyTorch", panel, (5.2, height), caption)


def bandwidths(rows: list[dict], op: str) -> Figure:
    """Achieved rate of one op over tokens at one width, with the rate of a copy above."""
    width = max(row["shape"][-1] for row in rows)
    rows = [row for row in rows if row["op"] == op and row["shape"][-1] == width]

    def tokens(row: dict) -> int:
        return math.prod(row["shape"][:-1])

    def panel(ax: Axes, found: list[dict]) -> None:
        for name in dict.fromkeys(name for row in found for name in row["timings"]):
            here = sorted((row for row in found if name in row["timings"]), key=tokens)
            rates = [r["bytes"] / r["timings"][name]["median"] / 1e6 for r in here]
            if name == "copy":
                style: dict = {"color": "black", "linestyle": "--", "linewidth": 1}
            else:
                mark, colour = MARKS.get(name, OTHER)
                style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1.2}
            ax.plot([tokens(row) for row in here], rates, label=name, **style)
        ax.set_xscale("log", base=2)
        counts = sorted({tokens(row) for row in rows})
        ax.set_xticks(counts, [f"{count // 1024}k" for count in counts])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens")
        ax.set_ylabel("GB/s")

    one = rows[0]
    caption = f"{one['device']}, torch {one['torch']}, triton {one['triton']}, {one['commit']}"
    return _grid(rows, f"{op}, D = {width}, L2-cold", panel, (4.6, 3.2), caption)


def throughputs(rows: list[dict]) -> Figure:
    """FLOP rates of self-attention over tokens, a panel for each head size and pass."""
    rows = [{**row, "d": row["shape"][-1]} for row in rows if row["op"] == "self_attention"]
    heads = sorted({row["d"] for row in rows}, key=lambda d: (d != 72, d))
    names = list(dict.fromkeys(name for row in rows for name in row["timings"] if name != ROOF))
    colours = pyplot.get_cmap("tab20").colors
    figure, axes = pyplot.subplots(
        len(PASSES),
        len(heads),
        figsize=(4.2 * len(heads), 3.0 * len(PASSES) + 1),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (down, which), (across, d) in product(enumerate(PASSES), enumerate(heads)):
        ax = axes[down, across]
        ax.set_title(f"head_dim {d}, {which}", fontsize=10)
        ax.grid(alpha=0.3)
        here = [row for row in rows if (row["d"], row["pass"]) == (d, which)]
        here.sort(key=lambda row: row["shape"][1])
        for name in (*names, ROOF):
            timed = [row for row in here if name in row["timings"]]
            flops = [row["roof_flops" if name == ROOF else "flops"] for row in timed]
            ax.plot(
                [row["shape"][1] for row in timed],
                [
                    f / row["timings"][name]["median"] / 1e9
                    for f, row in zip(flops, timed, strict=True)
                ],
                color="black" if name == ROOF else colours[names.index(name)],
                linestyle="--" if name == ROOF else "-",
                linewidth=2 if name in OURS else 1,
                marker="" if name == ROOF else "o" if name in OURS else ".",
                label=name,
            )
        ax.set_xscale("log", base=2)
        lengths = sorted({row["shape"][1] for row in rows})
        ax.set_xticks(lengths, [f"{N // 1024}k" if N >= 1024 else N for N in lengths])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens")
        ax.set_ylabel("TFLOP/s")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    one = rows[0]
    figure.suptitle(
        f"self-attention, 16 heads, {one['dtype']}\n{one['device']}, torch {one['torch']}, "
        f"cuDNN {one['cudnn']}, triton {one['triton']}, {one['commit']}",
        fontsize=9,
    )
    return figure


def transitions(rows: list[dict]) -> Figure:
    """A panel for each transition; for each start a line, the median over seeds, in their range."""
    found = over_seeds(rows)
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4.2 * len(found), 4.4), squeeze=False, layout="constrained"
    )
    for ax, (name, starts) in zip(axes.flat, found.items(), strict=True):
        before = [row["before"] for row in next(iter(starts.values()))]
        ax.axhline(median(before), color="0.6", linestyle=":", label="just before")
        for start, curves in starts.items():
            colour, style = STARTS.get(start.partition(":")[0], ("tab:purple", "-."))
            errors = list(zip(*(row["error"] for row in curves), strict=True))
            steps = curves[0]["steps"]
            ax.plot(steps, list(map(median, errors)), style, color=colour, marker=".", label=start)
            ax.fill_between(
                steps, list(map(min, errors)), list(map(max, errors)), color=colour, alpha=0.2
            )
        # linear to begin with: the first point is right after the transition, at 0
        ax.set_xscale("symlog", linthresh=10)
        ax.set_xlim(left=0)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(lambda value, _: "")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("steps after the transition")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("error of the predicted noise")
    one, seeds = rows[0], {row["seed"] for row in rows}
    figure.suptitle(
        f"{one['device']}, torch {one['torch']}, commit {one['commit']}; median and range of "
        f"{len(seeds)} seeds",
        fontsize=9,
    )
    return figure


STARTS = {
    "grown": ("tab:blue", "-"),
    "wrong": ("tab:red", "--"),
    "from scratch": ("tab:gray", "--"),
}


def _save(figure: Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    print(IMAGES / name)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks plot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of device folders")
    results = parser.parse_args(argv).results
    for folder in sorted(results.glob("sm_*")):
        if rows := measured(read(attention_file(folder))):
            _save(throughputs(rows), f"attention-{folder.name}.png")
    if rows := read(results / "cpu" / "transitions.jsonl"):
        _save(transitions(rows), "transitions.png")
    for file in sorted(results.glob("*/*.jsonl")):
        if file.stem not in FAMILIES:
            continue
        rows = [row for row in measured(read(file)) if tuple(row["shape"]) != TINY]
        rows.sort(key=lambda row: row["op"])
        if not rows:
            continue
        if file.parent.name == "cpu":
            _save(speed_ups(rows), f"{file.stem}-cpu.png")
            continue
        for op in dict.fromkeys(row["op"] for row in rows):
            _save(bandwidths(rows, op), f"{op}-{file.parent.name}.png")
