"""Our folder; files that are damaged, hostile or cut short; saves that die."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, PLAIN, assert_same, randomized

from pixart import PixArt
from pixart.checkpoints import files, load, save, save_diffusers, save_official, to_official

SAVES: dict[str, Callable[[PixArt, Path], None]] = {
    "ours": save,
    "diffusers": save_diffusers,
    "pth": lambda model, folder: save_official(model, folder / "file.pth"),
    "safetensors": lambda model, folder: save_official(model, folder / "file.safetensors"),
}


def reread(folder: Path) -> PixArt:
    return load(next((p for p in folder.iterdir() if p.stem == "file"), folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = randomized(CONFIGS[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]
    loaded = PixArt.from_pretrained(tmp_path / "new" / "folder")
    assert_same(loaded, model)
    assert not loaded.training


def test_config_argument_wins(tmp_path: Path) -> None:
    save(randomized(PLAIN), tmp_path)
    assert load(str(tmp_path), replace(PLAIN, caption_dropout=0.5)).config.caption_dropout == 0.5


def test_loaded_model_outlives_its_file(tmp_path: Path) -> None:
    model = randomized(PLAIN)
    for name, write in SAVES.items():
        (tmp_path / name).mkdir()
        write(model, tmp_path / name)
        loaded = reread(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            file.write_bytes(b"\0" * file.stat().st_size)  # in place: a mapping would see it
        assert_same(loaded, model)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    save(randomized(PLAIN), tmp_path)
    before = torch.random.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    state = {**to_official(PixArt(PLAIN)), "payload": Hostile(mark)}
    for zipped in (True, False):
        path = tmp_path / f"file{zipped}.pth"
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"weights_only.*runs no code"):
            load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file is as dangerous as it should be


def test_options_beside_the_weights_are_no_code(tmp_path: Path) -> None:
    state = to_official(PixArt(PLAIN))
    torch.save({"model": state, "ema": state, "args": Namespace(lr=1)}, tmp_path / "dit.pt")
    assert load(tmp_path / "dit.pt").config == PLAIN


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_weights(name: str, kept: float, tmp_path: Path) -> None:
    SAVES[name](randomized(PLAIN), tmp_path)
    weights = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"{weights.name}.*damaged"):
        reread(tmp_path)


@pytest.mark.parametrize("save_to", [save, save_diffusers])
def test_damaged_config(save_to: Callable, tmp_path: Path) -> None:
    save_to(PixArt(PLAIN), tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()
    for text in (whole[:30], "[]"):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            load(tmp_path)
    if save_to is save:
        config.write_text(json.dumps({**json.loads(whole), "colour": 1}))
        with pytest.raises(ValueError, match=r"config\.json.*colour"):
            load(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hub"):
        load("PixArt-alpha/PixArt-XL-2-512x512")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    save(PixArt(PLAIN), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match=r"model\.onnx.*accepted: \.safetensors, \.pth"):
        load(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"accepted: a \.pth or \.safetensors"):
        save_official(PixArt(PLAIN), tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {"a": torch.zeros(1)}}, "weights instead of tensors"),
        ([torch.zeros(1)], "holds a list"),
        ({}, "nothing instead of tensors"),
    ],
)
def test_torch_file_without_a_state_dict(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file.pth")


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("changed", [{}, {"pe_interpolation": 4.0}])
def test_save_that_dies_while_writing_keeps_the_old(
    name: str, changed: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = randomized(PLAIN)
    SAVES[name](old, tmp_path)
    listing = sorted(tmp_path.iterdir())
    written = []

    def half(write: Callable) -> Callable:
        def die(content: object, path: Path, *args: object, **kwargs: object) -> None:
            write(content, path, *args, **kwargs)
            path.write_bytes(path.read_bytes()[:1000])
            written.append(path)
            raise Killed

        return die

    monkeypatch.setattr(files, "save_file", half(files.save_file))
    monkeypatch.setattr(torch, "save", half(torch.save))
    with pytest.raises(Killed):
        SAVES[name](randomized(replace(PLAIN, **changed), seed=1), tmp_path)
    assert len(written) == 1
    assert sorted(tmp_path.iterdir()) == listing
    assert_same(reread(tmp_path), old)


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("changed", [{}, {"pe_interpolation": 4.0}])
@pytest.mark.parametrize("survived", [0, 1])
def test_save_that_dies_while_renaming_leaves_no_mixture(
    name: str, changed: dict, survived: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = randomized(PLAIN), randomized(replace(PLAIN, **changed), seed=1)
    SAVES[name](old, tmp_path)
    replaced = []
    replace_file = os.replace

    def die(source: Path, target: Path) -> None:
        if len(replaced) == survived:
            raise Killed
        replaced.append(target)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", die)
    try:
        SAVES[name](new, tmp_path)
        found = reread(tmp_path)
        assert_same(found, new)  # a single file has but one rename
    except Killed:
        if changed and name in ("ours", "diffusers"):
            with pytest.raises(FileNotFoundError):
                reread(tmp_path)
        else:
            assert_same(reread(tmp_path), old)


@pytest.mark.parametrize("name", SAVES)
def test_failed_write_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=f"{tmp_path}.*No space left.*free some space"):
        SAVES[name](PixArt(PLAIN), tmp_path)
    assert not list(tmp_path.iterdir())
