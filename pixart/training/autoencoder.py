"""What ``pixart train-vae`` trains: an AutoencoderKL, on pictures alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from pixart.data.sources import BadSample, UncaptionedFolder
from pixart.files import finish_folder, unfinished_folder
from pixart.generation import contact_sheet
from pixart.generation.pipeline import to_image
from pixart.training.recipe import VAERecipe

# enough pictures to know the latents' mean and spread to about a percent
STATISTICS_SAMPLES = 1024
MAX_BAD_FRACTION = 0.05
PREVIEWS = 16
INITIAL_LOG_VARIANCE = -6.0


class _Pictures(Dataset):
    """The pictures of a folder; a bad one is its :class:`BadSample`, for the task to count."""

    def __init__(self, source: UncaptionedFolder) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | BadSample:
        try:
            return self.source[index].image
        except BadSample as error:
            return error


class _Autoencoder(nn.Module):
    """One forward pass for encoder and decoder, as distributed wrappers need."""

    def __init__(self, vae: AutoencoderKL, decoder_alone: bool) -> None:
        super().__init__()
        self.vae, self.decoder_alone = vae, decoder_alone
        if decoder_alone:
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, and the KL divergence to a unit Gaussian per latent element."""
        moments = self.vae.encode(images).latent_dist.parameters
        # a sum over a picture's latents overflows fp16
        posterior = DiagonalGaussianDistribution(moments.float())
        latents = posterior.sample()
        return self.vae.decode(latents).sample, posterior.kl().sum() / latents.numel()


