"""From prompts to pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from pixart.conditioning import VAE, TextEncoder
from pixart.conditioning.pretrained import fingerprint
from pixart.data.aspect_ratios import nearest_size
from pixart.diffusion import sample
from pixart.generation.cache import Cached, CudaGraphs
from pixart.model import CaptionEmbedder, PixArt

PIPELINE = "pipeline.json"
# what the papers draw with
GUIDANCE_SCALE = 4.5


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, so that the text encoder need not stay in memory.

    caption (B, L, C) and mask (B, L) of the prompts; null_caption (Ln, C) and null_mask (Ln,) of
    the negative prompt, which may be empty.
    """

    texts: list[str]
    caption: Tensor
    mask: Tensor
    negative_prompt: str
    null_caption: Tensor
    null_mask: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, size: int) -> Iterator[tuple[slice, Prompts]]:
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            texts, caption, mask = self.texts[rows], self.caption[rows], self.mask[rows]
            yield rows, replace(self, texts=texts, caption=caption, mask=mask)


class PixArtPipeline:
    """A model with the text encoder and the autoencoder it was trained with.

    Args:
        model: any PixArt with captions; put into eval mode.
        vae: decodes its latents.
        text_encoder: None where only encoded :class:`Prompts` are drawn.
        guidance_scale: what suits the model, where a call does not say.
        cuda_graphs: replay the model's forward from a CUDA graph for each size, captured at its
            first use.

    Raises ValueError for ``cuda_graphs`` with a model that is not on a CUDA device.
    """

    def __init__(
        self,
        model: PixArt,
        vae: VAE,
        text_encoder: TextEncoder | None,
        guidance_scale: float = GUIDANCE_SCALE,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.vae, self.text_encoder = model.eval(), vae, text_encoder
        self.guidance_scale = guidance_scale
        device = next(model.parameters()).device
        if cuda_graphs and device.type != "cuda":
            raise ValueError(f"`cuda_graphs` is True for a model on {device}; accepted: on CUDA")
        self.cuda_graphs = CudaGraphs(self.model) if cuda_graphs else None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        cuda_graphs: bool = False,
    ) -> PixArtPipeline:
        """Reads a folder that ``pixart train`` exported, or a diffusers PixArt pipeline.

        Raises:
            FileNotFoundError: the folder holds neither, or a part of it is missing.
        """
        folder = Path(folder)
        if (folder / PIPELINE).is_file():
            parts = json.loads((folder / PIPELINE).read_text())
        elif (folder / "model_index.json").is_file():
            parts = {"vae": "vae", "text_encoder": "."}
        else:
            raise FileNotFoundError(
                f"{folder} is no pipeline: expected {PIPELINE} (as `pixart train` writes) or "
                "model_index.json (as diffusers does)"
            )
        model = PixArt.from_pretrained(folder / "transformer").to(device, dtype)
        # a name that is no folder beside it is a path of its own, a hub name, or "minilm"
        vae, encoder = (
            str(folder / name) if (folder / name).exists() else name
            for name in (parts["vae"], parts["text_encoder"])
        )
        return cls(
            model,
            VAE.from_pretrained(vae, dtype=dtype, device=device),
            TextEncoder.from_pretrained(
                encoder,
                max_tokens=model.config.max_caption_tokens,
                dtype=None if encoder == "minilm" else dtype,
                device=device,
            ),
            guidance_scale=parts.get("guidance_scale", GUIDANCE_SCALE),
            cuda_graphs=cuda_graphs,
        )

    @property
    def identity(self) -> str:
        """Names the weights of all parts, in their dtypes, wherever they are stored."""
        encoder = None if self.text_encoder is None else self.text_encoder.identity
        return fingerprint(self.model, self.vae.identity, encoder)

    def encode(self, prompts: Sequence[str], negative_prompt: str = "") -> Prompts:
        """Prompts' features, and those of what guidance steers away from."""
        if self.text_encoder is None:
            raise ValueError("this pipeline has no text encoder: draw encoded Prompts")
        caption, mask = self.text_encoder.encode(prompts)
        if negative_prompt:
            (null_caption,), (null_mask,) = self.text_encoder.encode([negative_prompt])
        else:
            null_caption, null_mask = self.text_encoder.encode_null()
        return Prompts(list(prompts), caption, mask, negative_prompt, null_caption, null_mask)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | Prompts,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        sampler: str = "dpm-solver++",
        guidance_scale: float | None = None,
        guidance_mask: str = "official",
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
        batch_size: int = 8,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draws one picture for each prompt.

        Args:
            prompts: texts, or what :meth:`encode` made of them.
            height, width: pixels; None: those of ``image``, or the size that the model was
                trained at. :meth:`size` finds those of an aspect ratio.
            seed: picture ``i`` starts from the noise of ``seed + i``, or of ``seed[i]``, whatever
                the batch size.
            steps, sampler: see ``pixart.diffusion.sample``.
            guidance_scale: 1 is no guidance; None: the pipeline's.
            guidance_mask: "official" steers away from the null caption that the model was trained
                with, attended at the prompt's length; "diffusers" from the text encoder's "", at
                its own. A negative prompt, which the official code does not have, is always
                attended at its own length.
            image: what all pictures begin with, scaled and cropped to the size; None: noise.
            mask: white where ``image`` is drawn anew, black where its pixels are the result's,
                and grey for a blend; of the size of ``image``.
            strength: share of the steps that are taken, the last ones, so that less of ``image``
                changes; in (0, 1]. None: :func:`default_strength`.
            batch_size: pictures drawn together.
            callback: called as ``callback(done, total)`` with model calls, for progress.

        Raises:
            ValueError: naming the argument, what was got and what is accepted.
        """
        if guidance_scale is not None and not 1 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {guidance_scale}; accepted: 1 or more")
        count = len(prompts)
        seeds = range(seed, seed + count) if isinstance(seed, int) else seed
        if len(seeds) != count:
            raise ValueError(f"`seed` has {len(seeds)} numbers; accepted: one, or {count}")
        if mask is not None and (image is None or mask.size != image.size):
            raise ValueError(
                f"`mask` is {_size(mask)} for an image of {_size(image)}; accepted: the same size"
            )
        if image is not None:
            width, height = (width or image.width, height or image.height)
        height, width = self.size(height, width)
        start = drawn_where = None
        if image is not None:
            image = ImageOps.fit(image.convert("RGB"), (width, height))
            start = self.vae.encode(to_pixels(image)[None])
        if mask is not None:
            mask = ImageOps.fit(mask.convert("L"), (width, height))
            white = to_pixels(mask)[None, :1]
            drawn_where = F.max_pool2d(white, self.vae.factor) > -1
        if strength is None:
            strength = 1.0 if image is None else default_strength(mask)
        if not isinstance(prompts, Prompts):
            prompts = self.encode(prompts)
        latents_of = self.draw_latents(
            prompts,
            (height // self.vae.factor, width // self.vae.factor),
            seeds=seeds,
            steps=steps,
            sampler=sampler,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_mask=guidance_mask,
            start=start,
            mask=drawn_where,
            strength=strength,
            batch_size=batch_size,
            callback=callback,
        )
        drawn = [to_image(pixels) for z in latents_of for pixels in self.vae.decode(z)]
        if image is None or mask is None:
            return drawn
        return [Image.composite(picture, image, mask) for picture in drawn]

    def size(
        self, height: int | None = None, width: int | None = None, aspect_ratio: str | None = None
    ) -> tuple[int, int]:
        """Height and width in pixels of a picture that is asked for.

        ``aspect_ratio``, width to height as "16:9", gives the nearest size of the papers' table
        for this model; a height or width that is not given is that of the model's training.

        Raises ValueError for a side that the model cannot draw, or an aspect ratio besides sides.
        """
        config, factor = self.model.config, self.vae.factor
        base, multiple = config.input_size * factor, factor * config.patch_size
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ValueError("an aspect ratio is given, and height or width: give one of them")
            return nearest_size(aspect_ratio, base, multiple)
        sides = base if height is None else height, base if width is None else width
        for name, pixels in zip(("height", "width"), sides, strict=True):
            if pixels < multiple or pixels % multiple:
                raise ValueError(f"`{name}` is {pixels}; accepted: a multiple of {multiple}")
        return sides

    def draw_latents(
        self,
        prompts: Prompts,
        size: tuple[int, int],
        *,
        seeds: Sequence[int],
        steps: int,
        sampler: str,
        guidance_scale: float,
        guidance_mask: str,
        batch_size: int,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
        callback: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Batches of normalised latents (B, C, h, w), in the order of the prompts.

        All begin with ``start`` (1, C, h, w), where given; ``mask`` (1, 1, h, w) and ``strength``
        are those of ``pixart.diffusion.sample``.
        """
        config, device = self.model.config, next(self.model.parameters()).device
        null_caption = prompts.null_caption
        if prompts.negative_prompt:
            guidance_mask = "diffusers"
        elif guidance_mask == "official":
            assert isinstance(self.model.y_embedder, CaptionEmbedder)
            null_caption = self.model.y_embedder.y_embedding
        batches = list(prompts.batches(batch_size))
        for done, (rows, batch) in enumerate(batches):
            B = len(batch)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            shape = (1, config.in_channels, *size)
            noise = torch.cat([torch.randn(shape, generator=g) for g in generators])
            image_size = aspect_ratio = None
            if config.micro_conditioning:
                pixels = torch.tensor([float(side * self.vae.factor) for side in size])
                image_size = pixels.to(device).expand(B, 2)
                aspect_ratio = torch.full((B, 1), size[0] / size[1], device=device)

            def progress(index: int, total: int, latents: Tensor, done: int = done) -> None:
                if callback is not None:
                    callback(done * total + index + 1, total * len(batches))

            dtype = self.model.final_layer.linear.weight.dtype
            cached = Cached(self.model, self.cuda_graphs)
            yield sample(
                cached,
                noise.to(device, dtype),
                batch.caption.to(device, dtype),
                batch.mask.to(device),
                null_caption=null_caption.to(device, dtype),
                null_mask=prompts.null_mask.to(device),
                sampler=sampler,
                steps=steps,
                guidance_scale=guidance_scale,
                guidance_mask=guidance_mask,
                generators=generators,
                start=None if start is None else start.to(device).expand(B, -1, -1, -1),
                mask=None if mask is None else mask.to(device),
                strength=strength,
                callback=progress,
                prepare=cached.prepare,
                image_size=image_size,
                aspect_ratio=aspect_ratio,
            )


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an 8-bit picture."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().cpu().numpy())


def to_pixels(image: Image.Image) -> Tensor:
    """An 8-bit picture to (3, H, W) in [-1, 1]."""
    array = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return array.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def default_strength(mask: Image.Image | None) -> float:
    """An image as a whole is to be recognised; what a mask shows is to be drawn from nothing."""
    return 0.6 if mask is None else 1.0


def _size(image: Image.Image | None) -> str:
    return "none" if image is None else f"{image.width}x{image.height}"
