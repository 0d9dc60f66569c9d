"""From prompts to pictures."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from pixart.checkpoints import load_lora
from pixart.conditioning import VAE, TextEncoder
from pixart.conditioning.pretrained import find_folder, fingerprint
from pixart.controlnet import ControlledPixArt
from pixart.data.aspect_ratios import nearest_size
from pixart.diffusion import defaults, sample
from pixart.generation import placement
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
        text_encoder: one, or what loads one: it is then loaded when it is needed, and freed before
            anything is drawn. None where only encoded :class:`Prompts` are drawn.
        guidance_scale, sampler: what suits the model, where a call does not say.
        cuda_graphs: replay the model's forward from a CUDA graph for each size, captured at its
            first use.
        device: where model and vae are while they work; None: where the model is.
        memory: "high" leaves model and vae on the device. With "low" each leaves it for the
            host's memory when its work is done, and pictures beyond 1024 x 1024 pixels are encoded
            and decoded in tiles, which with "high" are only those that would not fit otherwise.

    Raises ValueError for ``cuda_graphs`` elsewhere than on a CUDA device, or with "low" memory.
    """

    def __init__(
        self,
        model: PixArt,
        vae: VAE,
        text_encoder: TextEncoder | Callable[[], TextEncoder] | None,
        guidance_scale: float = GUIDANCE_SCALE,
        cuda_graphs: bool = False,
        device: str | torch.device | None = None,
        memory: str = "high",
        sampler: str = "dpm-solver++",
    ) -> None:
        self.model, self.vae, self.memory = model.eval(), vae, memory
        self._text_encoder: TextEncoder | None = None
        self._load_text_encoder: Callable[[], TextEncoder] | None = None
        if callable(text_encoder):
            self._load_text_encoder = text_encoder
        else:
            self._text_encoder = text_encoder
        self._encoder_identity: str | None = None
        self._null: tuple[str, Tensor, Tensor] | None = None
        self.guidance_scale, self.sampler = guidance_scale, sampler
        self.device = next(model.parameters()).device if device is None else torch.device(device)
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(
                f"`cuda_graphs` is True for a model on {self.device}; accepted: on CUDA"
            )
        if cuda_graphs and memory == "low":
            raise ValueError(
                '`cuda_graphs` is True with `memory` "low", where weights move between pictures; '
                'accepted: with "high"'
            )
        self.cuda_graphs = CudaGraphs(self.model) if cuda_graphs else None
        self._control: tuple[ControlledPixArt, Image.Image] | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        cuda_graphs: bool = False,
        memory: str = "auto",
        text_8bit: bool = False,
        loras: Sequence[tuple[str | Path, float]] = (),
    ) -> PixArtPipeline:
        """Reads a folder that ``pixart train`` exported, or a diffusers PixArt pipeline.

        Args:
            memory: "high": all parts stay on the device. "low": they take turns; the text encoder
                is loaded to encode prompts, with its weights streamed to a GPU layer by layer, and
                freed. "auto": high where everything fits, which is logged, or for CUDA graphs.
            text_8bit: the text encoder in 8 bits, by the package bitsandbytes: other features, and
                so slightly other pictures, for half its memory in bfloat16. It is not streamed.
            loras: files or folders and their scales, see ``pixart.checkpoints.load_lora``.

        Raises:
            FileNotFoundError: the folder holds neither, or a part of it is missing.
            ModuleNotFoundError: ``text_8bit`` without bitsandbytes.
            ValueError: ``memory`` is none of these, a file of the folder is not JSON or does not
                name the parts, or see the class.
        """
        if memory not in placement.MODES:
            raise ValueError(f"`memory` is {memory!r}; accepted: {', '.join(placement.MODES)}")
        folder, device = Path(folder), torch.device(device)
        if (file := folder / PIPELINE).is_file():
            parts = _read_json(file)
        elif (file := folder / "model_index.json").is_file():
            parts = {"vae": "./vae", "text_encoder": "."}
            scheduler = _read_json(file).get("scheduler")
            if scheduler and scheduler[1] == "LCMScheduler":
                parts["sampler"] = "lcm"
        else:
            raise FileNotFoundError(
                f"{folder} is no pipeline: expected {PIPELINE} (as `pixart train` writes) or "
                "model_index.json (as diffusers does), and the model in transformer/"
            )
        vae, encoder = (_part(file, parts, name) for name in ("vae", "text_encoder"))
        model = PixArt.from_pretrained(folder / "transformer")
        for path, scale in loras:
            load_lora(model, path, scale)
        model = model.to(dtype)
        encoder_dtype = None if encoder == "minilm" else dtype
        try:
            decoder = VAE.from_pretrained(vae, dtype=dtype)
        except OSError as error:
            raise FileNotFoundError(f"{file} has its vae at {vae}: {error}") from None
        if memory == "auto" and cuda_graphs:
            memory = "high"
        if memory == "auto":
            text = TextEncoder.weight_bytes(encoder, dtype=encoder_dtype, in_8bit=text_8bit)
            memory = placement.choose(model, decoder, text, device)

        def load_text_encoder() -> TextEncoder:
            streamed = memory == "low" and device.type == "cuda" and not text_8bit
            loaded = TextEncoder.from_pretrained(
                encoder,
                max_tokens=model.config.max_caption_tokens,
                dtype=encoder_dtype,
                device="cpu" if streamed else device,
                in_8bit=text_8bit,
            )
            return loaded.offload(device) if streamed else loaded

        low = memory == "low"
        return cls(
            model if low else model.to(device),
            decoder if low else decoder.to(device),
            load_text_encoder if low else load_text_encoder(),
            guidance_scale=parts.get("guidance_scale", GUIDANCE_SCALE),
            cuda_graphs=cuda_graphs,
            device=device,
            memory=memory,
            sampler=parts.get("sampler", "dpm-solver++"),
        )

    @property
    def text_encoder(self) -> TextEncoder | None:
        """Loaded now, where it was not."""
        if self._text_encoder is None and self._load_text_encoder is not None:
            self._text_encoder = self._load_text_encoder()
        return self._text_encoder

    def free_text_encoder(self) -> None:
        """Until it is needed again, where the pipeline knows how to load it."""
        if self._load_text_encoder is not None and self._text_encoder is not None:
            self._text_encoder = None
            # modules and accelerate's hooks refer to each other
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def _on_device(self, part: PixArt | ControlledPixArt | VAE) -> Iterator[None]:
        """With low memory a part is on the device no longer than it works."""
        if self.memory == "high":
            yield
            return
        try:
            # which may find room for half of it
            part.to(self.device)
            yield
        finally:
            part.to("cpu")

    @property
    def identity(self) -> str:
        """Names the weights of all parts, in their dtypes, wherever they are stored, and what
        pictures are drawn along."""
        if self._encoder_identity is None and self.text_encoder is not None:
            self._encoder_identity = self.text_encoder.identity
        others = [self.vae.identity, self._encoder_identity]
        if self._control is not None:
            controlled, image = self._control
            pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
            others.append(fingerprint(controlled.controlnet, image.size, pixels))
        return fingerprint(self.model, *others)

    def draw_along(self, controlnet: str | Path, image: Image.Image) -> None:
        """From now on pictures follow an image, scaled and cropped to their size.

        Args:
            controlnet: see ``ControlledPixArt.from_pretrained``.
            image: of the kind that it was trained with, such as edges.

        Raises ValueError for a ControlNet of another model, or where CUDA graphs are used.
        """
        if self.cuda_graphs is not None:
            raise ValueError("`cuda_graphs` is True; accepted with a ControlNet: False")
        # what it shares with the model is where that is, and of its type
        self._control = ControlledPixArt.from_pretrained(self.model, controlnet).eval(), image

    def encode(self, prompts: Sequence[str], negative_prompt: str = "") -> Prompts:
        """Prompts' features, and those of what guidance steers away from."""
        encoder = self.text_encoder
        if encoder is None:
            raise ValueError("this pipeline has no text encoder: draw encoded Prompts")
        caption, mask = encoder.encode(prompts)
        if self._null is None or self._null[0] != negative_prompt:
            if negative_prompt:
                (null_caption,), (null_mask,) = encoder.encode([negative_prompt])
            else:
                null_caption, null_mask = encoder.encode_null()
            self._null = negative_prompt, null_caption, null_mask
        _, null_caption, null_mask = self._null
        return Prompts(list(prompts), caption, mask, negative_prompt, null_caption, null_mask)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | Prompts,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        guidance_mask: str = "official",
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
        batch_size: int = 8,
        callback: Callable[[int, int], None] | None = None,
        preview: Callable[[Tensor], None] | None = None,
    ) -> list[Image.Image]:
        """Draws one picture for each prompt.

        Args:
            prompts: texts, or what :meth:`encode` made of them.
            height, width: pixels; None: those of ``image``, see :meth:`size_for`, or the size
                that the model was trained at. :meth:`size` finds those of an aspect ratio.
            seed: picture ``i`` starts from the noise of ``seed + i``, or of ``seed[i]``, whatever
                the batch size.
            steps, sampler: see ``pixart.diffusion.sample``; None: what suits the model.
            guidance_scale: 1 is no guidance; None: the pipeline's, or 1 for a distilled model.
            guidance_mask: "official" steers away from the null caption that the model was trained
                with, attended at the prompt's length; "diffusers" from the text encoder's "", at
                its own. A negative prompt, which the official code does not have, is always
                attended at its own length.
            image: what all pictures begin with, scaled and cropped to the size; None: noise.
            mask: white where ``image`` is drawn anew, black where its pixels are the result's;
                greys blend the two, and those darker than half are not drawn anew. Of the size of
                ``image``.
            strength: share of the steps that are taken, the last ones, so that less of ``image``
                changes; in (0, 1]. None: :func:`default_strength`.
            batch_size: pictures drawn together.
            callback: called as ``callback(done, total)`` with model calls, for progress.
            preview: called after each with what the batch's latents are becoming, (B, C, h, w)
                for ``vae.decode``.

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
            rows, columns = self.size_for(image)
            height, width = height or rows, width or columns
        height, width = self.size(height, width)
        sampler = sampler or self.sampler
        if guidance_scale is None:
            guidance_scale = defaults(sampler, self.guidance_scale)[1]
        if not isinstance(prompts, Prompts):
            prompts = self.encode(prompts)
        self.free_text_encoder()
        # else what took long to draw might fail at its last step
        tiled = self.memory == "low" or not placement.fits(
            self.vae.decoding_bytes(height, width), self.device
        )
        start = drawn_where = None
        if image is not None:
            image = ImageOps.fit(image.convert("RGB"), (width, height))
            with self._on_device(self.vae):
                start = self.vae.encode(to_pixels(image)[None], tiled=tiled)
        if mask is not None:
            mask = ImageOps.fit(mask.convert("L"), (width, height))
            white = to_pixels(mask)[None, :1]
            # each latent pixel with a white one; dark greys are a JPEG's black, or a blend's end
            drawn_where = F.max_pool2d(white, self.vae.factor) > 0
        control = None
        if self._control is not None:
            controlled, along = self._control
            along = ImageOps.fit(along.convert("RGB"), (width, height))
            with self._on_device(self.vae):
                control = controlled, self.vae.encode(to_pixels(along)[None], tiled=tiled)
        if strength is None:
            strength = 1.0 if image is None else default_strength(mask)
        batches = self.draw_latents(
            prompts,
            (height // self.vae.factor, width // self.vae.factor),
            seeds=seeds,
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            guidance_mask=guidance_mask,
            start=start,
            mask=drawn_where,
            strength=strength,
            control=control,
            batch_size=batch_size,
            callback=callback,
            preview=preview,
        )
        # all of them, small as they are, so that each part has one turn
        with self._on_device(self.model if control is None else control[0]):
            latents = list(batches)
        with self._on_device(self.vae):
            drawn = [_checked(x) for z in latents for x in self.vae.decode(z, tiled=tiled)]
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

    def size_for(self, image: Image.Image) -> tuple[int, int]:
        """Height and width in pixels of a picture that begins with an image.

        They are the image's own, where the model can draw them and neither is beyond twice the
        side that it was trained at, else the nearest size of the papers' table for its ratio.
        """
        multiple = self.vae.factor * self.model.config.patch_size
        largest = 2 * max(self.size())
        if all(side % multiple == 0 and side <= largest for side in image.size):
            return image.height, image.width
        return self.size(aspect_ratio=f"{image.width}:{image.height}")

    def draw_latents(
        self,
        prompts: Prompts,
        size: tuple[int, int],
        *,
        seeds: Sequence[int],
        steps: int | None,
        sampler: str,
        guidance_scale: float,
        guidance_mask: str,
        batch_size: int,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
        control: tuple[ControlledPixArt, Tensor] | None = None,
        callback: Callable[[int, int], None] | None = None,
        preview: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """Batches of normalised latents (B, C, h, w), in the order of the prompts.

        All begin with ``start`` (1, C, h, w), where given; ``mask`` (1, 1, h, w) and ``strength``
        are those of ``pixart.diffusion.sample``. ``control`` is a ControlNet of the model, and the
        latents (1, C, h, w) of the image that it sees.
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
            run: Callable[..., Tensor] = cached
            if control is not None:
                run = partial(control[0], control=control[1].to(device))
            yield sample(
                run,
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
                preview=preview,
                prepare=cached.prepare if run is cached else None,
                image_size=image_size,
                aspect_ratio=aspect_ratio,
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {values!r}; accepted: an object")
    return values


def _part(file: Path, parts: dict[str, Any], key: str) -> str:
    """Path or Hub name of a part that a pipeline's file names."""
    name = parts.get(key)
    if not isinstance(name, str):
        raise ValueError(f"{file}: {key!r} is {name!r}; accepted: a folder or a name")
    if name.startswith(".") or (file.parent / name).exists():
        name = str(file.parent / name)
    # else a path of its own, a Hub name, or "minilm"
    try:
        find_folder(name, key)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} has its {key} at {name}, which is no folder") from None
    return name


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


def _checked(pixels: Tensor) -> Image.Image:
    if not pixels.isfinite().all():
        raise ValueError(
            "a picture came out as NaN: the weights are broken, or overflow in float16; bfloat16 "
            "and float32 have room"
        )
    return to_image(pixels)


def _size(image: Image.Image | None) -> str:
    return "none" if image is None else f"{image.width}x{image.height}"
