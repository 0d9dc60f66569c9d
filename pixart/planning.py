"""What a training run will take: memory, time, money, energy.

Every number is a prediction. It rests on a measured run where there is one, and otherwise on a
floor, what a block must compute and move at a device's peak rates, over the share of that floor
which the runs of the PixArt-alpha paper reached.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from rich.table import Table

from pixart.config import PixArtConfig
from pixart.training.recipe import TrainRecipe

ELEMENT = 2  # bytes: bf16 or fp16


@dataclass(frozen=True)
class Site:
    """A place of a block: of one pass the FLOPs of its products, and its bytes."""

    name: str
    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int


def tokens_of(pixels: int, config: PixArtConfig) -> int:
    """Tokens of a square picture, or of any with its area.

    The autoencoder is one of factor 8, as all that PixArt was published with.
    """
    return (pixels // 8 // config.patch_size) ** 2


def block_sites(
    config: PixArtConfig,
    tokens: int,
    text: int,
    batch: int = 1,
    residual: int = ELEMENT,
    *,
    element: int = ELEMENT,
    layer: int = 0,
) -> list[Site]:
    """The sites of one block, in the order of its forward.

    An op reads each of its inputs once and writes each of its outputs once, in elements of
    ``element`` bytes; ``residual`` is the bytes of an element of the residual stream. The
    backward's bytes contain what it makes again. Vectors (tables, biases, lengths, statistics) are
    left out, as are sums of gradients outside of ops. A class model has no sites of text.
    """
    a, r, D, F = element, residual, config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    BN, BL = batch * tokens, batch * text
    image = BN * D  # elements of a tensor of image tokens
    both = a + (a if r != a else 0)  # a branch, or what asks the text, where it needs a copy
    reads_text = config.conditioning != "class"

    def matmul(name: str, rows: int, inputs: int, outputs: int) -> Site:
        flops, weight = 2 * rows * inputs * outputs, inputs * outputs
        once = a * (rows * (inputs + outputs) + weight)
        # the input's gradient, and the weight's: each reads the output's
        return Site(name, flops, once, 2 * flops, 2 * once)

    def attend(name: str, keys: int, of_keys: int) -> Site:
        flops = 4 * batch * tokens * keys * D
        # scores again, and four products; reads q, out, its gradient and k, v, writes three
        return Site(
            name,
            flops,
            a * (2 * image + of_keys),
            5 * flops // 2,
            a * (4 * image + 2 * of_keys),
        )

    def elementwise(name: str, forward: int, backward: int) -> Site:
        return Site(name, 0, forward, 0, backward)

    # as many of each token's keys and values remain
    ratio = config.compression_ratio(layer) ** 2
    kept = 2 * image // ratio
    enter = (2 * r + 2 * a) * image
    add = (2 * r + both) * image
    normalise = (2 * r + 2 * a) * image
    gelu = 2 * a * BN * F
    # backward: x, the branch and the gradients of x and h; of x and of the branch. And again.
    enter_backward = (3 * r + 3 * a) * image + enter
    sites = [
        elementwise("add MLP, LN-modulate", enter, enter_backward),
        matmul("qkv", BN, D, 3 * D),
    ]
    if ratio > 1:
        # backward: k, v and the gradient, their gradient; and again
        compress = a * (2 * image + kept)
        sites.append(elementwise("compress k, v", compress, a * (4 * image + kept) + compress))
    sites += [
        attend("self-attention", tokens // ratio, kept),
        matmul("proj", BN, D, D),
    ]
    if reads_text:
        sites += [
            # backward: the branch, the gradients of x and of the query; of x and of the branch
            elementwise("add attention", add, (2 * r + 3 * a) * image + add),
            matmul("text: q", BN, D, D),
            matmul("text: k, v", BL, D, 2 * D),
            attend("cross-attention", text, 2 * BL * D),
            matmul("text: proj", BN, D, D),
            # backward: x, the gradients of x and h; of x, and rounded for the branch. Again, h
            # alone.
            elementwise(
                "add text, LN-modulate",
                normalise,
                (3 * r + a + (both - a) + r + a) * image,
            ),
        ]
    else:
        sites.append(elementwise("add attention, LN-modulate", enter, enter_backward))
    return [
        *sites,
        matmul("fc1", BN, D, F),
        elementwise("GELU", gelu, gelu * 3 // 2 + gelu),
        matmul("fc2", BN, F, D),
    ]


def model_flops(config: PixArtConfig, tokens: int, text: int, batch: int = 1) -> int:
    """Of one forward of a whole model: matrix products, attention, the first convolution."""
    blocks = (
        site.flops
        for layer in range(config.depth)
        for site in block_sites(config, tokens, text, batch, layer=layer)
    )
    return sum(blocks) + _flops_outside(config, tokens, text, batch)


def _flops_outside(config: PixArtConfig, tokens: int, text: int, batch: int) -> int:
    """Of a forward, outside its blocks or once for them all."""
    D, p = config.hidden_size, config.patch_size
    ends = batch * tokens * D * p * p * (config.in_channels + config.out_channels)
    captions = batch * text * D * (config.caption_channels + D)
    if config.conditioning == "class":
        captions = 0
    # the final layer's are a table's, or a matrix's as every block's
    modulations = 6 if config.conditioning == "adaln_single" else 6 * config.depth + 2
    times = batch * D * (256 + D + modulations * D)
    return 2 * (ends + captions + times)


def seconds(flops: int, moved: int, tflops: float, gbs: float) -> float:
    """The least that an op takes at these rates: what it waits for longer."""
    return max(flops / (1e12 * tflops), moved / (1e9 * gbs))


@dataclass(frozen=True)
class Device:
    """Of one GPU, from its maker's data sheet: peak dense TFLOP/s of 16-bit matrix products and of
    float32 ones, GB/s and GB of its memory, and the watts it is rated at. Dollars an hour are
    typical of GPU clouds on demand in early 2026, where half and twice as much were asked as well.
    ``driver_name`` is what CUDA calls it: PCIe and Grace variants, of other rates, have others.
    """

    name: str
    driver_name: str
    tflops: float
    float32_tflops: float
    gbs: float
    memory_gb: float
    watts: float
    dollars_per_hour: float


DEVICES = {
    # the price: the alpha paper's 28,400 dollars for its 1656 GPU-days
    "v100": Device("NVIDIA V100 SXM2 32 GB", "Tesla V100-SXM2-32GB", 125, 15.7, 900, 32, 300, 0.71),
    "a100": Device(
        "NVIDIA A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 312, 19.5, 2039, 80, 400, 2.00
    ),
    "h100": Device("NVIDIA H100 SXM 80 GB", "NVIDIA H100 80GB HBM3", 989, 67, 3350, 80, 700, 3.00),
    "h200": Device("NVIDIA H200 SXM 141 GB", "NVIDIA H200", 989, 67, 4800, 141, 700, 4.00),
}

# share of the floor reached by the five stages of the PixArt-alpha paper on V100s (arXiv:2310.00426
# table 4), all blocks recomputed: 0.37, 0.35 and 0.34 at 256px, 0.45 at 512px, 0.11 at 1024px. The
# first is the one prediction rests on, the others are the range that is given with it
EFFICIENCY = 0.35
BEST_EFFICIENCY, WORST_EFFICIENCY, WORST_LONG_EFFICIENCY = 0.46, 0.33, 0.11
LONG = 4096  # tokens

# grams of CO2 equivalents a kWh: the world's electricity in 2023 (Ember)
WORLD_GRID = 481.0


@dataclass(frozen=True)
class Plan:
    """A prediction for a whole run. ``low`` and ``high`` belong to ``days``.

    Memory is bytes on each device; energy counts the devices alone, at their rated power.
    """

    device: str
    count: int
    basis: str
    parameters: int
    images: int
    memory: dict[str, int]
    memory_available: int
    step_seconds: float
    images_per_second: float
    days: float
    low: float
    high: float
    device_days: float
    dollars: float
    kwh: float
    kg_co2: float

    @property
    def memory_needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_needed <= self.memory_available


def plan(
    recipe: TrainRecipe,
    device: Device,
    count: int = 1,
    *,
    efficiency: float | None = None,
    measured: Path | None = None,
    dollars_per_hour: float | None = None,
    grid: float = WORLD_GRID,
) -> Plan:
    """Predicts what a recipe takes on ``count`` devices.

    Args:
        recipe: as it would be trained; its batch size is that of each process.
        device: one of ``DEVICES``, or your own.
        count: processes, each with a device.
        efficiency: share of the floor that is reached; default: that of the alpha paper's runs.
        measured: folder of a run of the same recipe, of any number of steps, on such devices: its
            images per second and process are taken instead.
        dollars_per_hour: of one device; default: the device's.
        grid: grams of CO2 equivalents a kWh.

    Raises:
        ValueError: a number is out of range, the measured run is of another recipe, or the recipe
            has lora, distill or control, whose weights and passes are not counted.
    """
    for name in ("lora", "distill", "control"):
        if getattr(recipe, name) is not None:
            raise ValueError(
                f"the recipe has {name}, which cannot be planned: train a few steps and read "
                "images_per_second and memory_gib in the run's log.jsonl"
            )
    for name, value in {"count": count, "efficiency": efficiency or 1, "grid": grid}.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; accepted: above 0")
    sequence = recipe.parallel.sequence
    if count % sequence:
        raise ValueError(f"count is {count}, which parallel.sequence = {sequence} does not divide")
    if measured is not None and efficiency is not None:
        raise ValueError("efficiency and a measured run are two answers to one question: give one")
    images = recipe.batch_size * recipe.gradient_accumulation * count // sequence
    if measured is not None:
        speed, what = _measured_speed(measured, recipe, device)
        step = images / (speed * count)
        best = worst = step
        basis = f"{what}, and no loss with more devices"
    else:
        floor = floor_seconds(recipe, device)
        reached = EFFICIENCY if efficiency is None else efficiency
        step = floor / reached
        best, worst = step, step
        basis = f"{reached:.0%} of the floor at the device's peak rates, as was given"
        if efficiency is None:
            long = _tokens(recipe) >= LONG
            worst = floor / (WORST_LONG_EFFICIENCY if long else WORST_EFFICIENCY)
            best = floor / BEST_EFFICIENCY
            basis = (
                f"{EFFICIENCY:.0%} of the floor at the device's peak rates, which the PixArt-alpha "
                "paper's runs reached at 256px; the range is that of its stages to "
                f"{1024 if long else 512}px"
            )
    days = recipe.steps / 86400
    device_days = step * days * count
    kwh = device_days * 24 * device.watts / 1000
    price = device.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    return Plan(
        device=device.name,
        count=count,
        basis=basis,
        parameters=_parameters(recipe.config),
        images=images * recipe.steps,
        memory=memory(recipe, count),
        memory_available=int(device.memory_gb * 1e9),
        step_seconds=step,
        images_per_second=images / step,
        days=step * days,
        low=best * days,
        high=worst * days,
        device_days=device_days,
        dollars=device_days * 24 * price,
        kwh=kwh,
        kg_co2=kwh * grid / 1000,
    )


def table(found: Plan) -> Table:
    """A plan for people."""
    rows = Table(title=f"Predicted: {found.count} × {found.device}", show_header=False)
    rows.caption = f"Rests on {found.basis}."
    gib = 2**30

    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def spread(value: float) -> str:
        low, high = (value * days / found.days for days in (found.low, found.high))
        return short(value) + (f" ({short(low)} to {short(high)})" if low != high else "")

    parts = ", ".join(f"{name} {size / gib:.1f}" for name, size in found.memory.items() if size)
    verdict = "" if found.fits else "  [bold red]does not fit[/]"
    rows.add_row("parameters", f"{found.parameters:,}")
    rows.add_row("images", f"{found.images:,}")
    rows.add_row(
        "memory of each, GiB",
        f"{found.memory_needed / gib:.1f} of {found.memory_available / gib:.1f}{verdict}\n{parts}",
    )
    rows.add_row("seconds a step", spread(found.step_seconds))
    rows.add_row("images a second", short(found.images_per_second))
    rows.add_row("days", spread(found.days))
    rows.add_row("device-days", spread(found.device_days))
    rows.add_row("dollars", spread(found.dollars))
    rows.add_row("kWh at rated power", spread(found.kwh))
    rows.add_row("kg CO₂", spread(found.kg_co2))
    return rows


def floor_seconds(recipe: TrainRecipe, device: Device) -> float:
    """The least that a device takes for its part of a step: forward, backward, what is recomputed,
    the optimiser and the averaged weights. Communication and data are not counted."""
    config, text = recipe.config, _text(recipe)
    batch, tokens = recipe.batch_size, _tokens(recipe)
    half = recipe.mixed_precision != "no"
    element, tflops = (2, device.tflops) if half else (4, device.float32_tflops)
    total = 0.0
    for layer in range(config.depth):
        for site in block_sites(
            config, tokens, text, batch, residual=4, element=element, layer=layer
        ):
            forward = seconds(site.flops, site.bytes, tflops, device.gbs)
            again = recipe.gradient_checkpointing is True or (
                recipe.gradient_checkpointing == "selective"
                and (site.name.startswith(("text", "cross")) or site.name == "fc1")
            )
            total += forward * (2 if again else 1)
            total += seconds(site.backward_flops, site.backward_bytes, tflops, device.gbs)
    total += 3 * _flops_outside(config, tokens, text, batch) / (1e12 * tflops)
    total *= recipe.gradient_accumulation / recipe.parallel.sequence
    # weights, gradients and moments are read once, weights and moments written; the average too
    state = _optimizer_bytes(recipe)
    moved = 12 + 2 * state + (12 if recipe.ema_decay is not None else 0)
    return total + moved * _parameters(config) / (1e9 * device.gbs)


def memory(recipe: TrainRecipe, count: int = 1) -> dict[str, int]:
    """Bytes that each of ``count`` devices needs, by what needs them.

    Activations are those that docs/memory.md counts, scaled; ``working`` is a block with all that
    its backward makes again, which is an estimate. What the allocator wastes, the CUDA context
    and encoders are not counted.
    """
    config = recipe.config
    D, F = config.hidden_size, config.mlp_ratio
    parameters, shares = _parameters(config), 1
    if recipe.parallel.strategy == "fsdp":
        shares = count
    found = {
        "weights": 4 * parameters // shares,
        "gradients": 4 * parameters // shares,
        "optimizer": _optimizer_bytes(recipe) * parameters // shares,
        "average": (4 * parameters // shares) if recipe.ema_decay is not None else 0,
    }
    half = recipe.mixed_precision != "no"
    # autocast keeps its copies until the backward; FSDP gathers two blocks at a time instead
    gathered = 2 * parameters // config.depth if shares > 1 else parameters
    found["weights in 16 bits" if half else "gathered weights"] = (
        2 * gathered if half else (4 * gathered if shares > 1 else 0)
    )
    if count > 1 and shares == 1:
        found["buckets of gradients"] = 4 * parameters
    rows = recipe.batch_size * _tokens(recipe) // recipe.parallel.sequence
    element = 2 if half else 4
    # in widths of a token; the residual stream is float32, two of a 16-bit width
    stream = 4 // element
    kept = {
        False: 8 + F + stream,
        "selective": 6 + stream,
        True: stream,
    }[recipe.gradient_checkpointing]
    texts = 0 if recipe.gradient_checkpointing is not False else 2
    of_text = recipe.batch_size * _text(recipe) * texts
    found["activations"] = int(config.depth * D * element * (rows * kept + of_text))
    found["working"] = int(rows * D * element * (17 + F + stream))
    return found


def _optimizer_bytes(recipe: TrainRecipe) -> int:
    """Of a parameter's moments. CAME's row and column means are next to nothing."""
    return {"adamw": 8, "came": 4, "adamw-8bit": 2}[recipe.optimizer.name]


def _tokens(recipe: TrainRecipe) -> int:
    return tokens_of(recipe.data.size or 8 * recipe.config.input_size, recipe.config)


def _text(recipe: TrainRecipe) -> int:
    """Tokens of a caption, at most."""
    return 0 if recipe.config.conditioning == "class" else recipe.config.max_caption_tokens


@cache
def _count(config: str) -> int:
    from pixart.model import PixArt

    with torch.device("meta"):
        model = PixArt(PixArtConfig.from_dict(json.loads(config)))
    return sum(p.numel() for p in model.parameters())


def _parameters(config: PixArtConfig) -> int:
    return _count(json.dumps(config.to_dict()))


def _measured_speed(folder: Path, recipe: TrainRecipe, device: Device) -> tuple[float, str]:
    """Images per second and process of a run's last start, and what was measured, in words."""
    try:
        before = yaml.safe_load((folder / "recipe.yaml").read_text())
        starts = [json.loads(x) for x in (folder / "starts.jsonl").read_text().splitlines()]
        log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{folder} is no folder of a run: {error}") from None
    then, now = _timed(before), _timed(recipe.model_dump(mode="json"))
    differ = [f"{key}: {then[key]} -> {now[key]}" for key in now if then[key] != now[key]]
    if differ:
        raise ValueError(f"{folder} is of another recipe: {'; '.join(differ)}")
    last = starts[-1]
    if last["device"] != device.driver_name:
        raise ValueError(f"{folder} was measured on {last['device']}, which is no {device.name}")
    rows = [row["images_per_second"] for row in log if row["step"] > last["after_step"]]
    # the first of a start has warming up in it
    if len(rows) < 2:
        raise ValueError(f"{folder}: {len(rows)} rows in log.jsonl since its last start, 2 needed")
    speed = median(rows[1:]) / last["processes"]
    return speed, f"{speed:.3g} images/s measured on each of {last['processes']} {last['device']}"


def _timed(values: dict[str, Any]) -> dict[str, Any]:
    """Of a recipe, what the time of a step depends on."""
    same = ("batch_size", "gradient_accumulation", "mixed_precision", "gradient_checkpointing",
            "ema_decay", "parallel", "lora", "distill", "control")  # fmt: skip
    return {
        **{key: values.get(key) for key in same},
        "model": {key: value for key, value in values["model"].items() if key != "init"},
        "data.size": values["data"]["size"],
        "optimizer.name": values["optimizer"]["name"],
    }
