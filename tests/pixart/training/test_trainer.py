"""The loop: exact resumption, checkpoints that are complete or absent, and what may not change."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import pixart_kernels as pk
from pixart.data.batches import BatchStream
from pixart.training import TrainRecipe, train
from pixart.training import trainer as trainer_module
from pixart.training.recipe import Run, Schedule, check_recipe
from pixart.training.text_to_image import TextToImage
from pixart.training.trainer import learning_rate

MODEL = {
    "input_size": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 6,
    "max_caption_tokens": 5,
}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pixart.conditioning import CacheMetadata, CacheWriter

    folder = tmp_path_factory.mktemp("features")
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    metadata = CacheMetadata("text", "vae", "float16", 5, 6, 4)
    with CacheWriter(folder, metadata, randn(5, 6), 1) as writer:
        for i in range(11):
            writer.add(
                key=f"{i}",
                text=f"caption {i}",
                caption=randn(1 + i % 5, 6),
                latent_mean=randn(4, 4, 4),
                latent_std=randn(4, 4, 4).abs(),
                image_size=(32, 32),
            )
    return folder


def recipe(output: Path, features: Path, **changes: object) -> TrainRecipe:
    values = {
        "output": str(output),
        "steps": 12,
        "batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 5,
        "ema_decay": 0.9,
        "gradient_clip": 1.0,
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "model": MODEL,
        "data": {"features": str(features)},
        **changes,
    }
    return check_recipe(TrainRecipe, values, "test")


def run(recipe: TrainRecipe) -> list[dict]:
    rows = train(recipe, lambda device: TextToImage(recipe, device)).read_log()
    for row in rows:
        del row["images_per_second"]
    return rows


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "pipeline" / "transformer" / "model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, features: Path, accumulation: int
) -> None:
    whole = run(recipe(tmp_path / "whole", features, gradient_accumulation=accumulation))
    assert [row["step"] for row in whole] == list(range(1, 13))

    # stopped at 7 by an error; the last complete checkpoint is that of step 5
    interrupted = recipe(tmp_path / "parts", features, gradient_accumulation=accumulation)

    class PowerCut(Exception):
        pass

    class Dies(TextToImage):
        calls = 0

        def loss(self, module, batch):
            Dies.calls += 1
            if Dies.calls > 7 * accumulation:
                raise PowerCut
            return super().loss(module, batch)

    with pytest.raises(PowerCut):
        train(interrupted, lambda device: Dies(interrupted, device))
    assert run(interrupted) == whole
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name


def test_kernels_train_as_their_definitions_do(tmp_path: Path, features: Path) -> None:
    """The quickstart's model and settings, for as long as it takes to see it learn."""
    if pk.chosen_backend("gated_residual_adaln", torch.zeros(1, 1, 8)) == "reference":
        pytest.skip("there are no kernels here to train with")
    curves: dict[str, list[float]] = {}
    for backend in ("reference", "auto"):
        with pk.use_backend(backend):
            rows = run(
                recipe(
                    tmp_path / backend,
                    features,
                    steps=80,
                    batch_size=8,
                    checkpoint_every=80,
                    model={**MODEL, "hidden_size": 192, "depth": 4, "num_heads": 4},
                    min_snr_gamma=5,
                    optimizer={"lr": 2e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0},
                    schedule={"name": "cosine", "warmup_steps": 10},
                )
            )
        curves[backend] = [value for row in rows for value in (row["loss"], row["gradient_norm"])]
    assert curves["auto"] != curves["reference"]
    assert curves["auto"] == pytest.approx(curves["reference"], rel=1e-3)
    losses = curves["auto"][::2]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_curves_reach_tensorboard(tmp_path: Path, features: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(recipe(tmp_path / "run", features, steps=4))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert {"lr", "gradient_norm", "images_per_second", "mse", "vb"} <= set(
        events.Tags()["scalars"]
    )


def test_different_seeds_differ(tmp_path: Path, features: Path) -> None:
    a, b = (run(recipe(tmp_path / str(s), features, seed=s, steps=2)) for s in (0, 1))
    assert a[0]["loss"] != b[0]["loss"]


def test_killed_at_any_instant_it_goes_on(tmp_path: Path, features: Path) -> None:
    whole = run(recipe(tmp_path / "whole", features, steps=30, checkpoint_every=2))
    output = tmp_path / "killed"
    values = recipe(output, features, steps=30, checkpoint_every=2).model_dump_json()
    code = (
        "import sys; from pixart.training import TrainRecipe, train\n"
        "from pixart.training.text_to_image import TextToImage\n"
        "recipe = TrainRecipe.model_validate_json(sys.argv[1])\n"
        "train(recipe, lambda device: TextToImage(recipe, device))"
    )
    # in the middle of the second checkpoint, whichever file it is writing
    process = subprocess.Popen(
        [sys.executable, "-c", code, values], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not (output / "checkpoints" / "step-0000004").exists() and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sorted(p.name for p in (output / "checkpoints").iterdir() if p.name[0] != ".")
    assert "step-0000030" not in done, process.stderr
    assert run(recipe(output, features, steps=30, checkpoint_every=2)) == whole


def test_old_checkpoints_are_dropped_and_steps_can_be_raised(
    tmp_path: Path, features: Path
) -> None:
    output, constant = tmp_path / "run", {"schedule": {"name": "constant", "warmup_steps": 3}}
    run(recipe(output, features, **constant))
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-0000010", "step-0000012"]
    assert len(run(recipe(output, features, steps=14, **constant))) == 14
    # a decay to zero belongs to its number of steps
    run(recipe(tmp_path / "cosine", features))
    with pytest.raises(ValueError, match="steps: 12 -> 14"):
        run(recipe(tmp_path / "cosine", features, steps=14))


def test_folder_of_another_recipe_is_refused(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "run", features))
    with pytest.raises(ValueError, match=r"another recipe:\n  batch_size: 4 -> 8"):
        run(recipe(tmp_path / "run", features, batch_size=8))


def test_previews_leave_training_as_it_was(tmp_path: Path, features: Path) -> None:
    class Previews(TextToImage):
        def __init__(self, recipe, device):
            super().__init__(recipe, device)
            self.preview_every = 1

        def preview(self, module):
            assert not module.training
            torch.randn(7)
            self.module.t_embedder.mlp[0].weight.mul_(1.0)

    plain = recipe(tmp_path / "plain", features, steps=4)
    seen = recipe(tmp_path / "seen", features, steps=4)
    with_previews = train(seen, lambda device: Previews(seen, device)).read_log()
    assert [r["loss"] for r in with_previews] == [r["loss"] for r in run(plain)]


def test_averaged_weights_are_exported(tmp_path: Path, features: Path) -> None:
    averaged = recipe(tmp_path / "ema", features, steps=3)
    plain = recipe(tmp_path / "plain", features, steps=3, ema_decay=None)
    histories: list[torch.Tensor] = []

    class Remembers(TextToImage):
        def loss(self, module, batch):
            histories.append(self.module.final_layer.linear.weight.detach().clone())
            return super().loss(module, batch)

    train(averaged, lambda device: Remembers(averaged, device))
    run(plain)
    name = "final_layer.linear.weight"
    final = weights(tmp_path / "plain")[name]
    # decay warms up: 0 at the first step, then (1 + step) / (10 + step)
    ema = histories[1].clone()
    for step, after in enumerate((histories[2], final), start=1):
        ema.lerp_(after, 1 - (1 + step) / (10 + step))
    torch.testing.assert_close(weights(tmp_path / "ema")[name], ema)


def test_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    saved, save_state = [], trainer_module.Accelerator.save_state

    def full(self, folder: str) -> None:
        save_state(self, folder)
        saved.append(folder)
        if len(saved) == 2:
            # what safetensors raises, which is no OSError
            raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(trainer_module.Accelerator, "save_state", full)
    with pytest.raises(RuntimeError, match="step 10 could not be written.*step-0000005.*Make room"):
        run(recipe(output, features))
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-0000005"]
    monkeypatch.undo()
    assert len(run(recipe(output, features))) == 12


def test_weights_that_blew_up_are_not_saved(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, checkpoint_every=1, gradient_clip=None)

    class Explodes(TextToImage):
        calls = 0

        def loss(self, module, batch):
            Explodes.calls += 1
            losses = super().loss(module, batch)
            if Explodes.calls == 3:
                # the loss is finite, its gradient is not
                weight = self.module.final_layer.linear.weight
                zero = (weight - weight.detach()).abs().sum()
                losses["loss"] = losses["loss"] + zero.sqrt()
            return losses

    with pytest.raises(RuntimeError, match="weights became infinite or nan.*step-0000002"):
        train(made, lambda device: Explodes(made, device))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("name", ["model.safetensors", "random-0.pt", "schedule-and-ema.pt"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, features: Path, name: str) -> None:
    whole = run(recipe(tmp_path / "run", features))
    damaged = tmp_path / "run" / "checkpoints" / "step-0000012"
    (damaged / name).write_bytes(b"garbage")
    with pytest.raises(RuntimeError, match="step-0000012 cannot be read.*Delete it"):
        run(recipe(tmp_path / "run", features))
    shutil.rmtree(damaged)
    assert run(recipe(tmp_path / "run", features)) == whole


@pytest.mark.parametrize(
    "name", ["random-0.pt", "schedule-and-ema.pt", "random_states_0.pkl", "optimizer.bin"]
)
def test_a_checkpoint_is_read_without_executing_code(
    tmp_path: Path, features: Path, name: str
) -> None:
    run(recipe(tmp_path / "run", features))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save(Evil(), tmp_path / "run" / "checkpoints" / "step-0000012" / name)
    # accelerate passes over its own file of random numbers when it is unreadable; ours counts
    with contextlib.suppress(RuntimeError):
        run(recipe(tmp_path / "run", features))
    assert not (tmp_path / "executed").exists()


def test_an_export_that_failed_is_made_by_the_next_run(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "whole", features))
    made = recipe(tmp_path / "run", features)

    class Fails(TextToImage):
        def export(self, module, folder):
            if (folder / "checkpoints" / "step-0000010").exists():
                raise KeyboardInterrupt
            super().export(module, folder)

    with pytest.raises(KeyboardInterrupt):
        train(made, lambda device: Fails(made, device))
    run(made)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
    shutil.rmtree(tmp_path / "run" / "pipeline")
    run(made)
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "whole").keys()


