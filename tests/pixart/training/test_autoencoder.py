"""What `pixart train-vae` trains."""

from __future__ import annotations

import json
import math
import sys
import types
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

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


class StandIn(nn.Module):
    """Has the arguments, the parts and the shapes of the package's LPIPS."""

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | None = None,
        eval_mode: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        assert (net, spatial, pnet_rand) == ("vgg", False, True)
        self.net = nn.Conv2d(3, 4, 3).requires_grad_(pnet_tune)
        self.lin0 = nn.Sequential(nn.Dropout(), nn.Conv2d(4, 1, 1, bias=False))
        self.train(not eval_mode)

    def forward(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor:
        if normalize:
            in0, in1 = 2 * in0 - 1, 2 * in1 - 1
        apart = (self.net(in0) - self.net(in1)).square()
        return self.lin0(apart).mean((2, 3), keepdim=True)


@pytest.fixture(params=["stand-in", "package"])
def lpips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package, where it is installed, without the weights that it downloads."""
    if request.param == "package":
        package = pytest.importorskip("lpips", exc_type=ImportError)
    else:
        package = types.SimpleNamespace(LPIPS=StandIn)
        monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(package, "LPIPS", partial(package.LPIPS, pnet_rand=True))
    return request.param


def test_lpips_moves_the_decoder_alone(images: Path, lpips: str) -> None:
    task = Autoencoder(decoder(images, perceptual_weight=1.0), torch.device("cpu"))
    task.module.train()
    judge, seen = task._perceptual, []
    judge.register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    batch = task.collate([task.dataset[i] for i in range(3)])
    task.loss(task.module, batch)["lpips"].backward()
    (((decoded, pictures), keywords, distances),) = seen
    # -1 to 1, as it takes them unless told otherwise
    assert torch.equal(pictures, batch["images"]) and pictures.min() < -0.5 < 0.5 < pictures.max()
    assert not keywords and decoded.requires_grad and distances.shape == (3, 1, 1, 1)
    assert not judge(pictures, pictures).any()
    assert not any(part.training for part in judge.modules())
    moved = {n.split(".")[1] for n, p in task.module.named_parameters() if p.grad is not None}
    assert moved == {"decoder", "post_quant_conv"}
    assert all(p.grad is None and not p.requires_grad for p in judge.parameters())


@pytest.mark.usefixtures("any_precision")
def test_lpips_sees_float32_and_is_in_no_checkpoint(images: Path, lpips: str) -> None:
    made = decoder(images, perceptual_weight=1.0, mixed_precision="bf16", steps=2)
    seen: list[torch.dtype] = []

    class Watched(Autoencoder):
        def __init__(self, made, device):
            super().__init__(made, device)
            self._perceptual.register_forward_pre_hook(
                lambda _module, pair: seen.extend(x.dtype for x in pair)
            )

    rows = train(made, lambda device: Watched(made, device)).read_log()
    assert seen == [torch.float32] * 4 and all(row["lpips"] > 0 for row in rows)
    saved: set[str] = set()
    for file in (made.output / "checkpoints" / "step-0000002").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            saved |= set(tensors.keys())
    assert {name.split(".")[2] for name in saved if name.startswith("model.")} == {
        "decoder", "post_quant_conv"
    }  # fmt: skip


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_learn_as_float32_does(images: Path, precision: str) -> None:
    curves = []
    for mixed in ("no", precision):
        AcceleratorState._reset_state()
        every = {"steps": 25, "checkpoint_every": 25, "samples_every": 25}
        rows = run(
            recipe(
                images, output=str(images.parent / mixed), mixed_precision=mixed,
                gradient_clip=1.0, **every,
            )
        )  # fmt: skip
        curves.append([[row[name] for row in rows] for name in ("l1", "kl")])
    rounding = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    for found, expected in zip(curves[1], curves[0], strict=True):
        assert found == pytest.approx(expected, rel=4 * rounding)


def test_divergence_is_summed_in_float32(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture's is beyond fp16's largest number, though its mean is not."""
    task = Autoencoder(recipe(images), torch.device("cpu"))
    moments = torch.zeros(1, 4, 160, 160, dtype=torch.float16)
    moments[:, 2:] = -6
    encoded = types.SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))
    monkeypatch.setattr(task.module.vae, "encode", lambda images: encoded)
    monkeypatch.setattr(
        task.module.vae, "decode", lambda latents: types.SimpleNamespace(sample=latents)
    )
    latents, kl = task.module(torch.zeros(1, 3, 320, 320))
    assert latents.dtype == torch.float32
    assert kl == pytest.approx((math.exp(-6) + 6 - 1) / 2)


@pytest.mark.parametrize("pixel_loss", ["l1", "mse"])
def test_each_term_has_its_weight(images: Path, pixel_loss: str, lpips: str) -> None:
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
    far = task._perceptual(seen, batch["images"]).mean()
    torch.testing.assert_close(terms["loss"], pixels + 0.5 * edges + 0.25 * far + 0.125 * kl)
    torch.testing.assert_close(terms["lpips"], far)


def test_what_a_decoder_and_lpips_need_is_said(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"parts: .*should come with model\.init"):
        recipe(images, parts="decoder")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="does not load.*pip install lpips and the torchvision"):
        Autoencoder(recipe(images, perceptual_weight=0.1), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"perceptual_weight: got 0\.1; needs a size of 16"):
        recipe(images, perceptual_weight=0.1, size=8)

    def offline(**_settings: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    with pytest.raises(
        ValueError, match="weights, which could not be downloaded.*put.*vgg16.* into"
    ):
        Autoencoder(recipe(images, perceptual_weight=0.1), torch.device("cpu"))
