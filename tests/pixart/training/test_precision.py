"""Training in 16 bits: as in float32, and steps that fp16 cannot hold are skipped and said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from processes import run_apart
from small_runs import MODEL, log, recipe, run, weights

from pixart.training import TrainRecipe, train
from pixart.training.loop import learning_rate
from pixart.training.text_to_image import TextToImage

pytestmark = pytest.mark.usefixtures("any_precision")


def scale_losses(monkeypatch: pytest.MonkeyPatch, first: float, growth_interval: int) -> None:
    """Sets what fp16's losses are multiplied by; these models' overflow at about 2**19."""
    scaler = partial(torch.amp.GradScaler, init_scale=first, growth_interval=growth_interval)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def in_fp16(output: Path, features: Path, **changes: object) -> TrainRecipe:
    return recipe(output, features, mixed_precision="fp16", **changes)


@pytest.mark.parametrize(("precision", "accumulation"), [("fp16", 1), ("fp16", 2), ("bf16", 1)])
def test_16_bits_learn_as_float32_does(
    tmp_path: Path, features: Path, precision: str, accumulation: int
) -> None:
    dtypes: set[torch.dtype] = set()

    class Watched(TextToImage):
        def __init__(self, made, device):
            super().__init__(made, device)
            fc1 = self.module.blocks[0].mlp.fc1
            fc1.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output.dtype))

    settings = {
        "steps": 60, "checkpoint_every": 60, "batch_size": 6, "ema_decay": None,
        "gradient_accumulation": accumulation, "gradient_clip": 0.5, "min_snr_gamma": 5,
        "optimizer": {"lr": 3e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0},
        "model": {**MODEL, "hidden_size": 96, "num_heads": 4},
    }  # fmt: skip
    expected = run(recipe(tmp_path / "no", features, **settings))
    AcceleratorState._reset_state()
    made = recipe(tmp_path / precision, features, mixed_precision=precision, **settings)
    train(made, lambda device: Watched(made, device))
    rows = log(made.output)
    assert dtypes == {{"fp16": torch.float16, "bf16": torch.bfloat16}[precision]}
    losses = [row["loss"] for row in rows]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    # bits of a fraction, which errors of many roundings and steps are a few times
    rounding = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    for name in ("loss", "gradient_norm"):
        curve = [row[name] for row in rows]
        assert curve == pytest.approx([row[name] for row in expected], rel=8 * rounding), name


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_a_step_that_overflows_moves_nothing(
    tmp_path: Path,
    features: Path,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    scale_losses(monkeypatch, first=2.0**26, growth_interval=3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(TextToImage):
        name = "final_layer.linear.weight"

        def loss(self, module, batch):
            now = self.module.get_parameter(self.name), self.averages[self.name]
            seen.append((now[0].detach().clone(), now[1].clone()))
            return super().loss(module, batch)

    schedule = {"name": "cosine", "warmup_steps": 4}
    made = in_fp16(
        tmp_path, features, steps=20, gradient_clip=None, schedule=schedule,
        optimizer={"name": optimizer, "lr": 1e-3},
    )  # fmt: skip
    train(made, lambda device: Watched(made, device))
    rows = log(tmp_path)
    skipped = [bool(row["skipped_steps"]) for row in rows]
    assert skipped[:5] == [True] * 5 and skipped.count(False) > 5 and any(skipped[9:])
    rate, updates = learning_rate(made.schedule, made.steps), 0
    for step, row in enumerate(rows[:-1]):
        assert row["lr"] == pytest.approx(1e-3 * rate(updates))
        (before, average), (after, later) = seen[step], seen[step + 1]
        assert torch.equal(before, after) is torch.equal(average, later) is skipped[step]
        if not skipped[step]:
            updates += 1
            decay = min(0.9, updates / (9 + updates)) if updates > 1 else 0
            torch.testing.assert_close(later, average.lerp(after, 1 - decay))
    assert "1 skipped: fp16 overflowed" in capsys.readouterr().out


def test_norms_leave_out_steps_that_overflow(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_losses(monkeypatch, first=2.0**22, growth_interval=2000)
    first, second = run(in_fp16(tmp_path, features, steps=16, log_every=8, checkpoint_every=16))
    assert first["skipped_steps"] > 0 and second["skipped_steps"] == 0
    assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "came", "adamw-8bit"])
def test_a_run_in_fp16_goes_on_bit_for_bit(
    tmp_path: Path, features: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off where no step has moved the weights yet, and again where losses overflow at times."""
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    scale_losses(monkeypatch, first=2.0**26, growth_interval=1)
    settings = {
        "steps": 20, "checkpoint_every": 3, "optimizer": {"name": optimizer, "lr": 1e-3},
        # in 8 bits are parameters of 4096 elements and more
        "model": {**MODEL, "hidden_size": 48},
    }  # fmt: skip
    whole = run(in_fp16(tmp_path / "whole", features, **settings))
    parts = in_fp16(tmp_path / "parts", features, **settings)

    class PowerCut(Exception):
        pass

    class Dies(TextToImage):
        left = 0

        def loss(self, module, batch):
            Dies.left -= 1
            if Dies.left < 0:
                raise PowerCut
            return super().loss(module, batch)

    for steps in (4, 13):
        Dies.left = steps
        with pytest.raises(PowerCut):
            train(parts, lambda device: Dies(parts, device))
    assert run(parts) == whole
    assert all(row["skipped_steps"] for row in whole[:4])
    assert any(row["skipped_steps"] for row in whole[16:])
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(parts.output)[name]), name


def test_a_checkpoint_without_a_scaler_goes_on(tmp_path: Path, features: Path) -> None:
    """As fp16 on a CPU once left them, which trained in float32."""
    settings = {"checkpoint_every": 2, "schedule": {"name": "constant"}}
    run(in_fp16(tmp_path / "run", features, steps=4, **settings))
    about = tmp_path / "run" / "checkpoints" / "step-0000004" / "checkpoint.json"
    kept = json.loads(about.read_text())
    del kept["updates"]
    about.write_text(json.dumps(kept | {"scaler": None}))
    rows = run(in_fp16(tmp_path / "run", features, steps=6, **settings))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


class Overflows(TextToImage):
    """In batches that have the sample named so; in all, where it is named nothing."""

    key = "3"

    def loss(self, module, batch):
        losses = super().loss(module, batch)
        if self.key in ("", *batch["keys"]):
            weight = self.module.final_layer.linear.weight
            # zero, whose gradient is not finite
            losses["loss"] = losses["loss"] + (weight - weight.detach()).abs().sum().sqrt()
        return losses


def overflowing(made: TrainRecipe) -> None:
    train(made, partial(Overflows, made))


def test_processes_skip_a_step_together(tmp_path: Path, features: Path) -> None:
    settings = {"steps": 5, "batch_size": 2}
    one = in_fp16(tmp_path / "one", features, gradient_accumulation=2, **settings)
    two = in_fp16(tmp_path / "two", features, **settings)
    overflowing(one)
    run_apart(overflowing, two, output=tmp_path / "out", processes=2)
    assert sorted(row["skipped_steps"] for row in log(one.output)) == [0, 0, 0, 0, 1]
    for row, expected in zip(log(two.output), log(one.output), strict=True):
        assert row == pytest.approx(expected, rel=2e-3)


def test_gradients_that_are_never_finite_end_the_run(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overflows, "key", "")
    with pytest.raises(
        RuntimeError, match=r"nan at step 30, even of the loss times 0\.0001.*step-0000025.*bf16"
    ):
        overflowing(in_fp16(tmp_path, features, steps=40))
