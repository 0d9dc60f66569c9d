"""Pictures with their prompts underneath, on one sheet."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
FONT_SIZE = 12
LINES = 3


def contact_sheet(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    columns: int | None = None,
    side: int = 112,
) -> Image.Image:
    """A grid of pictures, each scaled to ``side`` pixels across, with its text below.

    ``columns``: None makes the grid about as wide as it is high. Text beyond three lines is cut.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + 3
    heights = [round(side * image.height / image.width) for image in images]
    cell_width, cell_height = side + MARGIN, max(heights) + LINES * line + MARGIN
    rows = math.ceil(len(images) / columns)
    size = (columns * cell_width + MARGIN, rows * cell_height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    letters = int(side / font.getlength("n"))
    for i, (image, text, height) in enumerate(zip(images, texts, heights, strict=True)):
        left = MARGIN + i % columns * cell_width
        top = MARGIN + i // columns * cell_height
        # small pictures are shown as they are, pixel by pixel
        enlarged = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, height), enlarged), (left, top))
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder="…")
        for number, words in enumerate(lines):
            middle = left + (side - font.getlength(words)) / 2
            draw.text((middle, top + height + 2 + number * line), words, "black", font)
    return sheet
