"""Many processes: the curve of one, whoever holds the weights, and wherever it was stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from processes import Apart, run_apart
from small_runs import (
    MODEL,
    log,
    recipe,
    run,
    train_apart,
    train_in_turn,
    weights,
    write_features,
)

from pixart.training import TrainRecipe, train
from pixart.training.distributed import Processes, share_tokens
from pixart.training.recipe import Parallel
from pixart.training.text_to_image import TextToImage

STEPS = 4
# a step is always four batches; of the eleven samples, they have four or three
BATCHES = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, then the same on two and four, sharded or not, whole or in parts."""
    folder = tmp_path_factory.mktemp("runs")
    write_features(folder / "features")

    def of(name: str, processes: int, steps: int = STEPS, **changes: Any):
        values = {
            "steps": steps,
            "checkpoint_every": STEPS,
            "schedule": {"name": "constant", "warmup_steps": 3},
            # a step's 16 samples are four times as many: twice the rate
            "optimizer": {"lr": 5e-4, "base_batch_size": 4, "eps": 1e-8},
            # all of these gradients are longer
            "gradient_clip": 0.05,
            "gradient_accumulation": BATCHES // processes,
            **changes,
        }
        return recipe(folder / name, folder / "features", **values)

    fsdp, parts = {"parallel": {"strategy": "fsdp"}}, STEPS // 2
    run(of("one", 1))
    run(of("one-to-two", 1, parts, gradient_accumulation=4))
    train_apart(
        of("ddp-2", 2),
        of("fsdp-2", 2, **fsdp),
        of("fsdp-2-selective", 2, gradient_checkpointing="selective", **fsdp),
        of("fsdp-2-whole-blocks", 2, gradient_checkpointing=True, **fsdp),
        of("one-to-two", 1, STEPS, gradient_accumulation=4, **fsdp),
        of("fsdp-2-to-ddp-4", 2, parts, **fsdp),
        of("sequence-2", 1, parallel={"sequence": 2}),
        processes=2,
    )
    train_apart(
        of("ddp-4", 4),
        of("fsdp-2-to-ddp-4", 2, STEPS),
        of("fsdp-4-to-one", 4, parts, **fsdp),
        of("fsdp-4-sequence-2", 2, parallel={"strategy": "fsdp", "sequence": 2}),
        processes=4,
    )
    run(of("fsdp-4-to-one", 4))
    return folder


