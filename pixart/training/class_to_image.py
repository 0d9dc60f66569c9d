"""What ``pixart train`` trains at first: a DiT on classes of pictures (PixArt-alpha, stage 1)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from pixart.conditioning import VAE, TextEncoder
from pixart.config import PixArtConfig
from pixart.data.sources import BadSample, ImageFolder
from pixart.diffusion import sample
from pixart.files import finish_folder, unfinished_folder, write_atomically
from pixart.generation import contact_sheet
from pixart.generation.pipeline import to_image
from pixart.model import PixArt
from pixart.training.recipe import Data
from pixart.training.text_to_image import TextToImage, all_rows, encode_missing

# in the folder of features: names of the classes, in the order of their labels
CLASSES = "classes.json"


class ClassFolder(ImageFolder):
    """A folder with a folder of pictures for each class, as ImageNet's: captions are its name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        lost = "it lies in no class's folder"
        self._rows = [
            (key, key.split("/")[0] if "/" in key else BadSample(key, lost)) for key in self.keys
        ]

    @property
    def classes(self) -> list[str]:
        return sorted({key.split("/")[0] for key in self.keys if "/" in key})


class NoText:
    """In a text encoder's place, where captions are not read."""

    max_tokens = channels = 1

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(captions), 1, 1), torch.zeros(len(captions), 1, dtype=torch.bool)

    def encode_null(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool)

    def to(self, device: torch.device) -> NoText:
        return self


def encode_classes(data: Data, config: PixArtConfig, device: torch.device) -> list[int]:
    """As :func:`pixart.training.text_to_image.encode_images`, and records the classes' names."""
    if data.text_encoder is not None:
        raise ValueError(
            "data.text_encoder is given, but a class model reads no text: leave it out"
        )
    if data.images is None:
        return all_rows(data.features)
    if data.vae is None:
        raise ValueError("data.images is given: data.vae is needed as well")
    vae = VAE.from_pretrained(data.vae)
    source = ClassFolder(data.images, data.sizes(vae.factor * config.patch_size))
    classes = source.classes
    if not classes:
        raise ValueError(f"data.images: {data.images} has no folders of pictures, one for a class")
    names = json.dumps(classes, indent=1).encode()
    # a cache is not continued with other classes, which would have other labels
    digest = hashlib.sha256(json.dumps(classes).encode()).hexdigest()
    no_text = cast(TextEncoder, NoText(f"classes {digest}"))
    rows = encode_missing(source, vae, lambda: no_text, data, device)
    if PartialState().is_main_process and not (data.features / CLASSES).is_file():
        write_atomically(data.features / CLASSES, lambda file: file.write(names))
    return rows


class ClassToImage(TextToImage):
    """A :class:`pixart.training.loop.Task`: noise prediction for classes.

    ``samples.prompts`` are names of classes. The exported ``pipeline/`` is the transformer alone,
    from which ``pixart grow`` makes one that reads text.
    """

    def _encode(self) -> list[int]:
        return encode_classes(self.recipe.data, self.recipe.config, self.device)

    def _check_features(self) -> None:
        features, config = self.recipe.data.features, self.recipe.config
        if not (features / CLASSES).is_file():
            raise ValueError(f"{features} holds features of captions; a class model needs classes")
        names = json.loads((features / CLASSES).read_text())
        self._labels = {name: label for label, name in enumerate(names)}
        found = self.features.metadata.latent_channels
        if len(names) != config.num_classes or found != config.in_channels:
            raise ValueError(
                f"{features} has {len(names)} classes and {found} latent channels, but "
                f"model.num_classes is {config.num_classes}, model.in_channels "
                f"{config.in_channels}"
            )

    def _model(self) -> PixArt:
        recipe = self.recipe
        if recipe.init is None:
            return PixArt(recipe.config)
        return PixArt.from_pretrained(recipe.init, recipe.config)

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        batch = super().collate(samples)
        batch["label"] = torch.tensor([self._labels[sample["text"]] for sample in samples])
        return batch

    def _condition(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        return batch["label"], None

    def _prepare_preview(self) -> None:
        data, names = self.recipe.data, self.recipe.samples.prompts
        if data.vae is None:
            raise ValueError("samples.prompts are given: data.vae is needed")
        unknown = [name for name in names if name not in self._labels]
        if unknown:
            some = ", ".join(list(self._labels)[:5])
            raise ValueError(f"samples.prompts: {', '.join(unknown)} are no classes; as {some}")
        self._vae = VAE.from_pretrained(data.vae, device=self.device)

    def preview(self, module: nn.Module) -> Image.Image:
        assert isinstance(module, PixArt)
        samples, config = self.recipe.samples, module.config
        labels = [self._labels[name] for name in samples.prompts]
        generators = [
            torch.Generator().manual_seed(self.recipe.seed + i) for i in range(len(labels))
        ]
        shape = (1, config.in_channels, config.input_size, config.input_size)
        noise = torch.cat([torch.randn(shape, generator=g) for g in generators])

        def model(latents: Tensor, t: Tensor, caption: Tensor, **_: object) -> Tensor:
            return module(latents, t, caption[:, 0, 0].long())

        # guidance speaks of captions; here one is a single number, the label
        latents = sample(
            model,
            noise.to(self.device),
            torch.tensor(labels, dtype=torch.float32, device=self.device)[:, None, None],
            null_caption=torch.full((1, 1), float(config.num_classes), device=self.device),
            sampler=samples.sampler,
            steps=samples.steps,
            guidance_scale=samples.guidance_scale,
            generators=generators,
        )
        return contact_sheet([to_image(x) for x in self._vae.decode(latents)], samples.prompts)

    def export(self, module: nn.Module, folder: Path) -> None:
        """``pipeline/``: the transformer, and the names of its classes."""
        assert isinstance(module, PixArt)
        final = folder / "pipeline"
        partial = unfinished_folder(final)
        module.save_pretrained(partial / "transformer")
        (partial / CLASSES).write_text(json.dumps(list(self._labels), indent=1))
        finish_folder(final)
