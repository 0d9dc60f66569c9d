"""Picture sizes of about one area, one for each of many aspect ratios: the papers' buckets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

# Rows and columns, in sixteenths of the square's side, of every size of the official tables: those
# that keep more than nine tenths of its area, from 1:4 to 4:1, but for one that they leave out. The
# code lists them as numbers, 40 at each base (PixArt-Sigma, diffusion/data/datasets/utils.py).
_SIXTEENTHS = [
    (rows, columns)
    for rows in range(8, 33)
    for columns in range(32, 7, -1)
    if 0.9 * 16 * 16 < rows * columns <= 16 * 16 and (rows, columns) != (21, 11)
]


def bucket_sizes(
    base: int, multiple: int, ratios: Iterable[str] | None = None
) -> list[tuple[int, int]]:
    """One size for each aspect ratio, none with more pixels than the square of ``base``.

    At 256, 512, 1024, 2048 and 2880 pixels these are the official training sizes, and at 4096
    those that the official code draws 4K with. Any other base has the same ratios, each side
    rounded down to what a model can take.

    Args:
        base: side of the square in pixels.
        multiple: what both sides are multiples of: the autoencoder's factor times the patch size.
        ratios: width to height, as "16:9"; None: the 40 of the papers.

    Returns:
        (height, width) in pixels, each once.

    Raises:
        ValueError: a ratio is not of that form.
    """
    if ratios is not None:
        sizes = [_size(base, multiple, ratio) for ratio in ratios]
    elif base == 2880:
        # a sixteenth is no multiple of what latents and patches need; the official table rounds
        # down to 64 pixels, except that one size is as wide as UHD
        sizes = _scaled(base, math.lcm(multiple, 64))
        uhd = {(2112, 3776): (2112, 3840), (3776, 2112): (3840, 2112)}
        sizes = [uhd.get(size, size) for size in sizes]
    else:
        sizes = _scaled(base, multiple)
    return list(dict.fromkeys(sizes))


def nearest(sizes: Iterable[tuple[int, int]], ratio: float) -> tuple[int, int]:
    """The size whose height over width is nearest to ``ratio``, by their difference.

    The official code rounds the ratios of its tables to hundredths before it compares.
    """
    return min(sizes, key=lambda size: abs(size[0] / size[1] - ratio))


def nearest_size(aspect_ratio: str, base: int, multiple: int) -> tuple[int, int]:
    """The (height, width) of :func:`bucket_sizes` nearest to a ratio, width to height as "16:9".

    Raises:
        ValueError: ``aspect_ratio`` is not of that form.
    """
    return nearest(bucket_sizes(base, multiple), 1 / _ratio(aspect_ratio))


def _scaled(base: int, multiple: int) -> list[tuple[int, int]]:
    def side(sixteenths: int) -> int:
        return max(1, sixteenths * base // (16 * multiple)) * multiple

    return [(side(rows), side(columns)) for rows, columns in _SIXTEENTHS]


def _size(base: int, multiple: int, aspect_ratio: str) -> tuple[int, int]:
    stretch = math.sqrt(_ratio(aspect_ratio))
    rows, columns = int(base / multiple / stretch), int(base / multiple * stretch)
    return max(1, rows) * multiple, max(1, columns) * multiple


def _ratio(aspect_ratio: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", aspect_ratio)
    width, height = map(float, match.groups()) if match else (0, 0)
    if not width or not height:
        raise ValueError(f"aspect ratio is {aspect_ratio!r}; accepted: width:height, as 16:9")
    return width / height
