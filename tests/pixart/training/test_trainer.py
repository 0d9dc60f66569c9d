"""The loop: what it learns, logs, shows and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import MODEL, recipe, run, weights, write_features
from torch import nn

import pixart_kernels as pk
from pixart.floor import model_flops
from pixart.training import loop as loop_module
from pixart.training import train
from pixart.training.loop import learning_rate
from pixart.training.recipe import Run, Schedule, check_recipe
from pixart.training.text_to_image import TextToImage


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_features(folder)
    return folder


class Line:
    """Fits 3 x - 1, so that a sign or scale error anywhere in the loop would show."""

    preview_every = 0

    def __init__(self, samples: int) -> None:
        self.module = nn.Linear(1, 1)
        self.dataset = torch.linspace(-1, 1, samples)[:, None]
        self.keys = [str(i) for i in range(samples)]
        self.buckets = [0] * samples

    def collate(self, samples):
        return {"x": torch.stack(samples)}

    def loss(self, module, batch):
        return {"loss": (module(batch["x"]) - (3 * batch["x"] - 1)).square().mean()}

    def export(self, module, folder):
        torch.save(module.state_dict(), folder / "line.pt")


def fit(output: Path, samples: int = 32, **changes: object) -> tuple[list[dict], dict]:
    values = {
        "output": str(output), "steps": 400, "batch_size": 16, "gradient_clip": None,
        "optimizer": {"lr": 0.05, "weight_decay": 0}, "schedule": {"warmup_steps": 0},
        "ema_decay": 0.5, "log_every": 1, **changes,
    }  # fmt: skip
    rows = train(check_recipe(Run, values, "test"), lambda device: Line(samples)).read_log()
    return rows, torch.load(output / "line.pt")


def test_training_learns(tmp_path: Path) -> None:
    _, state = fit(tmp_path)
    assert state["weight"].item() == pytest.approx(3, abs=0.01)
    assert state["bias"].item() == pytest.approx(-1, abs=0.01)


def test_accumulated_gradients_are_means_over_samples(tmp_path: Path) -> None:
    """Whether 11 samples come at once, or as batches of 4, 4 and 3."""
    optimizer = {"lr": 0.05, "eps": 1e-8}
    once, expected = fit(tmp_path / "once", 11, steps=5, batch_size=11, optimizer=optimizer)
    parts, found = fit(
        tmp_path / "parts", 11, steps=5, batch_size=4, gradient_accumulation=3, optimizer=optimizer
    )
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in once])
    torch.testing.assert_close(found, expected)


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
    measured = {"images_per_second", "data_wait", "memory_gib"}
    assert {"lr", "gradient_norm", "mse", "vb"} | measured <= set(events.Tags()["scalars"])


def test_utilisation_is_logged_where_the_peak_is_known(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_peak_flops", lambda device, precision: 1e9)
    made = recipe(tmp_path / "run", features, steps=3, log_every=3)
    (row,) = train(made, lambda device: TextToImage(made, device)).read_log()
    # an epoch of eleven pictures, with 1 to 5 tokens of text
    texts = [1 + i % 5 for i in range(11)]
    forward = sum(model_flops(made.config, 4, 0) for _ in texts)
    forward += sum(model_flops(made.config, 4, n) - model_flops(made.config, 4, 0) for n in texts)
    expected = 3 * forward * row["images_per_second"] / 11 / 1e9
    # the mean length of a batch's texts is rounded
    assert row["mfu"] == pytest.approx(expected, rel=0.1)


def test_different_seeds_differ(tmp_path: Path, features: Path) -> None:
    a, b = (run(recipe(tmp_path / str(s), features, seed=s, steps=2)) for s in (0, 1))
    assert a[0]["loss"] != b[0]["loss"]


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

    monkeypatch.setattr(loop_module.Accelerator, "clip_grad_norm_", clipped)
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


def test_learning_rates() -> None:
    rate = learning_rate(Schedule(name="cosine", warmup_steps=4), 14)
    assert [rate(step) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert rate(9) == pytest.approx(0.5) and rate(14) == pytest.approx(0)
    assert learning_rate(Schedule(name="constant", warmup_steps=0), 10)(9) == 1
    assert learning_rate(Schedule(name="linear", warmup_steps=0), 10)(5) == 0.5
