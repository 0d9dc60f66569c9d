"""Writes the README's benchmark tables from the result files: ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import FAMILIES, TINY
from benchmarks.rivals import EAGER_16BIT, baseline

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
MMAPPED = 32 * 2**20  # bytes; above glibc's largest threshold
LARGE_TOKENS = 32 * 1024  # from here on a GPU is full, and bandwidth all that counts


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _by(shape) -> str:
    return "×".join(map(str, shape))


def _link(file: Path) -> str:
    return f"[{file.relative_to(ROOT)}]({file.relative_to(ROOT)})"


def _span(values: list[float], digits: int = 1) -> str:
    """Lowest to highest."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"


Name = Callable[[dict], str]  # of a row's provider


def _always(name: str) -> Name:
    return lambda row: name


def _ratios(rows: list[dict], rival: Name, ours: Name) -> str:
    """How many times as fast ``ours`` is as ``rival``; bold where the rival was the faster."""
    pairs = [(row["timings"].get(rival(row)), row["timings"].get(ours(row))) for row in rows]
    ratios = [them["median"] / us["median"] for them, us in pairs if them and us]
    if not ratios:
        return "–"
    if min(ratios) >= 1:
        return _span(ratios)
    # two digits, or 0.97 would read as a draw
    return f"**{_span(ratios, 2)}**"


def _missing(rows: list[dict]) -> str:
    """What a table's ratios do not contain."""
    unmeasured = sum("not_measured" in row for row in rows)
    failed = [
        f"{row.get('op', row.get('part'))} {_by(row['shape'])} {row['dtype']} ({row['failed']})"
        for row in rows
        if "failed" in row
    ]
    wrong = sorted({name for row in rows for name in row.get("incorrect", ())})
    sentences = [
        (unmeasured, f"Cases not measured: {unmeasured}."),
        (failed, f"Ended in an error: {', '.join(failed)}."),
        (wrong, f"Failed the check at some shape, and was not timed there: {', '.join(wrong)}."),
    ]
    return "".join(f" {sentence}" for there_are, sentence in sentences if there_are)


