"""What `pixart train-vae` trains."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart.conditioning import VAE
from pixart.training import VAERecipe, train
from pixart.training.autoencoder import Autoencoder
from pixart.training.recipe import check_recipe


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        colour = rng.integers(0, 255, 3)
        picture = np.full((16, 16, 3), colour, dtype=np.uint8)
        picture[4:12, 4:12] = 255 - colour
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def recipe(folder: Path, **changes: object) -> VAERecipe:
    values = {
        "output": str(folder.parent / "run"),
        "images": str(folder),
        "size": 16,
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint_every": 2,
        "samples_every": 2,
        "ema_decay": None,
        "optimizer": {"lr": 3e-3, "eps": 1e-8},
        "schedule": {"warmup_steps": 2},
        "model": {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 2},
        **changes,
    }
    return check_recipe(VAERecipe, values, "test")


def run(recipe: VAERecipe) -> list[dict]:
    return train(recipe, lambda device: Autoencoder(recipe, device)).read_log()


def test_learns_and_exports_latents_of_mean_0_and_spread_1(images: Path) -> None:
    # few channels alone would bound how much of a picture comes back
    model = {**recipe(images).model, "latent_channels": 4}
    every = {"checkpoint_every": 100, "samples_every": 100}
    rows = run(recipe(images, steps=300, gradient_clip=1.0, model=model, **every))
    assert rows[-1]["l1"] < 0.6 * rows[0]["l1"]
    vae = VAE.from_pretrained(images.parent / "run" / "vae")
    task = Autoencoder(recipe(images), torch.device("cpu"))
    pixels = torch.stack([task.dataset[i] for i in range(24)])
    latents, std = vae.moments(pixels)
    assert latents.mean().abs() < 0.05
    assert latents.std() == pytest.approx(1, abs=0.05)
    assert std.mean() < 0.5
    decoded = vae.decode(latents)
    assert (decoded - pixels).abs().mean() < 0.6 * (pixels - pixels.mean()).abs().mean()
    samples = images.parent / "run" / "samples"
    assert sorted(p.name for p in samples.iterdir())[0] == "step-0000100.png"


def test_resumes_bit_for_bit(images: Path) -> None:
    whole = run(recipe(images))
    first = recipe(images, output=str(images.parent / "parts"), steps=2)
    run(first)
    parts = run(first.model_copy(update={"steps": 4}))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]


def test_a_fresh_encoder_is_almost_sure(images: Path) -> None:
    for quant_conv in (True, False):
        model = {**recipe(images).model, "use_quant_conv": quant_conv}
        task = Autoencoder(recipe(images, model=model), torch.device("cpu"))
        std = task.module.vae.encode(torch.randn(2, 3, 16, 16)).latent_dist.std
        torch.testing.assert_close(std, torch.full_like(std, 0.0498), rtol=1e-2, atol=0)


def test_bad_pictures_are_skipped_counted_and_reported(images: Path) -> None:
    (images / "3.png").write_bytes(b"not a picture")
    run(recipe(images, steps=6))
    report = (images.parent / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in report] == ["3.png"]


def test_a_batch_of_bad_pictures_alone_ends_no_run(images: Path) -> None:
    (images / "3.png").write_bytes(b"not a picture")
    assert len(run(recipe(images, steps=25, batch_size=1))) == 25
    for image in images.glob("*.png"):
        image.write_bytes(b"not a picture")
    with pytest.raises(RuntimeError, match=r"of 16 pictures none could be read; the first: "):
        Autoencoder(recipe(images), torch.device("cpu")).collate([])


def test_too_many_bad_pictures_stop_the_run(images: Path) -> None:
    for i in range(3):
        (images / f"{i}.png").write_bytes(b"not a picture")
    with pytest.raises(RuntimeError, match=r"of 24 pictures cannot be used.*skipped\.jsonl"):
        run(recipe(images, steps=6))


def test_wrong_model_fields_are_named(images: Path) -> None:
    with pytest.raises(ValueError, match="latent_chanels"):
        run(recipe(images, model={"latent_chanels": 3}))
    (images.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        run(recipe(images, images=str(images.parent / "empty")))


def decoder(images: Path, **changes: object) -> VAERecipe:
    """A recipe for the decoder of a small autoencoder, whose scale is not these pictures'."""
    vae = Autoencoder(recipe(images), torch.device("cpu")).module.vae
    vae.register_to_config(scaling_factor=0.13025)
    vae.save_pretrained(images.parent / "first")
    model = {"init": str(images.parent / "first")}
    return recipe(images, model=model, parts="decoder", pixel_loss="mse", edge_weight=0, **changes)


def test_the_decoder_alone_learns_and_latents_stay(images: Path) -> None:
    every = {"checkpoint_every": 60, "samples_every": 60}
    made = decoder(images, steps=60, gradient_clip=1.0, **every)
    rows = run(made)
    assert rows[-1]["l1"] < 0.8 * rows[0]["l1"]
    before = VAE.from_pretrained(images.parent / "first")
    after = VAE.from_pretrained(images.parent / "run" / "vae")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = before.encode(pixels)
    assert torch.equal(after.encode(pixels), latents)
    assert not torch.equal(after.decode(latents), before.decode(latents))


@pytest.mark.parametrize("pixel_loss", ["l1", "mse"])
def test_each_term_has_its_weight(
    images: Path, pixel_loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().amax((1, 2, 3), keepdim=True)

    fake = types.ModuleType("lpips")
    fake.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", fake)
    weights = {"edge_weight": 0.5, "perceptual_weight": 0.25, "kl_weight": 0.125}
    made = recipe(images, pixel_loss=pixel_loss, **weights)
    task = Autoencoder(made, torch.device("cpu"))
    batch = task.collate([task.dataset[i] for i in range(3)])
    torch.manual_seed(1)
    terms = task.loss(task.module, batch)
    torch.manual_seed(1)
    with torch.no_grad():
        seen, kl = task.module(batch["images"])
    error = seen - batch["images"]
    pixels = error.abs().mean() if pixel_loss == "l1" else error.square().mean()
    edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
    far = error.abs().amax((1, 2, 3)).mean()
    torch.testing.assert_close(terms["loss"], pixels + 0.5 * edges + 0.25 * far + 0.125 * kl)
    torch.testing.assert_close(terms["lpips"], far)


def test_what_a_decoder_and_lpips_need_is_said(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"parts: .*should come with model\.init"):
        recipe(images, parts="decoder")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        Autoencoder(recipe(images, perceptual_weight=0.1), torch.device("cpu"))
