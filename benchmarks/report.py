"""Writes the README's benchmark tables from the result files: ``python -m benchmarks.report``."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results/cpu"
RIVALS = ("eager", "torch.compile")


def table(file: Path) -> str:
    """Ratios rival / native of the median wall time, lowest to highest over shapes."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    wall = [row for row in rows if row["clock"] == "wall"]
    kinds = sorted({(row["dtype"], row["pass"]) for row in wall}, key=lambda k: (k[0][0] != "f", k))
    ops = list(dict.fromkeys(row["op"] for row in wall))
    lines = [
        "| times as fast as eager / `torch.compile` | "
        + " | ".join(f"{dtype} {which}" for dtype, which in kinds)
        + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for op in ops:
        cells = []
        for kind in kinds:
            found = [r for r in wall if r["op"] == op and (r["dtype"], r["pass"]) == kind]
            cells.append(" / ".join(_ratios(found, rival) for rival in RIVALS))
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    one = rows[0]
    shapes = sorted({tuple(row["shape"]) for row in wall}, reverse=True)
    disturbed = sum(not row["quiet"] for row in wall)
    lines += [
        "",
        f"{one['device']}, {wall[0]['threads']} threads, torch {one['torch']}, commit "
        f"{one['commit']}; medians of interleaved calls, lowest to highest over "
        f"{', '.join('×'.join(map(str, shape)) for shape in shapes)}; "
        + (
            f"{disturbed} of {len(wall)} rows were measured beside other work. "
            if disturbed
            else "measured on a quiet machine. "
        )
        + f"Spread and single rows: [{file.relative_to(ROOT)}]({file.relative_to(ROOT)}).",
    ]
    return "\n".join(lines)


def _ratios(rows: list[dict], rival: str) -> str:
    ratios = [r["timings"][rival]["median"] / r["timings"]["native"]["median"] for r in rows]
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return low if low == high else f"{low}–{high}"


def quickstart(file: Path) -> str:
    """What the quickstart reached and how long it took, over the seeds that were run."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]

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
        f"[{file.relative_to(ROOT)}]({file.relative_to(ROOT)})."
    )


BLOCKS = {"adaln": table, "quickstart": quickstart}


def updated_readme(readme: str) -> str:
    for name, text in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{text(ROOT / RESULTS / f'{name}.jsonl')}\n{end}{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated_readme(path.read_text()))
