"""Training a ControlNet: images that say where things are, beside those that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from pixart.conditioning import VAE, FeatureCache, TextEncoder
from pixart.controlnet import ControlledPixArt
from pixart.data.sources import UncaptionedFolder
from pixart.generation import PixArtPipeline, Prompts, contact_sheet
from pixart.generation.pipeline import to_image
from pixart.model import PixArt
from pixart.training.class_to_image import NoText
from pixart.training.text_to_image import TextToImage, all_rows, encode_missing

# of the samples: how many previews show
PREVIEWS = 8


class _WithControl(Dataset[dict[str, Any]]):
    """Samples with the latents of the control image that has the same name.

    Raises ValueError where one has none, or one of another size.
    """

    def __init__(self, task: TextToImage, controls: FeatureCache, rows_of: list[int]) -> None:
        keys, of_controls = controls.keys(), controls.latent_shapes()
        rows = {_name(keys[row]): row for row in rows_of}
        names, shapes = [_name(key) for key in task.keys], task.buckets
        lacking = [name for name in names if name not in rows]
        unequal = [
            name
            for name, shape in zip(names, shapes, strict=True)
            if name in rows and of_controls[rows[name]] != shape
        ]
        if lacking or unequal:
            raise ValueError(
                f"{controls.folder}: {len(lacking)} of {len(names)} images have no control image "
                f"({', '.join(lacking[:5])}), {len(unequal)} one of another size "
                f"({', '.join(unequal[:5])})"
            )
        self.samples, self.controls = task.dataset, controls
        self.rows = [rows[name] for name in names]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        control = self.controls[self.rows[row]]["latent_mean"]
        return {**self.samples[row], "control": control.float()}


class ControlledTextToImage(TextToImage):
    """A :class:`pixart.training.loop.Task`: noise prediction along an image."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.recipe.control is not None
        controls = FeatureCache(self.recipe.control.features)
        if controls.metadata.vae != self.features.metadata.vae:
            raise ValueError("control.features were encoded by another autoencoder")
        self.dataset = _WithControl(self, controls, self._control_rows)
        if self.recipe.data.vae is not None:
            self.preview_every = self.recipe.samples.every
            self._vae = VAE.from_pretrained(self.recipe.data.vae, device=self.device)

    def _encode(self) -> list[int]:
        rows = super()._encode()
        self._control_rows = self._encode_controls()
        return rows

    def _encode_controls(self) -> list[int]:
        control, data = self.recipe.control, self.recipe.data
        assert control is not None
        if control.images is None:
            return all_rows(control.features)
        if data.vae is None:
            raise ValueError("control.images is given: data.vae is needed as well")
        vae = VAE.from_pretrained(data.vae)
        source = UncaptionedFolder(
            control.images, data.sizes(vae.factor * self.recipe.config.patch_size)
        )
        same = data.model_copy(update={"features": control.features, "text_encoder": None})
        no_text = cast(TextEncoder, NoText("control images"))
        return encode_missing(source, vae, lambda: no_text, same, self.device)

    def _module(self) -> ControlledPixArt:
        assert self.recipe.control is not None
        return ControlledPixArt(cast(PixArt, super()._module()), self.recipe.control.copies)

    def flops(self, batch: dict[str, Any]) -> int:
        config, control = self.recipe.config, self.recipe.control
        assert control is not None
        return super().flops(batch) * (config.depth + control.copies) // config.depth

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        controls = torch.stack([sample["control"] for sample in samples])
        return {**super().collate(samples), "control": controls}

    def _keywords(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {**super()._keywords(batch), "control": batch["control"]}

    def preview(self, module: nn.Module) -> Image.Image:
        """Of samples all over the data: the control, what is drawn along it, and the original."""
        assert isinstance(module, ControlledPixArt)
        recipe, samples, null = self.recipe, self.recipe.samples, self.features.null_caption
        pipeline = PixArtPipeline(module.base_model, self._vae, None)
        pictures, texts = [], []
        # one by one, as they may be of different sizes
        for i, row in enumerate(range(0, len(self.keys), -(-len(self.keys) // PREVIEWS))):
            sample = self.dataset[row]
            batch = self.collate([sample])
            prompts = Prompts(
                texts=[sample["text"]],
                caption=batch["caption"],
                mask=batch["caption_mask"],
                negative_prompt="",
                null_caption=null,
                null_mask=torch.ones(len(null), dtype=torch.bool),
            )
            (drawn,) = pipeline.draw_latents(
                prompts,
                batch["control"].shape[2:],
                seeds=[recipe.seed + i],
                steps=samples.steps,
                sampler=samples.sampler,
                guidance_scale=samples.guidance_scale,
                # features do not say how long the empty caption is, which the other one needs
                guidance_mask="official",
                batch_size=1,
                control=(module, batch["control"]),
            )
            for latents in (batch["control"], drawn, batch["latent_mean"]):
                pictures.append(to_image(self._vae.decode(latents)[0]))
            texts += ["control", sample["text"], "original"]
        return contact_sheet(pictures, texts, columns=6)

    def export(self, module: nn.Module, folder: Path) -> None:
        """``controlnet/``, without the model it is for."""
        assert isinstance(module, ControlledPixArt)
        module.save_pretrained(folder / "controlnet")


def _name(key: str) -> str:
    """An image may be a JPEG and its edges a PNG."""
    return key.rsplit(".", 1)[0]
