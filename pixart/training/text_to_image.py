"""What ``pixart train`` trains: a PixArt on cached latents and captions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from pixart.conditioning import VAE, FeatureCache, TextEncoder, collate, encode_dataset
from pixart.data.sources import ImageFolder
from pixart.diffusion import NoiseSchedule, Objective
from pixart.files import finish_folder, unfinished_folder, write_atomically
from pixart.generation import PixArtPipeline, contact_sheet
from pixart.generation.pipeline import PIPELINE
from pixart.model import CaptionEmbedder, PixArt
from pixart.training.recipe import Data, TrainRecipe

# in the folder of features: how they were made
SOURCE = "source.json"


def encode_images(data: Data, max_tokens: int, device: torch.device) -> None:
    """Encodes ``data.images`` into ``data.features``, where samples are missing."""
    if data.images is None:
        return
    if data.vae is None or data.text_encoder is None:
        raise ValueError("data.images is given: data.vae and data.text_encoder are needed as well")
    source = ImageFolder(data.images, data.size)
    _same_source(data)
    try:
        if set(source.keys) <= set(FeatureCache(data.features).keys()):
            return
    except FileNotFoundError:
        pass
    encode_dataset(
        source,
        VAE.from_pretrained(data.vae, device=device),
        TextEncoder.from_pretrained(data.text_encoder, max_tokens=max_tokens, device=device),
        data.features,
        device=device,
        max_bad_fraction=data.max_bad_fraction,
    )


def _same_source(data: Data) -> None:
    """Records how the features are made; raises ValueError where they were made otherwise.

    The pictures themselves are told apart by name alone: new ones are encoded, changed ones need
    new features.
    """
    file = data.features / SOURCE
    values: dict[str, Any] = {"size": data.size, "text_encoder": data.text_encoder}
    values["vae"] = _digest(data.vae) or data.vae
    if not file.exists():
        text = json.dumps(values, indent=2)
        write_atomically(file, lambda f: f.write(text.encode()))
    before = json.loads(file.read_text())
    changed = [
        f"data.{key}: {before.get(key)} -> {values[key]}"
        for key in values
        if before.get(key) != values[key]
    ]
    if changed:
        raise ValueError(
            f"{data.features} was encoded differently ({'; '.join(changed)}): name a new folder "
            "in data.features, or delete that one"
        )


def _digest(name: str | None) -> str | None:
    """Of the weights in a folder; None where there are none."""
    digest = hashlib.sha256()
    files = sorted(Path(name).glob("*.safetensors")) if name is not None else []
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


class TextToImage:
    """A :class:`pixart.training.trainer.Task`: noise prediction on a feature cache."""

    def __init__(self, recipe: TrainRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        config = recipe.config
        if config.conditioning == "class":
            raise ValueError("model.conditioning: a class model has no captions to train on")
        with PartialState().main_process_first():
            encode_images(recipe.data, config.max_caption_tokens, device)
        self.dataset = FeatureCache(recipe.data.features)
        self._check_features()
        self.module = self._model().to(device)
        self.module.gradient_checkpointing = recipe.gradient_checkpointing
        self.schedule = NoiseSchedule()
        self.objective = Objective(self.schedule, config.learn_sigma, recipe.min_snr_gamma)
        self.preview_every = recipe.samples.every if recipe.samples.prompts else 0
        if self.preview_every:
            self._prepare_preview()

    def _model(self) -> PixArt:
        recipe, null = self.recipe, self.dataset.null_caption
        if recipe.init is None:
            model = PixArt(recipe.config)
        else:
            model = PixArt.from_pretrained(recipe.init, recipe.config)
        assert isinstance(model.y_embedder, CaptionEmbedder)
        y_embedding = model.y_embedder.y_embedding
        # weights from diffusers come without a null caption; others keep their own
        if recipe.init is None or not y_embedding.any():
            y_embedding[: len(null)].copy_(null)
        return model

    def _check_features(self) -> None:
        found, config = self.dataset.metadata, self.recipe.config
        wanted = {
            "caption_channels": (found.caption_channels, config.caption_channels),
            "in_channels": (found.latent_channels, config.in_channels),
            "max_caption_tokens": (found.max_tokens, config.max_caption_tokens),
        }
        wrong = [
            f"model.{k} is {b}, but the features have {a}" for k, (a, b) in wanted.items() if a != b
        ]
        if wrong:
            raise ValueError(f"{self.recipe.data.features}: " + "; ".join(wrong))
        if len(self.dataset) == 0:
            raise ValueError(f"{self.recipe.data.features} holds no sample")

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        return collate(samples)

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        mean, std = batch["latent_mean"], batch["latent_std"]
        latents = mean + std * torch.randn_like(std)
        noise = torch.randn_like(latents)
        t = torch.randint(len(self.schedule), (len(latents),), device=latents.device)
        micro = {}
        if self.recipe.config.micro_conditioning:
            # the official training tells the original size, and the ratio of what is shown
            ratio = latents.shape[2] / latents.shape[3]
            micro = {
                "image_size": batch["image_size"],
                "aspect_ratio": torch.full((len(latents), 1), ratio, device=latents.device),
            }
        output = module(
            self.schedule.add_noise(latents, noise, t),
            t,
            batch["caption"].float(),
            batch["caption_mask"],
            **micro,
        )
        terms = self.objective(output, latents, noise, t)
        return {name: term.mean() for name, term in terms.items()}

    def _prepare_preview(self) -> None:
        data, samples = self.recipe.data, self.recipe.samples
        if data.vae is None or data.text_encoder is None:
            raise ValueError("samples.prompts are given: data.vae and data.text_encoder are needed")
        self._vae = VAE.from_pretrained(data.vae, device=self.device)
        encoder = TextEncoder.from_pretrained(
            data.text_encoder, max_tokens=self.recipe.config.max_caption_tokens, device=self.device
        )
        # encoded now, so that the encoder, often the largest model of all, can go
        self._prompts = PixArtPipeline(self.module, self._vae, encoder).encode(samples.prompts)

    def preview(self, module: nn.Module) -> Image.Image:
        assert isinstance(module, PixArt)
        samples = self.recipe.samples
        pipeline = PixArtPipeline(module, self._vae, None)
        images = pipeline(
            self._prompts,
            seed=self.recipe.seed,
            steps=samples.steps,
            sampler=samples.sampler,
            guidance_scale=samples.guidance_scale,
            guidance_mask=samples.guidance_mask,
        )
        return contact_sheet(images, samples.prompts)

    def export(self, module: nn.Module, folder: Path) -> None:
        """``pipeline/``: the transformer, and where its encoders are."""
        assert isinstance(module, PixArt)
        final = folder / "pipeline"
        partial = unfinished_folder(final)
        module.save_pretrained(partial / "transformer")
        data = self.recipe.data
        if data.vae is not None and data.text_encoder is not None:
            parts = {
                "vae": _absolute(data.vae),
                "text_encoder": _absolute(data.text_encoder),
                "guidance_scale": self.recipe.samples.guidance_scale,
            }
            (partial / PIPELINE).write_text(json.dumps(parts, indent=2))
        finish_folder(final)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name
