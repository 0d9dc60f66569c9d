"""Tables of single ops, on a CPU and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks import attention
from benchmarks.attention import PASSES, ROOF
from benchmarks.cross_attention import MASKED
from benchmarks.environment import measured, read
from benchmarks.registry import TINY
from benchmarks.rivals import EAGER_16BIT, baseline
from benchmarks.tables import (
    always,
    by,
    fastest,
    link,
    missing,
    picture,
    ratios,
    source,
    span,
    table,
)

MMAPPED = 32 * 2**20  # bytes; above glibc's largest threshold
LARGE_TOKENS = 32 * 1024  # from here on a GPU is full, and bandwidth all that counts


def cpu_table(file: Path) -> str:
    """Ratios of the median wall time, lowest to highest over shapes."""
    rows = read(file)
    timed = measured(rows)
    usual = [row for row in timed if tuple(row["shape"]) != TINY]
    kinds = sorted(
        {(row["dtype"], row["pass"]) for row in usual}, key=lambda kind: (kind[0][0] != "f", kind)
    )
    inductor = always("torch.compile")
    lines = []
    for op in dict.fromkeys(row["op"] for row in usual):
        cells = []
        for kind in kinds:
            found = [r for r in usual if r["op"] == op and (r["dtype"], r["pass"]) == kind]
            times = " / ".join(
                ratios(found, them, always("native")) for them in (baseline, inductor)
            )
            compiled = ratios(found, inductor, always("native, compiled"))
            cells.append(times + (f" ({compiled})" if compiled != "–" else ""))
        lines.append([f"`{op}`", *cells])
    one = timed[0]
    shapes = sorted({tuple(row["shape"]) for row in usual}, reverse=True)
    disturbed = sum(not row["quiet"] for row in usual)
    caption = [
        f"{one['device']}, {one['threads']} threads, torch {one['torch']}, commit {one['commit']}; "
        f"medians of interleaved calls, lowest to highest over {', '.join(map(by, shapes))}; "
        + (
            f"{disturbed} of {len(usual)} rows were measured beside other work."
            if disturbed
            else "measured on a quiet machine."
        )
    ]
    if any(baseline(row) == EAGER_16BIT for row in usual):
        caption.append("16-bit columns: against the official formula in that type.")
    shown = "".join(cell for line in lines for cell in line)
    if "(" in shown:
        caption.append("In brackets: the op inside `torch.compile`, against Inductor's own code.")
    if "**" in shown:
        caption.append("Bold: at some shape the rival was faster.")
    if one.get("malloc") == "default" and max(map(_largest, usual)) >= MMAPPED:
        caption.append(
            "Tensors of 32 MiB and more are mapped anew by glibc's malloc at each call, for every "
            "provider alike."
        )
    caption += _call_overhead([row for row in timed if row not in usual])
    caption.append(f"Spread and single rows: {link(file)}.{missing(rows)}")
    return table(
        ["times as fast as eager / `torch.compile`", *map(" ".join, kinds)],
        lines,
        picture(f"{file.stem}-cpu.png", "Speed-up over eager PyTorch, by shape"),
        " ".join(caption),
    )


def _largest(row: dict) -> int:
    """Bytes of the largest tensor of a row: its residual stream."""
    return math.prod(row["shape"]) * (4 if row["dtype"].startswith("float32") else 2)


def _call_overhead(rows: list[dict]) -> list[str]:
    """One sentence on what a call costs where there is nothing to compute."""
    rows = [row for row in rows if {"native", "eager"} <= set(row["timings"])]
    if not rows:
        return []
    parts = []
    for row in rows:
        ours, eager = (1e3 * row["timings"][name]["median"] for name in ("native", "eager"))
        parts.append(f"`{row['op']}` {row['pass']} {ours:.0f} ({eager:.0f})")
    shape = by(rows[0]["shape"])
    return [f"One eager call on {shape}, in µs, eager PyTorch in brackets: {', '.join(parts)}."]


def gpu_table(file: Path) -> str:
    """Rates and ratios of the faster of our backends, for one GPU."""
    rows = read(file)
    usual = [row for row in measured(rows) if tuple(row["shape"]) != TINY]
    ours = fastest("cuda", "triton")
    named = {name for row in usual for name in row["timings"]}
    rivals = sorted(name for name in named if name.split(",")[0] not in ("cuda", "triton", "copy"))
    lines = []
    for op, which in dict.fromkeys((row["op"], row["pass"]) for row in usual):
        found = [r for r in usual if (r["op"], r["pass"]) == (op, which) and ours(r) != "none"]
        large = [row for row in found if math.prod(row["shape"][:-1]) >= LARGE_TOKENS]
        rates = [row["bytes"] / row["timings"][ours(row)]["median"] / 1e6 for row in large]
        shares = [
            100 * row["timings"]["copy"]["median"] / row["timings"][ours(row)]["median"]
            for row in large
        ]
        cells = [span(values, 0) if values else "–" for values in (rates, shares)]
        cells += [ratios(found, always(rival), ours) for rival in rivals]
        lines.append([f"`{op}` {which}", *cells])
    one = rows[0]
    caption = (
        f"{one['device']}, driver {one.get('driver_version')}, torch {one['torch']}, triton "
        f"{one['triton']}, commit {one['commit']}; the faster of our backends, rates from "
        f"{LARGE_TOKENS // 1024}k tokens on, ratios over all shapes, bold where a rival was "
        f"faster at some shape. {link(file)}.{missing(rows)}"
    )
    columns = [f"{'' if i else 'times as fast as '}{rival}" for i, rival in enumerate(rivals)]
    return table(["L2-cold", "GB/s", "% of a copy", *columns], lines, caption)


def _lengths(shape: Iterable[int]) -> str:
    _, Nq, Nk, *_ = shape
    return f"{Nq} tokens" if Nq == Nk else f"{Nq} queries, {Nk} keys"


def attention_cpu_table(file: Path) -> str:
    """`auto` over a direct call."""
    rows = read(file)
    timed = measured(rows)
    found = {
        (row["op"], tuple(row["shape"]), row["dtype"], row["pass"]): row["speedups"]["auto"]
        for row in timed
        if "auto" in row["speedups"]
    }
    kinds = list(dict.fromkeys(key[2:] for key in found))
    lines = []
    for op, shape in dict.fromkeys(key[:2] for key in found):
        cells = []
        for ratio in (found.get((op, shape, *kind)) for kind in kinds):
            if ratio is None:
                cells.append("–")
                continue
            text = f"{ratio['median']:.3f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
            cells.append(f"**{text}**" if ratio["p80"] < 1 else text)
        lines.append([f"`{op}`, {_lengths(shape)}", *cells])
    one = timed[0]
    caption = (
        "On a CPU `auto` is PyTorch's scaled dot product attention, and must not be slower than a "
        "direct call of it on the same tensors. Turn by turn: median, and from the 20th to the "
        f"80th percentile (bold: all of that below 1). {one['device']}, {one['threads']} threads, "
        f"batch {one['shape'][0]}, {one['shape'][3]} heads of {one['shape'][4]}, "
        f"{source(file, rows)}"
    )
    return table(["times as fast as a direct call", *map(" ".join, kinds)], lines, caption)


def attention_file(folder: Path) -> Path:
    """A GPU's run with our kernels or, until there is one, that of rivals alone."""
    ours, rivals = (folder / f"{family}.jsonl" for family in attention.FAMILIES)
    return ours if measured(read(ours)) else rivals


