"""Sizes by aspect ratio: the papers' where they have a table, and its shape elsewhere."""

from __future__ import annotations

import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma

from pixart.data.aspect_ratios import nearest_size

TABLES = {
    256: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
    512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
}


@pytest.mark.parametrize("base", TABLES)
def test_every_size_of_the_papers_is_found(base: int) -> None:
    for ratio, size in TABLES[base].items():
        assert nearest_size(f"1:{ratio}", base, 16) == tuple(size)


@pytest.mark.parametrize(
    ("asked", "base", "multiple", "size"),
    [
        ("16:9", 1024, 16, (768, 1344)),
        ("9:16", 1024, 16, (1344, 768)),
        ("3:2", 512, 16, (416, 608)),
        ("10:1", 512, 16, (256, 1024)),
        ("2.35:1", 2048, 16, (1280, 3072)),
        ("16:9", 32, 8, (24, 40)),
        ("1:100", 32, 8, (64, 16)),
    ],
    ids=str,
)
def test_the_nearest_is_taken(asked: str, base: int, multiple: int, size: tuple) -> None:
    assert nearest_size(asked, base, multiple) == size


@pytest.mark.parametrize("wrong", ["", "16", "16/9", "16:0", "0:9", "-1:2", "a:b", "1:2:3"])
def test_other_words_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="accepted: width:height, as 16:9"):
        nearest_size(wrong, 512, 16)
