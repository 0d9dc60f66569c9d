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

from pixart.files import write_atomically
from pixart.generation.contact_sheet import contact_sheet
from pixart.generation.pipeline import PixArtPipeline, default_strength


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


def read_requests(path: Path) -> list[Request]:
    """Prompts from a file, one a line; in a .jsonl file each line is an object of `Request` keys.

    Blank lines are skipped.

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
            requests.append(Request.model_validate(values))
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
        except ValidationError as error:
            problems += [f"{path}:{number}: {_problem(problem)}" for problem in error.errors()]
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


def resolve(
    requests: Sequence[Request],
    pipeline: PixArtPipeline,
    *,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    aspect_ratio: str | None = None,
    negative_prompt: str = "",
    steps: int = 20,
    sampler: str = "dpm-solver++",
    guidance_scale: float | None = None,
    guidance_mask: str = "official",
) -> list[Picture]:
    """Requests, with what they leave open as the run has it.

    A request that names a height, a width or an aspect ratio takes none of the run's. Request
    ``i`` has the seed ``seed + i`` where it names none.

    Raises ValueError, naming the prompt, for a size that the model cannot draw.
    """
    if guidance_scale is None:
        guidance_scale = pipeline.guidance_scale
    pictures = []
    for i, request in enumerate(requests):
        sides = request.height, request.width, request.aspect_ratio
        if sides == (None, None, None):
            sides = height, width, aspect_ratio
        try:
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
            )
        )
    return pictures


@dataclass(frozen=True)
class Source:
    """An image to begin with, and perhaps a mask: see ``PixArtPipeline``."""

    image: Image.Image
    mask: Image.Image | None = None
    strength: float | None = None

    @classmethod
    def open(cls, image: Path, mask: Path | None, strength: float | None) -> Source:
        """Reads them turned as a viewer shows them: cameras leave the turning to it."""
        masking = None if mask is None else ImageOps.exif_transpose(Image.open(mask))
        return cls(ImageOps.exif_transpose(Image.open(image)), masking, strength)

    def recipe(self) -> dict[str, Any]:
        pixels = {"image": self.image, "mask": self.mask}
        return {
            "strength": default_strength(self.mask) if self.strength is None else self.strength,
            **{name: _digest(x.tobytes()) for name, x in pixels.items() if x is not None},
        }


def draw(
    pipeline: PixArtPipeline,
    pictures: Sequence[Picture],
    folder: Path,
    *,
    source: Source | None = None,
    batch_size: int = 8,
    note: Mapping[str, Any] | None = None,
    callback: Callable[[float, int], None] | None = None,
) -> list[Path]:
    """Draws pictures into a folder; those that it has already, with the same recipe, stay.

    Pictures of one size and settings are drawn together. Each PNG carries its recipe as JSON in
    the text chunk "pixart"; a digest of it, which covers the weights, is in the file's name.

    Args:
        source: what all pictures begin with.
        note: written into each recipe, without being a part of what decides the picture.
        callback: called as ``callback(done, total)`` with numbers of pictures, those in the works
            counted by the share of their steps.

    Returns:
        a path for each picture; equal ones share theirs.
    """
    shared = {"weights": pipeline.identity, **(source.recipe() if source else {})}
    recipes = [{**dataclasses.asdict(picture), **shared} for picture in pictures]
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
    for alike, members in groups.items():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            texts = [todo[path][0].prompt for path in batch]
            images = pipeline(
                pipeline.encode(texts, alike.negative_prompt),
                height=alike.height,
                width=alike.width,
                seed=[todo[path][0].seed for path in batch],
                steps=alike.steps,
                sampler=alike.sampler,
                guidance_scale=alike.guidance_scale,
                guidance_mask=alike.guidance_mask,
                image=source.image if source else None,
                mask=source.mask if source else None,
                strength=source.strength if source else None,
                batch_size=batch_size,
                callback=progress,
            )
            for path, image in zip(batch, images, strict=True):
                info = PngInfo()
                info.add_itxt("pixart", json.dumps({**todo[path][1], **(note or {})}))
                write_atomically(path, partial(image.save, format="PNG", pnginfo=info))
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
