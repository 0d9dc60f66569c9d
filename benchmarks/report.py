"""Writes the benchmark tables of README and docs: ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from benchmarks import attention, kv_compression
from benchmarks.attention import PASSES, ROOF
from benchmarks.cross_attention import MASKED
from benchmarks.registry import FAMILIES, TINY
from benchmarks.rivals import EAGER_16BIT, baseline

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("benchmarks", "floor", "generation", "memory", "stages")),
)
STOCK = "diffusers"  # what whole models are compared with
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
        f"{row.get('op') or row.get('part') or row['model']} {_by(row['shape'])} {row['dtype']} "
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


def cpu_table(file: Path) -> str:
    """Ratios of the median wall time, lowest to highest over shapes."""
    if not _has_timings(file):
        return "No run is recorded yet."
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


def _lengths(shape) -> str:
    _, Nq, Nk, *_ = shape
    return f"{Nq} tokens" if Nq == Nk else f"{Nq} queries, {Nk} keys"


def attention_cpu_table(file: Path) -> str:
    """`auto` over a direct call."""
    if not _has_timings(file):
        return "No run is recorded yet."
    rows = _rows(file)
    measured = [row for row in rows if "timings" in row]
    ratios = {
        (row["op"], tuple(row["shape"]), row["dtype"], row["pass"]): row["speedups"]["auto"]
        for row in measured
        if "auto" in row["speedups"]
    }
    kinds = list(dict.fromkeys(key[2:] for key in ratios))
    lines = [
        "| times as fast as a direct call | " + " | ".join(map(" ".join, kinds)) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for op, shape in dict.fromkeys(key[:2] for key in ratios):
        cells = []
        for ratio in (ratios.get((op, shape, *kind)) for kind in kinds):
            if ratio is None:
                cells.append("–")
                continue
            text = f"{ratio['median']:.3f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
            cells.append(f"**{text}**" if ratio["p80"] < 1 else text)
        lines.append(f"| `{op}`, {_lengths(shape)} | " + " | ".join(cells) + " |")
    one = measured[0]
    disturbed = sum(not row["quiet"] for row in measured)
    caption = (
        "On a CPU `auto` is PyTorch's scaled dot product attention, and must not be slower than a "
        "direct call of it on the same tensors. Turn by turn: median, and from the 20th to the "
        f"80th percentile (bold: all of that below 1). {one['device']}, {one['threads']} threads, "
        f"batch {one['shape'][0]}, {one['shape'][3]} heads of {one['shape'][4]}, torch "
        f"{one['torch']}, commit {one['commit']}"
        + (f"; {disturbed} of {len(measured)} rows beside other work" if disturbed else "")
        + f". {_link(file)}.{_missing(rows)}"
    )
    return "\n".join([*lines, "", caption])


def attention_gpu_table(file: Path) -> str:
    """FLOP rates of everyone at head_dim 72, by pass and length."""
    rows = _rows(file)
    measured = [row for row in rows if "timings" in row and row["shape"][-1] == 72]
    # self-attention first
    measured.sort(key=lambda r: (PASSES.index(r["pass"]), r["op"] == "attention", r["shape"][1]))
    names = list(dict.fromkeys(n for row in measured for n in row["timings"] if n != ROOF))
    lines = [
        "| TFLOP/s at head_dim 72 | " + " | ".join(names) + " | best, % of a matrix product |",
        "|---|" + "---|" * (len(names) + 1),
    ]

    def line(label: str, cells: dict[str, str], best: str, last: str) -> str:
        texts = [cells.get(name, "–") for name in names]
        texts = [f"**{t}**" if n == best else t for n, t in zip(names, texts, strict=True)]
        return f"| {label} | " + " | ".join(texts) + f" | {last} |"

    for row in measured:
        times = {n: t["median"] for n, t in row["timings"].items() if n != ROOF}
        if not times:
            continue
        rates = {name: row["flops"] / time / 1e9 for name, time in times.items()}
        best = max(rates, key=lambda name: rates[name])
        roof = row["roof_flops"] / row["timings"][ROOF]["median"] / 1e9
        cells = {name: f"{rate:.0f}" for name, rate in rates.items()}
        label = f"{row['pass']}, {_lengths(row['shape'])}"
        lines.append(line(label, cells, best, f"{100 * rates[best] / roof:.0f}"))
    largest = [row for row in measured if row["pass"] == PASSES[-1] and row["peak_bytes"]]
    if largest:
        row = max(largest, key=lambda r: r["shape"][1])
        peaks = row["peak_bytes"]
        cells = {name: f"{peak / 2**20:.0f}" for name, peak in peaks.items()}
        label = f"MiB at the peak of it, {_lengths(row['shape'])}"
        lines.append(line(label, cells, min(peaks, key=lambda name: peaks[name]), ""))
    one = measured[0]
    absent = {name: why for row in measured for name, why in row["cannot"].items()}
    nowhere = [f"{name} ({why})" for name, why in absent.items() if name not in names]
    caption = (
        f"{one['device']}, driver {one.get('driver_version')}, torch {one['torch']}, cuDNN "
        f"{one['cudnn']}, triton {one['triton']}, commit {one['commit']}; {one['dtype']}, 16 heads "
        "of samples that have 16k tokens together, L2-cold in CUDA graphs that take turns. FLOPs "
        "are those of the true head_dim, 2.5 times as many backward; bold: the best. Ours reads "
        "the packed projection in place; others get the layout they like, conversions are not "
        "timed, and their options are the defaults. A dash: could not run there, or failed the "
        "check. Reasons, spread and other head "
        f"sizes: {_link(file)}."
        + (f" Nowhere: {'; '.join(nowhere)}." if nowhere else "")
        + _missing(rows)
    )
    picture = f"docs/images/attention-{file.parent.name}.png"
    if (ROOT / picture).exists():
        lines += ["", f"![TFLOP/s over tokens, by head size and pass]({picture})"]
    return "\n".join([*lines, "", caption])


def _text(row: dict) -> str:
    """How much of the texts is real: one length, or those that repeat over the batch."""
    lengths, L = row["lengths"], row["shape"][2]
    return f"{' and '.join(map(str, dict.fromkeys(lengths)))} of {L} tokens"


def cross_attention_table(file: Path) -> str:
    """Ratios of the faster of our backends, for each text."""
    if not _has_timings(file):
        return "No run is recorded yet."
    rows = _rows(file)
    measured = [row for row in rows if "timings" in row]

    def ours(row: dict) -> str:
        backends = [name for name in ("cuda", "triton", "native") if name in row["timings"]]
        return min(backends, key=lambda name: row["timings"][name]["median"], default="none")

    kinds = list(dict.fromkeys((row["dtype"], row["pass"]) for row in measured))
    lines = [
        f"| times as fast as eager / {MASKED} | " + " | ".join(map(" ".join, kinds)) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for text in dict.fromkeys(map(_text, measured)):
        cells = []
        for kind in kinds:
            found = [r for r in measured if (_text(r), r["dtype"], r["pass"]) == (text, *kind)]
            cells.append(" / ".join(_ratios(found, _always(n), ours) for n in ("eager", MASKED)))
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    one = measured[0]
    disturbed = sum(not row.get("quiet", True) for row in measured)
    images = dict.fromkeys("×".join(map(str, row["shape"][:2])) for row in measured)
    caption = (
        f"{MASKED} is what diffusers runs, over all tokens; eager is our definition, which clears "
        f"padding too. Lowest to highest over images × their tokens, {', '.join(images)}; "
        f"{one['shape'][3]} heads of {one['shape'][4]}; bold: the rival was faster at some. "
        f"{one['device']}, torch {one['torch']}, commit {one['commit']}"
        + (f"; {disturbed} of {len(measured)} rows beside other work" if disturbed else "")
        + f". {_link(file)}.{_missing(rows)}"
    )
    return "\n".join([*lines, "", caption])


def attention_files(results: Path) -> list[Path]:
    """Each GPU's run with our kernels or, until there is one, that of rivals alone."""
    found = []
    for folder in sorted(results.glob("sm_*")):
        files = [folder / f"{family}.jsonl" for family in attention.FAMILIES]
        found += [file for file in files if _has_timings(file)][:1]
    return found