@pytest.mark.parametrize(
    "name",
    ["ddp-2", "ddp-4", "fsdp-2", "fsdp-2-selective", "fsdp-2-whole-blocks",
     "one-to-two", "fsdp-2-to-ddp-4", "fsdp-4-to-one", "sequence-2", "fsdp-4-sequence-2"],
)  # fmt: skip
def test_many_processes_train_as_one_does(runs: Path, name: str) -> None:
    whole, found = log(runs / "one"), log(runs / name)
    assert [row.keys() for row in found] == [row.keys() for row in whole]
    assert found[-1]["lr"] == 1e-3
    for row, expected in zip(found, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    for key, tensor in weights(runs / "one").items():
        torch.testing.assert_close(weights(runs / name)[key], tensor, rtol=1e-3, atol=1e-5)


def counted(*recipes: TrainRecipe) -> None:
    """Trains in turn; prints the bytes of weights that each forward keeps for its backward."""

    class Counted(TextToImage):
        def loss(self, module, batch):
            of_blocks, others = (
                {p.shape for name, p in self.module.named_parameters()
                 if name.endswith("weight") and name.startswith("blocks.") == inside}
                for inside in (True, False)
            )  # fmt: skip
            shapes, saved = of_blocks - others, []
            keep = torch.autograd.graph.saved_tensors_hooks(
                lambda x: saved.append(x.detach()) or x, lambda x: x
            )
            with keep:
                losses = super().loss(module, batch)
            storages = {
                x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in saved
                if x.dtype == torch.bfloat16 and {x.shape, x.shape[::-1]} & shapes
            }
            # in one piece, as others print into the same file
            print(f" kept {self.recipe.output.name} {sum(storages.values())} ", flush=True)
            return losses

    PartialState.destroy_process_group = lambda *_: None
    for each in recipes:
        AcceleratorState._reset_state()
        train(each, partial(Counted, each))


def test_sharded_weights_in_bf16_are_let_go(tmp_path: Path) -> None:
    """Autocast would keep a copy of all of them from the forward to the backward."""
    write_features(tmp_path / "features")
    # every kind of parameter that a block may have
    model = {**MODEL, "qk_norm": True, "gated_cross_attention": True,
             "kv_compression": {"sampling": "conv", "scale_factor": 2, "layers": [1]}}  # fmt: skip
    ddp, fsdp = (
        recipe(
            tmp_path / strategy, tmp_path / "features", steps=STEPS, mixed_precision="bf16",
            model=model, parallel={"strategy": strategy},
        )
        for strategy in ("ddp", "fsdp")
    )  # fmt: skip
    text = run_apart(counted, ddp, fsdp, output=tmp_path / "out", processes=2)
    kept = re.findall(r"kept (\w+) (\d+)", text)
    assert {name for name, size in kept if int(size)} == {"ddp"} and len(kept) == 4 * STEPS
    # tables and norms are rounded as well, which autocast does not do
    for row, expected in zip(log(fsdp.output), log(ddp.output), strict=True):
        assert row == pytest.approx(expected, rel=2e-3)


def spied(made: TrainRecipe) -> None:
    class Spy(TextToImage):
        def loss(self, module, batch):
            state = torch.get_rng_state()
            print("drew", torch.randn(1).item(), *batch["keys"], flush=True)
            torch.set_rng_state(state)
            return super().loss(module, batch)

    tasks: list[Spy] = []
    train(made, lambda device: tasks.append(Spy(made, device)) or tasks[0])
    print("weights", sum(p.double().sum() for p in tasks[0].module.parameters()).item())


def test_processes_draw_different_noise_for_different_samples(tmp_path: Path) -> None:
    write_features(tmp_path / "features")
    made = recipe(tmp_path / "run", tmp_path / "features", batch_size=2, steps=3)
    text = run_apart(spied, made, output=tmp_path / "out", processes=2)
    drew = [line.split()[1:] for line in text.splitlines() if line.startswith("drew")]
    assert len({noise for noise, *_ in drew}) == len(drew) == 6
    # an epoch of six batches, in which each sample is once
    assert sorted(key for _, *keys in drew for key in keys) == sorted(map(str, range(11)))
    ends = {line for line in text.splitlines() if line.startswith("weights")}
    assert len(ends) == 1


def test_a_step_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    write_features(tmp_path / "features")
    made = recipe(tmp_path / "run", tmp_path / "features", steps=1)
    run(made)
    apart = Apart(train_in_turn, made, output=tmp_path / "out", processes=2)
    assert apart.wait() == [1, 1]
    assert "is 1 batches, which 2 processes cannot share evenly" in apart.text


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_command_line_starts_many_processes(tmp_path: Path, launcher: str) -> None:
    write_features(tmp_path / "features")
    made = recipe(tmp_path / "run", tmp_path / "features", steps=2, log_every=2)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    commands = {
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", *commands[launcher], "-m", "pixart.cli", "train", str(file)],
        env=environment, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    (start,) = (made.output / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["processes"] == 2


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    sharded = {"parallel": {"strategy": "fsdp"}, "mixed_precision": "fp16"}
    with pytest.raises(ValueError, match="parallel: got .*fsdp goes with mixed_precision bf16"):
        recipe(tmp_path / "run", tmp_path, **sharded)
    sharded = {"parallel": {"strategy": "fsdp"}, "optimizer": {"name": "adamw-8bit"}}
    with pytest.raises(ValueError, match="parallel: got .*fsdp goes with optimizer adamw or came"):
        recipe(tmp_path / "run", tmp_path, **sharded)
    with pytest.raises(ValueError, match="sequence is 2, which does not divide the 1 processes"):
        Processes(Parallel(sequence=2))
    with pytest.raises(ValueError, match="only a PixArt's tokens can be shared"):
        share_tokens(torch.nn.Linear(1, 1), 2)
