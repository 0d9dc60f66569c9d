"""Tables of blocks, whole models and what they learn: time, memory and error."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.environment import measured, read
from benchmarks.tables import TURNS, against, link, listed, source, span, table

STOCK = "diffusers"  # what whole models are compared with


def block(file: Path) -> str:
    """A training step's time and memory, with the ops and without."""
    rows = read(file)
    timed = measured(rows)
    names = list(timed[0]["timings"])
    lines = []
    for row in timed:
        cells = [f"{row['part']}, {row['shape'][1]} tokens"]
        for name in names:
            if name not in row["timings"]:
                cells.append("wrong")
                continue
            time = row["timings"][name]["median"]
            saved, peak = (row["memory"][name][key] / 2**20 for key in ("saved", "peak"))
            text = f"{time:.4g} ms; {saved:.0f}, {peak:.0f} MiB"
            cells.append(text if name == "eager" else against(row["speedups"][name], text, 3))
        lines.append(cells)
    one = timed[0]
    caption = (
        f"Times as fast as eager without the ops, {TURNS}; milliseconds; MiB saved for the "
        f"backward, and at the peak without parameter gradients. {one['device']}, {one['dtype']}, "
        f"batch {one['shape'][0]}, {one['text']} tokens of text, {source(file, rows)}"
    )
    return table(["training step", *names], lines, caption)


def model(file: Path) -> str:
    """A whole model's time and memory: its own, and diffusers' with the same weights."""
    rows = read(file)
    timed = measured(rows)

    def label(row: dict) -> str:
        batch, tokens, _ = row["shape"]
        return f"{row['model']}, {row['pass']}, {batch} × {tokens} tokens"

    def figures(row: dict, name: str) -> str:
        text = f"{row['timings'][name]['median']:.4g} ms"
        if name in row["peak_bytes"]:
            text += f", {row['peak_bytes'][name] / 2**20:.0f} MiB"
        return text

    one = timed[0]
    texts = "; ".join(
        dict.fromkeys(f"{row['text']}, of which {listed(row['lengths'])} are real" for row in timed)
    )
    caption = (
        f"Times as fast as {STOCK}, {TURNS}; milliseconds; MiB at the peak, weights and their "
        "gradients not counted. The same weights, outputs and gradients compared first. "
        f"{one['device']}, {one['dtype']}, tokens of text {texts}; {source(file, rows)}"
    )
    return _beside_stock("whole model", timed, label, figures, caption)


def generation(file: Path) -> str:
    """Steps a second, seconds to the first picture and memory, of ours and of diffusers'."""
    rows = read(file)
    timed = measured(rows)

    def label(row: dict) -> str:
        return f"{row['model']}, {row['pixels']}px, {row['shape'][0]}, {row['steps']} steps"

    def figures(row: dict, name: str) -> str:
        rate = 1e3 * row["steps"] / row["timings"][name]["median"]
        text = f"{rate:.3g} it/s, {row['first_seconds'][name]:.3g} s"
        if name in row["peak_bytes"]:
            peaks = (row[key][name] / 2**30 for key in ("peak_bytes", "decoding_peak_bytes"))
            text += ", {:.2f} and {:.2f} GiB".format(*peaks)
        return text

    one = timed[0]
    caption = (
        f"Pictures drawn together, with guidance; times as fast as {STOCK}, {TURNS}; steps of all "
        "pictures a second; seconds to the first picture of a new process, compiling, capturing "
        "and decoding included, reading weights and encoding texts not"
        + (
            "; memory at the peaks of drawing and of decoding, weights included"
            if any(row["peak_bytes"] for row in timed)
            else ""
        )
        + ". The same random weights, on which speed does not depend; latents compared first. "
        f"{one['device']}, {one['dtype']}, {source(file, rows)}"
    )
    return _beside_stock("pictures", timed, label, figures, caption)


def _beside_stock(
    head: str,
    rows: list[dict],
    label: Callable[[dict], str],
    figures: Callable[[dict, str], str],
    caption: str,
) -> str:
    """A column for each provider, a line for each row: how much faster, then its figures."""
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))

    def cell(row: dict, name: str) -> str:
        if name not in row["timings"]:
            return "–"
        text = figures(row, name)
        if name == STOCK or STOCK not in row["timings"]:
            return text
        return against(row["speedups"][name], text)

    lines = [[label(row), *(cell(row, name) for name in names)] for row in rows]
    return table([head, *names], lines, caption)


