"""Defects of the official training code that ours must not have: docs/training-defects.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_runs import MODEL, recipe, run, write_features

from pixart.training import train
from pixart.training import trainer as trainer_module
from pixart.training.checkpointing import ABOUT
from pixart.training.text_to_image import TextToImage

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "training-defects.md"


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_features(folder)
    return folder


def test_captions_are_dropped_after_a_preview_as_before(tmp_path: Path, features: Path) -> None:
    """The official validation leaves the first process in evaluation mode."""
    modes: list[bool] = []
    nulls: list[int] = []

    class Watched(TextToImage):
        preview_every = 1

        def __init__(self, made, device):
            super().__init__(made, device)
            self.preview_every = 1
            self.module.y_embedder.y_proj.register_forward_pre_hook(self._count)

        def _count(self, _module, inputs):
            null = self.module.y_embedder.y_embedding
            (caption,) = inputs
            same = (caption == null[: caption.shape[1]]).flatten(1).all(1)
            nulls.append(int(same.sum()))

        def loss(self, module, batch):
            modes.append(self.module.training)
            return super().loss(module, batch)

        def preview(self, module):
            assert not module.training

    made = recipe(
        tmp_path / "run", features, steps=6, model={**MODEL, "caption_dropout": 0.9},
        checkpoint_every=6,
    )  # fmt: skip
    train(made, lambda device: Watched(made, device))
    assert modes == [True] * len(modes) and len(modes) == 6
    # nine in ten of four captions or three
    assert sum(nulls[1:]) >= 12


def test_scaling_of_losses_goes_on_where_it_was(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fp16 multiplies losses by grows as it goes well; accelerate scales on GPUs alone."""

    class Scaled(trainer_module.Accelerator):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4, growth_interval=2)

    monkeypatch.setattr(trainer_module, "Accelerator", Scaled)
    settings = {"checkpoint_every": 3, "schedule": {"name": "constant", "warmup_steps": 0}}
    run(recipe(tmp_path / "whole", features, steps=7, **settings))
    run(recipe(tmp_path / "parts", features, steps=3, **settings))
    run(recipe(tmp_path / "parts", features, steps=7, **settings))
    found = [
        json.loads((tmp_path / name / "checkpoints" / "step-0000007" / ABOUT).read_text())["scaler"]
        for name in ("whole", "parts")
    ]
    assert found[0]["scale"] == 4 * 2**3
    assert found[0] == found[1]


def test_no_package_is_pinned_to_one_version() -> None:
    """The official requirements ask for an xformers that needs another torch than they name."""
    text = (ROOT / "pyproject.toml").read_text()
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert "torch>=" in dependencies
    assert "==" not in dependencies
    for absent in ("xformers", "mmcv", "timm"):
        assert f'"{absent}' not in text


def test_every_defect_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 9
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), (file, name)
