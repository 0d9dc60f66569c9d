"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from generation.small_pipeline import small_pipeline
from PIL import Image

pytest.importorskip("gradio", reason="the page is an extra: pip install 'pixart-kernels[web]'")
pytest.importorskip("playwright", reason="pip install playwright")

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from pixart.webui import studio as studio_module
from pixart.webui.app import build
from pixart.webui.limits import Limits
from pixart.webui.studio import Studio

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
STEPS = 6


class Brake:
    """While it is held, the model takes only the steps that it is given."""

    def __init__(self) -> None:
        self._free, self._given = threading.Event(), threading.Semaphore(0)
        self._free.set()

    def __call__(self, *_: object) -> None:
        end = time.monotonic() + 60
        while not (self._free.is_set() or self._given.acquire(timeout=0.01)):
            assert time.monotonic() < end

    @contextmanager
    def held(self) -> Iterator[None]:
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def give(self) -> None:
        self._given.release()


@pytest.fixture(scope="module")
def brake() -> Brake:
    return Brake()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, brake: Brake) -> Iterator[Studio]:
    pipeline = small_pipeline()
    pipeline.model.blocks[0].register_forward_pre_hook(brake)
    limits = Limits(side=32, steps=1000, rate=1000)
    studio = Studio(pipeline, limits, tmp_path_factory.mktemp("pictures"), {"model": "a <model>"})
    yield studio
    studio.close()


