"""Many pictures from one model: prompts from a file, batches, PNGs that know their recipe."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pixart.diffusion import GUIDANCE_MASKS, SAMPLERS, NoiseSchedule, defaults
from pixart.diffusion.samplers import STARTS_FROM_NOISE_ALONE
from pixart.files import write_atomically
from pixart.generation.contact_sheet import contact_sheet
from pixart.generation.pipeline import PixArtPipeline, default_strength

# encoded before the first of them is drawn, where the text encoder is loaded for each time
ENCODED_AT_ONCE = 64

MAX_STEPS = 1000


class Request(BaseModel):
    """One line of a file of prompts; what it leaves out is decided for the whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    negative_prompt: str | None = None
    height: Annotated[int, Field(gt=0)] | None = None
    width: Annotated[int, Field(gt=0)] | None = None
    aspect_ratio: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


def read_requests(path: Path) -> list[Request]:
    """Prompts from a file, one a line.

    In a .jsonl or .ndjson file each line is an object of `Request` keys. Blank lines are
    skipped. Paths of images and masks are relative to the file's folder.

    Raises:
        ValueError: one line for each problem, with the file's line number; no prompt at all; or a
            .json file, which is no lines.
        OSError: the file cannot be read.
    """
    requests, problems = [], []
    kind = path.suffix.lower()
    if kind == ".json":
        raise ValueError(f"{path}: accepted: .jsonl, an object on each line, or text")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    # not splitlines(): JSON may hold characters that it takes for a line's end
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line) if kind in (".jsonl", ".ndjson") else {"prompt": line.strip()}
            request = Request.model_validate(values)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
        except ValidationError as error:
            problems += [f"{path}:{number}: {_problem(problem)}" for problem in error.errors()]
        else:
            named = {"image": request.image, "mask": request.mask}
            files = {name: path.parent / file for name, file in named.items() if file is not None}
            for name, file in files.items():
                if not file.is_file():
                    problems.append(f"{path}:{number}: {name} is {str(file)!r}: no such file")
            requests.append(request.model_copy(update=files))
    if problems:
        raise ValueError("\n".join(problems))
    if not requests:
        raise ValueError(f"{path} holds no prompt")
    return requests


def _problem(problem: Mapping[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Request.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else ", ".join(Request.model_fields)
        return f"unknown key {key!r} ({hint})"
    if problem["type"] == "missing":
        return f"{key} is required"
    return f"{key or 'the line'} is {problem['input']!r}: {problem['msg']}"


@dataclass(frozen=True)
class Source:
    """An image to begin with, and perhaps a mask: see ``PixArtPipeline``."""

    image: Path
    mask: Path | None = None
    strength: float | None = None

    def open(self) -> tuple[Image.Image, Image.Image | None]:
        """Image and mask of 8 bits, turned as a viewer shows them: cameras leave the turning to it.

        Raises ValueError for what is no image, a mask of another size, or a strength beyond (0, 1].
        """
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"`strength` is {self.strength}; accepted: above 0, to 1")
        image = _read(self.image).convert("RGB")
        mask = None if self.mask is None else _read(self.mask).convert("L")
        if mask is not None and mask.size != image.size:
            sizes = "{}x{} for an image of {}x{}".format(*mask.size, *image.size)
            raise ValueError(f"{self.mask} is {sizes}; accepted: the same size")
        return image, mask

    def recipe(self) -> dict[str, Any]:
        image, mask = self.open()
        pixels = {"image": image, "mask": mask}
        return {
            "strength": default_strength(mask) if self.strength is None else self.strength,
            **{
                name: _digest(str(x.size).encode() + x.tobytes())
                for name, x in pixels.items()
                if x is not None
            },
        }


def _read(file: Path) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file}: {reason}") from None
    # of 16 bits, which conversion to 8 would cut off
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image


@dataclass(frozen=True)
class Picture:
    """All that decides a picture, given the model."""

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    steps: int
    sampler: str
    guidance_scale: float
    guidance_mask: str
    source: Source | None = None

    def recipe(self) -> dict[str, Any]:
        """As JSON may hold it; the source by its pixels, wherever they are stored."""
        values = {**vars(self)}
        source = values.pop("source")
        return values if source is None else {**values, **source.recipe()}


