"""The command line: help, errors in one message, and conversion."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart import PixArt, PixArtConfig
from pixart.cli import main

COMMANDS = [
    "quickstart",
    "train",
    "train-vae",
    "generate",
    "convert",
    "grow",
    "serve",
    "doctor",
    "data",
]
TINY = PixArtConfig(
    input_size=8, hidden_size=72, depth=2, num_heads=1, caption_channels=6, max_caption_tokens=5
)


@pytest.fixture
def pixart(monkeypatch, capsys) -> Iterator[Callable[..., str]]:
    """The command, in this process: what it says, on stderr where it is to fail."""
    monkeypatch.setenv("COLUMNS", "100")
    # which the command sets for its process
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    logger = logging.getLogger("pixart")
    level = logger.level

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["pixart", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == code, said.err
        return said.err if code else said.out

    yield run
    logger.setLevel(level)


def test_runs_as_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pixart.cli", "train", "sigma-511"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no recipe 'sigma-511'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_command(pixart) -> None:
    said = pixart("--help")
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(pixart, command: str) -> None:
    assert len(pixart(command, "--help").split()) > 20


def test_errors_are_one_message(pixart, tmp_path: Path) -> None:
    said = pixart("train", "sigma-512", "optimizer.lrr=1", code=1)
    assert "optimizer.lrr: unknown key (did you mean lr?)" in said
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert "is no pipeline" in pixart("generate", tmp_path, "a cat", code=1)


def test_converts_without_loss(pixart, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PixArt(TINY)
    model.save_pretrained(tmp_path / "ours")
    before = load_file(tmp_path / "ours" / "model.safetensors")
    pixart("convert", tmp_path / "ours", tmp_path / "a.pth", "--to", "official")
    pixart("convert", tmp_path / "a.pth", tmp_path / "diffusers", "--to", "diffusers")
    assert "parameters" in pixart("convert", tmp_path / "diffusers", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert PixArtConfig.from_dict(config).depth == 2
    said = pixart("convert", tmp_path / "ours", tmp_path / "back", code=1)
    assert "exists already" in said


def test_grows_and_says_how(pixart, tmp_path: Path) -> None:
    dit = dataclasses.replace(TINY, conditioning="class", num_classes=3)
    PixArt(dit).save_pretrained(tmp_path / "dit")
    for name, config in (("text", TINY), ("fine", dataclasses.replace(TINY, input_size=16))):
        (tmp_path / f"{name}.json").write_text(json.dumps(config.to_dict()))
    said = pixart("grow", tmp_path / "dit", tmp_path / "text", "--config", tmp_path / "text.json")
    assert "re-parameterised" in said and "t_block.1" in said
    said = pixart("grow", tmp_path / "text", tmp_path / "fine", "--config", tmp_path / "fine.json")
    assert "copied" in said and "extrapolated" in said and "4 x 4 -> 8 x 8" in said
    assert PixArt.from_pretrained(tmp_path / "fine").config.input_size == 16
    said = pixart("grow", tmp_path / "text", tmp_path / "x", "--preset", "alpha-256", code=1)
    assert "hidden_size 72 -> 1152" in said and not (tmp_path / "x").exists()
    assert "--preset or --config" in pixart("grow", tmp_path / "text", tmp_path / "x", code=1)


def test_doctor_lists_every_op(pixart) -> None:
    said = pixart("doctor")
    assert all(op in said for op in ("adaln_single", "self_attention", "compress_kv"))
