"""What a training run will take: memory, time, money, energy.

Every number is a prediction. It rests on what was measured where there is something, a run or a
benchmark, and otherwise on a floor, what a step must compute and move at a device's peak rates,
over the share of that floor which the runs of the PixArt-alpha paper reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.table import Table

from pixart.floor import Device, seconds
from pixart.training.cost import MOMENTS, memory, tokens, weights, work
from pixart.training.recipe import TrainRecipe
from pixart.training.run_state import read_rows

# share of the floor reached by the five stages of the PixArt-alpha paper on V100s (arXiv:2310.00426
# table 4), all blocks recomputed: 0.37, 0.35 and 0.34 at 256px, 0.45 at 512px, and at 1024px, where
# self-attention is taken to have run in float32, 0.35. The second is the one that prediction rests
# on, the others are the range that is given with it
EFFICIENCY = 0.35
BEST_EFFICIENCY, WORST_EFFICIENCY = 0.46, 0.33

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
    trained: int
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
    float32_attention: bool = False,
) -> Plan:
    """Predicts what a recipe takes on ``count`` devices.

    Args:
        recipe: as it would be trained; its batch size is that of each process.
        device: one of ``pixart.floor.DEVICES``, or your own.
        count: processes, each with a device.
        efficiency: share of the floor that is reached; default: that of the alpha paper's runs.
        measured: what such devices took. The folder of a run of the same recipe, of any number of
            steps: its images per second and process are taken. Or results of ``python -m benchmarks
            model``, a file or its folder: the share of the floor that the same model reached there
            at the same size, and where ``optimizer.jsonl`` lies beside it, the optimiser's time.
        dollars_per_hour: of one device; default: the device's.
        grid: grams of CO2 equivalents a kWh.
        float32_attention: self-attention's products are in float32, as in the official code.

    Raises:
        ValueError: a number is out of range, or what was measured is of something else.
        ModuleNotFoundError: the recipe has lora, and peft is not installed.
    """
    for name, value in {"count": count, "efficiency": efficiency, "grid": grid}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; accepted: above 0")
    sequence = recipe.parallel.sequence
    if count % sequence:
        raise ValueError(f"count is {count}, which parallel.sequence = {sequence} does not divide")
    if measured is not None and efficiency is not None:
        raise ValueError("efficiency and a measured run are two answers to one question: give one")
    images = recipe.batch_size * recipe.gradient_accumulation * count // sequence
    if measured is not None:
        step, what = _measured_step(measured, recipe, device)
        best = worst = step
        basis = f"{what}, and no loss with more devices"
    else:
        floor = floor_seconds(recipe, device, float32_attention=float32_attention)
        reached = EFFICIENCY if efficiency is None else efficiency
        step = best = worst = floor / reached
        basis = f"{reached:.0%} of the floor at the device's peak rates, as was given"
        if efficiency is None:
            best, worst = floor / BEST_EFFICIENCY, floor / WORST_EFFICIENCY
            basis = (
                f"{EFFICIENCY:.0%} of the floor at the device's peak rates, which the PixArt-alpha "
                "paper's runs reached at 256px; the range is that of its stages"
            )
    size = weights(recipe)
    days = recipe.steps / 86400
    device_days = step * days * count
    kwh = device_days * 24 * device.watts / 1000
    price = device.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    return Plan(
        device=device.name,
        count=count,
        basis=basis,
        parameters=size.trained + size.frozen,
        trained=size.trained,
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
    if found.trained != found.parameters:
        rows.add_row("of which are trained", f"{found.trained:,}")
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


def floor_seconds(recipe: TrainRecipe, device: Device, *, float32_attention: bool = False) -> float:
    """The least that a device takes for its part of a step: forward, backward, what is recomputed,
    the optimiser and the averaged weights. Communication and data are not counted."""
    once = pass_seconds(recipe, device, float32_attention=float32_attention)
    once *= recipe.gradient_accumulation / recipe.parallel.sequence
    return once + sum(_update_seconds(recipe, device))


def pass_seconds(
    recipe: TrainRecipe, device: Device, residual: int = 4, *, float32_attention: bool = False
) -> float:
    """Of a micro-batch, the least: forward, backward and what is recomputed.

    ``residual`` is the bytes of an element of the residual stream. ``float32_attention``: the
    products of self-attention are in float32, as in the official code.
    """
    fast = device.float32_tflops if recipe.mixed_precision == "no" else device.tflops
    rates = {"self-attention": device.float32_tflops} if float32_attention else {}
    return sum(
        seconds(flops, moved, rates.get(name, fast), device.gbs)
        for name, flops, moved in work(recipe, residual)
    )


def _update_seconds(recipe: TrainRecipe, device: Device) -> tuple[float, float]:
    """Of the optimiser and of the averaged weights, the least."""
    # weights, gradients and moments are read once, weights and moments written; the average too
    optimizer = 12 + 2 * MOMENTS[recipe.optimizer.name]
    average = 12 if recipe.ema_decay is not None else 0
    each = weights(recipe).trained / (1e9 * device.gbs)
    return optimizer * each, average * each


def _measured_step(path: Path, recipe: TrainRecipe, device: Device) -> tuple[float, str]:
    """Seconds of a step by what was measured, and what that was, in words."""
    results = path / "model.jsonl" if path.is_dir() else path
    if results.is_file() and not (path / "recipe.yaml").exists():
        return _benchmarked_step(results, recipe, device)
    speed, what = _measured_speed(path, recipe, device)
    pictures = recipe.batch_size * recipe.gradient_accumulation / recipe.parallel.sequence
    return pictures / speed, what


def _measured_speed(folder: Path, recipe: TrainRecipe, device: Device) -> tuple[float, str]:
    """Images per second and process of a run's last start, and what was measured, in words."""
    try:
        before = yaml.safe_load((folder / "recipe.yaml").read_text())
    except OSError as error:
        raise ValueError(
            f"{folder} is neither the folder of a run nor results of python -m benchmarks model: "
            f"{error}"
        ) from None
    then, now = _timed(before), _timed(recipe.model_dump(mode="json"))
    differ = [f"{key}: {then[key]} -> {now[key]}" for key in now if then[key] != now[key]]
    if differ:
        raise ValueError(f"{folder} is of another recipe: {'; '.join(differ)}")
    starts, log = read_rows(folder / "starts.jsonl"), read_rows(folder / "log.jsonl")
    if not starts:
        raise ValueError(f"{folder}: starts.jsonl has no row, and a run writes one as it begins")
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
        # an autoencoder's recipe has neither
        "model": {k: v for k, v in values.get("model", {}).items() if k != "init"},
        "data.size": values.get("data", {}).get("size"),
        "optimizer.name": values.get("optimizer", {}).get("name"),
    }