@contextmanager
def served(studio: Studio, token: str | None) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            build(studio, token), log_level="warning", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    with served(studio, None) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # containers that run tests as root have no sandbox to offer
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Opens pages; at the end, none of them had an error or asked another host for anything."""
    contexts, problems = [], []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and problems.append(said.text))
        page.on("request", lambda request: elsewhere(request.url))

    def elsewhere(url: str) -> None:
        if not url.startswith((address, "data:")):
            problems.append(url)

    def opens(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        watch(page)
        page.goto(address)
        page.get_by_role("button", name="Draw").wait_for()
        return page

    yield opens
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Page, prompt: str, steps: int = STEPS) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    field = page.get_by_role("spinbutton", name="Steps")
    field.fill(str(steps))
    field.press("Tab")
    page.get_by_role("button", name="Draw").click()


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_prompt_becomes_a_picture_before_ones_eyes(
    visit: Callable[..., Page],
    studio: Studio,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # none is left out for its price
    monkeypatch.setattr(studio_module, "PREVIEW_SHARE", 1)
    page = visit()
    # what the stage shows, in the order of showing it
    page.evaluate("""() => {
        window.shown = [];
        const look = () => {
            const image = document.querySelector('#stage img');
            if (image && window.shown.at(-1) !== image.src) window.shown.push(image.src);
        };
        const changes = {attributes: true, childList: true, subtree: true};
        new MutationObserver(look).observe(document.querySelector('#stage'), changes);
    }""")
    with brake.held():
        ask(page, "a cat")
        page.get_by_text("Drawing").wait_for()
        page.get_by_role("progressbar").wait_for()
        for step in range(1, 4):
            brake.give()
            page.wait_for_function(f"window.shown.length >= {step}")
    picture = page.locator("#stage").get_by_role("img", name="a cat")
    page.locator("#status").get_by_role("link", name="Download PNG").wait_for()
    *previews, final = page.evaluate("window.shown")
    assert len(previews) >= 3
    assert all(url.startswith("data:image/webp") for url in previews)
    assert final.endswith(".png")
    assert page.get_by_role("progressbar").count() == 0
    until(lambda: picture.evaluate("image => image.naturalWidth") == 16)

    with page.expect_download() as download:
        page.locator("#status").get_by_role("link", name="Download PNG").click()
    assert download.value.suggested_filename.startswith("a-cat-")
    png = Image.open(download.value.path())
    recipe = json.loads(png.text["pixart"])
    assert (recipe["prompt"], recipe["steps"], recipe["model"]) == ("a cat", STEPS, "a <model>")
    assert recipe["weights"] == studio.pipeline.identity
    assert page.get_by_label("Seed", exact=True).input_value() == str(recipe["seed"])
    assert f"seed {recipe['seed']}" in page.locator("#status").inner_text()
    (expected,) = studio.pipeline(["a cat"], seed=recipe["seed"], steps=STEPS)
    assert png.tobytes() == expected.tobytes()


def test_the_gallery_has_the_visit_and_settings_hold(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_label("New seed for each picture").uncheck()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Negative prompt").fill("bad art")
    page.get_by_label("Size").click()
    page.get_by_role("option", name="Wide 16:9").click()
    pictures = page.locator("#gallery").get_by_role("img")
    for i, prompt in enumerate(["a cat", "{{prompt}} <b onclick='x'>${1+1}</b> \" dog"]):
        ask(page, prompt, steps=2)
        pictures.nth(i).wait_for()
    assert [pictures.nth(i).get_attribute("alt") for i in range(2)] == [prompt, "a cat"]
    assert page.locator("#gallery b").count() == 0
    assert prompt in page.locator("#gallery").inner_text()
    assert "20 × 12 · 2 steps · guidance 4.5 · seed 7" in page.locator("#status").inner_text()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_role("link", name="Download PNG").nth(1).click()
    recipe = json.loads(Image.open(download.value.path()).text["pixart"])
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["seed"]) == ("a cat", "bad art", 7)
    # a visit is one page: others do not see it
    assert visit().locator("#gallery").get_by_role("img").count() == 0


def test_what_is_not_accepted_is_said(visit: Callable[..., Page]) -> None:
    page = visit()
    ask(page, "  ")
    alert = page.locator("#status").get_by_role("alert")
    alert.wait_for()
    assert "prompt" in alert.inner_text()
    page.get_by_label("Size").click()
    page.get_by_role("option", name="Other").click()
    page.get_by_label("Width").fill("36")
    ask(page, "a cat", steps=2)
    page.get_by_text("`width` is 36; accepted: up to 32").wait_for()
    page.get_by_label("Width").fill("24")
    page.get_by_label("Height").fill("8")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("24 × 8 · 2 steps").wait_for()


def test_cancel_ends_it(visit: Callable[..., Page], studio: Studio, brake: Brake) -> None:
    page = visit()
    assert page.get_by_role("button", name="Cancel").is_disabled()
    with brake.held():
        ask(page, "a cat", steps=900)
        brake.give()
        page.locator("#stage").get_by_role("img").wait_for()
        assert page.get_by_role("button", name="Draw").is_disabled()
        (job,) = studio._jobs
        page.get_by_role("button", name="Cancel").click()
        until(lambda: job.cancelled)
    page.get_by_text("Cancelled").wait_for()
    assert studio._jobs == []
    until(lambda: job.preview is None)
    assert page.locator("#stage").get_by_role("img").count() == 0
    ask(page, "a dog", steps=2)
    page.locator("#gallery").get_by_role("img", name="a dog").wait_for()


def test_those_who_wait_see_their_place(
    visit: Callable[..., Page], studio: Studio, brake: Brake
) -> None:
    first, second = visit(), visit()
    with brake.held():
        ask(first, "a cat", steps=900)
        first.get_by_text("Drawing").wait_for()
        (job,) = studio._jobs
        ask(second, "a dog", steps=2)
        second.get_by_text("Waiting: 1 before this one").wait_for()
        first.get_by_role("button", name="Cancel").click()
        until(lambda: job.cancelled)
    second.locator("#gallery").get_by_role("img", name="a dog").wait_for()


def test_leaving_ends_and_deletes(visit: Callable[..., Page], studio: Studio, brake: Brake) -> None:
    page = visit()
    ask(page, "a cat", steps=2)
    page.locator("#gallery").get_by_role("img").wait_for()
    (job,) = [job for job in studio._kept if job.picture.steps == 2][-1:]
    with brake.held():
        ask(page, "a dog", steps=900)
        page.get_by_text("Drawing").wait_for()
        (ended,) = studio._jobs
        page.close()
        until(lambda: ended.cancelled)
    until(lambda: not studio._jobs)
    until(lambda: not job.folder.exists())


def test_a_phone_shows_prompt_and_picture_at_once(visit: Callable[..., Page]) -> None:
    page = visit(viewport={"width": 390, "height": 844})
    ask(page, "a cat", steps=2)
    page.locator("#gallery").get_by_role("img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.evaluate("scrollTo(0, 0)")
    stage, settings, gallery = (
        page.locator(part).bounding_box() for part in ("#stage .frame", "#settings", "#gallery")
    )
    assert stage["y"] + stage["height"] < 844
    assert stage["y"] < settings["y"] < gallery["y"]


def test_nothing_of_it_is_a_public_endpoint(visit: Callable[..., Page], address: str) -> None:
    with urllib.request.urlopen(f"{address}config", timeout=60) as answer:
        calls = json.load(answer)["dependencies"]
    assert {call["api_visibility"] for call in calls} == {"private"}


def test_everything_has_a_name(visit: Callable[..., Page]) -> None:
    page = visit()
    for label in ("Prompt", "Negative prompt", "Size", "Seed", "New seed for each picture"):
        assert page.get_by_label(label, exact=True).count() == 1
    for label in ("Steps", "Guidance"):
        assert page.get_by_role("slider", name=label).count() == 1
        assert page.get_by_role("spinbutton", name=label).count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "PixArt"
    assert page.get_by_text("a <model>").count() == 1
    until(lambda: page.locator("#status").get_attribute("aria-live") == "polite")
    assert page.locator("html").get_attribute("lang") == "en"
    # Gradio's own links lead away from what is done here
    assert page.locator("footer").is_hidden() or page.locator("footer").count() == 0
    assert page.title() == "PixArt"


def test_a_token_is_asked_for(browser: Browser, studio: Studio) -> None:
    with served(studio, "a-secret") as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("a token is needed").fill("a-guess")
        page.get_by_role("button", name="Open").click()
        page.get_by_label("the token is wrong").fill("a-secret")
        page.get_by_role("button", name="Open").click()
        ask(page, "a cat", steps=2)
        page.locator("#gallery").get_by_role("img").wait_for()
        until(lambda: page.url == address)
        page.close()
