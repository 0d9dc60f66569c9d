"""Runs of a tiny model, here and in processes of their own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from processes import run_apart

from pixart.conditioning import CacheMetadata, CacheWriter
from pixart.training import TrainRecipe, train
from pixart.training.recipe import check_recipe
from pixart.training.text_to_image import TextToImage

MODEL = {
    "input_size": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 6,
    "max_caption_tokens": 5,
}


def write_features(folder: Path) -> None:
    """Eleven samples, which no batch size of these tests divides."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    metadata = CacheMetadata("text", "vae", "float16", 5, 6, 4)
    with CacheWriter(folder, metadata, randn(5, 6), 1) as writer:
        for i in range(11):
            writer.add(
                key=f"{i}",
                text=f"caption {i}",
                caption=randn(1 + i % 5, 6),
                latent_mean=randn(4, 4, 4),
                latent_std=randn(4, 4, 4).abs(),
                image_size=(32, 32),
            )


def recipe(output: Path, features: Path, **changes: object) -> TrainRecipe:
    values = {
        "output": str(output),
        "steps": 12,
        "batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 5,
        "ema_decay": 0.9,
        "gradient_clip": 1.0,
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "model": MODEL,
        "data": {"features": str(features)},
        **changes,
    }
    return check_recipe(TrainRecipe, values, "test")


def run(recipe: TrainRecipe) -> list[dict]:
    train(recipe, lambda device: TextToImage(recipe, device))
    return log(recipe.output)


def log(output: Path) -> list[dict]:
    """Without what no two runs have in common."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for row in rows:
        for measured in ("images_per_second", "data_wait", "memory_gib"):
            del row[measured]
    return rows


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "pipeline" / "transformer" / "model.safetensors")


def train_in_turn(*recipes: TrainRecipe) -> None:
    # a run that ends leaves its processes alone, which here have more to do
    PartialState.destroy_process_group = lambda *_: None
    for each in recipes:
        AcceleratorState._reset_state()
        train(each, partial(TextToImage, each))


def train_apart(*recipes: TrainRecipe, processes: int = 1) -> str:
    """Trains one after the other in processes of their own; returns what they printed."""
    output = recipes[0].output.with_suffix(".out")
    return run_apart(train_in_turn, *recipes, output=output, processes=processes)