def attention_gpu_table(file: Path) -> str:
    """FLOP rates of everyone at head_dim 72, by pass and length."""
    rows = read(file)
    timed = [row for row in measured(rows) if row["shape"][-1] == 72]
    # self-attention first
    timed.sort(key=lambda r: (PASSES.index(r["pass"]), r["op"] == "attention", r["shape"][1]))
    names = list(dict.fromkeys(n for row in timed for n in row["timings"] if n != ROOF))

    def line(label: str, cells: dict[str, str], best: str, last: str) -> list[str]:
        texts = [cells.get(name, "–") for name in names]
        texts = [f"**{t}**" if n == best else t for n, t in zip(names, texts, strict=True)]
        return [label, *texts, last]

    lines = []
    for row in timed:
        times = {n: t["median"] for n, t in row["timings"].items() if n != ROOF}
        if not times:
            continue
        rates = {name: row["flops"] / time / 1e9 for name, time in times.items()}
        best = max(rates, key=lambda name: rates[name])
        roof = row["roof_flops"] / row["timings"][ROOF]["median"] / 1e9
        cells = {name: f"{rate:.0f}" for name, rate in rates.items()}
        label = f"{row['pass']}, {_lengths(row['shape'])}"
        lines.append(line(label, cells, best, f"{100 * rates[best] / roof:.0f}"))
    largest = [row for row in timed if row["pass"] == PASSES[-1] and row["peak_bytes"]]
    if largest:
        row = max(largest, key=lambda r: r["shape"][1])
        peaks = row["peak_bytes"]
        cells = {name: f"{peak / 2**20:.0f}" for name, peak in peaks.items()}
        label = f"MiB at the peak of it, {_lengths(row['shape'])}"
        lines.append(line(label, cells, min(peaks, key=lambda name: peaks[name]), ""))
    one = timed[0]
    absent = {name: why for row in timed for name, why in row["cannot"].items()}
    nowhere = [f"{name} ({why})" for name, why in absent.items() if name not in names]
    caption = (
        f"{one['device']}, driver {one.get('driver_version')}, torch {one['torch']}, cuDNN "
        f"{one['cudnn']}, triton {one['triton']}, commit {one['commit']}; {one['dtype']}, 16 heads "
        "of samples that have 16k tokens together, L2-cold in CUDA graphs that take turns. FLOPs "
        "are those of the true head_dim, 2.5 times as many backward; bold: the best. Ours reads "
        "the packed projection in place; others get the layout they like, conversions are not "
        "timed, and their options are the defaults. A dash: could not run there, or failed the "
        f"check. Reasons, spread and other head sizes: {link(file)}."
        + (f" Nowhere: {'; '.join(nowhere)}." if nowhere else "")
        + missing(rows)
    )
    return table(
        ["TFLOP/s at head_dim 72", *names, "best, % of a matrix product"],
        lines,
        picture(f"attention-{file.parent.name}.png", "TFLOP/s over tokens, by head size and pass"),
        caption,
    )


