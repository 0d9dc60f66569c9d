"""What ``pixart train`` trains: a PixArt on cached latents and captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pixart.checkpoints import save_lora
from pixart.conditioning import (
    VAE,
    FeatureCache,
    TextEncoder,
    collate,
    encode_dataset,
    encoded_rows,
)
from pixart.config import PixArtConfig
from pixart.data.sources import IMAGE_SUFFIXES, ImageFolder
from pixart.diffusion import NoiseSchedule, Objective
from pixart.files import finish_folder, unfinished_folder, write_atomically
from pixart.floor import model_flops
from pixart.generation import PixArtPipeline, contact_sheet
from pixart.generation.pipeline import PIPELINE
from pixart.model import CaptionEmbedder, PixArt
from pixart.together import all_processes
from pixart.training.adapters import add_lora
from pixart.training.dreambooth import balanced, weights
from pixart.training.recipe import Data, TrainRecipe

# in the folder of features: how they were made
SOURCE = "source.json"


def encode_images(data: Data, config: PixArtConfig, device: torch.device) -> list[int]:
    """Encodes ``data.images`` into ``data.features``, where samples are missing or changed.

    All processes must call it: each encodes its share.

    Returns:
        Rows of the features: of the images, or of all where there are none. In the order of their
        keys.
    """
    if data.images is None:
        return all_rows(data.features)
    if data.vae is None or data.text_encoder is None:
        raise ValueError("data.images is given: data.vae and data.text_encoder are needed as well")
    vae = VAE.from_pretrained(data.vae)
    source = ImageFolder(data.images, data.sizes(vae.factor * config.patch_size))
    name, tokens = data.text_encoder, config.max_caption_tokens
    return encode_missing(
        source,
        vae,
        lambda: TextEncoder.from_pretrained(name, max_tokens=tokens, device=device),
        data,
        device,
    )


def encode_missing(
    source: ImageFolder,
    vae: VAE,
    text_encoder: Callable[[], TextEncoder],
    data: Data,
    device: torch.device,
) -> list[int]:
    """Rows of ``data.features`` with the samples of ``source``, in the order of their keys.

    What is not there is encoded, with the encoder that ``text_encoder`` loads. All processes must
    call it.

    Raises ValueError where the features were made otherwise, or the folder has no pictures.
    """
    if not len(source):
        raise ValueError(
            f"{source.folder} holds no pictures. Read are {', '.join(sorted(IMAGE_SUFFIXES))} in "
            "it and in folders below it, or what a metadata.jsonl or metadata.csv in it lists; "
            "archives are not: unpack them"
        )
    together = all_processes()

    def rows() -> list[int] | None:
        same_source(data)
        return encoded_rows(source, data.features, max_bad_fraction=data.max_bad_fraction)

    found = together.first(rows)
    if found is None:
        encode_dataset(
            source,
            vae,
            text_encoder(),
            data.features,
            device=device,
            max_bad_fraction=data.max_bad_fraction,
        )
        found = together.first(rows)
    if found is None:
        raise RuntimeError(
            f"pictures in {source.folder} were changed while they were encoded; once nothing "
            "writes to it, run the same command again"
        )
    return found


def all_rows(folder: Path) -> list[int]:
    """Of features whose images are not given, in the order of their keys.

    Raises ValueError where some are there in several versions.
    """
    keys = FeatureCache(folder).keys()
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{folder} holds {len(repeated)} pictures in several versions, as "
            f"{', '.join(repeated[:3])}: give data.images, which tells which of them are meant, or "
            "encode that folder into new features"
        )
    return sorted(range(len(keys)), key=keys.__getitem__)


def same_source(data: Data) -> None:
    """Records how the features are made; raises ValueError where they were made otherwise."""
    file = data.features / SOURCE
    values: dict[str, Any] = {"size": data.size, "text_encoder": data.text_encoder}
    values["vae"] = _digest(data.vae) or data.vae
    values["buckets"] = data.buckets
    if not file.exists():
        text = json.dumps(values, indent=2)
        write_atomically(file, lambda f: f.write(text.encode()))
    before = json.loads(file.read_text())
    changed = [
        f"data.{key}: {before.get(key)} -> {values[key]}"
        for key in values
        # features from before there were buckets have none
        if before.get(key, False) != values[key]
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
    """A :class:`pixart.training.loop.Task`: noise prediction on a feature cache."""

    averages: dict[str, Tensor] | None = None

    def __init__(self, recipe: TrainRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        config = recipe.config
        rows = self._encode()
        PartialState().wait_for_everyone()
        self.features = FeatureCache(recipe.data.features)
        self._check_features()
        if not rows:
            raise ValueError(f"{recipe.data.features} holds no sample")
        keys, shapes = self.features.keys(), self.features.latent_shapes()
        if recipe.prior is not None:
            rows = [rows[i] for i in balanced([keys[row] for row in rows], recipe.prior)]
        self.dataset: Dataset = Subset(self.features, rows)
        self.keys = [keys[row] for row in rows]
        # shapes of the latents
        self.buckets = [shapes[row] for row in rows]
        self.module = self._module().to(device)
        self.schedule = NoiseSchedule()
        self.objective = Objective(self.schedule, config.learn_sigma, recipe.min_snr_gamma)
        self.preview_every = recipe.samples.every if recipe.samples.prompts else 0
        if self.preview_every:
            self._prepare_preview()

    def _encode(self) -> list[int]:
        """Rows of the features to train on."""
        config = self.recipe.config
        if config.conditioning == "class":
            raise ValueError("model.conditioning: a class model has no captions to train on")
        return encode_images(self.recipe.data, config, self.device)

    def _module(self) -> nn.Module:
        """What is trained, and what is frozen about it."""
        model = self._model()
        model.gradient_checkpointing = self.recipe.gradient_checkpointing
        if self.recipe.lora is not None:
            add_lora(model, self.recipe.lora)
        return model

    def _model(self) -> PixArt:
        recipe, null = self.recipe, self.features.null_caption
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
        found, config = self.features.metadata, self.recipe.config
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

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        batch = collate(samples)
        if self.recipe.prior is not None:
            batch["weight"] = weights(batch["keys"], self.recipe.prior)
        return batch

    def flops(self, batch: dict[str, Any]) -> int:
        config, (count, _, height, width) = self.recipe.config, batch["latent_mean"].shape
        # so many on average, as attention over texts of different lengths is linear in them
        real = 0 if config.conditioning == "class" else int(batch["caption_mask"].sum())
        tokens = height * width // config.patch_size**2
        return count * model_flops(config, tokens, round(real / count))

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        mean, std = batch["latent_mean"], batch["latent_std"]
        latents = mean + std * torch.randn_like(std)
        noise = torch.randn_like(latents)
        t = torch.randint(len(self.schedule), (len(latents),), device=latents.device)
        output = module(
            self.schedule.add_noise(latents, noise, t),
            t,
            *self._condition(batch),
            **self._keywords(batch),
        )
        terms = self.objective(output, latents, noise, t)
        weight = batch.get("weight", 1)
        return {name: (weight * term).mean() for name, term in terms.items()}

    def _keywords(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What else the model is told: micro-conditions, where it takes some."""
        if not self.recipe.config.micro_conditioning:
            return {}
        size, (*_, height, width) = batch["image_size"], batch["latent_mean"].shape
        # the official training tells the original size, and the ratio of what is shown
        return {"image_size": size, "aspect_ratio": torch.full_like(size[:, :1], height / width)}

    def _condition(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Caption and its mask, as the model takes them."""
        return batch["caption"].float(), batch["caption_mask"]

    def _prepare_preview(self) -> None:
        data, samples = self.recipe.data, self.recipe.samples
        if data.vae is None or data.text_encoder is None:
            raise ValueError("samples.prompts are given: data.vae and data.text_encoder are needed")
        self._vae = VAE.from_pretrained(data.vae, device=self.device)
        encoder = TextEncoder.from_pretrained(
            data.text_encoder, max_tokens=self.recipe.config.max_caption_tokens, device=self.device
        )
        # encoded now, so that the encoder, often the largest model of all, can go
        self._prompts = PixArtPipeline(cast(PixArt, self.module), self._vae, encoder).encode(
            samples.prompts
        )

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
        """``pipeline/``: the transformer, and where its encoders are; or ``lora/``."""
        assert isinstance(module, PixArt)
        if self.recipe.lora is not None:
            save_lora(module, folder / "lora")
            return
        final = folder / "pipeline"
        partial = unfinished_folder(final)
        module.save_pretrained(partial / "transformer")
        data = self.recipe.data
        if data.vae is not None and data.text_encoder is not None:
            parts: dict[str, Any] = {
                "vae": _where(data.vae, final),
                "text_encoder": _where(data.text_encoder, final),
                "guidance_scale": self.recipe.samples.guidance_scale,
            }
            if self.recipe.distill is not None:
                parts["sampler"] = "lcm"
            (partial / PIPELINE).write_text(json.dumps(parts, indent=2))
        finish_folder(final)


def _where(name: str, pipeline: Path) -> str:
    """What lies in the run's folder or beside that one moves with the pipeline."""
    if not Path(name).exists():
        return name
    path, pipeline = Path(name).resolve(), pipeline.resolve()
    near = path.is_relative_to(pipeline.parents[1])
    return os.path.relpath(path, pipeline) if near else str(path)
