"""Whatever happens to a run, it says what to do, and what was saved stays."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from processes import Apart
from small_runs import log, recipe, run, weights, write_features

from pixart.training import TrainRecipe, train, trainer
from pixart.training.run_state import RunFolder
from pixart.training.text_to_image import TextToImage


def slowly(made: TrainRecipe) -> None:
    """Long enough a step to be interrupted in."""

    class Slow(TextToImage):
        def loss(self, module, batch):
            time.sleep(0.01)
            return super().loss(module, batch)

    train(made, partial(Slow, made))


def _lines(made: TrainRecipe) -> int:
    """What a run has written of its starts and its steps."""
    files = (made.output / name for name in ("starts.jsonl", "log.jsonl"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def test_killed_at_random_again_and_again_it_goes_on(tmp_path: Path, features: Path) -> None:
    """In steps, in checkpoints, in exports, in the log: until it has got through."""
    settings = {"steps": 40, "checkpoint_every": 2}
    whole = run(recipe(tmp_path / "whole", features, **settings))
    made = recipe(tmp_path / "run", features, **settings)
    chosen, kills = random.Random(0), 0
    while True:
        apart = Apart(slowly, made, output=tmp_path / "out")
        process, seen = apart.processes[0], _lines(made)
        # so much of its work, and a moment: a busy machine takes any time for it. Sometimes less
        # than to its first checkpoint, which only costs time
        work = chosen.randrange(7)
        while process.exitcode is None and (kills == 8 or _lines(made) < seen + work):
            time.sleep(0.001)
        process.join(chosen.uniform(0, 0.03))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
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


def wait_for_steps(apart: Apart, made: TrainRecipe) -> None:
    rows = made.output / "log.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 3:
        assert apart.processes[0].exitcode is None, apart.text
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_ends(
    tmp_path: Path, features: Path, number: signal.Signals, processes: int
) -> None:
    settings = {"steps": 200, "checkpoint_every": 200, "batch_size": 2,
                "gradient_accumulation": 2 // processes}  # fmt: skip
    made = recipe(tmp_path / "run", features, **settings)
    apart = Apart(slowly, made, output=tmp_path / "out", processes=processes)
    wait_for_steps(apart, made)
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
    wait_for_steps(apart, made)
    for _ in range(2):
        os.killpg(apart.processes[0].pid, signal.SIGTERM)
        time.sleep(0.02)
    assert apart.wait() == [128 + signal.SIGTERM], apart.text
    (saved,) = (made.output / "checkpoints").iterdir()
    assert int(saved.name[5:]) == log(made.output)[-1]["step"]


def train_on_other_losses(made: TrainRecipe, other: Callable[..., dict]) -> None:
    """On ``other(number, task, losses)``, of the batch's number from 1."""
    numbers = itertools.count(1)

    class Other(TextToImage):
        def loss(self, module, batch):
            return other(next(numbers), self, super().loss(module, batch))

    train(made, partial(Other, made))


def train_until_told(made: TrainRecipe, batch: int) -> int:
    """Gets SIGTERM in that batch; how many it has seen when it ends."""
    seen = 0

    def tell(number: int, task: TextToImage, losses: dict) -> dict:
        nonlocal seen
        seen = number
        if number == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    with pytest.raises(SystemExit):
        train_on_other_losses(made, tell)
    return seen


def test_what_was_not_logged_yet_is_before_a_run_ends(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, log_every=4)

    assert train_until_told(made, 6) == 6
    rows = run(made)
    assert [row["step"] for row in rows] == [4, 5, 6, 8, 10, 12]
    each = run(recipe(tmp_path / "each", features))
    assert rows[2]["loss"] == each[5]["loss"]


def test_a_step_that_is_told_to_stop_is_left_in_the_middle(tmp_path: Path, features: Path) -> None:
    """It may take longer than a launcher waits before it kills."""
    settings = {"gradient_accumulation": 3, "log_every": 2, "steps": 4}
    made = recipe(tmp_path / "run", features, **settings)

    assert train_until_told(made, 8) == 8
    (saved,) = (made.output / "checkpoints").iterdir()
    assert saved.name == "step-0000002"
    assert run(made) == run(recipe(tmp_path / "whole", features, **settings))


def test_a_second_signal_ends_at_once(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ONE_WISH", 0.0)
    made = recipe(tmp_path / "run", features)

    class Interrupted(TextToImage):
        def loss(self, module, batch):
            # to this thread: two that reach another one at once are one
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return super().loss(module, batch)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(made, partial(Interrupted, made))
    assert signal.getsignal(signal.SIGINT) is before


def test_nan_loss_says_what_to_do(tmp_path: Path, features: Path) -> None:
    bad = recipe(tmp_path / "run", features, checkpoint_every=2)

    def explode(step: int, task: TextToImage, losses: dict) -> dict:
        return {name: value * (1 if step < 4 else torch.nan) for name, value in losses.items()}

    with pytest.raises(RuntimeError, match="loss became nan at or before step 4.*step-0000002.*lr"):
        train_on_other_losses(bad, explode)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]


def test_weights_that_blew_up_are_not_saved(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, checkpoint_every=1, gradient_clip=None)

    def explode(step: int, task: TextToImage, losses: dict) -> dict:
        if step == 3:
            # the loss is finite, its gradient is not
            weight = task.module.final_layer.linear.weight
            zero = (weight - weight.detach()).abs().sum()
            losses["loss"] = losses["loss"] + zero.sqrt()
        return losses

    with pytest.raises(RuntimeError, match="weights became infinite or nan.*step-0000002"):
        train_on_other_losses(made, explode)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_loss_that_grows_without_end_stops_the_run(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, steps=30, gradient_clip=None)

    def grow(step: int, task: TextToImage, losses: dict) -> dict:
        return {name: value * 2 ** max(0, step - 10) for name, value in losses.items()}

    with pytest.raises(RuntimeError, match=r"loss grew from .* at first.*step-0000010.*lr"):
        train_on_other_losses(made, grow)


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


def test_what_a_data_process_says_is_not_its_death(tmp_path: Path) -> None:
    write_features(tmp_path / "features")
    (shard,) = (tmp_path / "features").glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RuntimeError, match=f"^[^\n]*{shard.name} [^\n]*damaged[^\n]*$") as raised:
        run(recipe(tmp_path / "run", tmp_path / "features", workers=1))
    assert "died" not in str(raised.value)


def test_a_disk_that_fills_is_named_with_what_was_saved(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, log_row = recipe(tmp_path / "run", features, checkpoint_every=2), RunFolder.log

    def fills(self: RunFolder, row: dict) -> None:
        if row["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        log_row(self, row)

    monkeypatch.setattr(RunFolder, "log", fills)
    with pytest.raises(
        OSError,
        match=r"the run in .*run ended: .*No space.*checkpoint is .*step-0000002.*the same command",
    ):
        run(made)


def test_curves_that_cannot_be_shown_end_no_run(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("log", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, full)
    assert len(run(recipe(tmp_path / "run", features))) == 12


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
    assert second == -signal.SIGKILL and first not in (0, None), apart.text
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