def check(
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_mask: str = "official",
    seed: int = 0,
) -> None:
    """Raises ValueError for settings that no model draws with."""
    if sampler is not None and sampler not in SAMPLERS:
        raise ValueError(f"`sampler` is {sampler!r}; accepted: {', '.join(SAMPLERS)}")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"`steps` is {steps}; accepted: 1 to {MAX_STEPS}")
    if sampler is not None and steps is not None:
        _check_steps(sampler, steps)
    if guidance_scale is not None and not 1 <= guidance_scale < math.inf:
        raise ValueError(f"`guidance_scale` is {guidance_scale}; accepted: 1 or more")
    if guidance_mask not in GUIDANCE_MASKS:
        raise ValueError(
            f"`guidance_mask` is {guidance_mask!r}; accepted: {', '.join(GUIDANCE_MASKS)}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` is {seed}; accepted: 0 to 2^63 - 1")


@cache
def _check_steps(sampler: str, steps: int) -> None:
    # some take fewer, and say so
    SAMPLERS[sampler](NoiseSchedule(), steps, torch.device("cpu"))


def resolve(
    requests: Sequence[Request],
    pipeline: PixArtPipeline,
    *,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    aspect_ratio: str | None = None,
    negative_prompt: str = "",
    steps: int | None = None,
    sampler: str | None = None,
    guidance_scale: float | None = None,
    guidance_mask: str = "official",
    source: Source | None = None,
) -> list[Picture]:
    """Requests, with what they leave open as the run has it.

    A request that names a height, a width or an aspect ratio takes none of the run's, and one that
    names an image no mask and strength of the run's. Sides that are named nowhere are those of
    ``PixArtPipeline.size_for`` the image, where there is one. Request ``i`` has the seed
    ``seed + i`` where it names none.

    Raises ValueError, naming the prompt, for a size that the model cannot draw, a mask or strength
    without an image, or as :func:`check`.
    """
    sampler = sampler or pipeline.sampler
    default_steps, default_scale = defaults(sampler, pipeline.guidance_scale)
    steps = default_steps if steps is None else steps
    if sampler == "iddpm" and not pipeline.model.config.learn_sigma:
        raise ValueError(
            '`sampler` is "iddpm"; accepted for a model without learned variance: ddpm'
        )
    guidance_scale = default_scale if guidance_scale is None else guidance_scale
    # of many requests for one image
    open_source = lru_cache(maxsize=1)(Source.open)
    pictures = []
    for i, request in enumerate(requests):
        sides = request.height, request.width, request.aspect_ratio
        if sides == (None, None, None):
            sides = height, width, aspect_ratio
        try:
            begin = _source(request, source)
            if begin is not None and sampler in STARTS_FROM_NOISE_ALONE:
                raise ValueError(f"sampler {sampler!r} cannot begin with an image; the others can")
            if begin is not None:
                of_image = pipeline.size_for(open_source(begin)[0])
                if sides[2] is None:
                    sides = sides[0] or of_image[0], sides[1] or of_image[1], None
            rows, columns = pipeline.size(*sides)
            check(
                sampler=sampler,
                steps=request.steps or steps,
                guidance_scale=guidance_scale,
                guidance_mask=guidance_mask,
                seed=seed + i if request.seed is None else request.seed,
            )
        except ValueError as error:
            raise ValueError(f"{request.prompt!r}: {error}") from None
        negative, scale = request.negative_prompt, request.guidance_scale
        pictures.append(
            Picture(
                prompt=request.prompt,
                negative_prompt=negative_prompt if negative is None else negative,
                seed=seed + i if request.seed is None else request.seed,
                height=rows,
                width=columns,
                steps=request.steps or steps,
                sampler=sampler,
                guidance_scale=guidance_scale if scale is None else scale,
                guidance_mask=guidance_mask,
                source=begin,
            )
        )
    return pictures


def _source(request: Request, of_run: Source | None) -> Source | None:
    if request.image is not None:
        return Source(request.image, request.mask, request.strength)
    if of_run is not None:
        strength = of_run.strength if request.strength is None else request.strength
        return Source(of_run.image, request.mask or of_run.mask, strength)
    if request.mask is not None or request.strength is not None:
        raise ValueError("a `mask` or `strength` is named, and no `image` that it is for")
    return None