class Autoencoder:
    """A :class:`pixart.training.loop.Task`: reconstruction of pictures.

    L1 or squared error of pixels, L1 of their differences between neighbours, which keeps edges,
    LPIPS (arXiv 1801.03924), plus a little KL (Rombach et al. 2022, section 3.1, without its
    adversarial term), each with the recipe's weight. Training the decoder alone leaves the
    encoder, and with it every latent, as it is.
    """

    averages: dict[str, Tensor] | None = None

    def __init__(self, recipe: VAERecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.dataset = _Pictures(UncaptionedFolder(recipe.images, recipe.size))
        if len(self.dataset) == 0:
            raise ValueError(f"images: {recipe.images} holds no picture")
        self.keys = self.dataset.source.keys
        self.buckets = [recipe.size] * len(self.dataset)
        self.preview_every = recipe.samples_every
        self._bad: dict[str, str] = {}
        self._perceptual = _lpips(device) if recipe.perceptual_weight else None
        # convolutions are faster on channels that lie together, on CPUs and GPUs alike
        self.module = _Autoencoder(self._model(), recipe.parts == "decoder").to(device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _model(self) -> AutoencoderKL:
        model = dict(self.recipe.model)
        init = model.pop("init", None)
        if init is not None:
            return AutoencoderKL.from_pretrained(init)
        levels = len(model.get("block_out_channels", (64,)))
        model.setdefault("down_block_types", ["DownEncoderBlock2D"] * levels)
        model.setdefault("up_block_types", ["UpDecoderBlock2D"] * levels)
        try:
            vae = AutoencoderKL(**model)
        except TypeError as error:
            raise ValueError(f"model: AutoencoderKL says: {error}") from error
        # the encoder starts almost sure of its latents: unit noise on them, the default, would
        # have to be unlearned before the decoder sees anything
        last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
        channels = last.weight.shape[0] // 2
        torch.nn.init.zeros_(last.weight[channels:])
        torch.nn.init.constant_(last.bias[channels:], INITIAL_LOG_VARIANCE)
        return vae

    def collate(self, samples: list[Tensor | BadSample]) -> dict[str, Any]:
        images = [sample for sample in samples if isinstance(sample, Tensor)]
        bad = [(s.key, s.reason) for s in samples if isinstance(s, BadSample)]
        if not images:
            # a step needs a picture, and one batch, which comes again and again, is no reason to
            # end the run: how many are bad decides that
            images = list(self._images(PREVIEWS)[:1])
        return {"images": torch.stack(images), "bad": bad}

    def flops(self, batch: dict[str, Any]) -> None:
        return None

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        self._count(batch["bad"])
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        reconstructed, kl = module(images)
        reconstructed = reconstructed.float()
        recipe, l1 = self.recipe, F.l1_loss(reconstructed, images)
        loss = l1 if recipe.pixel_loss == "l1" else F.mse_loss(reconstructed, images)
        if recipe.edge_weight:
            edges = [F.l1_loss(reconstructed.diff(dim=d), images.diff(dim=d)) for d in (2, 3)]
            loss = loss + recipe.edge_weight * sum(edges)
        loss = loss + recipe.kl_weight * kl
        terms = {"l1": l1, "kl": kl}
        if self._perceptual is not None:
            terms["lpips"] = self._perceptual(reconstructed, images).mean()
            loss = loss + recipe.perceptual_weight * terms["lpips"]
        return {"loss": loss, **terms}

    def _count(self, bad: list[tuple[str, str]]) -> None:
        new = {key: reason for key, reason in bad if key not in self._bad}
        if not new:
            return
        self._bad |= new
        report = self.recipe.output / "skipped.jsonl"
        report.parent.mkdir(parents=True, exist_ok=True)
        with report.open("a") as file:
            for key, reason in new.items():
                file.write(json.dumps({"key": key, "reason": reason}) + "\n")
        if len(self._bad) > MAX_BAD_FRACTION * len(self.dataset):
            raise RuntimeError(
                f"{len(self._bad)} of {len(self.dataset)} pictures cannot be used, more than "
                f"{MAX_BAD_FRACTION:.0%}; they are listed in {report}"
            )

    def preview(self, module: nn.Module) -> Image.Image:
        assert isinstance(module, _Autoencoder)
        images = self._images(PREVIEWS).to(self.device)
        decoded = module.vae.decode(module.vae.encode(images).latent_dist.mean).sample
        pairs = [picture for pair in zip(images, decoded, strict=True) for picture in pair]
        names = ["original", "decoded"] * len(images)
        return contact_sheet([to_image(picture) for picture in pairs], names, columns=8)

    def export(self, module: nn.Module, folder: Path) -> None:
        """``vae/``: a diffusers AutoencoderKL that knows its latents' mean and spread."""
        assert isinstance(module, _Autoencoder)
        vae = module.vae
        if not module.decoder_alone:
            images = self._images(STATISTICS_SAMPLES).split(32)
            with torch.no_grad():
                latents = [vae.encode(part.to(self.device)).latent_dist.mean for part in images]
            spread, mean = (x.item() for x in torch.std_mean(torch.cat(latents)))
            vae.register_to_config(shift_factor=mean, scaling_factor=1 / spread)
        final = folder / "vae"
        vae.save_pretrained(unfinished_folder(final))
        finish_folder(final)

    def _images(self, count: int) -> Tensor:
        step = max(1, len(self.dataset) // count)
        found = [self.dataset[i] for i in range(0, len(self.dataset), step)][:count]
        images = [image for image in found if isinstance(image, Tensor)]
        if not images:
            raise RuntimeError(
                f"of {len(found)} pictures none could be read; the first: {found[0]}"
            )
        return torch.stack(images)


def _lpips(device: torch.device) -> nn.Module:
    """Distance of pictures in [-1, 1] as VGG sees them, (B, 3, H, W) twice -> (B, 1, 1, 1)."""
    try:
        import lpips

        distance = lpips.LPIPS(net="vgg", verbose=False)
    # RuntimeError: a torchvision for another torch
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"perceptual_weight needs the package lpips, which does not load ({error}): pip "
            f"install lpips and the torchvision for torch {torch.__version__}, or set "
            "perceptual_weight=0"
        ) from error
    except OSError as error:
        raise ValueError(
            f"perceptual_weight needs VGG's weights, which could not be downloaded ({error}): put "
            f"torchvision's vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints, or set "
            "perceptual_weight=0"
        ) from error
    return distance.to(device).eval().requires_grad_(False)
