"""Many pictures from one model: prompts from a file, batches, PNGs that know their recipe."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pixart.diffusion import defaults
from pixart.files import write_atomically
from pixart.generation.contact_sheet import contact_sheet
from pixart.generation.pipeline import PixArtPipeline, default_strength

# encoded before the first of them is drawn, where the text encoder is loaded for each time
ENCODED_AT_ONCE = 64


class Request(BaseModel):
    """One line of a file of prompts; what it leaves out is decided for the whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    negative_prompt: str | None = None
    height: Annotated[int, Field(gt=0)] | None = None
    width: Annotated[int, Field(gt=0)] | None = None
    aspect_ratio: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


def read_requests(path: Path) -> list[Request]:
    """Prompts from a file, one a line; in a .jsonl file each line is an object of `Request` keys.

    Blank lines are skipped. Paths of images and masks are relative to the file's folder.

    Raises:
        ValueError: one line for each problem, with the file's line number; or no prompt at all.
        OSError: the file cannot be read.
    """
    requests, problems = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    # not splitlines(): JSON may hold characters that it takes for a line's end
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
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
        """Image and mask, turned as a viewer shows them: cameras leave the turning to it."""
        mask = None if self.mask is None else ImageOps.exif_transpose(Image.open(self.mask))
        return ImageOps.exif_transpose(Image.open(self.image)), mask

    def recipe(self) -> dict[str, Any]:
        image, mask = self.open()
        pixels = {"image": image, "mask": mask}
        return {
            "strength": default_strength(mask) if self.strength is None else self.strength,
            **{name: _digest(x.tobytes()) for name, x in pixels.items() if x is not None},
        }


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
    names an image no mask and strength of the run's. Sides that are named nowhere are the image's,
    where there is one. Request ``i`` has the seed ``seed + i`` where it names none.

    Raises ValueError, naming the prompt, for a size that the model cannot draw, or a mask or
    strength without an image.
    """
    sampler = sampler or pipeline.sampler
    default_steps, default_scale = defaults(sampler, pipeline.guidance_scale)
    steps = default_steps if steps is None else steps
    guidance_scale = default_scale if guidance_scale is None else guidance_scale
    pictures = []
    for i, request in enumerate(requests):
        sides = request.height, request.width, request.aspect_ratio
        if sides == (None, None, None):
            sides = height, width, aspect_ratio
        try:
            begin = _source(request, source)
            if begin is not None and sides[2] is None:
                image, _ = begin.open()
                sides = sides[0] or image.height, sides[1] or image.width, None
            rows, columns = pipeline.size(*sides)
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
    batches = [
        (alike, members[start : start + batch_size])
        for alike, members in groups.items()
        for start in range(0, len(members), batch_size)
    ]
    at_once = max(1, ENCODED_AT_ONCE // batch_size) if pipeline.memory == "low" else 1
    for start in range(0, len(batches), at_once):
        several = batches[start : start + at_once]
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
                notes["image_file"] = str(alike.source.image)
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