def _text(row: dict) -> str:
    """How much of the texts is real: one length, or those that repeat over the batch."""
    lengths, L = row["lengths"], row["shape"][2]
    return f"{' and '.join(map(str, dict.fromkeys(lengths)))} of {L} tokens"


def cross_attention_table(file: Path) -> str:
    """Ratios of the faster of our backends, for each text."""
    rows = read(file)
    timed = measured(rows)
    ours = fastest("cuda", "triton", "native")
    kinds = list(dict.fromkeys((row["dtype"], row["pass"]) for row in timed))
    lines = []
    for text in dict.fromkeys(map(_text, timed)):
        cells = []
        for kind in kinds:
            found = [r for r in timed if (_text(r), r["dtype"], r["pass"]) == (text, *kind)]
            cells.append(" / ".join(ratios(found, always(n), ours) for n in ("eager", MASKED)))
        lines.append([text, *cells])
    one = timed[0]
    images = dict.fromkeys(by(row["shape"][:2]) for row in timed)
    caption = (
        f"{MASKED} is what diffusers runs, over all tokens; eager is our definition, which clears "
        f"padding too. Lowest to highest over images × their tokens, {', '.join(images)}; "
        f"{one['shape'][3]} heads of {one['shape'][4]}; bold: the rival was faster at some. "
        f"{one['device']}, {source(file, rows)}"
    )
    return table([f"times as fast as eager / {MASKED}", *map(" ".join, kinds)], lines, caption)
