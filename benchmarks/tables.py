"""What the tables of results share: their cells, and what their captions say of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.environment import ROOT, measured

Name = Callable[[dict], str]  # of a row's provider

# how to read what `against` writes
TURNS = "turn by turn: median, and from the 20th to the 80th percentile (bold: slower)"


def table(head: Iterable[str], lines: Iterable[Iterable[str]], *below: str) -> str:
    """A table in Markdown, and paragraphs below it; of those, empty ones are left out."""
    cells = list(head)
    rows = (cells, *lines)
    first, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join(("\n".join((first, "|" + "---|" * len(cells), *rest)), *filter(None, below)))


def by(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def listed(values: Iterable) -> str:
    *rest, last = map(str, values)
    return f"{', '.join(rest)} and {last}" if rest else last


def span(values: Iterable[float], digits: int = 1) -> str:
    """Lowest to highest."""
    values = list(values)
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"


def ratios(rows: Iterable[dict], rival: Name, ours: Name) -> str:
    """How many times as fast ``ours`` is as ``rival``; bold where the rival was the faster."""
    pairs = [(row["timings"].get(rival(row)), row["timings"].get(ours(row))) for row in rows]
    found = [them["median"] / us["median"] for them, us in pairs if them and us]
    if not found:
        return "–"
    if min(found) >= 1:
        return span(found)
    # two digits, or 0.97 would read as a draw
    return f"**{span(found, 2)}**"


def always(name: str) -> Name:
    return lambda row: name


def fastest(*backends: str) -> Name:
    """The fastest of those that were timed, or ``none``."""

    def name(row: dict) -> str:
        timed = [backend for backend in backends if backend in row["timings"]]
        return min(timed, key=lambda which: row["timings"][which]["median"], default="none")

    return name


def against(ratio: dict, text: str, digits: int = 2) -> str:
    """A ratio of turns with its spread, then ``text``; bold where it is slower."""
    spread = f"{ratio['p20']:.2f}–{ratio['p80']:.2f}"
    text = f"{ratio['median']:.{digits}f}× ({spread}), {text}"
    return f"**{text}**" if ratio["median"] < 1 else text


def link(file: Path, text: str | None = None) -> str:
    path = file.relative_to(ROOT)
    return f"[{text or path}]({path})"


def picture(name: str, shows: str) -> str:
    file = f"docs/images/{name}"
    return f"![{shows}]({file})" if (ROOT / file).exists() else ""


def source(file: Path, rows: list[dict]) -> str:
    """Versions, the commit, how quiet it was, the file, and what it lacks."""
    timed = measured(rows)
    disturbed = sum(not row.get("quiet", True) for row in timed)
    beside = f"; {disturbed} of {len(timed)} rows beside other work" if disturbed else ""
    versions = f"torch {timed[0]['torch']}, commit {timed[0]['commit']}"
    return f"{versions}{beside}. {link(file)}.{missing(rows)}"


def missing(rows: Iterable[dict]) -> str:
    """What a table's ratios do not contain."""
    unmeasured = sum("not_measured" in row for row in rows)
    failed = [
        f"{row.get('op') or row.get('part') or row['model']} {by(row['shape'])} {row['dtype']} "
        f"({row['failed']})"
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