def _has_timings(file: Path) -> bool:
    return file.exists() and any("timings" in row for row in _rows(file))


def gpu(results: Path) -> str:
    families = (*FAMILIES, *kv_compression.FAMILIES)
    named = [
        folder / f"{family}.jsonl" for folder in sorted(results.glob("sm_*")) for family in families
    ]
    tables = [gpu_table(file) for file in named if file.exists()]
    tables += [attention_gpu_table(file) for file in attention_files(results)]
    tables += [model(file) for file in sorted(results.glob("sm_*/model.jsonl"))]
    tables += [generation(file) for file in sorted(results.glob("sm_*/generation.jsonl"))]
    cross = sorted(results.glob("sm_*/cross_attention.jsonl"))
    tables += [cross_attention_table(file) for file in cross if _has_timings(file)]
    if not tables:
        why = "nothing here has run on a GPU yet: [docs/hardware.md](docs/hardware.md)"
        return f"There are no GPU figures yet, because {why}."
    return "\n\n".join(tables)


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


def model(file: Path) -> str:
    """A whole model's time and memory: its own, and diffusers' with the same weights."""
    if not _has_timings(file):
        return "No run is recorded yet."
    everything = _rows(file)
    rows = [row for row in everything if "timings" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    lines = ["| whole model | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        batch, tokens, _ = row["shape"]
        cells = [f"{row['model']}, {row['pass']}, {batch} × {tokens} tokens"]
        for name in names:
            if name not in row["timings"]:
                cells.append("–")
                continue
            text = f"{row['timings'][name]['median']:.4g} ms"
            if name in row["peak_bytes"]:
                text += f", {row['peak_bytes'][name] / 2**20:.0f} MiB"
            if name != STOCK and STOCK in row["timings"]:
                ratio = row["speedups"][name]
                text = f"{ratio['median']:.2f}× ({ratio['p20']:.2f}–{ratio['p80']:.2f}), {text}"
                text = f"**{text}**" if ratio["median"] < 1 else text
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    one = rows[0]
    disturbed = sum(not row["quiet"] for row in rows)
    texts = "; ".join(
        dict.fromkeys(f"{row['text']}, of which {_listed(row['lengths'])} are real" for row in rows)
    )
    caption = (
        f"Times as fast as {STOCK}, turn by turn: median, and from the 20th to the 80th percentile "
        "(bold: slower); milliseconds; MiB at the peak, weights and their gradients not counted. "
        f"The same weights, outputs and gradients compared first. {one['device']}, {one['dtype']}, "
        f"tokens of text {texts}; torch {one['torch']}, commit {one['commit']}"
        + (f"; {disturbed} of {len(rows)} rows beside other work" if disturbed else "")
        + f". {_link(file)}.{_missing(everything)}"
    )
    return "\n".join([*lines, "", caption])


def generation(file: Path) -> str:
    """Steps a second, seconds to the first picture and memory, of ours and of diffusers'."""
    if not _has_timings(file):
        return "No run is recorded yet."
    everything = _rows(file)
    rows = [row for row in everything if "timings" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    lines = ["| pictures | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{row['model']}, {row['pixels']}px, {row['shape'][0]}, {row['steps']} steps"]
        for name in names:
            if name not in row["timings"]:
                cells.append("–")
                continue
            rate = 1e3 * row["steps"] / row["timings"][name]["median"]
            text = f"{rate:.3g} it/s, {row['first_seconds'][name]:.3g} s"
            if name in row["peak_bytes"]:
                peaks = (row[key][name] / 2**30 for key in ("peak_bytes", "decoding_peak_bytes"))
                text += ", {:.2f} and {:.2f} GiB".format(*peaks)
            if name != STOCK:
                ratio = row["speedups"][name]
                text = f"{ratio['median']:.2f}× ({ratio['p20']:.2f}–{ratio['p80']:.2f}), {text}"
                text = f"**{text}**" if ratio["median"] < 1 else text
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    one = rows[0]
    disturbed = sum(not row["quiet"] for row in rows)
    caption = (
        f"Pictures drawn together, with guidance; times as fast as {STOCK}, turn by turn: median, "
        "and from the 20th to the 80th percentile (bold: slower); steps of all pictures a second; "
        "seconds to the first picture of a new process, compiling, capturing and decoding "
        "included, reading weights and encoding texts not"
        + (
            "; memory at the peaks of drawing and of decoding, weights included"
            if any(row["peak_bytes"] for row in rows)
            else ""
        )
        + ". The same random weights, on which speed does not depend; latents compared first. "
        f"{one['device']}, {one['dtype']}, torch {one['torch']}, commit {one['commit']}"
        + (f"; {disturbed} of {len(rows)} rows beside other work" if disturbed else "")
        + f". {_link(file)}.{_missing(everything)}"
    )
    return "\n".join([*lines, "", caption])


def _listed(values: list) -> str:
    *rest, last = map(str, values)
    return f"{', '.join(rest)} and {last}" if rest else last


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


def memory(file: Path) -> str:
    """What each mode keeps of a block, and its share of what diffusers' model keeps."""
    rows = _rows(file)
    if not rows:
        return ""
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    lines = [f"| kept of a block | {' | '.join(precisions)} |", "|---|" + "---|" * len(precisions)]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells = [mode]
        for precision in precisions:
            found = {row["mode"]: row for row in rows if row["precision"] == precision}
            batch, tokens, width = found[mode]["shape"]
            share = found[mode]["bytes"] / found["diffusers"]["bytes"]
            cells.append(f"{found[mode]['bytes'] / (batch * tokens):,.0f}, {share:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    one = rows[0]
    return "\n".join(lines) + (
        "\n\nBytes for each image token, and the share of diffusers'. "
        f"{batch} × {tokens} tokens of {width} channels, {one['text']} tokens of text, "
        f"torch {one['torch']}, commit {one['commit']}. "
        f"Tensor by tensor: [{file.name}]({file.relative_to(ROOT)})."
    )


def generation_memory(file: Path) -> str:
    """Gigabytes at the peak of each part of drawing, by size and memory mode."""
    if not file.is_file():
        return "No run is recorded yet."
    rows = _rows(file)
    parts = ("text", "denoise", "decode", "peak")
    lines = [
        "| picture | `--memory` | text | denoising | decoding | peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (f"{row[part] / 1e9:.1f} GB" for part in parts)
        lines.append(f"| {row['pixels']} × {row['pixels']} | {row['mode']} | {' | '.join(cells)} |")
    one = rows[0]
    return "\n".join(lines) + (
        f"\n\nOne picture, {one['how']}, weights included: {one['dtype']}, guidance, "
        f"{one['text_tokens']} tokens of text. Torch {one['torch']}, commit {one['commit']}, "
        f"[{file.name}]({file.relative_to(ROOT)})."
    )


def transitions(file: Path) -> str:
    """The error right after each transition and later, rightly made, wrongly and from scratch."""
    if not file.is_file():
        return ""
    rows = _rows(file)
    last = rows[0]["steps"][-1]
    few = next(step for step in rows[0]["steps"] if step >= last / 10)
    lines = [
        f"| | just before | right after | {few} steps later | {last} steps later |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["transition"] for row in rows):
        here = [row for row in rows if row["transition"] == name]
        lines.append(f"| **{name}** | {here[0]['before']:.3f} | | | |")
        for row in here:
            error = dict(zip(row["steps"], row["error"], strict=True))
            lines.append(
                f"| {row['start']} | | {error[0]:.3f} | {error[few]:.3f} | {error[last]:.3f} |"
            )
    one = rows[0]
    return "\n".join(lines) + (
        f"\n\nMean squared error of the predicted noise; one seed. {one['device']}, "
        f"torch {one['torch']}, commit {one['commit']}, "
        f"[{file.name}]({file.relative_to(ROOT)})."
    )


def floor_sites(file: Path) -> str:
    """A block's sites at 1024px with the longest text: work and bytes of each."""
    row = max((row for row in _rows(file) if row["pixels"] == 1024), key=lambda row: row["text"])
    keys = ("flops", "bytes", "backward_flops", "backward_bytes")
    lines = [
        "| site | forward, GFLOP | MB | FLOP/B | backward, GFLOP | MB | FLOP/B |",
        "|---|---|---|---|---|---|---|",
    ]
    total = {"name": "all", **{key: sum(site[key] for site in row["sites"]) for key in keys}}
    for site in (*row["sites"], total):
        cells = [site["name"]]
        for flops, moved in ((site[keys[0]], site[keys[1]]), (site[keys[2]], site[keys[3]])):
            intensity = f"{flops / moved:.0f}" if flops else "–"
            cells += [f"{flops / 1e9:.1f}" if flops else "–", f"{moved / 1e6:.1f}", intensity]
        lines.append(f"| {' | '.join(cells)} |")
    wide = row["float32_residual"]
    caption = (
        f"One picture of 1024px, {row['tokens']} tokens, {row['text']} tokens of text. With a "
        f"float32 residual stream, all: {wide['bytes'] / 1e6:.1f} MB forward, "
        f"{wide['backward_bytes'] / 1e6:.1f} MB backward."
    )
    return "\n".join([*lines, "", caption])


def floor_counts(file: Path) -> str:
    """What each model dispatches for a block, as multiples of the floor's bytes."""
    rows = _rows(file)
    models = list(rows[0]["counted"])
    lines = [
        "| picture, text | a model's forward, TFLOP | "
        + " | ".join(
            f"{name}: GFLOP, MB | {' | '.join(models)}"
            for name in ("block forward", "and backward")
        )
        + " |",
        "|---|---|" + "---|" * (2 + 2 * len(models)),
    ]
    differ = set()
    for row in rows:
        cells = [f"{row['pixels']}px, {row['text']}", f"{row['model_flops'] / 1e12:.2f}"]
        flops = moved = 0
        for prefix, name in (("", "forward"), ("backward_", "step")):
            flops += sum(site[f"{prefix}flops"] for site in row["sites"])
            moved += sum(site[f"{prefix}bytes"] for site in row["sites"])
            cells.append(f"{flops / 1e9:.1f}, {moved / 1e6:.0f}")
            for which in models:
                found = row["counted"][which][name]
                cells.append(f"{found['bytes'] / moved:.2f}×")
                if found["flops"] != flops:
                    differ.add(which)
        lines.append(f"| {' | '.join(cells)} |")
    one = rows[0]
    flops = "The FLOPs that were counted are the floor's in every case"
    if differ:
        flops = f"Counted other FLOPs: {', '.join(sorted(differ))}"
    caption = (
        f"{flops}. Torch {one['torch']}, commit {one['commit']}, "
        f"[{file.name}]({file.relative_to(ROOT)})."
    )
    return "\n".join([*lines, "", caption])


# marker in a page -> its text; what has no marker there is not written
BLOCKS: dict[str, Callable[[Path], str]] = {
    "adaln": lambda results: cpu_table(results / "cpu" / "adaln.jsonl"),
    "mlp": lambda results: cpu_table(results / "cpu" / "mlp.jsonl"),
    "attention": lambda results: attention_cpu_table(results / "cpu" / "attention.jsonl"),
    "kv_compression": lambda results: cpu_table(results / "cpu" / "kv_compression.jsonl"),
    "cross_attention": lambda results: cross_attention_table(
        results / "cpu" / "cross_attention.jsonl"
    ),
    "block": lambda results: block(results / "cpu" / "block.jsonl"),
    "floor-counts": lambda results: floor_counts(results / "cpu" / "floor.jsonl"),
    "floor-sites": lambda results: floor_sites(results / "cpu" / "floor.jsonl"),
    "generation": lambda results: generation(results / "cpu" / "generation.jsonl"),
    "gpu": lambda results: gpu(results),
    "generation-memory": lambda results: generation_memory(
        results / "cpu" / "generation_memory.jsonl"
    ),
    "memory": lambda results: memory(results / "cpu" / "memory.jsonl"),
    "model": lambda results: model(results / "cpu" / "model.jsonl"),
    "quickstart": lambda results: quickstart(results / "cpu" / "quickstart.jsonl"),
    "transitions": lambda results: transitions(results / "cpu" / "transitions.jsonl"),
}


def updated(page: str, in_docs: bool = False) -> str:
    """A page's text, in the root or in docs/, with the tables that the results make now."""
    for name, text in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page:
            continue
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        table = text(ROOT / RESULTS)
        if in_docs:
            # links are written from the root
            table = table.replace("](docs/", "](").replace("](benchmarks/", "](../benchmarks/")
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


def main(argv: list[str]) -> None:
    description = (__doc__ or "").splitlines()[0]
    argparse.ArgumentParser("python -m benchmarks report", description=description).parse_args(argv)
    for name in PAGES:
        page = ROOT / name
        page.write_text(updated(page.read_text(), in_docs=name.startswith("docs/")))
