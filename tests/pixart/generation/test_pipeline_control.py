"""Drawing along an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipeline import small_pipeline
from typer.testing import CliRunner

from pixart.cli import app
from pixart.controlnet import ControlledPixArt
from pixart.generation import PixArtPipeline

PROMPTS = ["a red gem", "two", "a fox"]


@pytest.fixture
def pipeline() -> PixArtPipeline:
    return small_pipeline()


def picture(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    noise = np.random.default_rng(value).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write_controlnet(pipeline: PixArtPipeline, folder: Path, std: float = 0.2) -> Path:
    controlled = ControlledPixArt(pipeline.model, 1)
    torch.manual_seed(5)
    for name, parameter in controlled.controlnet.named_parameters():
        if std or "_proj" not in name:
            # a random autoencoder's latents are small
            wide = 5 if "before_proj" in name else 1
            torch.nn.init.normal_(parameter, std=wide * (std or 0.2))
    controlled.save_pretrained(folder)
    return folder


def drawn(pipeline: PixArtPipeline, **options: object) -> np.ndarray:
    pictures = pipeline(PROMPTS, steps=3, guidance_scale=2.0, **options)
    return np.stack([np.asarray(image, dtype=int) for image in pictures])


def test_an_untrained_controlnet_draws_what_none_does(
    pipeline: PixArtPipeline, tmp_path: Path
) -> None:
    plain = drawn(pipeline)
    pipeline.draw_along(write_controlnet(pipeline, tmp_path, std=0), picture(0))
    # without what is cached over steps, matrix products round otherwise
    assert abs(drawn(pipeline) - plain).max() <= 1


@pytest.mark.parametrize("memory", ["high", "low"])
def test_pictures_follow_the_image_alone_or_together(
    pipeline: PixArtPipeline, tmp_path: Path, memory: str
) -> None:
    pipeline.memory = memory
    plain, names = drawn(pipeline), {pipeline.identity}
    folder = write_controlnet(pipeline, tmp_path)
    pipeline.draw_along(folder, picture(0))
    first = drawn(pipeline)
    names.add(pipeline.identity)
    assert abs(first - plain).max() > 5
    assert abs(drawn(pipeline, batch_size=1) - first).max() <= 1
    pipeline.draw_along(folder, picture(1))
    assert abs(drawn(pipeline) - first).max() > 5
    # files are not taken for those of another image
    names.add(pipeline.identity)
    assert len(names) == 3
    assert drawn(pipeline, height=16, width=24).shape == (3, 16, 24, 3)


def test_the_command_needs_both(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "a", "--control", "edges.png"])
    assert "--control and --controlnet need each other" in str(result.exception)
