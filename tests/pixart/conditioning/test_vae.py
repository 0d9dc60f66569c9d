"""VAE around a tiny random AutoencoderKL: normalisation, sampling, loading, wrong input."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vae import small_vae

from pixart.conditioning import VAE, tiling, vae

tiny_autoencoder = partial(small_vae, 8, 16, 16)


def images(batch=2, height=16, width=24):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


CONFIGS = {
    "alpha": {"scaling_factor": 0.18215},
    "shifted": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "per_channel": {
        "scaling_factor": 0.5,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 2.0, 1.0],
    },
}


def expected_normalisation(config):
    shift = torch.tensor(config.get("latents_mean", [0.0] * 4)) + config.get("shift_factor", 0.0)
    scale = config["scaling_factor"] / torch.tensor(config.get("latents_std", [1.0] * 4))
    return shift.view(1, 4, 1, 1), scale.view(1, 4, 1, 1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_moments_are_normalised(config):
    model = tiny_autoencoder(**config)
    vae = VAE(model)
    shift, scale = expected_normalisation(config)
    with torch.no_grad():
        raw = model.encode(images()).latent_dist
    mean, std = vae.moments(images())
    assert mean.shape == std.shape == (2, 4, 4, 6)
    assert (vae.factor, vae.channels) == (4, 4)
    torch.testing.assert_close(mean, (raw.mean - shift) * scale)
    torch.testing.assert_close(std, raw.std * scale)
    assert torch.equal(vae.encode(images()), mean)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decode_undoes_the_normalisation(config):
    model = tiny_autoencoder(**config)
    vae = VAE(model)
    raw = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    shift, scale = expected_normalisation(config)
    with torch.no_grad():
        expected = model.decode(raw).sample
    decoded = vae.decode((raw - shift) * scale)
    assert decoded.shape == (2, 3, 16, 24)
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_decoded_images_are_clamped():
    model = tiny_autoencoder()
    model.decoder.conv_out.bias.data.fill_(50.0)
    assert torch.equal(VAE(model).decode(torch.zeros(1, 4, 2, 2)), torch.ones(1, 3, 8, 8))


def test_sample_is_mean_plus_std_times_noise():
    vae = VAE(tiny_autoencoder(scaling_factor=0.13025, shift_factor=0.3))
    mean, std = vae.moments(images())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    sample = vae.encode(images(), torch.Generator().manual_seed(7))
    torch.testing.assert_close(sample, mean + std * noise)
    assert torch.equal(sample, vae.encode(images(), torch.Generator().manual_seed(7)))
    assert not torch.equal(sample, vae.encode(images(), torch.Generator().manual_seed(8)))


def test_large_images_are_tiled_one_by_one(monkeypatch):
    decoder = VAE(tiny_autoencoder(shift_factor=0.3))
    latents = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    pixels = images(3, 20, 24)
    expected, moments = decoder.decode(latents), decoder.moments(pixels)
    seen = []
    for name in ("decode", "encode"):
        whole = getattr(tiling, name)
        monkeypatch.setattr(tiling, name, lambda *a, f=whole: seen.append(a[1].shape) or f(*a))
    # as large as may be decoded at once: nothing to gain
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 20 * 24)
    assert torch.equal(decoder.decode(latents, tiled=True), decoder.decode(latents))
    assert torch.equal(decoder.moments(pixels, tiled=True)[0], moments[0])
    assert not seen
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 20 * 24 - 1)
    monkeypatch.setattr(tiling, "TILE", 8)
    decoder.decode(latents), decoder.encode(pixels)
    assert not seen
    torch.testing.assert_close(decoder.decode(latents, tiled=True), expected)
    for ours, whole in zip(decoder.moments(pixels, tiled=True), moments, strict=True):
        torch.testing.assert_close(ours, whole)
    assert torch.equal(decoder.encode(pixels, tiled=True), decoder.moments(pixels, tiled=True)[0])
    assert seen == [(1, 4, 5, 6)] * 3 + [(1, 3, 20, 24)] * 9


def test_decodes_as_many_at_once_as_memory_is_meant_for(monkeypatch):
    decoder = VAE(tiny_autoencoder())
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    expected, sizes = decoder.decode(latents), []
    whole = decoder.model.decode
    monkeypatch.setattr(decoder.model, "decode", lambda z: sizes.append(len(z)) or whole(z))
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 2 * 16 * 16 + 9)
    torch.testing.assert_close(decoder.decode(latents), expected)
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 7)
    torch.testing.assert_close(decoder.decode(latents[:2]), expected[:2])
    assert sizes == [2, 2, 1, 1, 1]


def test_frozen():
    vae = VAE(tiny_autoencoder().train())
    assert not vae.model.training
    assert not any(p.requires_grad for p in vae.model.parameters())
    latents = torch.zeros(1, 4, 2, 2, requires_grad=True)
    assert not vae.decode(latents).requires_grad


def test_low_precision_gives_float32_close_to_the_reference(tmp_path):
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path)
    vae = VAE.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert vae.dtype == torch.bfloat16
    mean, std = vae.moments(images())
    assert mean.dtype == std.dtype == vae.decode(mean).dtype == torch.float32
    torch.testing.assert_close(mean, VAE(model).moments(images())[0], rtol=0.1, atol=0.02)


def test_folder_and_pipeline_folder(tmp_path):
    model = tiny_autoencoder(scaling_factor=0.3)
    model.save_pretrained(tmp_path / "vae")
    expected = VAE(model)
    for path in (tmp_path, tmp_path / "vae", str(tmp_path)):
        vae = VAE.from_pretrained(path)
        assert torch.equal(vae.encode(images()), expected.encode(images()))
        assert vae.identity == expected.identity


def test_identity_tells_weights_and_normalisation_apart():
    identity = VAE(tiny_autoencoder()).identity
    assert VAE(tiny_autoencoder()).identity == identity
    assert VAE(tiny_autoencoder(scaling_factor=0.5)).identity != identity
    retrained = tiny_autoencoder()
    retrained.encoder.conv_in.weight.data += 1e-4
    assert VAE(retrained).identity != identity


def test_unfitting_weights_are_refused(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_inn.weight"] = weights.pop("encoder.conv_in.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight.*encoder\.conv_inn\.weight"):
        VAE.from_pretrained(tmp_path)


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_in_vae_weights_is_not_executed(tmp_path):
    tiny_autoencoder().save_config(tmp_path)
    proof = tmp_path / "executed"
    torch.save({"x": Payload(f"touch {proof}")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="Unable to load weights"):
        VAE.from_pretrained(tmp_path)
    assert not proof.exists()


def test_another_autoencoder_is_refused(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="holds a VQModel; an AutoencoderKL is accepted"):
        VAE.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong, pattern",
    [
        (torch.zeros(1, 3, 16, 18), "16x18 pixels; sides divisible by 4"),
        (torch.zeros(1, 3, 0, 16), "0x16 pixels"),
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), r"shape \(1, 4, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "dtype torch.uint8"),
    ],
)
def test_wrong_images(wrong, pattern):
    with pytest.raises(ValueError, match=pattern):
        VAE(tiny_autoencoder()).encode(wrong)


def test_wrong_latents():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 4\); \(B, 4, h, w\)"):
        VAE(tiny_autoencoder()).decode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("upcast", [True, False])
def test_float16_is_for_those_that_do_not_overflow(tmp_path, upcast):
    model = tiny_autoencoder(force_upcast=upcast)
    model.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.dtype == (torch.float32 if upcast else torch.float16)
    # not rounded on the way
    expected = model.decoder.conv_in.weight.to(loaded.dtype)
    assert torch.equal(loaded.model.decoder.conv_in.weight, expected)
