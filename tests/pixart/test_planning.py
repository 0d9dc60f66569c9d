"""Predictions, held to what the papers took, what was measured here, and sums by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.environment import RESULTS
from pixart import presets
from pixart.cli import app
from pixart.floor import DEVICES, Device, block_sites
from pixart.planning import EFFICIENCY, Plan, floor_seconds, pass_seconds, plan
from pixart.training.loop import _peak_flops
from pixart.training.recipe import TrainRecipe, check_recipe, load_recipe
from pixart.training.run_state import RunFolder

# PixArt-alpha, arXiv:2310.00426, table 4: preset, size, steps, batch a GPU, GPUs, V100-days
STAGES = {
    "pixel dependency": ("dit-256", 256, 300_000, 128, 8, 88),
    "alignment": ("alpha-256", 256, 150_000, 178, 64, 672),
    "aesthetics 256": ("alpha-256", 256, 90_000, 178, 64, 416),
    "aesthetics 512": ("alpha-512", 512, 100_000, 40, 64, 320),
    "aesthetics 1024": ("alpha-1024", 1024, 16_000, 12, 32, 160),
}
V100_DAYS = 1656
# table 2 and its footnote: 2.2 V100-days are taken for an A100-day
A100_DAYS = 753


def recipe(**changes: object) -> TrainRecipe:
    values = {
        "output": "run",
        "steps": 1000,
        "batch_size": 2,
        "mixed_precision": "bf16",
        "model": {},
        "data": {"features": "features"},
        **changes,
    }
    return check_recipe(TrainRecipe, values, "test")


def stage(name: str, device: str = "v100", **settings: object) -> Plan:
    preset, size, steps, batch, count, _ = STAGES[name]
    made = recipe(
        model={"preset": preset},
        data={"features": "features", "size": size},
        steps=steps,
        batch_size=batch,
        mixed_precision="fp16",
        # the official configurations recompute all blocks
        gradient_checkpointing=True,
    )
    # what the last one reached says that its attention was in float32, what the others did, not
    settings.setdefault("float32_attention", size == 1024)
    return plan(made, DEVICES[device], count, **settings)


@pytest.mark.parametrize("name", list(STAGES))
def test_the_alpha_paper_s_stages(name: str) -> None:
    found, days = stage(name), STAGES[name][-1]
    assert found.low * found.count <= days <= found.high * found.count
    assert found.device_days == pytest.approx(days, rel=0.3)
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    spread = f"{found.low * found.count:.0f} to {found.high * found.count:.0f}"
    assert f"| {days} | {found.device_days:.0f} | {spread} |" in page
    # the batches of the paper fill its GPUs
    assert 0.4 * found.memory_available < found.memory_needed < 1.2 * found.memory_available


def test_the_alpha_paper_s_gpu_days() -> None:
    days = sum(stage(name).device_days for name in STAGES)
    assert days == pytest.approx(V100_DAYS, rel=0.06)
    assert days / 2.2 == pytest.approx(A100_DAYS, rel=0.06)
    # an A100 by its own rates, with the efficiency of V100s
    on_a100 = sum(stage(name, "a100").device_days for name in STAGES)
    assert on_a100 == pytest.approx(A100_DAYS, rel=0.15)


def test_the_alpha_paper_s_dollars_and_carbon() -> None:
    # from its project page, 26,000 dollars for 675 A100-days; in the paper 28,400 for 753
    price = 26_000 / (675 * 24)
    plans = [stage(name, "a100", dollars_per_hour=price, grid=57) for name in STAGES]
    assert sum(p.dollars for p in plans) == pytest.approx(28_400, rel=0.15)
    # 1.2 % of RAPHAEL's 35 t, by the method of Luccioni et al. 2022: rated power, 57 g a kWh
    assert sum(p.kg_co2 for p in plans) == pytest.approx(0.012 * 35_000, rel=0.15)


def test_attention_in_float32_has_no_tensor_cores() -> None:
    """What the last stage took, at the share of the others; 512px would be far from theirs."""
    reached = {
        (name, wide): stage(name, efficiency=1, float32_attention=wide).device_days
        / STAGES[name][-1]
        for name in ("aesthetics 512", "aesthetics 1024")
        for wide in (False, True)
    }
    expected = {("aesthetics 512", False): 0.45, ("aesthetics 512", True): 0.77,
                ("aesthetics 1024", False): 0.11, ("aesthetics 1024", True): 0.35}  # fmt: skip
    assert reached == pytest.approx(expected, abs=0.005)


def test_efficiency_is_what_the_longest_stage_reached() -> None:
    *_, days = STAGES["alignment"]
    reached = stage("alignment", efficiency=1).device_days / days
    assert reached == pytest.approx(EFFICIENCY, abs=0.01)


def test_a_floor_without_bytes_is_flops_over_the_peak() -> None:
    made = recipe(model={"depth": 2}, ema_decay=None, gradient_checkpointing=True)
    fast = replace(DEVICES["h100"], gbs=1e30)
    sites = block_sites(made.config, 256, 300, 2)
    blocks = 2 * sum(2 * site.flops + site.backward_flops for site in sites)
    D = 1152
    outside = 2 * (2 * 256 * D * 4 * 12 + 2 * 300 * D * (4096 + D) + 2 * D * (256 + 7 * D))
    expected = (blocks + 3 * outside) / 989e12
    assert floor_seconds(made, fast) == pytest.approx(expected)
    twice = made.model_copy(update={"gradient_accumulation": 2})
    assert floor_seconds(twice, fast) == pytest.approx(2 * expected)
    shared = made.parallel.model_copy(update={"sequence": 4})
    shared_out = made.model_copy(update={"parallel": shared})
    assert floor_seconds(shared_out, fast) == pytest.approx(expected / 4)


def test_a_floor_without_flops_is_bytes_over_the_bandwidth() -> None:
    made = recipe(model={"depth": 1}, gradient_checkpointing="selective")
    slow = replace(DEVICES["h100"], tflops=1e30)
    sites = block_sites(made.config, 256, 300, 2, residual=4)
    again = ("text: q", "text: k, v", "cross-attention", "text: proj", "fc1")
    moved = sum(s.bytes * (2 if s.name in again else 1) + s.backward_bytes for s in sites)
    # AdamW reads four tensors and writes three; the average reads two and writes one
    parameters = plan(made, slow).parameters
    assert floor_seconds(made, slow) == pytest.approx((moved + 40 * parameters) / 3350e9)
    wide = recipe(model={"depth": 1}, mixed_precision="no")
    moved = sum(
        s.bytes + s.backward_bytes
        for s in block_sites(made.config, 256, 300, 2, residual=4, element=4)
    )
    slow = replace(slow, float32_tflops=1e30)
    assert floor_seconds(wide, slow) == pytest.approx((moved + 40 * parameters) / 3350e9)


def test_what_is_shared_and_what_it_costs() -> None:
    made = recipe(model={"depth": 2}, parallel={"sequence": 2}, gradient_accumulation=3)
    found = plan(made, DEVICES["h100"], 8, dollars_per_hour=2.5, grid=100)
    # four streams of two processes
    assert found.images == 4 * 2 * 3 * 1000
    assert found.images_per_second == pytest.approx(24 / found.step_seconds)
    assert found.days == pytest.approx(1000 * found.step_seconds / 86400)
    assert found.device_days == pytest.approx(8 * found.days)
    assert found.dollars == pytest.approx(found.device_days * 24 * 2.5)
    assert found.kwh == pytest.approx(found.device_days * 24 * 0.7)
    assert found.kg_co2 == pytest.approx(found.kwh * 0.1)
    assert found.fits and not replace(found, memory_available=1).fits


def run_folder(folder: Path, made: TrainRecipe, device: str = "NVIDIA H100 80GB HBM3") -> Path:
    """As a run of two processes leaves it that was started twice, and logged at every tenth."""
    run = RunFolder(folder)
    run.begin(made)
    starts = [
        {"after_step": after, "processes": count, "device": device}
        for after, count in ((0, 8), (20, 2))
    ]
    (folder / "starts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    for step, speed in ((10, 1.0), (20, 1.0), (30, 5.0), (40, 90.0), (50, 110.0), (60, 100.0)):
        run.log({"step": step, "images_per_second": speed})
    return folder


def test_measured_speed_comes_first(tmp_path: Path) -> None:
    made = recipe(model={"depth": 2, "init": "weights.pth"})
    folder = run_folder(tmp_path / "run", made)
    # other steps and weights to start from take the same time
    again = recipe(model={"depth": 2}, steps=5)
    found = plan(again, DEVICES["h100"], 4, measured=folder)
    assert found.images_per_second == pytest.approx(4 * 50)
    assert found.step_seconds == pytest.approx(8 / 200)
    assert found.low == found.high == found.days
    assert "50 images/s measured on each of 2 NVIDIA H100" in found.basis


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"batch_size": 3}, "h100", "of another recipe: batch_size: 2 -> 3"),
        ({"optimizer": {"name": "came"}}, "h100", "optimizer.name: adamw -> came"),
        ({"data": {"features": "x", "size": 512}}, "h100", "data.size: None -> 512"),
        ({"model": {"depth": 3}}, "h100", "'depth': 2.*'depth': 3"),
        ({}, "a100", "measured on NVIDIA H100 80GB HBM3, which is no NVIDIA A100"),
    ],
)
def test_a_run_of_something_else_says_nothing(
    tmp_path: Path, changes: dict, device: str, message: str
) -> None:
    folder = run_folder(tmp_path / "run", recipe(model={"depth": 2}))
    with pytest.raises(ValueError, match=message):
        plan(recipe(**{"model": {"depth": 2}, **changes}), DEVICES[device], measured=folder)


# the machine whose results are in the repository, with rates of no importance
EPYC = Device("a CPU", "AMD EPYC", 1.0, 0.5, 40, 64, 100, 0.1)
ROW = {
    "model": "XL/2", "pass": "step", "shape": [16, 1024, 1152], "text": 300, "dtype": "bfloat16",
    "config": presets["sigma-512"].to_dict(), "device": "NVIDIA H100 80GB HBM3",
    "date": "2030-01-02T03:04:05+00:00", "commit": "c0ffee",
    "timings": {"diffusers": {"median": 900.0}, "definitions": {"median": 800.0},
                "auto": {"median": 400.0}},
}  # fmt: skip


def results(folder: Path, *rows: dict, optimizers: Sequence[dict] = ()) -> Path:
    """As ``python -m benchmarks`` writes them; no such figures were measured."""
    for name, written in (("model", rows), ("optimizer", optimizers)):
        if written:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))
    return folder


def test_a_benchmark_of_the_same_step_is_its_time(tmp_path: Path) -> None:
    folder = results(
        tmp_path, {**ROW, "pass": "forward"}, ROW, {**ROW, "failed": "", "timings": {}}
    )
    made = recipe(model={"preset": "sigma-512"}, batch_size=16, ema_decay=None)
    h100 = DEVICES["h100"]
    # in bf16 the residual stream of the row is half as wide as autocast's
    wider = pass_seconds(made, h100) / pass_seconds(made, h100, residual=2)
    assert 1.0 < wider < 1.2
    share = pass_seconds(made, h100, residual=2) / 0.4
    update = 28 * plan(made, h100).parameters / (1e9 * h100.gbs) / share
    found = plan(made, h100, 4, measured=folder)
    assert found.step_seconds == pytest.approx(0.4 * wider + update)
    assert found.low == found.high == found.days
    assert "16 pictures in 400 ms" in found.basis and "by the same share" in found.basis
    assert f"NVIDIA H100 80GB HBM3 ({folder / 'model.jsonl'}, 2030-01-02, commit" in found.basis
    # a file is as good, another batch is scaled, accumulation comes before one update
    twice = made.model_copy(update={"batch_size": 8, "gradient_accumulation": 4})
    file = folder / "model.jsonl"
    scaled = plan(twice, h100, measured=file).step_seconds
    assert scaled == pytest.approx(2 * 0.4 * wider + update, rel=0.01)
    # the benchmark made nothing again
    again = made.model_copy(update={"gradient_checkpointing": True})
    longer = pass_seconds(again, h100) / pass_seconds(made, h100)
    assert longer > 1.2
    repeated = plan(again, h100, measured=file).step_seconds
    assert repeated == pytest.approx(longer * 0.4 * wider + update)
    # what has no time of "auto" yet ran as the definitions did
    results(tmp_path, {**ROW, "timings": {"definitions": {"median": 800.0}}})
    assert plan(made, h100, measured=file).step_seconds == pytest.approx(2 * found.step_seconds)


def test_a_benchmark_of_the_optimiser_is_its_time(tmp_path: Path) -> None:
    other = {"parameters": 10**6, "device": ROW["device"],
             "timings": {"fused AdamW": {"median": 1.0}, "native": {"median": 2.0}}}  # fmt: skip
    near = {**other, "parameters": 6 * 10**8, "timings": {"fused AdamW": {"median": 6.0}}}
    folder = results(tmp_path, ROW, optimizers=[other, near, {**near, "device": "another"}])
    made = recipe(model={"preset": "sigma-512"}, batch_size=16, ema_decay=None)
    h100 = DEVICES["h100"]

    def update(**optimizer: str) -> tuple[float, str]:
        changed = recipe(**{**made.model_dump(), "optimizer": optimizer})
        found = plan(changed, h100, measured=folder)
        share = pass_seconds(made, h100, residual=2) / 0.4
        return found.step_seconds - pass_seconds(made, h100) / share, found.basis

    parameters = plan(made, h100).parameters
    seconds, basis = update()
    assert seconds == pytest.approx(0.006 * parameters / 6e8)
    assert "the optimiser's time measured there" in basis
    assert update(name="came")[0] == pytest.approx(0.002 * parameters / 1e6)
    assert "by the same share" in update(name="adamw-8bit")[1]


def test_the_results_that_are_here_plan_a_recipe_of_their_model() -> None:
    folder = RESULTS / "cpu"
    (row,) = (
        row
        for row in map(json.loads, (folder / "model.jsonl").read_text().splitlines())
        if row["pass"] == "step" and row["model"] != "quickstart"
    )
    small = {"depth": 4, "hidden_size": 384, "num_heads": 6, "max_caption_tokens": 120}
    made = recipe(model=small, mixed_precision="no", ema_decay=None)
    found = plan(made, EPYC, measured=folder)
    took = row["timings"]["auto"]["median"] / 1e3
    # besides, the optimiser's 42 million parameters
    assert took < found.step_seconds < 1.25 * took
    assert row["commit"] in found.basis and "the optimiser's time measured there" in found.basis
    lora = recipe(model=small, mixed_precision="no", ema_decay=None, lora={})
    assert 0.6 * took < plan(lora, EPYC, measured=folder).step_seconds < found.step_seconds
    # whose autoencoder is of another factor than 8
    quickstart = load_recipe(TrainRecipe, "quickstart", ["data.size=null"])
    assert "64 pictures in" in plan(quickstart, EPYC, measured=folder).basis


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"data": {"features": "x", "size": 1024}}, "h100", "model at 4096 tokens in bfloat16; it"),
        ({"mixed_precision": "fp16"}, "h100", "in float16; it has: XL/2, 1024 tokens, bfloat16$"),
        ({"model": {"preset": "sigma-512", "depth": 27}}, "h100", "no training step of the recipe"),
        ({"model": {"preset": "sigma-512", "qk_norm": True}}, "h100", "no training step of the"),
        ({}, "a100", "measured on NVIDIA H100 80GB HBM3, which is no NVIDIA A100"),
    ],
)  # fmt: skip
def test_a_benchmark_of_something_else_says_nothing(
    tmp_path: Path, changes: dict, device: str, message: str
) -> None:
    folder = results(tmp_path, ROW)
    made = recipe(**{"model": {"preset": "sigma-512"}, **changes})
    with pytest.raises(ValueError, match=message):
        plan(made, DEVICES[device], measured=folder)


@pytest.mark.parametrize("name", ["lora", "distill", "control"])
def test_what_trains_something_else_takes_another_time(tmp_path: Path, name: str) -> None:
    section = {"features": "edges"} if name == "control" else {}
    model = {"preset": "sigma-512", "init": "weights.pth"}
    whole, made = recipe(model=model), recipe(model=model, **{name: section})
    h100 = DEVICES["h100"]
    with pytest.raises(ValueError, match=f"of another recipe: {name}: "):
        plan(whole, h100, measured=run_folder(tmp_path / "run", made))
    # three forwards of four, and factors; three more beside three; two thirds, and half of three
    passes = {"lora": (0.66, 0.8), "distill": (1.85, 2.05), "control": (1.05, 1.2)}[name]
    fast = replace(h100, gbs=1e30)
    compared = floor_seconds(made, fast) / floor_seconds(whole, fast)
    assert passes[0] < compared < passes[1]
    found = plan(made, h100)
    assert (found.trained < found.parameters) == (name != "distill")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989), ("NVIDIA GH200 480GB", None), ("NVIDIA H100 80GB HBM3", 989),
     ("NVIDIA H100 PCIe", None), ("NVIDIA A100-SXM4-80GB", 312)],
)  # fmt: skip
def test_devices_are_known_by_their_whole_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert _peak_flops(torch.device("cuda"), "bf16") == (tflops and 1e12 * tflops)
    made = recipe(model={"depth": 2})
    folder = run_folder(tmp_path / "run", made, name)
    for known in DEVICES.values():
        if known.driver_name != name:
            with pytest.raises(ValueError, match=f"was measured on {name}, which is no"):
                plan(made, known, measured=folder)


def test_a_run_that_says_too_little(tmp_path: Path) -> None:
    made = recipe(model={"depth": 2})
    with pytest.raises(ValueError, match="neither the folder of a run nor results of"):
        plan(made, DEVICES["h100"], measured=tmp_path)
    folder = run_folder(tmp_path / "run", made)
    log = (folder / "log.jsonl").read_text()
    # cut in a row, as by a kill
    (folder / "log.jsonl").write_text(log[: log.index("110.0")])
    assert plan(made, DEVICES["h100"], measured=folder).images_per_second == pytest.approx(45)
    (folder / "log.jsonl").write_text("\n".join(log.splitlines()[:3]))
    with pytest.raises(ValueError, match="1 rows .* since its last start, 2 needed"):
        plan(made, DEVICES["h100"], measured=folder)
    (folder / "starts.jsonl").write_text("")
    with pytest.raises(ValueError, match="starts.jsonl has no row"):
        plan(made, DEVICES["h100"], measured=folder)
    (folder / "recipe.yaml").write_text("size: 64\n")  # an autoencoder's
    with pytest.raises(ValueError, match="of another recipe: batch_size: None -> 2"):
        plan(made, DEVICES["h100"], measured=folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count is 0; accepted: above 0"),
        ({"efficiency": -1.0}, "efficiency is -1.0"),
        ({"efficiency": 0.0}, "efficiency is 0.0"),
        ({"count": 3}, "count is 3, which parallel.sequence = 2 does not divide"),
        ({"count": 2, "efficiency": 0.5, "measured": Path("run")}, "give one"),
    ],
)
def test_wrong_numbers_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(recipe(parallel={"sequence": 2}), DEVICES["h100"], **settings)


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    overrides = ["plan", "sigma-512", "model.preset=sigma-1024", "batch_size=400"]
    arguments = [*overrides, "--device", "a100", "--count", "4"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Predicted: 4 × NVIDIA A100" in shown.output and "does not fit" in shown.output
    assert "35% of the floor" in shown.output
    asked = CliRunner().invoke(app, [*arguments, "--json", "--efficiency", "0.7"])
    values = json.loads(asked.output)
    assert values["low"] == values["days"] == values["high"]
    assert values["basis"].startswith("70% of the floor")
    wrong = CliRunner().invoke(app, ["plan", "sigma-512", "--device", "abacus"])
    assert isinstance(wrong.exception, ValueError)
    assert "accepted: v100, a100, h100, h200" in str(wrong.exception)
