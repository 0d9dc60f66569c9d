"""What may be asked for: each bound, and what is said about it."""

from __future__ import annotations

import pytest
from generation.small_pipeline import small_pipeline

from pixart.generation import PixArtPipeline
from pixart.webui.limits import Limits, Rate

LIMITS = Limits(side=24, steps=9, prompt=10)


@pytest.fixture(scope="module")
def pipeline() -> PixArtPipeline:
    return small_pipeline()


def test_what_is_left_open_is_the_models(pipeline: PixArtPipeline) -> None:
    first, second = (LIMITS.picture({"prompt": " cat "}, pipeline, "ddim") for _ in range(2))
    assert (first.prompt, first.negative_prompt, first.sampler) == ("cat", "", "ddim")
    assert (first.height, first.width) == pipeline.size()
    assert first.guidance_scale == pipeline.guidance_scale
    # 20 are usual, and more than are allowed
    assert first.steps == 9
    assert first.seed != second.seed
    distilled = LIMITS.picture({"prompt": "cat"}, pipeline, "lcm")
    assert (distilled.steps, distilled.guidance_scale) == (4, 1)


def test_what_is_asked_for_is_drawn(pipeline: PixArtPipeline) -> None:
    asked = {"prompt": "0123456789", "negative_prompt": "bad", "height": 24, "width": 4,
             "seed": 2**53 - 1, "steps": 9, "guidance_scale": 30}  # fmt: skip
    picture = LIMITS.picture(asked, pipeline, "ddim")
    assert {key: getattr(picture, key) for key in asked} == asked
    wide = LIMITS.picture({"prompt": "a", "aspect_ratio": "16:9"}, pipeline, "ddim")
    assert (wide.height, wide.width) == pipeline.size(aspect_ratio="16:9")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "`prompt` is missing"),
        ({"prompt": "  "}, "`prompt` is '  '; accepted: String should have at least 1 character"),
        ({"prompt": "x" * 11}, "`prompt` is 'xxxxxxxxxxx'; accepted: String should have at most"),
        ({"prompt": "a", "negative_prompt": "x" * 11}, "`negative_prompt` is 'xxx"),
        ({"prompt": "\ud800"}, r"`prompt` is '\ud800'; accepted: a valid string"),
        ({"prompt": 5}, "`prompt` is 5; accepted: a valid string"),
        ({"prompt": "a", "height": 28}, "`height` is 28; accepted: up to 24"),
        ({"prompt": "a", "width": 28}, "`width` is 28; accepted: up to 24"),
        ({"prompt": "a", "width": 5}, "`width` is 5; accepted: a multiple of 4"),
        ({"prompt": "a", "width": 0}, "`width` is 0; accepted: greater than 0"),
        ({"prompt": "a", "aspect_ratio": "1:4"}, "`height` is 32; accepted: up to 24"),
        ({"prompt": "a", "aspect_ratio": "wide"}, "aspect ratio is 'wide'"),
        ({"prompt": "a", "steps": 10}, "`steps` is 10; accepted: less than or equal to 9"),
        ({"prompt": "a", "steps": 0}, "`steps` is 0; accepted: greater than or equal to 1"),
        ({"prompt": "a", "steps": 2.5}, "`steps` is 2.5; accepted: a valid integer"),
        ({"prompt": "a", "guidance_scale": 31}, "`guidance_scale` is 31"),
        ({"prompt": "a", "guidance_scale": 0.5}, "`guidance_scale` is 0.5"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"prompt": "a", "seed": -1}, "`seed` is -1"),
        ({"prompt": "a", "seed": 2**53}, "`seed` is 9007199254740992"),
        ({"prompt": "a", "seed": True}, "`seed` is True"),
        ({"prompt": "a", "image": "/etc/passwd"}, "`image` is not known"),
        ({"steps": 0, "seed": -1}, "`prompt` is missing; `seed` is -1"),
        (["a"], "`the body` is ['a']"),
    ],
    ids=ascii,
)  # fmt: skip
def test_what_is_refused(pipeline: PixArtPipeline, asked: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        LIMITS.picture(asked, pipeline, "ddim")
    assert message in str(error.value)


def test_a_long_prompt_is_not_repeated(pipeline: PixArtPipeline) -> None:
    with pytest.raises(ValueError) as error:
        LIMITS.picture({"prompt": "x" * 10**6}, pipeline, "ddim")
    assert len(str(error.value)) < 200


def test_so_many_a_minute_for_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    rate = Rate(2)
    assert rate.wait("a") == 0
    rate.count("a")
    now += 10
    # asking is free
    assert [rate.wait("a") for _ in range(3)] == [0] * 3
    rate.count("a")
    assert rate.wait("a") == 50
    assert rate.wait("b") == 0
    now += 50.5
    # the first has left the minute, the second has not
    assert rate.wait("a") == 0
    rate.count("a")
    assert 9 < rate.wait("a") < 10
    now += 61
    rate.count("c")
    assert list(rate._times) == ["c"]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::9", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_a_household_is_one_client(first: str, second: str, same: bool) -> None:
    rate = Rate(1)
    rate.count(first)
    assert rate.wait(first) > 0
    assert (rate.wait(second) > 0) is same