def draw(
    pipeline: PixArtPipeline,
    pictures: Sequence[Picture],
    folder: Path,
    *,
    batch_size: int = 8,
    note: Mapping[str, Any] | None = None,
    callback: Callable[[float, int], None] | None = None,
    preview: Callable[[Tensor], None] | None = None,
) -> list[Path]:
    """Draws pictures into a folder; those that it has already, with the same recipe, stay.

    Pictures of one size and settings are drawn together. Each PNG carries its recipe as JSON in
    the text chunk "pixart"; a digest of it, which covers the weights, is in the file's name.

    Args:
        note: written into each recipe, without being a part of what decides the picture.
        callback: called as ``callback(done, total)`` with numbers of pictures, those in the works
            counted by the share of their steps.
        preview: see ``PixArtPipeline``.

    Returns:
        a path for each picture; equal ones share theirs.
    """
    weights = pipeline.identity
    recipes = [{**picture.recipe(), "weights": weights} for picture in pictures]
    paths = [folder / _file_name(recipe) for recipe in recipes]
    todo = {
        path: (picture, recipe)
        for path, picture, recipe in zip(paths, pictures, recipes, strict=True)
        if not path.exists()
    }
    total = len(set(paths))
    drawn = total - len(todo)
    groups: dict[Picture, list[Path]] = {}
    for path, (picture, _) in todo.items():
        alike = dataclasses.replace(picture, prompt="", seed=0)
        groups.setdefault(alike, []).append(path)

    def progress(calls: int, of_calls: int) -> None:
        if callback is not None:
            callback(drawn + len(batch) * calls / of_calls, total)

    if callback is not None:
        callback(drawn, total)
    if not todo:
        pipeline.free_text_encoder()
    at_once = ENCODED_AT_ONCE if pipeline.memory == "low" else 1
    turns: list[list[tuple[Picture, list[Path]]]] = []
    waiting = at_once
    for alike, members in groups.items():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            if waiting + len(batch) > at_once:
                turns.append([])
                waiting = 0
            turns[-1].append((alike, batch))
            waiting += len(batch)
    for several in turns:
        encoded = [
            pipeline.encode([todo[path][0].prompt for path in members], alike.negative_prompt)
            for alike, members in several
        ]
        for (alike, batch), prompts in zip(several, encoded, strict=True):
            image, mask = alike.source.open() if alike.source else (None, None)
            images = pipeline(
                prompts,
                height=alike.height,
                width=alike.width,
                seed=[todo[path][0].seed for path in batch],
                steps=alike.steps,
                sampler=alike.sampler,
                guidance_scale=alike.guidance_scale,
                guidance_mask=alike.guidance_mask,
                image=image,
                mask=mask,
                strength=alike.source.strength if alike.source else None,
                batch_size=batch_size,
                callback=progress,
                preview=preview,
            )
            notes = {**(note or {})}
            if alike.source is not None:
                notes["image_file"] = alike.source.image.name
            for path, drawing in zip(batch, images, strict=True):
                info = PngInfo()
                info.add_itxt("pixart", json.dumps({**todo[path][1], **notes}))
                write_atomically(path, partial(drawing.save, format="PNG", pnginfo=info))
            drawn += len(batch)
    return paths


def sheet_of(paths: Sequence[Path], texts: Sequence[str], *, side: int = 192) -> Image.Image:
    """A contact sheet of pictures on disk, of which it never holds two in full."""
    small = []
    for path in paths:
        with Image.open(path) as image:
            image.thumbnail((side, image.height))
            small.append(image.convert("RGB"))
    return contact_sheet(small, texts, side=side)


def _file_name(recipe: Mapping[str, Any]) -> str:
    words = "".join(c if c.isalnum() else "-" for c in recipe["prompt"].lower())
    # file systems count bytes
    words = words.encode()[:80].decode(errors="ignore").strip("-")
    digest = _digest(json.dumps(recipe, sort_keys=True).encode())
    return f"{words or 'picture'}-{recipe['seed']}-{digest[:8]}.png"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
