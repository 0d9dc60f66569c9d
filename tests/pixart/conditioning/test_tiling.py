"""Tiles of a random autoencoder: the whole picture's result, without seams, whatever the tiles."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from small_vae import small_vae
from torch import Tensor

from pixart.conditioning import tiling

# latents of an odd size, in tiles of which the last is narrow
HEIGHT, WIDTH, FACTOR = 21, 35, 4
TILES = [16, 24, 40]


def autoencoder(dtype: torch.dtype = torch.float64, **config) -> AutoencoderKL:
    model = small_vae(8, 16, 16, layers_per_block=2, **config)
    for name, parameter in model.named_parameters():
        # biases far from 0 make zero padding differ from what a neighbouring tile holds
        torch.nn.init.normal_(parameter, mean=0.5 if name.endswith("bias") else 0.0, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def latents(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 4, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    # a picture with a bright side, so that a tile's statistics are not the picture's
    z[..., : WIDTH // 2] += 2
    return z.to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(1, 3, FACTOR * HEIGHT, FACTOR * WIDTH, generator=generator, dtype=torch.float64)
    x[:, :, : FACTOR * HEIGHT // 3] *= 0.1
    return (2 * x - 1).to(dtype)


def error(result: Tensor, expected: Tensor) -> Tensor:
    """Largest over the channels, (height, width), in units of the largest value."""
    return ((result.double() - expected).abs() / expected.abs().max())[0].amax(0)


@pytest.mark.parametrize("tile", TILES)
def test_decodes_as_the_whole(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", tile)
    model = autoencoder()
    decoded = tiling.decode(model, latents())
    assert error(decoded, model.decode(latents()).sample).max() < 1e-13


@pytest.mark.parametrize("tile", TILES)
def test_encodes_as_the_whole(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", tile)
    model = autoencoder()
    encoded = tiling.encode(model, images())
    assert error(encoded, model.encode(images()).latent_dist.parameters).max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "TILE", 24)
    exact, rounded = autoencoder(), autoencoder(dtype)
    of_dtype = [p.double() for p in rounded.parameters()]
    for parameter, value in zip(exact.parameters(), of_dtype, strict=True):
        parameter.copy_(value)
    z, x = latents(dtype), images(dtype)
    expected = exact.decode(z.double()).sample, exact.encode(x.double()).latent_dist.parameters
    whole = rounded.decode(z).sample, rounded.encode(x).latent_dist.parameters
    tiles = tiling.decode(rounded, z), tiling.encode(rounded, x)
    for ours, theirs, true in zip(tiles, whole, expected, strict=True):
        assert ours.dtype == dtype
        assert error(ours, true).square().mean() <= (2 * error(theirs, true)).square().mean()


def test_leaves_no_seams_where_diffusers_tiles_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", 32)
    model, z = autoencoder(torch.float32), latents(torch.float32)
    whole = model.decode(z).sample.double()
    # tiles are 32 pixels wide in our last stage: what is within 4 pixels of their edges
    near = torch.zeros(FACTOR * HEIGHT, FACTOR * WIDTH, dtype=torch.bool)
    for pixel in (-4, -3, -2, -1, 0, 1, 2, 3):
        near[32 + pixel :: 32] = True
        near[:, 32 + pixel :: 32] = True
    wrong = error(tiling.decode(model, z), whole)
    assert wrong.max() < 1e-5
    assert wrong[near].mean() < 1.5 * wrong[~near].mean()
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = 32, 8
    assert error(model.decode(z).sample, whole).max() > 1e-2


def test_one_tile_is_the_whole() -> None:
    model = autoencoder(torch.float32)
    z = latents(torch.float32)[..., :1]
    torch.testing.assert_close(tiling.decode(model, z), model.decode(z).sample)


def test_without_quantising_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", 24)
    model = autoencoder(use_quant_conv=False, use_post_quant_conv=False)
    assert error(tiling.decode(model, latents()), model.decode(latents()).sample).max() < 1e-13
    expected = model.encode(images()).latent_dist.parameters
    assert error(tiling.encode(model, images()), expected).max() < 1e-13


def test_attention_between_tiles_is_refused() -> None:
    model = autoencoder(
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    )
    with pytest.raises(ValueError, match="has AttnUpDecoderBlock2D, whose attention takes all"):
        tiling.decode(model, latents())
    with pytest.raises(ValueError, match="has AttnDownEncoderBlock2D, whose attention takes all"):
        tiling.encode(model, images())
