"""Writes the benchmark tables of README and docs: ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import kv_compression, registry
from benchmarks.environment import RESULTS, ROOT, measured, read
from benchmarks.model_tables import (
    block,
    conditioning,
    floor_counts,
    floor_sites,
    generation,
    generation_memory,
    memory,
    model,
    optimizer,
    quickstart,
    transitions,
)
from benchmarks.op_tables import (
    attention_cpu_table,
    attention_file,
    attention_gpu_table,
    cpu_table,
    cross_attention_table,
    gpu_table,
)

PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("benchmarks", "floor", "generation", "memory", "stages", "training")
    ),
)
Table = Callable[[Path], str]
# marker in a page -> the file of benchmarks/results/cpu that its text is made of
CPU: dict[str, tuple[str, Table]] = {
    "adaln": ("adaln", cpu_table),
    "mlp": ("mlp", cpu_table),
    "attention": ("attention", attention_cpu_table),
    "kv_compression": ("kv_compression", cpu_table),
    "cross_attention": ("cross_attention", cross_attention_table),
    "block": ("block", block),
    "conditioning": ("conditioning", conditioning),
    "floor-counts": ("floor", floor_counts),
    "floor-sites": ("floor", floor_sites),
    "generation": ("generation", generation),
    "generation-memory": ("generation_memory", generation_memory),
    "memory": ("memory", memory),
    "model": ("model", model),
    "optimizer": ("optimizer", optimizer),
    "quickstart": ("quickstart", quickstart),
    "transitions": ("transitions", transitions),
}


def cpu(name: str, results: Path) -> str:
    """The text of a marker."""
    family, text = CPU[name]
    file = results / "cpu" / f"{family}.jsonl"
    return text(file) if measured(read(file)) else "No run is recorded yet."


def gpu(results: Path) -> str:
    """All tables of each GPU."""
    found: list[tuple[Path, Table]] = []
    for folder in sorted(results.glob("sm_*")):
        families = (*registry.FAMILIES, *kv_compression.FAMILIES)
        found += [(folder / f"{family}.jsonl", gpu_table) for family in families]
        found += [
            (attention_file(folder), attention_gpu_table),
            (folder / "model.jsonl", model),
            (folder / "conditioning.jsonl", conditioning),
            (folder / "generation.jsonl", generation),
            (folder / "optimizer.jsonl", optimizer),
            (folder / "cross_attention.jsonl", cross_attention_table),
        ]
    tables = [text(file) for file, text in found if measured(read(file))]
    if not tables:
        why = "nothing here has run on a GPU yet: [docs/hardware.md](docs/hardware.md)"
        return f"There are no GPU figures yet, because {why}."
    return "\n\n".join(tables)


def updated(page: str, in_docs: bool = False) -> str:
    """A page's text, in the root or in docs/, with the tables that the results make now."""
    for name in (*CPU, "gpu"):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page:
            continue
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        text = gpu(RESULTS) if name == "gpu" else cpu(name, RESULTS)
        if in_docs:
            # links are written from the root
            text = text.replace("](docs/", "](").replace("](benchmarks/", "](../benchmarks/")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main(argv: list[str]) -> None:
    description = (__doc__ or "").splitlines()[0]
    argparse.ArgumentParser("python -m benchmarks report", description=description).parse_args(argv)
    for name in PAGES:
        page = ROOT / name
        page.write_text(updated(page.read_text(), in_docs=name.startswith("docs/")))