def memory(file: Path) -> str:
    """What each mode keeps of a block, and its share of what diffusers' model keeps."""
    rows = read(file)
    found = {(row["mode"], row["precision"]): row for row in rows}
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    batch, tokens, width = rows[0]["shape"]
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells = [mode]
        for precision in precisions:
            kept, stock = found[mode, precision]["bytes"], found[STOCK, precision]["bytes"]
            cells.append(f"{kept / (batch * tokens):,.0f}, {kept / stock:.0%}")
        lines.append(cells)
    one = rows[0]
    caption = (
        "Bytes for each image token, and the share of diffusers'. "
        f"{batch} × {tokens} tokens of {width} channels, {one['text']} tokens of text, "
        f"torch {one['torch']}, commit {one['commit']}. Tensor by tensor: {link(file, file.name)}."
    )
    return table(["kept of a block", *precisions], lines, caption)


def conditioning(file: Path) -> str:
    """Gigabytes at the peak of a training step of the adaLN ablation, and of adaLN-single."""
    rows = read(file)
    peaks = [row for row in rows if "peak_bytes" in row]
    (times,) = (row for row in rows if "timings" in row)
    names = {"adaln": "adaLN in each block", "adaln_single": "adaLN-single"}
    lines = [
        [f"XL/2, 256px, batch {row['batch']}"]
        + [f"{row['peak_bytes'][name] / 1e9:.1f} GB" for name in names]
        for row in peaks
    ]
    timed = f"depth {times['depth']}, width {times['width']}, batch {times['batch']}"
    lines.append([timed, *(f"{times['timings'][name]['median']:.4g} ms" for name in names)])
    parameters = (f"{count / 1e6:.0f}" for count in peaks[0]["parameters"].values())
    caption = (
        f"A training step: bytes at its peak, {peaks[0]['how']} under bf16 autocast, with "
        f"{' and '.join(parameters)} million parameters; median time, {times['dtype']}. "
        f"{times['device']}, {source(file, rows)}"
    )
    return table(["", *names.values()], lines, caption)


def optimizer(file: Path) -> str:
    """A step of CAME by backend, beside came-pytorch's and AdamW's."""
    rows = read(file)
    baseline, *others = rows[0]["timings"]
    lines = []
    for row in rows:
        what = f"width {row['width']}, {row['depth']} blocks, {row['parameters'] / 1e6:.1f} million"
        times = {name: f"{timing['median']:.3g} ms" for name, timing in row["timings"].items()}
        cells = [against(row["speedups"][name], times[name], 1) for name in others]
        lines.append([what, times[baseline], *cells])
    caption = (
        f"A step on the parameters of a PixArt; times as fast as {baseline}, {TURNS}. Results "
        f"compared first. {rows[0]['device']}, {source(file, rows)}"
    )
    return table(["", baseline, *others], lines, caption)


def generation_memory(file: Path) -> str:
    """Gigabytes at the peak of each part of drawing, by size and memory mode."""
    rows = read(file)
    parts = ("text", "denoise", "decode", "peak")
    lines = [
        [
            f"{row['pixels']} × {row['pixels']}",
            row["mode"],
            *(f"{row[part] / 1e9:.1f} GB" for part in parts),
        ]
        for row in rows
    ]
    one = rows[0]
    caption = (
        f"One picture, {one['how']}, weights included: {one['dtype']}, guidance, "
        f"{one['text_tokens']} tokens of text. Torch {one['torch']}, commit {one['commit']}, "
        f"{link(file, file.name)}."
    )
    return table(["picture", "`--memory`", "text", "denoising", "decoding", "peak"], lines, caption)


