"""Images with captions from a folder, checked and prepared one sample at a time.

Pillow alone decodes and resizes. A sample that cannot be used raises `BadSample` with the reason;
whoever drives the source decides how many of those are too many.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from pixart.data.aspect_ratios import nearest
from pixart.files import digest

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 100_000_000  # decoded RGB stays under 300 MB; larger files are mostly bombs or maps
MIN_SIDE = 8  # one latent pixel of the usual 8x VAEs
# longer side over shorter, for buckets that end at 4 as the papers'; they too drop what is taller
MAX_RATIO = 4.5


class BadSample(Exception):
    """One sample of a source cannot be used; the source itself is fine."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class ImageSample(NamedTuple):
    key: str  # unique within the source, stable across runs
    image: torch.Tensor  # (3, H, W) float32 in [-1, 1]
    caption: str
    size: tuple[int, int]  # (height, width) in pixels of the upright original


class ImageSource(Protocol):
    """What the feature cache reads: indexable from several threads, keys known without decoding."""

    @property
    def keys(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageSample: ...

    def stamp(self, index: int) -> str:
        """What changes when the sample's files are written or copied; told without reading them."""
        ...

    def fingerprint(self, index: int) -> str:
        """Of picture and caption, wherever they lie; empty where they cannot be read."""
        ...


class ImageFolder:
    """A folder of images with captions.

    With a `metadata.jsonl` (rows `{"file_name": ..., "text": ...}`, or `"caption"` in place of
    `"text"`) or a `metadata.csv` with such columns, the layouts of Hugging Face's `imagefolder`,
    the rows are the samples. Without one, every image below the folder is a sample, and `x.png`
    takes its caption from `x.txt`.

    Args:
        folder: where the images are; keys are paths relative to it, with forward slashes.
        size: what each image is cut to: side in pixels of a square, or (height, width) of several
            buckets, of which the nearest in shape is taken. The largest centred part of that
            shape is resampled (Lanczos, antialiased), which equals covering and then cropping and
            distorts nothing. None keeps the image as it is.

    Items are `ImageSample`s. `BadSample` is raised for a missing, unreadable or truncated image,
    a missing, empty or undecodable caption, more than 100 megapixels, a side under 8 pixels, a
    path (or link) that leaves the folder and, for buckets, an image longer than 4.5 to 1.
    """

    def __init__(self, folder: str | Path, size: int | list[tuple[int, int]] | None = None) -> None:
        is_side = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if not is_side and size is not None and not (isinstance(size, list) and size):
            raise ValueError(
                f"size={size!r}: a positive side length in pixels, a list of (height, width) or "
                "None is accepted; pass None to keep each image's own size"
            )
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"folder={str(folder)!r} is not a folder; pass the folder that holds the images"
            )
        self.size = size
        self._root = self.folder.resolve()
        tables = (self.folder / name for name in ("metadata.jsonl", "metadata.csv"))
        table = next((path for path in tables if path.is_file()), None)
        # (key, caption) for rows of the metadata file, (key, None) where a sidecar has the caption
        # and (key, BadSample) for a row that is no use at all
        self._rows: list[tuple[str, str | BadSample | None]]
        if table is not None:
            self._rows = _read_metadata(table)
        else:
            self._rows = [
                (path.relative_to(self.folder).as_posix(), None)
                for path in sorted(self.folder.rglob("*"))
                if path.suffix.lower() in IMAGE_SUFFIXES
            ]
        self.keys = [key for key, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageSample:
        key, caption = self._rows[index]
        if isinstance(caption, BadSample):
            # a fresh exception: one raised twice would drag the first traceback along
            raise BadSample(caption.key, caption.reason)
        try:
            path = (self.folder / key).resolve()
            path.exists()
        except (OSError, ValueError) as error:
            raise BadSample(key, f"the file name cannot be used ({error})") from error
        if not path.is_relative_to(self._root):
            raise BadSample(key, f"the path leaves the folder (it leads to {path})")
        if caption is None:
            caption = _read_sidecar(key, self.folder / Path(key).with_suffix(".txt"), self._root)
        caption = caption.strip()
        if not caption:
            raise BadSample(key, "the caption is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise BadSample(key, "the caption is no valid Unicode")
        image = _load_rgb(key, path)
        height, width = image.height, image.width
        if isinstance(self.size, int):
            image = _cover(image, (self.size, self.size))
        elif self.size is not None:
            image = _cover(image, _bucket(key, image, self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return ImageSample(key, pixels.to(torch.float32) / 127.5 - 1.0, caption, (height, width))

    def stamp(self, index: int) -> str:
        """Of the image's size and times, and of the caption or those of its file."""
        key, caption = self._rows[index]
        image = self.folder / key
        beside = _stamp(image.with_suffix(".txt")) if caption is None else str(caption)
        return _short(f"{_stamp(image)} {beside}", 16)

    def fingerprint(self, index: int) -> str:
        """Of the bytes of the image and of its caption."""
        key, caption = self._rows[index]
        image = self.folder / key
        try:
            # a device never ends
            if isinstance(caption, BadSample) or not image.is_file():
                return ""
            if caption is None:
                caption = image.with_suffix(".txt").read_text("utf-8-sig", "surrogateescape")
            return _short(f"{digest(image)} {caption.strip()}", 32)
        except (OSError, ValueError):
            return ""


class UncaptionedFolder(ImageFolder):
    """An :class:`ImageFolder` whose images need no captions; what they have is not read."""

    def __init__(self, folder: str | Path, size: int | list[tuple[int, int]] | None = None) -> None:
        super().__init__(folder, size)
        self._rows = [(key, "no caption") for key in self.keys]


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return "-"
    # an archive gives files of equal size the same date, but none can give them st_ctime
    return f"{found.st_size}@{found.st_mtime_ns}@{found.st_ctime_ns}"


def _short(text: str, digits: int) -> str:
    """Of SHA-256, so many hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def _read_metadata(path: Path) -> list[tuple[str, str | BadSample | None]]:
    rows: list[tuple[str, str | BadSample | None]] = []
    for where, row in _table(path):
        if isinstance(row, BadSample):
            rows.append((where, row))
            continue
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            rows.append((where, BadSample(where, 'the row has no "file_name"')))
            continue
        caption = row.get("text", row.get("caption"))
        if isinstance(caption, str):
            rows.append((name, caption))
        else:
            rows.append((name, BadSample(name, f'no "text" or "caption" string in {where}')))
    return rows


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row is, and what it says: of a .jsonl or a .csv."""
    if path.suffix == ".csv":
        reader = csv.DictReader(_lines(path))
        for row in reader:
            yield f"{path.name}:{reader.line_num}", row
        return
    for number, line in enumerate(_lines(path), 1):
        where = f"{path.name}:{number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except json.JSONDecodeError as error:
            yield where, BadSample(where, f"the row is not JSON ({error})")


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number} is not UTF-8; save it as UTF-8") from error


def _read_sidecar(key: str, path: Path, root: Path) -> str:
    if not path.is_file():
        raise BadSample(key, f"no caption: {path.name} does not exist")
    if not path.resolve().is_relative_to(root):
        raise BadSample(key, f"the caption file leaves the folder (it leads to {path.resolve()})")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(key, f"the caption in {path.name} is not UTF-8 ({error})") from error


def _load_rgb(key: str, path: Path) -> Image.Image:
    """Decode upright, without transparency: alpha is composited on white."""
    if not path.is_file():
        raise BadSample(key, "the image file does not exist")
    try:
        with Image.open(path) as opened:
            # the header is enough for this, so a bomb is refused before its pixels are allocated
            if opened.width * opened.height > MAX_PIXELS:
                raise BadSample(
                    key, f"{opened.width}x{opened.height} is over {MAX_PIXELS // 10**6} megapixels"
                )
            if min(opened.size) < MIN_SIDE:
                raise BadSample(
                    key, f"{opened.width}x{opened.height} has a side under {MIN_SIDE} pixels"
                )
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except BadSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(key, f"absurdly large image ({error})") from error
    # Pillow's decoders answer damage with whatever they trip over: OSError, SyntaxError,
    # struct.error, EOFError, ...
    except Exception as error:
        raise BadSample(key, f"unreadable image ({type(error).__name__}: {error})") from error

    if image.mode.startswith("I;16"):
        # convert("RGB") would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise BadSample(key, f"pixel mode {image.mode} has no defined range; store 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _bucket(key: str, image: Image.Image, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    longest = max(max(size) / min(size) for size in sizes)
    limit = MAX_RATIO * max(1, longest / 4)
    if max(image.size) / min(image.size) > limit:
        raise BadSample(key, f"{image.width}x{image.height} is longer than {limit:.3g} to 1")
    return nearest(sizes, image.height / image.width)


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of `image` with the shape of `size`, (height, width), at that size.

    Resampling that part alone, instead of covering first and cropping after, keeps an extreme
    aspect ratio from allocating a strip of gigapixels.
    """
    height, width = size
    scale = min(image.width / width, image.height / height)
    # no more than the image, where the product was rounded up
    columns, rows = min(image.width, scale * width), min(image.height, scale * height)
    left, top = (image.width - columns) / 2, (image.height - rows) / 2
    box = (left, top, left + columns, top + rows)
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
