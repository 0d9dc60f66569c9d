"""Defects of the official training code that ours must not have: docs/training-defects.md."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed as dist
from small_runs import MODEL, recipe
from torch.distributed.fsdp import FSDPModule

from pixart.config import PixArtConfig
from pixart.model import PixArt
from pixart.training import train
from pixart.training.distributed import shard
from pixart.training.text_to_image import TextToImage

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "training-defects.md"


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


def test_no_package_is_pinned_to_one_version() -> None:
    """The official requirements ask for an xformers that needs another torch than they name."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^[\w-]+ = (\[.*?^\]|\[.*?\])", text.split("[tool.")[0], re.S | re.M)
    packages = re.findall(r'"([^"]+)"', "".join(lists))
    assert "torch>=2.11" in packages and "peft" in packages
    assert not [package for package in packages if "==" in package]
    assert not {"xformers", "mmcv", "timm"} & {re.split(r"\W", x)[0] for x in packages}


def test_every_block_of_every_model_is_sharded(tmp_path: Path) -> None:
    """The official FSDP names a class that multi-aspect models do not have."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for changes in (
            {"micro_conditioning": True},
            {
                "kv_compression": {"sampling": "conv", "scale_factor": 2, "layers": [1]},
                "qk_norm": True,
            },
            {"conditioning": "class", "num_classes": 3},
        ):
            model = PixArt(PixArtConfig(**MODEL, **changes))
            shard(model, torch.device("cpu"), "no")
            assert all(isinstance(block, FSDPModule) for block in model.blocks)
    finally:
        dist.destroy_process_group()


def test_every_defect_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 9
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), (file, name)