# of a configuration, what the time of a step does not depend on, or what rows say beside it
_TIMELESS = ("input_size", "pe_interpolation", "caption_dropout", "max_caption_tokens")
_DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
# of CAME what auto takes, on a CPU and on a GPU
_OPTIMIZERS = {"adamw": ("fused AdamW",), "came": ("native", "reference")}


def _benchmarked_step(file: Path, recipe: TrainRecipe, device: Device) -> tuple[float, str]:
    """As :func:`_measured_step`, by what ``python -m benchmarks model`` wrote."""
    rows = [row for row in read_rows(file) if row.get("pass") == "step" and "timings" in row]
    wanted = _case(recipe.config.to_dict(), tokens(recipe), _DTYPES[recipe.mixed_precision])
    of_it = [
        (row, time)
        for row in rows
        if _case(row.get("config", {}), row["shape"][1], row["dtype"]) == wanted
        # what training takes, or took before there was anything else
        if (time := row["timings"].get("auto") or row["timings"].get("definitions"))
    ]
    if not of_it:
        there = "; ".join(
            f"{row['model']}, {row['shape'][1]} tokens, {row['dtype']}" for row in rows
        )
        raise ValueError(
            f"{file} has no training step of the recipe's model at {tokens(recipe)} tokens in "
            f"{_DTYPES[recipe.mixed_precision]}; it has: {there or 'none'}"
        )
    row, time = of_it[-1]
    if row["device"] != device.driver_name:
        raise ValueError(f"{file} was measured on {row['device']}, which is no {device.name}")
    batch = row["shape"][0]
    timed = recipe.model_copy(
        update={
            "model": {**recipe.model, "max_caption_tokens": row["text"]},
            "batch_size": batch,
            "gradient_checkpointing": False,
            **dict.fromkeys(("lora", "distill", "control")),
        }
    )
    took = time["median"] / 1e3
    # its weights and residual stream are of its dtype
    element = 4 if row["dtype"] == "float32" else 2
    share = pass_seconds(timed, device, residual=element) / took
    step = pass_seconds(recipe, device) / share
    step *= recipe.gradient_accumulation / recipe.parallel.sequence
    optimizer, average = _update_seconds(recipe, device)
    measured = _benchmarked_optimizer(file.with_name("optimizer.jsonl"), recipe, device)
    update = optimizer / share if measured is None else measured
    what = (
        f"a forward and backward of {batch} pictures in {1e3 * took:.4g} ms, {share:.0%} of the "
        f"floor, measured on {row['device']} ({file}, {row['date'][:10]}, commit "
        f"{row['commit']}), the same share for the recipe's, the optimiser's time "
        f"{'by the same share' if measured is None else 'measured there'}"
    )
    return step + update + average / share, what


def _case(config: dict[str, Any], tokens: int, dtype: str) -> tuple[dict[str, Any], int, str]:
    return {k: v for k, v in config.items() if k not in _TIMELESS}, tokens, dtype


def _benchmarked_optimizer(file: Path, recipe: TrainRecipe, device: Device) -> float | None:
    """Seconds by ``python -m benchmarks optimizer``: of the most similar number of parameters."""
    names = _OPTIMIZERS.get(recipe.optimizer.name, ())
    trained = weights(recipe).trained
    rows = [
        row
        for row in read_rows(file)
        if row["device"] == device.driver_name and not row["timings"].keys().isdisjoint(names)
    ]
    if not rows:
        return None
    row = min(rows, key=lambda row: abs(math.log(row["parameters"] / trained)))
    name = next(name for name in names if name in row["timings"])
    return row["timings"][name]["median"] / 1e3 * trained / row["parameters"]
