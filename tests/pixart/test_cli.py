"""The command line: help, errors in one message, and conversion."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart import PixArt, PixArtConfig

COMMANDS = ["quickstart", "train", "train-vae", "generate", "convert", "doctor", "data"]
TINY = PixArtConfig(
    input_size=8, hidden_size=72, depth=2, num_heads=1, caption_channels=6, max_caption_tokens=5
)


def pixart(*arguments: object, code: int = 0) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "pixart.cli", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_help_names_every_command() -> None:
    said = pixart("--help")
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    assert len(pixart(command, "--help").split()) > 20


def test_errors_are_one_message(tmp_path: Path) -> None:
    said = pixart("train", "sigma-512", "optimizer.lrr=1", code=1)
    assert "optimizer.lrr: unknown key (did you mean lr?)" in said
    assert "Traceback" not in said
    assert "no recipe 'sigma-511'" in pixart("train", "sigma-511", code=1)
    assert "is no pipeline" in pixart("generate", tmp_path, "a cat", code=1)


def test_converts_without_loss(tmp_path: Path) -> None:
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


def test_starts_from_a_dit_and_says_how(tmp_path: Path) -> None:
    from pixart import checkpoints, presets

    small = {"input_size": 4, "hidden_size": 12, "depth": 1, "num_heads": 1}
    dit = PixArt(dataclasses.replace(presets["dit-256"], **small, num_classes=3))
    checkpoints.save_official(dit, tmp_path / "dit.pth")
    # the command starts published sizes alone, which this one is not
    said = pixart(
        "convert",
        tmp_path / "dit.pth",
        tmp_path / "out",
        "--from-dit",
        "--preset",
        "alpha-256",
        code=1,
    )
    assert "x_embedder.proj.weight" in said
    assert "needs --preset" in pixart(
        "convert", tmp_path / "dit.pth", tmp_path / "o", "--from-dit", code=1
    )


def test_doctor_lists_every_op() -> None:
    said = pixart("doctor")
    assert all(op in said for op in ("adaln_single", "self_attention", "compress_kv"))