def cpu_table(file: Path) -> str:
    """Ratios of the median wall time, lowest to highest over shapes."""
    rows = _rows(file)
    measured = [row for row in rows if "timings" in row]
    usual = [row for row in measured if tuple(row["shape"]) != TINY]
    kinds = sorted(
        {(row["dtype"], row["pass"]) for row in usual}, key=lambda kind: (kind[0][0] != "f", kind)
    )
    lines = [
        "| times as fast as eager / `torch.compile` | "
        + " | ".join(f"{dtype} {which}" for dtype, which in kinds)
        + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for op in dict.fromkeys(row["op"] for row in usual):
        cells = []
        for kind in kinds:
            found = [r for r in usual if r["op"] == op and (r["dtype"], r["pass"]) == kind]
            inductor = _always("torch.compile")
            against = [_ratios(found, rival, _always("native")) for rival in (baseline, inductor)]
            compiled = _ratios(found, inductor, _always("native, compiled"))
            cells.append(" / ".join(against) + (f" ({compiled})" if compiled != "–" else ""))
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    one = measured[0]
    shapes = sorted({tuple(row["shape"]) for row in usual}, reverse=True)
    disturbed = sum(not row["quiet"] for row in usual)
    caption = [
        f"{one['device']}, {one['threads']} threads, torch {one['torch']}, commit {one['commit']}; "
        "medians of interleaved calls, lowest to highest over "
        f"{', '.join(map(_by, shapes))}; "
        + (
            f"{disturbed} of {len(usual)} rows were measured beside other work."
            if disturbed
            else "measured on a quiet machine."
        )
    ]
    if any(baseline(row) == EAGER_16BIT for row in usual):
        caption.append("16-bit columns: against the official formula in that type.")
    if "(" in "".join(lines[2:]):
        caption.append("In brackets: the op inside `torch.compile`, against Inductor's own code.")
    if "**" in "".join(lines):
        caption.append("Bold: at some shape the rival was faster.")
    if one.get("malloc") == "default" and max(map(_largest, usual)) >= MMAPPED:
        caption.append(
            "Tensors of 32 MiB and more are mapped anew by glibc's malloc at each call, for every "
            "provider alike."
        )
    caption += _call_overhead([row for row in measured if row not in usual])
    caption.append(f"Spread and single rows: {_link(file)}.{_missing(rows)}")
    picture = f"docs/images/{file.stem}-cpu.png"
    if (ROOT / picture).exists():
        lines += ["", f"![Speed-up over eager PyTorch, by shape]({picture})"]
    return "\n".join([*lines, "", " ".join(caption)])


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
    shape = _by(rows[0]["shape"])
    return [f"One eager call on {shape}, in µs, eager PyTorch in brackets: {', '.join(parts)}."]


def gpu_table(file: Path) -> str:
    """Rates and ratios of the faster of our backends, for one GPU."""
    rows = _rows(file)
    usual = [row for row in rows if "timings" in row and tuple(row["shape"]) != TINY]

    def ours(row: dict) -> str:
        backends = [name for name in ("cuda", "triton") if name in row["timings"]]
        return min(backends, key=lambda name: row["timings"][name]["median"], default="none")

    named = {name for row in usual for name in row["timings"]}
    rivals = sorted(name for name in named if name.split(",")[0] not in ("cuda", "triton", "copy"))
    lines = [
        "| L2-cold | GB/s | % of a copy | times as fast as " + " | ".join(rivals) + " |",
        "|---|---|---|" + "---|" * len(rivals),
    ]
    for op, which in dict.fromkeys((row["op"], row["pass"]) for row in usual):
        found = [r for r in usual if (r["op"], r["pass"]) == (op, which) and ours(r) != "none"]
        large = [row for row in found if _tokens(row) >= LARGE_TOKENS]
        rates = [row["bytes"] / row["timings"][ours(row)]["median"] / 1e6 for row in large]
        shares = [
            100 * row["timings"]["copy"]["median"] / row["timings"][ours(row)]["median"]
            for row in large
        ]
        cells = [_span(values, 0) if values else "–" for values in (rates, shares)]
        cells += [_ratios(found, _always(rival), ours) for rival in rivals]
        lines.append(f"| `{op}` {which} | " + " | ".join(cells) + " |")
    one = rows[0]
    caption = (
        f"{one['device']}, driver {one.get('driver_version')}, torch {one['torch']}, triton "
        f"{one['triton']}, commit {one['commit']}; the faster of our backends, rates from "
        f"{LARGE_TOKENS // 1024}k tokens on, ratios over all shapes, bold where a rival was "
        f"faster at some shape. {_link(file)}.{_missing(rows)}"
    )
    return "\n".join([*lines, "", caption])


def _tokens(row: dict) -> int:
    return math.prod(row["shape"][:-1])


def gpu(results: Path) -> str:
    named = [
        folder / f"{family}.jsonl" for folder in sorted(results.glob("sm_*")) for family in FAMILIES
    ]
    files = [file for file in named if file.exists()]
    if not files:
        why = "nothing here has run on a GPU yet: [docs/hardware.md](docs/hardware.md)"
        return f"There are no GPU figures yet, because {why}."
    return "\n\n".join(gpu_table(file) for file in files)


def block(file: Path) -> str:
    """A training step's time and memory, with the ops and without."""
    everything = _rows(file)
    rows = [row for row in everything if "timings" in row]
    names = list(rows[0]["timings"])
    lines = [
        "| training step | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = []
        for name in names:
            if name not in row["timings"]:
                cells.append("wrong")
                continue
            time = row["timings"][name]["median"]
            saved, peak = (row["memory"][name][key] / 2**20 for key in ("saved", "peak"))
            ratio = row["speedups"][name]
            text = f"{time:.4g} ms; {saved:.0f}, {peak:.0f} MiB"
            if name != "eager":
                spread = f"{ratio['p20']:.2f}–{ratio['p80']:.2f}"
                text = f"{ratio['median']:.3f}× ({spread}), {text}"
            cells.append(f"**{text}**" if ratio["median"] < 1 else text)
        lines.append(f"| {row['part']}, {row['shape'][1]} tokens | " + " | ".join(cells) + " |")
    one = rows[0]
    disturbed = sum(not row["quiet"] for row in rows)
    caption = (
        f"Times as fast as eager without the ops, turn by turn: median, and from the 20th to the "
        f"80th percentile (bold: slower); milliseconds; MiB saved for the backward, and at the "
        f"peak without parameter gradients. {one['device']}, "
        f"{one['dtype']}, batch {one['shape'][0]}, {one['text']} tokens of text, torch "
        f"{one['torch']}, commit {one['commit']}"
        + (f"; {disturbed} of {len(rows)} rows beside other work" if disturbed else "")
        + f". {_link(file)}.{_missing(everything)}"
    )
    return "\n".join([*lines, "", caption])


def quickstart(file: Path) -> str:
    """What the quickstart reached and how long it took, over the seeds that were run."""
    rows = _rows(file)

    def span(values: list[float], unit: str, digits: int = 0) -> str:
        low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
        return f"{low}{unit}" if low == high else f"{low}–{high}{unit}"

    def percent(key: str) -> str:
        return span([100 * row[key] for row in rows], " %", 1)

    def seconds(stage: str) -> str:
        return span([row["seconds"][stage] for row in rows], " s")

    one = rows[0]
    total = span([sum(row["seconds"].values()) for row in rows], " s")
    foreign = max(row["foreign_cores"] for row in rows)
    return (
        f"{len(rows)} runs from nothing with different seeds: the nearest training picture carries "
        f"the prompt's caption for **{percent('retrieval')}** of {one['pictures']} pictures of "
        f"{one['captions']} captions. With prompts shuffled among the pictures: "
        f"{percent('control')}; chance: {percent('chance')}. {total} in all on {one['threads']} "
        f"threads of an {one['device']} (autoencoder {seconds('autoencoder')}, transformer "
        f"{seconds('transformer')}, drawing {seconds('drawing')}), other work keeping at most "
        f"{foreign:.2f} cores busy. Commit {one['commit']}, torch {one['torch']}, "
        f"{_link(file)}."
    )


# marker in the README -> its text; what has no marker there is not written
BLOCKS: dict[str, Callable[[Path], str]] = {
    "adaln": lambda results: cpu_table(results / "cpu" / "adaln.jsonl"),
    "mlp": lambda results: cpu_table(results / "cpu" / "mlp.jsonl"),
    "block": lambda results: block(results / "cpu" / "block.jsonl"),
    "gpu": lambda results: gpu(results),
    "quickstart": lambda results: quickstart(results / "cpu" / "quickstart.jsonl"),
}


def updated_readme(readme: str) -> str:
    for name, text in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in readme:
            continue
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{text(ROOT / RESULTS)}\n{end}{after}"
    return readme


def main(argv: list[str]) -> None:
    description = (__doc__ or "").splitlines()[0]
    argparse.ArgumentParser("python -m benchmarks report", description=description).parse_args(argv)
    path = ROOT / "README.md"
    path.write_text(updated_readme(path.read_text()))
