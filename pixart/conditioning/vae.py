"""Images to normalised latents and back, through a frozen diffusers `AutoencoderKL`.

Shapes: B images of H x W pixels; C latent channels of h x w, with H = factor * h.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from pixart.conditioning import tiling
from pixart.conditioning.pretrained import find_folder, fingerprint, require_complete

# decoding that many pixels fills a GPU, and takes 1.6 GB in bfloat16 with PixArt's autoencoders
PIXELS_AT_ONCE = 1024**2


class VAE:
    """A frozen autoencoder that speaks normalised latents, z = (z_raw - shift) * scale.

    shift and scale come from the model's config: `shift_factor` and `scaling_factor`, and per
    channel `latents_mean` and `latents_std` where a model has them. Latents, their moments and
    images are float32 whatever dtype the autoencoder computes in.
    """

    def __init__(self, model: AutoencoderKL) -> None:
        self.model: Any = model
        self.model.eval().requires_grad_(False)
        config = self.model.config
        shift = torch.tensor(config.get("shift_factor") or 0.0)
        scale = torch.tensor(config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") is not None:
            shift = shift + torch.tensor(config["latents_mean"]).view(-1, 1, 1)
        if config.get("latents_std") is not None:
            scale = scale / torch.tensor(config["latents_std"]).view(-1, 1, 1)
        self._shift, self._scale = shift, scale  # () or (C, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> VAE:
        """Load an `AutoencoderKL`, without executing code from the checkpoint.

        Args:
            path: its folder, a diffusers pipeline folder (its `vae`), or a Hub name. A folder is
                read without touching the network.
            dtype: None means float32. For float16 an autoencoder whose config says
                `force_upcast`, because its activations overflow, stays in float32.
            device: None keeps the model on the CPU.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: another kind of autoencoder, or weights that do not fit the config.
        """
        folder = find_folder(path, "vae")
        config_file = None if folder is None else folder / "config.json"
        if config_file is not None and config_file.is_file():
            name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
            if name != "AutoencoderKL":
                raise ValueError(
                    f"path={str(path)!r} holds a {name}; an AutoencoderKL is accepted, such as the "
                    "vae of a PixArt, Stable Diffusion or SDXL pipeline"
                )
        model, report = AutoencoderKL.from_pretrained(
            str(folder or path),
            local_files_only=folder is not None,
            torch_dtype=torch.float32 if dtype in (None, torch.float16) else dtype,
            output_loading_info=True,
        )
        require_complete(path, report["missing_keys"], report["unexpected_keys"])
        if dtype == torch.float16 and not model.config.force_upcast:
            model.to(dtype)
        vae = cls(model)
        return vae if device is None else vae.to(device)

    def to(self, device: str | torch.device) -> VAE:
        self.model.to(device)
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along each side."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.model.config.latent_channels)

    def decoding_bytes(self, height: int, width: int) -> int:
        """What decoding an image takes at most, without tiles: three of its largest activations."""
        widest = max(self.model.config.block_out_channels[:2])
        return 3 * widest * height * width * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def identity(self) -> str:
        """Names these weights, in this dtype and with this normalisation, wherever stored."""
        dtype = str(self.dtype).removeprefix("torch.")
        facts = (self._shift.tolist(), self._scale.tolist())
        return f"AutoencoderKL {dtype} {fingerprint(self.model, *facts)}"

    @torch.no_grad()
    def moments(
        self, images: torch.Tensor, *, tiled: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of images.

        Both are normalised, so that `mean + std * noise` is a sample the transformer trains on.

        Args:
            images: (B, 3, H, W) floating point in [-1, 1], H and W multiples of `factor`.
            tiled: see `decode`.

        Returns:
            mean and std, each (B, C, H / factor, W / factor) float32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}; "
                "(B, 3, H, W) floating point in [-1, 1] is accepted"
            )
        height, width = images.shape[2:]
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(
                f"images is {height}x{width} pixels; sides divisible by {self.factor} are "
                "accepted; resize or crop the images first"
            )
        images = images.to(self.device, self.dtype)
        if tiled and height * width > PIXELS_AT_ONCE:
            parameters = [tiling.encode(self.model, image[None]) for image in images]
            raw = DiagonalGaussianDistribution(torch.cat(parameters))
        else:
            raw = self.model.encode(images).latent_dist
        shift, scale = self._normalisation()
        return (raw.mean.float() - shift) * scale, raw.std.float() * scale

    def encode(
        self,
        images: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        tiled: bool = False,
    ) -> torch.Tensor:
        """Normalised latents (B, C, h, w) float32 of images: see `moments` for what is accepted.

        Without a generator the latents are the mean; with one they are a sample.
        """
        mean, std = self.moments(images, tiled=tiled)
        if generator is None:
            return mean
        noise = randn_tensor(mean.shape, generator, device=mean.device, dtype=mean.dtype)
        return mean + std * noise

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1] of normalised latents (B, C, h, w).

        They are decoded together up to `PIXELS_AT_ONCE` in all, and larger ones one by one.

        Args:
            tiled: an image of more pixels than that is decoded tile by tile: the same image but
                for rounding, in a fraction of the memory. See `pixart.conditioning.tiling`.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; (B, {self.channels}, h, w) is accepted"
            )
        shift, scale = self._normalisation()
        raw = (latents.to(self.device, torch.float32) / scale + shift).to(self.dtype)
        pixels = raw.shape[2] * raw.shape[3] * self.factor**2
        if tiled and pixels > PIXELS_AT_ONCE:
            images = [tiling.decode(self.model, z[None]) for z in raw]
        else:
            together = raw.split(max(1, PIXELS_AT_ONCE // max(1, pixels)))
            images = [self.model.decode(z).sample for z in together]
        return torch.cat([image.float().clamp_(-1.0, 1.0) for image in images])

    def _normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._shift.to(self.device), self._scale.to(self.device)
