"""One thread, a line of bounded length, previews that cost little, and nothing left behind."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from generation.small_pipeline import small_pipeline
from PIL import Image
from torch.nn import functional as F

from pixart.generation import PixArtPipeline
from pixart.generation.pipeline import to_image
from pixart.webui import studio as studio_module
from pixart.webui.limits import Limits, Refused
from pixart.webui.studio import PREVIEW_SIDE, Cancelled, Job, Previews, Studio, data_url

ASKED = {"prompt": "a cat", "seed": 3, "steps": 3}


@pytest.fixture(scope="module")
def pipeline() -> PixArtPipeline:
    return small_pipeline()


@pytest.fixture
def studio(pipeline: PixArtPipeline, tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(pipeline, Limits(side=32, queue=2, rate=6), tmp_path, {"model": "small"})
    yield studio
    studio.close()


class Held:
    """Stops the model before its first call until it is let go."""

    def __init__(self, pipeline: PixArtPipeline) -> None:
        self.started, self.go = threading.Event(), threading.Event()
        self._hook = pipeline.model.blocks[0].register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.started.set()
        assert self.go.wait(60)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._hook.remove()


def finished(*jobs: Job) -> list[str]:
    """What became of them."""
    return [type(job.future.exception(60)).__name__ for job in jobs if not job.future.cancelled()]


def test_draws_what_the_command_draws(studio: Studio, pipeline: PixArtPipeline) -> None:
    job = studio.submit(ASKED, "a")
    png = Image.open(job.future.result(60))
    (expected,) = pipeline(["a cat"], seed=3, steps=3)
    assert png.tobytes() == expected.tobytes()
    recipe = json.loads(png.text["pixart"])
    assert recipe["weights"] == pipeline.identity
    assert (recipe["prompt"], recipe["seed"], recipe["model"]) == ("a cat", 3, "small")
    assert job.done == 1
    assert job.preview is not None


def test_the_line_has_an_end(studio: Studio, pipeline: PixArtPipeline) -> None:
    with Held(pipeline) as held:
        first, second, third = (studio.submit(ASKED, "a") for _ in range(3))
        assert held.started.wait(60)
        assert [studio.ahead(job) for job in (first, second, third)] == [0, 1, 2]
        with pytest.raises(Refused, match="2 pictures wait already") as error:
            studio.submit(ASKED, "a")
        assert error.value.status == 503
        with pytest.raises(ValueError, match="`steps` is 0"):
            studio.submit({**ASKED, "steps": 0}, "a")
        second.cancel()
        assert [studio.ahead(job) for job in (first, third)] == [0, 1]
        fourth = studio.submit(ASKED, "a")
    assert finished(first, third, fourth) == ["NoneType"] * 3
    with pytest.raises(CancelledError):
        second.future.result()


def test_a_client_asks_only_so_often(studio: Studio) -> None:
    for _ in range(6):
        studio.submit(ASKED, "a").future.result(60)
    with pytest.raises(Refused, match="6 pictures a minute are drawn for one client") as error:
        studio.submit(ASKED, "a")
    assert error.value.status == 429
    assert 0 < error.value.retry_after <= 60
    studio.submit(ASKED, "b").future.result(60)


def test_cancelling_stops_at_the_next_step(studio: Studio, pipeline: PixArtPipeline) -> None:
    calls: list[int] = []
    with Held(pipeline) as held:
        job = studio.submit({**ASKED, "steps": 50}, "a")
        counter = pipeline.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        assert held.started.wait(60)
        job.cancel()
    assert finished(job) == ["Cancelled"]
    counter.remove()
    assert len(calls) == 1
    # and the next one is drawn
    assert studio.submit(ASKED, "a").future.result(60).is_file()


def test_what_nobody_waits_for_is_deleted(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio_module, "KEPT_PICTURES", 2)
    jobs = [studio.submit({**ASKED, "seed": i}, "a") for i in range(3)]
    names = [job.future.result(60).name for job in jobs]
    for job in jobs:
        studio.keep(job)
    # the oldest made room
    found = [studio.find(job.folder.name, name) for job, name in zip(jobs, names, strict=True)]
    assert found == [None, *(job.future.result() for job in jobs[1:])]
    assert studio.find(jobs[1].folder.name, names[2]) is None
    assert studio.find(jobs[1].folder.name, f"../{jobs[2].folder.name}/{names[2]}") is None
    # a kept picture outlives the wait for it
    studio.drop(jobs[1])
    assert jobs[1].future.result().is_file()
    studio.forget(jobs[1])
    other = studio.submit(ASKED, "a")
    other.future.result(60)
    studio.drop(other)
    assert list(tmp_path.iterdir()) == [jobs[2].folder]


def test_a_cancel_that_comes_too_late_leaves_nothing(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, vae = studio.pipeline.vae.decode, studio.pipeline.vae

    def cancels_while_decoding(latents, **options):
        if job.done == 1:
            studio.drop(job)
        return decode(latents, **options)

    monkeypatch.setattr(vae, "decode", cancels_while_decoding)
    with Held(studio.pipeline):
        job = studio.submit(ASKED, "a")
    assert job.future.result(60)
    studio.close()
    assert not any(tmp_path.iterdir())


def test_closing_ends_everything(studio: Studio, pipeline: PixArtPipeline) -> None:
    with Held(pipeline) as held:
        jobs = [studio.submit({**ASKED, "steps": 50}, "a") for _ in range(2)]
        assert held.started.wait(60)
        closing = threading.Thread(target=studio.close)
        closing.start()
        while not jobs[1].future.cancelled():
            assert closing.is_alive()
    closing.join(60)
    assert isinstance(jobs[0].future.exception(), Cancelled)


def test_a_failure_is_logged_and_the_next_picture_drawn(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(studio.pipeline, "encode", lambda *_: 1 / 0)
        assert finished(studio.submit(ASKED, "a")) == ["ZeroDivisionError"]
    assert "a cat" in caplog.text and "ZeroDivisionError" in caplog.text
    assert finished(studio.submit(ASKED, "a")) == ["NoneType"]


def test_words_that_are_not_read_are_told(studio: Studio) -> None:
    long = {**ASKED, "prompt": "a b c d e f"}
    asked = [ASKED, long, long, {**long, "negative_prompt": "bad"}]
    told = []
    for each in asked:
        job = studio.submit(each, "a")
        assert finished(job) == ["NoneType"]
        told.append(job.notes)
    assert told == [[], *[["the prompt is too long; not read: “e f”"]] * 3]


def test_who_sees_a_picture_finished_may_keep_it_and_ask_for_the_next(
    pipeline: PixArtPipeline, tmp_path: Path
) -> None:
    studio = Studio(pipeline, Limits(side=32, queue=0), tmp_path, {"model": "small"})
    seen = threading.Event()
    with Held(pipeline) as held:
        job = studio.submit(ASKED, "a")
        assert held.started.wait(60)
        # callbacks come in the order of adding: the next one is long in coming
        job.future._done_callbacks.insert(0, lambda _: seen.wait(60))
    path = job.future.result(60)
    studio.keep(job)
    studio.drop(job)
    assert not job.cancelled
    # no room but for one
    studio.submit({**ASKED, "seed": 4}, "a")
    seen.set()
    studio.close()
    assert studio.find(job.folder.name, path.name) == path
    assert path.is_file()


def test_previews_take_a_tenth_of_the_time(pipeline: PixArtPipeline) -> None:
    now = 0.0

    class Slow:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += 2
            return pipeline.vae.decode(latents)

    previews, latents, drawn = Previews(Slow(), clock=lambda: now), torch.zeros(1, 4, 4, 4), []
    for step in range(50):
        now += 1
        if previews(latents) is not None:
            drawn.append(step)
    # 2 s of decoding, then 18 of drawing
    assert drawn == [0, 18, 36]


@pytest.mark.parametrize(
    ("latents", "pixels"),
    [((4, 6), (12, 8)), ((32, 16), (32, 64)), ((33, 32), (62, 64)), ((64, 256), (64, 16)),
     ((200, 2), (2, 64))],
)  # fmt: skip
def test_previews_are_small(pipeline: PixArtPipeline, latents, pixels) -> None:
    assert PREVIEW_SIDE * pipeline.vae.factor == 64
    image = Previews(pipeline.vae)(torch.zeros(1, 4, *latents))
    assert image is not None and image.size == pixels


def test_previews_are_what_the_latents_decode_to(pipeline: PixArtPipeline) -> None:
    seen: list[torch.Tensor] = []

    class Watched:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents)
            return pipeline.vae.decode(latents)

    for side in (8, 64):
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(side))
        image = Previews(Watched())(latents)
        assert image.tobytes() == to_image(pipeline.vae.decode(seen[-1])[0]).tobytes()
        whole = latents if side == 8 else F.avg_pool2d(latents, 2)
        assert torch.allclose(seen[-1], whole, atol=1e-6)


@pytest.mark.parametrize(("side", "exact"), [(64, True), (65, False)])
def test_pixels_that_will_be_seen_are_exact(side: int, exact: bool) -> None:
    noise = torch.randint(256, (side, side, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise)
    url = data_url(image)
    kind, data = url.split(",")
    assert kind == "data:image/webp;base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    assert (decoded.tobytes() == image.tobytes()) is exact
