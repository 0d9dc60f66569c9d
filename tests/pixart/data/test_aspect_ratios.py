"""Sizes by aspect ratio: the official tables, and their shape at every other base."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from hypothesis import given
from hypothesis import strategies as st

from pixart.data.aspect_ratios import bucket_sizes, nearest, nearest_size

# every table of PixArt-Sigma's diffusion/data/datasets/utils.py: ratio to (height, width)
OFFICIAL = json.loads(
    (Path(__file__).parents[2] / "data" / "official_buckets.json").read_text(encoding="utf-8")
)
TRAINED = [256, 512, 1024, 2048, 2880]


@pytest.mark.parametrize("base", TRAINED)
def test_training_sizes_are_the_official_ones(base: int) -> None:
    official = [tuple(size) for size in OFFICIAL[str(base)].values()]
    assert len(official) == 40
    assert bucket_sizes(base, 16) == official


@pytest.mark.parametrize("base", TRAINED)
def test_sizes_that_the_official_code_draws_are_found(base: int) -> None:
    # what it calls 2880 there is drawn at 4096
    sizes = bucket_sizes(4096 if base == 2880 else base, 16)
    drawn = OFFICIAL[f"{base}_TEST"]
    assert len(drawn) == 33
    assert {tuple(size) for size in drawn.values()} <= set(sizes)


@pytest.mark.parametrize(
    "table",
    [
        pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
        pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
        pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    ],
    ids=["256", "512", "1024", "2048"],
)
def test_sizes_of_diffusers_are_found(table: dict[str, list[float]]) -> None:
    base = int(table["1.0"][0])
    for ratio, size in table.items():
        assert nearest_size(f"1:{ratio}", base, 16) == tuple(size)


@pytest.mark.parametrize("base", TRAINED[:4])
def test_pictures_go_to_the_official_bucket(base: int) -> None:
    draw = random.Random(0)
    sizes, table = bucket_sizes(base, 16), OFFICIAL[str(base)]
    for _ in range(500):
        height, width = draw.randint(250, 1100), draw.randint(250, 1100)
        ratio = height / width
        official = table[min(table, key=lambda key: abs(float(key) - ratio))]
        ours = nearest(sizes, ratio)
        # their ratios are rounded to hundredths, so at a border either may be taken
        distances = [abs(size[0] / size[1] - ratio) for size in (ours, official)]
        assert ours == tuple(official) or abs(distances[0] - distances[1]) <= 0.01


def test_nearest_is_by_height_over_width() -> None:
    # by width over height, or by their logarithms, 2.4 would be nearer to 4
    assert nearest([(100, 100), (400, 100)], 2.4) == (100, 100)


@given(
    base=st.integers(64, 6000),
    multiple=st.sampled_from([8, 16, 32]),
    ratios=st.none() | st.lists(st.sampled_from(["1:1", "16:9", "2:3", "4:1", "1:2.35"])),
)
def test_sizes_fit_the_model_and_keep_the_area(
    base: int, multiple: int, ratios: list[str] | None
) -> None:
    sizes = bucket_sizes(base, multiple, ratios)
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0 < min(height, width)
        assert height * width <= base**2
        # what rounding both sides down can cost at most, of a tenth less than the square
        assert (height + multiple) * (width + multiple) > 0.9 * base**2


@pytest.mark.parametrize(
    ("base", "ratios", "sizes"),
    [
        (960, ["16:9", "9:16", "1:1"], [(720, 1280), (1280, 720), (960, 960)]),
        (768, ["16:9"], [(576, 1024)]),
        (1024, ["2.35:1"], [(656, 1568)]),
        (512, ["1:1", "100:101"], [(512, 512), (512, 496)]),
    ],
    ids=str,
)
def test_ratios_of_ones_own(base: int, ratios: list[str], sizes: list) -> None:
    assert bucket_sizes(base, 16, ratios) == sizes


@pytest.mark.parametrize(
    ("asked", "base", "multiple", "size"),
    [
        ("16:9", 1024, 16, (768, 1344)),
        ("9:16", 1024, 16, (1344, 768)),
        ("3:2", 512, 16, (416, 608)),
        ("10:1", 512, 16, (256, 1024)),
        ("2.35:1", 2048, 16, (1280, 3072)),
        ("16:9", 2880, 16, (2112, 3840)),
        ("16:9", 4096, 16, (3072, 5376)),
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
    with pytest.raises(ValueError, match="accepted: width:height, as 16:9"):
        bucket_sizes(512, 16, ["1:1", wrong])


def test_a_side_is_never_nothing() -> None:
    assert bucket_sizes(16, 16) == [(16, 32), (16, 16), (32, 16)]
    assert bucket_sizes(16, 16, ["10:1"]) == [(16, 48)]
