"""The papers' picture sizes: about as many pixels as the square, for each of 33 shapes or more."""

from __future__ import annotations

import re

from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN


def nearest_size(aspect_ratio: str, base: int, multiple: int) -> tuple[int, int]:
    """The size in the table of ``base`` pixels whose ratio is nearest to the one that is asked.

    At 256, 512, 1024 and 2048 pixels these are the sizes that PixArt was trained at. Models of
    another size get the table of 1024 pixels, scaled and rounded to what they can draw.

    Args:
        aspect_ratio: width to height, as "16:9".
        base: side in pixels of the square that the model was trained at.
        multiple: what both sides are multiples of.

    Returns:
        height and width in pixels.

    Raises:
        ValueError: ``aspect_ratio`` is not of that form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", aspect_ratio)
    width, height = map(float, match.groups()) if match else (0, 0)
    if not width or not height:
        raise ValueError(f"aspect ratio is {aspect_ratio!r}; accepted: width:height, as 16:9")
    table, side = ASPECT_RATIO_1024_BIN, 1024
    if base == 2048:
        table, side = ASPECT_RATIO_2048_BIN, 2048
    nearest = min(table, key=lambda ratio: abs(float(ratio) - height / width))
    rows, columns = (max(1, round(x * base / side / multiple)) * multiple for x in table[nearest])
    return rows, columns