def test_the_recipe_reaches_the_optimiser_and_the_model(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict = {}
    adamw = torch.optim.AdamW

    def spy(parameters, **settings):
        seen.update(settings)
        return adamw(parameters, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    optimizer = {"lr": 2e-3, "betas": [0.7, 0.8], "eps": 1e-7, "weight_decay": 0.2}
    made = recipe(
        tmp_path / "run", features, steps=2, optimizer=optimizer, min_snr_gamma=3.0,
        gradient_checkpointing="selective", gradient_clip=0.02,
    )  # fmt: skip
    norms: list[torch.Tensor] = []

    class Checks(TextToImage):
        def loss(self, module, batch):
            assert self.module.gradient_checkpointing == "selective"
            assert self.objective.min_snr_gamma == 3
            return super().loss(module, batch)

    def clipped(self, parameters, limit):
        parameters = list(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        )
        return norm

    monkeypatch.setattr(trainer_module.Accelerator, "clip_grad_norm_", clipped)
    rows = train(made, lambda device: Checks(made, device)).read_log()
    assert (seen["lr"], seen["betas"], seen["eps"]) == (2e-3, (0.7, 0.8), 1e-7)
    assert seen["weight_decay"] == 0.2
    assert rows[0]["gradient_norm"] > 0.02
    assert all(norm < 0.0201 for norm in norms)


def test_processes_that_would_train_alone_are_stopped(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started.*ACCELERATE_USE_CPU"):
        run(recipe(tmp_path / "run", features))


def test_nan_loss_says_what_to_do(tmp_path: Path, features: Path) -> None:
    bad = recipe(tmp_path / "run", features, checkpoint_every=2)

    class Explodes(TextToImage):
        calls = 0

        def loss(self, module, batch):
            Explodes.calls += 1
            losses = super().loss(module, batch)
            return (
                losses if Explodes.calls < 4 else {k: v * float("nan") for k, v in losses.items()}
            )

    with pytest.raises(RuntimeError, match="loss became nan at or before step 4.*step-0000002.*lr"):
        train(bad, lambda device: Explodes(bad, device))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]


def test_features_must_fit_the_model(tmp_path: Path, features: Path) -> None:
    wrong = recipe(tmp_path / "run", features, model={**MODEL, "caption_channels": 8})
    with pytest.raises(ValueError, match="model.caption_channels is 8, but the features have 6"):
        run(wrong)


def test_starts_from_a_checkpoint_in_training_mode(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "first", features, steps=2, ema_decay=None))
    start = tmp_path / "first" / "pipeline" / "transformer"
    second = recipe(tmp_path / "second", features, steps=1, model={**MODEL, "init": str(start)})

    class Checks(TextToImage):
        def loss(self, module, batch):
            assert module.training
            for name, tensor in weights(tmp_path / "first").items():
                assert torch.equal(self.module.state_dict()[name], tensor), name
            return super().loss(module, batch)

    train(second, lambda device: Checks(second, device))


def test_fresh_model_takes_the_null_caption(tmp_path: Path, features: Path) -> None:
    from pixart.conditioning import FeatureCache

    task = TextToImage(recipe(tmp_path / "run", features), torch.device("cpu"))
    assert torch.equal(
        task.module.y_embedder.y_embedding, FeatureCache(features).null_caption.float()
    )


def test_processes_draw_different_noise(tmp_path: Path, features: Path) -> None:
    """Two processes: the same weights throughout, different noise, and each sample once."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from accelerate import Accelerator
from pathlib import Path
from pixart.training import train
from pixart.training.text_to_image import TextToImage
from test_trainer import recipe
r = recipe(Path({str(tmp_path / "run")!r}), Path({str(features)!r}), batch_size=2, steps=3)
class Spy(TextToImage):
    def loss(self, module, batch):
        state = torch.get_rng_state()
        noise = torch.randn(1).item()
        torch.set_rng_state(state)
        rank = torch.distributed.get_rank()
        with open({str(tmp_path)!r} + f"/rank{{rank}}", "a") as file:
            file.write(f"{{noise}} {{','.join(batch['keys'])}}\\n")
        return super().loss(module, batch)
tasks = []
train(r, lambda device: tasks.append(Spy(r, device)) or tasks[0])
total = sum(p.double().sum() for p in tasks[0].module.parameters()).item()
print("weights", total)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    out = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert out.returncode == 0, out.stderr
    assert len({line for line in out.stdout.splitlines() if line.startswith("weights")}) == 1
    ranks = [(tmp_path / f"rank{r}").read_text().splitlines() for r in (0, 1)]
    noises = [line.split()[0] for rank in ranks for line in rank]
    assert len(set(noises)) == 6
    keys = [key for rank in ranks for line in rank for key in line.split()[1].split(",")]
    # 12 draws of 11 samples: one epoch and the first of the next
    assert len(keys) == 12 and len(set(keys)) == 11


def test_batches_show_each_sample_once_an_epoch() -> None:
    def take(count: int, **where: int) -> list[list[int]]:
        stream = iter(BatchStream(10, 4, seed=3, **where))
        return [next(stream) for _ in range(count)]

    whole = take(10, rank=0, world_size=1, start=0)
    flat = [i for batch in whole for i in batch]
    epochs = [flat[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert take(6, rank=0, world_size=1, start=4) == whole[4:]
    # two processes see between them what one would
    ranks = [take(5, rank=rank, world_size=2, start=0) for rank in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == whole


def test_learning_rates() -> None:
    rate = learning_rate(Schedule(name="cosine", warmup_steps=4), 14)
    assert [rate(step) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert rate(9) == pytest.approx(0.5) and rate(14) == pytest.approx(0)
    assert learning_rate(Schedule(name="constant", warmup_steps=0), 10)(9) == 1
    assert learning_rate(Schedule(name="linear", warmup_steps=0), 10)(5) == 0.5


def test_training_learns(tmp_path: Path) -> None:
    """The loop fits a line, so that a sign or scale error anywhere in it would show."""

    class Line:
        preview_every = 0

        def __init__(self) -> None:
            self.module = nn.Linear(1, 1)
            self.dataset = torch.linspace(-1, 1, 32)[:, None]

        def collate(self, samples):
            return {"x": torch.stack(samples)}

        def loss(self, module, batch):
            return {"loss": (module(batch["x"]) - (3 * batch["x"] - 1)).square().mean()}

        def export(self, module, folder):
            torch.save(module.state_dict(), folder / "line.pt")

    values = {
        "output": str(tmp_path), "steps": 400, "batch_size": 16, "gradient_clip": None,
        "optimizer": {"lr": 0.05, "weight_decay": 0}, "schedule": {"warmup_steps": 0},
        "ema_decay": 0.5,
    }  # fmt: skip
    train(check_recipe(Run, values, "test"), lambda device: Line())
    state = torch.load(tmp_path / "line.pt")
    assert state["weight"].item() == pytest.approx(3, abs=0.01)
    assert state["bias"].item() == pytest.approx(-1, abs=0.01)
    shutil.rmtree(tmp_path)
