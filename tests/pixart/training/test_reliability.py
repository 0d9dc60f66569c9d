"""Whatever happens to a run, it says what to do, and what was saved stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Apart
from small_runs import log, recipe, run, weights, write_features

from pixart.training import TrainRecipe, train, trainer
from pixart.training.text_to_image import TextToImage


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_features(folder)
    return folder


def slowly(made: TrainRecipe) -> None:
    """Long enough a step to be interrupted in."""

    class Slow(TextToImage):
        def loss(self, module, batch):
            time.sleep(0.01)
            return super().loss(module, batch)

    train(made, partial(Slow, made))


def test_killed_at_random_again_and_again_it_goes_on(tmp_path: Path, features: Path) -> None:
    """In steps, in checkpoints, in exports, in the log: until it has got through."""
    settings = {"steps": 40, "checkpoint_every": 2}
    whole = run(recipe(tmp_path / "whole", features, **settings))
    made = recipe(tmp_path / "run", features, **settings)
    instants, kills = random.Random(0), 0
    while True:
        apart = Apart(slowly, made, output=tmp_path / "out")
        begun = made.output / "starts.jsonl"
        starts = begun.read_text().count("\n") if begun.exists() else 0
        while apart.processes[0].exitcode is None and (
            not begun.exists() or begun.read_text().count("\n") == starts
        ):
            time.sleep(0.01)
        # sometimes before its first checkpoint, which only costs time; mostly after
        if kills < 8:
            apart.processes[0].join(instants.uniform(0.05, 0.6))
            if apart.processes[0].exitcode is None:
                os.kill(apart.processes[0].pid, signal.SIGKILL)
                apart.processes[0].join()
                kills += 1
                continue
        assert apart.wait() == [0], apart.text
        break
    assert kills >= 6
    lines = (made.output / "starts.jsonl").read_text().splitlines()
    assert any(json.loads(line)["after_step"] for line in lines)
    assert all(p.name.startswith("step-") for p in (made.output / "checkpoints").iterdir())
    assert log(made.output) == whole
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(made.output)[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_ends(
    tmp_path: Path, features: Path, number: signal.Signals, processes: int
) -> None:
    settings = {"steps": 200, "checkpoint_every": 200, "batch_size": 2,
                "gradient_accumulation": 2 // processes}  # fmt: skip
    made = recipe(tmp_path / "run", features, **settings)
    apart = Apart(slowly, made, output=tmp_path / "out", processes=processes)
    rows = made.output / "log.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 3:
        assert apart.processes[0].exitcode is None, apart.text
        time.sleep(0.01)
    # one of them is told: all must stop after the same step
    os.kill(apart.processes[-1].pid, number)
    codes = apart.wait()
    assert codes[-1] == 128 + number, apart.text
    assert all(codes), apart.text
    (saved,) = (made.output / "checkpoints").iterdir()
    assert "The last good checkpoint is" in apart.text and saved.name in apart.text
    assert int(saved.name[5:]) == log(made.output)[-1]["step"]


def in_its_own_group(made: TrainRecipe) -> None:
    os.setsid()
    # as in a process that is nobody's fork
    multiprocessing.set_start_method("fork", force=True)
    slowly(made)


def test_a_signal_to_all_of_a_group_saves_as_well(tmp_path: Path, features: Path) -> None:
    """A terminal and Slurm tell the processes that read data, and torchrun tells again."""
    made = recipe(tmp_path / "run", features, steps=500, checkpoint_every=500, workers=2)
    apart = Apart(in_its_own_group, made, output=tmp_path / "out")
    rows = made.output / "log.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 3:
        assert apart.processes[0].exitcode is None, apart.text
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(apart.processes[0].pid, signal.SIGTERM)
        time.sleep(0.02)
    assert apart.wait() == [128 + signal.SIGTERM], apart.text
    (saved,) = (made.output / "checkpoints").iterdir()
    assert int(saved.name[5:]) == log(made.output)[-1]["step"]


def test_what_was_not_logged_yet_is_before_a_run_ends(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, log_every=4)

    class Told(TextToImage):
        calls = 0

        def loss(self, module, batch):
            Told.calls += 1
            if Told.calls == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(module, batch)

    with pytest.raises(SystemExit):
        train(made, partial(Told, made))
    rows = run(made)
    assert [row["step"] for row in rows] == [4, 5, 6, 8, 10, 12]
    each = run(recipe(tmp_path / "each", features))
    assert rows[2]["loss"] == each[5]["loss"]


def test_a_second_signal_ends_at_once(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ONE_WISH", 0.0)
    made = recipe(tmp_path / "run", features)

    class Interrupted(TextToImage):
        def loss(self, module, batch):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(module, batch)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(made, partial(Interrupted, made))
    assert signal.getsignal(signal.SIGINT) is before


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


def test_a_loss_that_grows_without_end_stops_the_run(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, steps=30, gradient_clip=None)

    class Grows(TextToImage):
        calls = 0

        def loss(self, module, batch):
            Grows.calls += 1
            losses = super().loss(module, batch)
            return {name: value * 2 ** max(0, Grows.calls - 10) for name, value in losses.items()}

    with pytest.raises(RuntimeError, match=r"loss grew from .* at first.*step-0000010.*lr"):
        train(made, lambda device: Grows(made, device))


def test_a_data_process_that_died_is_named(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, workers=1, checkpoint_every=1)

    class Dies(TextToImage):
        def collate(self, samples):
            if len(list((made.output / "checkpoints").glob("step-*"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().collate(samples)

    with pytest.raises(
        RuntimeError, match="process that reads data died.*good checkpoint.*workers"
    ):
        train(made, lambda device: Dies(made, device))
    whole = run(recipe(tmp_path / "whole", features, checkpoint_every=1))
    assert run(made) == whole


def test_a_data_process_that_died_while_a_file_was_written_is_named(
    tmp_path: Path, features: Path
) -> None:
    made = recipe(tmp_path / "run", features, checkpoint_every=1)

    class Interrupted(TextToImage):
        def export(self, module, folder):
            died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            raise OSError("cannot write a file: free some space") from died

    with pytest.raises(RuntimeError, match=r"data died: DataLoader worker \(pid 7\)"):
        train(made, lambda device: Interrupted(made, device))


def dies(made: TrainRecipe) -> None:
    class Dies(TextToImage):
        def loss(self, module, batch):
            time.sleep(0.02)
            saved = (made.output / "checkpoints" / "step-0000005").exists()
            if saved and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().loss(module, batch)

    train(made, partial(Dies, made))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_when_a_process_is_lost_the_others_end(
    tmp_path: Path, features: Path, strategy: str
) -> None:
    settings = {"batch_size": 2, "steps": 40, "checkpoint_every": 5}
    made = recipe(tmp_path / "run", features, parallel={"strategy": strategy}, **settings)
    apart = Apart(dies, made, output=tmp_path / "out", processes=2)
    first, second = apart.wait()
    assert second == -signal.SIGKILL
    assert first not in (0, None), apart.text
    # what was saved is there, and one process takes over the work of both
    whole = run(recipe(tmp_path / "whole", features, gradient_accumulation=2, **settings))
    for row, expected in zip(
        run(recipe(tmp_path / "run", features, **settings)), whole, strict=True
    ):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, features: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="output: cannot write to .*file/run.*name another"):
        run(recipe(tmp_path / "file" / "run", features))


def test_damaged_features_are_named(tmp_path: Path) -> None:
    write_features(tmp_path / "features")
    shard = tmp_path / "features" / "shard-000000.safetensors"
    shard.write_bytes(b"garbage")
    with pytest.raises(RuntimeError, match=f"{shard.name} is damaged.*rerun the encoding"):
        run(recipe(tmp_path / "run", tmp_path / "features"))