def transitions(file: Path) -> str:
    """The error right after each transition and later, rightly made, wrongly and from scratch."""
    rows = read(file)
    one = rows[0]
    last = one["steps"][-1]
    few = next(step for step in one["steps"] if step >= last / 10)
    times = {"right after": 0, f"{few} steps later": few, f"{last} steps later": last}

    def at_each_time(found: list[dict]) -> list[list[float]]:
        """The errors, one for each seed."""
        return [[row["error"][row["steps"].index(at)] for row in found] for at in times.values()]

    lines, ahead = [], []
    for name, starts in over_seeds(rows).items():
        errors = {start: at_each_time(found) for start, found in starts.items()}
        right, wrong, *_ = errors.values()
        before = [row["before"] for row in next(iter(starts.values()))]
        lines.append([f"**{name}**", _over(before), "", "", ""])
        lines += [[start, "", *map(_over, found)] for start, found in errors.items()]
        wins = [sum(map(operator.lt, *pair)) for pair in zip(right, wrong, strict=True)]
        ahead.append(f"{name} {listed(wins)}")
    seeds = len({row["seed"] for row in rows})
    caption = (
        f"Mean squared error of the predicted noise: median over {seeds} seeds (lowest to "
        f"highest). In how many of them the right way was ahead of the wrong one, {listed(times)}: "
        f"{'; '.join(ahead)}. {one['device']}, torch {one['torch']}, commit {one['commit']}, "
        f"{link(file, file.name)}."
    )
    return table(["", "just before", *times], lines, caption)


def over_seeds(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The rows of each transition and start, one for each seed."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        found.setdefault(row["transition"], {}).setdefault(row["start"], []).append(row)
    return found


def _over(values: Sequence[float]) -> str:
    """Median, and lowest to highest where they differ."""
    middle, between = f"{median(values):.3f}", span(values, 3)
    return middle if middle == between else f"{middle} ({between})"


def floor_sites(file: Path) -> str:
    """A block's sites at 1024px with the longest text: work and bytes of each."""
    row = max((row for row in read(file) if row["pixels"] == 1024), key=lambda row: row["text"])
    keys = ("flops", "bytes", "backward_flops", "backward_bytes")
    total = {"name": "all", **{key: sum(site[key] for site in row["sites"]) for key in keys}}
    lines = []
    for site in (*row["sites"], total):
        cells = [site["name"]]
        for flops, moved in ((site[keys[0]], site[keys[1]]), (site[keys[2]], site[keys[3]])):
            intensity = f"{flops / moved:.0f}" if flops else "–"
            cells += [f"{flops / 1e9:.1f}" if flops else "–", f"{moved / 1e6:.1f}", intensity]
        lines.append(cells)
    wide = row["float32_residual"]
    caption = (
        f"One picture of 1024px, {row['tokens']} tokens, {row['text']} tokens of text. With a "
        f"float32 residual stream, all: {wide['bytes'] / 1e6:.1f} MB forward, "
        f"{wide['backward_bytes'] / 1e6:.1f} MB backward."
    )
    return table(
        ["site", "forward, GFLOP", "MB", "FLOP/B", "backward, GFLOP", "MB", "FLOP/B"],
        lines,
        caption,
    )


def floor_counts(file: Path) -> str:
    """What each model dispatches for a block, as multiples of the floor's bytes."""
    rows = read(file)
    models = list(rows[0]["counted"])
    lines, differ = [], set()
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
        lines.append(cells)
    one = rows[0]
    flops = "The FLOPs that were counted are the floor's in every case"
    if differ:
        flops = f"Counted other FLOPs: {', '.join(sorted(differ))}"
    caption = f"{flops}. Torch {one['torch']}, commit {one['commit']}, {link(file, file.name)}."
    passes = ("block forward", "and backward")
    head = [cell for which in passes for cell in (f"{which}: GFLOP, MB", *models)]
    return table(["picture, text", "a model's forward, TFLOP", *head], lines, caption)


def quickstart(file: Path) -> str:
    """What the quickstart reached and how long it took, over the seeds that were run."""
    rows = read(file)

    def percent(key: str) -> str:
        return f"{span(100 * row[key] for row in rows)} %"

    def seconds(stage: str) -> str:
        return f"{span((row['seconds'][stage] for row in rows), 0)} s"

    one = rows[0]
    total = span((sum(row["seconds"].values()) for row in rows), 0)
    foreign = max(row["foreign_cores"] for row in rows)
    return (
        f"{len(rows)} runs from nothing with different seeds: the nearest training picture carries "
        f"the prompt's caption for **{percent('retrieval')}** of {one['pictures']} pictures of "
        f"{one['captions']} captions. With prompts shuffled among the pictures: "
        f"{percent('control')}; chance: {percent('chance')}. {total} s in all on {one['threads']} "
        f"threads of an {one['device']} (autoencoder {seconds('autoencoder')}, transformer "
        f"{seconds('transformer')}, drawing {seconds('drawing')}), other work keeping at most "
        f"{foreign:.2f} cores busy. Commit {one['commit']}, torch {one['torch']}, {link(file)}."
    )
