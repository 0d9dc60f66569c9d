"""Checkpoints: a run goes on from them exactly, and none is there that is not whole."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from processes import Apart
from safetensors.torch import load_file
from small_runs import MODEL, recipe, run, train_apart, train_in_turn, weights, write_features

from pixart.training import train
from pixart.training.run_state import RunFolder
from pixart.training.text_to_image import TextToImage


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


def test_some_checkpoints_are_kept_for_good(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "run", features, checkpoint_every=2, keep_checkpoints=1, keep_every=4))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000004", "step-0000008", "step-0000012"]


def test_what_is_written_is_what_was_there_when_it_was_asked_for(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the writing takes, while training changes the weights."""
    import torch.distributed.checkpoint as dcp

    release = threading.Event()
    write = dcp.HuggingFaceStorageWriter.write_data

    def slow(self, plan, planner):
        release.wait(60)
        return write(self, plan, planner)

    class Remembers(TextToImage):
        def loss(self, module, batch):
            step = len(seen) + 1
            seen.append({k: v.clone() for k, v in self.module.state_dict().items()})
            names = [path.name for path in (made.output / "checkpoints").glob("step-*")]
            if step == 8:
                assert names == []
                release.set()
            return super().loss(module, batch)

    seen: list[dict[str, torch.Tensor]] = []
    made = recipe(tmp_path / "run", features, steps=9)
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", slow)
    train(made, lambda device: Remembers(made, device))
    (file,) = (made.output / "checkpoints" / "step-0000005").glob("*.safetensors")
    saved = load_file(file)
    for name, tensor in seen[5].items():
        assert torch.equal(saved[f"model.{name}"], tensor), name


def limited(size: int, *recipes: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train_in_turn(*recipes)


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, features: Path) -> None:
    whole = run(recipe(tmp_path / "whole", features, steps=8))
    shard = max((tmp_path / "whole" / "checkpoints").rglob("*.safetensors"), key=os.path.getsize)
    made = recipe(tmp_path / "run", features, steps=8, checkpoint_every=2)
    run(recipe(tmp_path / "run", features, steps=8, checkpoint_every=2))
    # no file may reach the size of a checkpoint's: the writing fails in the other thread
    shutil.rmtree(made.output)
    apart = Apart(limited, shard.stat().st_size // 2, made, output=tmp_path / "out")
    assert apart.wait() == [1]
    assert "checkpoint of step 2 could not be written" in apart.text
    assert "there is no earlier one. Make room in" in apart.text
    assert list((made.output / "checkpoints").iterdir()) == []
    assert run(made) == whole


@pytest.mark.parametrize("how", ["garbage", "truncated", "flipped", "missing", "unknown"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, features: Path, how: str) -> None:
    whole = run(recipe(tmp_path / "run", features))
    damaged = tmp_path / "run" / "checkpoints" / "step-0000012"
    (file,) = damaged.glob("*.safetensors")
    if how == "garbage":
        file.write_bytes(b"\xff" * file.stat().st_size)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif how == "flipped":
        flip_last_bit(file)
    elif how == "missing":
        file.unlink()
    else:
        (damaged / "checkpoint.json").write_text("no json")
    reasons = {"missing": "safetensors is missing", "flipped": "checksum does not match"}
    reason = reasons.get(how, "")
    with pytest.raises(RuntimeError, match=f"step-0000012 cannot be read.*{reason}.*Delete it"):
        run(recipe(tmp_path / "run", features))
    shutil.rmtree(damaged)
    assert run(recipe(tmp_path / "run", features)) == whole


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_each_process_checks_a_part_and_all_end(tmp_path: Path, features: Path) -> None:
    made = recipe(tmp_path / "run", features, steps=5, parallel={"strategy": "fsdp"})
    train_apart(made, processes=2)
    *_, last = sorted((made.output / "checkpoints" / "step-0000005").glob("*.safetensors"))
    flip_last_bit(last)
    more = recipe(made.output, features, steps=5, parallel={"strategy": "fsdp"})
    apart = Apart(train_in_turn, more, output=tmp_path / "out", processes=2)
    assert apart.wait() == [1, 1]
    assert f"{last.name} is not what was written" in apart.text
    assert apart.text.count("step-0000005 cannot be read") == 2


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path, features: Path) -> None:
    """As of before there were any: a list of names."""
    constant = {"schedule": {"name": "constant", "warmup_steps": 3}}
    run(recipe(tmp_path / "run", features, steps=5, **constant))
    folder = tmp_path / "run" / "checkpoints" / "step-0000005"
    about = json.loads((folder / "checkpoint.json").read_text())
    assert about["files"] and all(len(digest) == 64 for digest in about["files"].values())
    (folder / "checkpoint.json").write_text(json.dumps({**about, "files": list(about["files"])}))
    assert len(run(recipe(tmp_path / "run", features, steps=6, **constant))) == 6
    # what can be told without them still is
    (file,) = (tmp_path / "run" / "checkpoints" / "step-0000006").glob("*.safetensors")
    about = json.loads((file.parent / "checkpoint.json").read_text())
    (file.parent / "checkpoint.json").write_text(
        json.dumps({**about, "files": list(about["files"])})
    )
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RuntimeError, match="step-0000006 cannot be read"):
        run(recipe(tmp_path / "run", features, steps=7, **constant))


def test_only_a_damaged_checkpoint_is_to_be_deleted(tmp_path: Path, features: Path) -> None:
    settings = {"steps": 2, "ema_decay": None}
    made = recipe(tmp_path / "run", features, **settings)
    run(made)

    class Wider(TextToImage):
        def _module(self):
            module = super()._module()
            module.extra = torch.nn.Linear(1, 1)
            return module

    with pytest.raises(RuntimeError, match=r"is whole, but .* \(.*model\.extra.*Keep it"):
        train(made, lambda device: Wider(made, device))


def test_a_run_goes_on_with_its_own_data_alone(tmp_path: Path) -> None:
    from pixart.conditioning import CacheWriter, FeatureCache

    write_features(tmp_path / "features")
    made = recipe(tmp_path / "run", tmp_path / "features")
    run(recipe(tmp_path / "run", tmp_path / "features"))
    cache = FeatureCache(tmp_path / "features")
    with CacheWriter(
        tmp_path / "features", cache.metadata, cache.null_caption, cache.null_length
    ) as w:
        w.add(**{**cache[0], "key": "one more"})
    with pytest.raises(
        ValueError, match=r"trained on other data: 1 added \(one more\)\. Take away"
    ):
        run(made)


def test_memory_may_be_saved_from_some_step_on(tmp_path: Path, features: Path) -> None:
    constant = {"schedule": {"name": "constant", "warmup_steps": 3}}
    whole = run(recipe(tmp_path / "whole", features, **constant))
    run(recipe(tmp_path / "parts", features, steps=5, **constant))
    changed = {"gradient_checkpointing": True, **constant}
    for row, expected in zip(
        run(recipe(tmp_path / "parts", features, **changed)), whole, strict=True
    ):
        assert row == pytest.approx(expected)


def test_a_checkpoint_is_read_without_executing_code(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "run", features))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = tmp_path / "run" / "checkpoints" / "step-0000012"
    for file in folder.iterdir():
        torch.save(Evil(), file)
    # which torch.distributed.checkpoint would unpickle
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with contextlib.suppress(RuntimeError):
        run(recipe(tmp_path / "run", features))
    assert not (tmp_path / "executed").exists()


def test_folder_of_another_recipe_is_refused(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "run", features))
    changed = {"batch_size": 8, "model": {**MODEL, "depth": 3}}
    with pytest.raises(
        ValueError, match=r"another recipe:\n  batch_size: 4 -> 8\n  model.depth: 2 -> 3\nGive"
    ):
        run(recipe(tmp_path / "run", features, **changed))


def test_a_run_may_move_with_its_data(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    write_features(before / "features")
    rows = run(recipe(before / "run", before / "features"))

    def again(features: Path, **data: object) -> list[dict]:
        data = {"features": str(features), "max_bad_fraction": 0.2, **data}
        return run(recipe(features.parent / "run", features, data=data))

    (before / "link").symlink_to(before / "features")
    assert again(before / "link") == rows
    before.rename(after)
    assert again(after / "features") == rows
    # what is still there is something else
    shutil.copytree(after / "features", after / "other")
    with pytest.raises(ValueError, match="another recipe:\n  data.features: .*other\n"):
        again(after / "other")
    # names on the hub, which are in no folder: their latents differ
    run_of = RunFolder(tmp_path / "named")

    def begin(vae: str) -> None:
        data = {"features": str(after / "features"), "vae": vae}
        run_of.begin(recipe(run_of.folder, after / "features", data=data))

    begin("stabilityai/sd-vae-ft-ema")
    run_of.name(1).mkdir(parents=True)
    with pytest.raises(ValueError, match="data.vae: stabilityai/sd-vae-ft-ema -> another/vae"):
        begin("another/vae")


def test_an_export_that_failed_is_made_by_the_next_run(tmp_path: Path, features: Path) -> None:
    run(recipe(tmp_path / "whole", features))
    made = recipe(tmp_path / "run", features)

    class Fails(TextToImage):
        exports = 0

        def export(self, module, folder):
            Fails.exports += 1
            if Fails.exports == 3:
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
