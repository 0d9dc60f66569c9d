"""The HTTP API: pictures, and every error with its status and one sentence."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generation.small_pipeline import small_pipeline
from PIL import Image

pytest.importorskip("gradio", reason="the page is an extra: pip install 'pixart-kernels[web]'")

from starlette.testclient import TestClient

from pixart.webui.app import build
from pixart.webui.limits import Limits
from pixart.webui.studio import Cancelled, Studio

ASKED = {"prompt": "a cat", "seed": 3, "steps": 2}


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    limits = Limits(side=32, queue=0, rate=5, prompt=100)
    studio = Studio(small_pipeline(), limits, tmp_path, {"model": "small"})
    yield studio
    studio.close()


@pytest.fixture
def api(studio: Studio) -> TestClient:
    return TestClient(build(studio, None), base_url="http://127.0.0.1:7860")


def error_of(api: TestClient, status: int, **request) -> str:
    answer = api.post("/api/generate", **request)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


def test_a_picture_with_its_recipe(api: TestClient, studio: Studio, tmp_path: Path) -> None:
    answer = api.post("/api/generate", json={**ASKED, "height": 12, "width": 20})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.size == (20, 12)
    recipe = json.loads(picture.text["pixart"])
    assert (recipe["prompt"], recipe["seed"], recipe["steps"]) == ("a cat", 3, 2)
    assert (recipe["model"], recipe["weights"]) == ("small", studio.pipeline.identity)
    # whoever asked has it
    assert not any(tmp_path.iterdir())


def test_errors(
    api: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "not JSON" in error_of(api, 400, content=b"{")
    assert "not JSON" in error_of(api, 400, content=b"\xff")
    assert "not JSON" in error_of(api, 400, content=b"[" * 30_000)
    assert "`steps` is 101" in error_of(api, 422, json={**ASKED, "steps": 101})
    assert "bytes" in error_of(api, 413, content=b"x" * 10**6)
    unknown = api.get("/api/generate")
    assert (unknown.status_code, list(unknown.json())) == (405, ["error"])
    monkeypatch.setattr(studio.pipeline, "encode", lambda *_: 1 / 0)
    # what went wrong inside is nobody else's business
    assert error_of(api, 500, json=ASKED) == "drawing failed; the server's log says why"

    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(studio.pipeline, "encode", runs_out)
    assert "smaller picture" in error_of(api, 500, json=ASKED)

    def refuses(*_: object) -> None:
        raise ValueError("`steps` is 2; accepted: 1")

    monkeypatch.setattr(studio.pipeline, "encode", refuses)
    assert error_of(api, 422, json=ASKED) == "`steps` is 2; accepted: 1"
    assert not any(tmp_path.iterdir())


def test_too_many_and_too_often(api: TestClient, studio: Studio) -> None:
    started, go = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        started.set()
        assert go.wait(60)

    hook = studio.pipeline.model.blocks[0].register_forward_pre_hook(wait)
    drawn: list[int] = []
    first = threading.Thread(
        target=lambda: drawn.append(api.post("/api/generate", json=ASKED).status_code)
    )
    first.start()
    assert started.wait(60)
    busy = api.post("/api/generate", json=ASKED)
    go.set()
    first.join(60)
    hook.remove()
    assert (busy.status_code, drawn) == (503, [200])
    assert "wait already" in busy.json()["error"] and int(busy.headers["Retry-After"]) >= 1
    for _ in range(4):
        assert api.post("/api/generate", json=ASKED).status_code == 200
    often = api.post("/api/generate", json=ASKED)
    assert often.status_code == 429
    assert 1 <= int(often.headers["Retry-After"]) <= 61


def test_who_hangs_up_is_not_drawn_for(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, submit = [], studio.submit
    monkeypatch.setattr(studio, "submit", lambda *asked: jobs.append(submit(*asked)) or jobs[0])
    body = json.dumps({**ASKED, "steps": 100}).encode()
    headers = [(b"host", b"127.0.0.1"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/api/generate", "query_string": b"",
             "headers": headers, "client": ("127.0.0.1", 1), "http_version": "1.1"}  # fmt: skip
    steps = []
    studio.pipeline.model.blocks[0].register_forward_hook(lambda *_: steps.append(1))
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

    async def receive() -> dict:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(_: dict) -> None: ...

    def wait(*_: object) -> None:
        end = time.monotonic() + 60
        while not (jobs and jobs[0].cancelled):
            assert time.monotonic() < end
            time.sleep(0.01)

    studio.pipeline.model.blocks[0].register_forward_hook(wait)
    asyncio.run(build(studio, None)(scope, receive, send))
    assert isinstance(jobs[0].future.exception(60), Cancelled)
    assert len(steps) == 1
    studio.close()
    assert not any(tmp_path.iterdir())


def test_words_that_are_not_read_are_told(api: TestClient) -> None:
    assert "PixArt-Notes" not in api.post("/api/generate", json=ASKED).headers
    long = {**ASKED, "prompt": "a cat on a “mat”, 犬", "negative_prompt": "b " * 50}
    for _ in range(2):
        first, second = json.loads(api.post("/api/generate", json=long).headers["PixArt-Notes"])
        assert first == "the prompt is too long; not read: ““mat”, 犬”"
        assert second.startswith("the negative prompt is too long") and len(second) < 160


def test_a_token_guards_all_of_it(studio: Studio) -> None:
    api = TestClient(build(studio, "secret"), base_url="http://10.0.0.1:7860")
    for path in ("/", "/config", "/theme.css", "/api/generate", "/gradio_api/queue/join"):
        assert api.get(path).status_code == 401
        assert api.post(path, json=ASKED).status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert api.post("/api/generate", json=ASKED, headers=right).status_code == 200
    assert api.get("/", headers=right).status_code == 200


def test_gradios_own_doors_are_shut(api: TestClient) -> None:
    # what the page needs is there
    assert api.get("/config").json()["footer_links"] == []
    for path in ("upload", "file=/etc/hostname", "info", "run/draw", "runs", "openapi.json"):
        assert api.get(f"/gradio_api/{path}").status_code == 404
        assert api.post(f"/gradio_api/{path}", content=b"{}").status_code == 404


def test_pictures_are_found_by_whoever_drew_them(api: TestClient, studio: Studio) -> None:
    job = studio.submit({**ASKED, "prompt": "a “cat”, 犬?"}, "a")
    name = job.future.result(60).name
    path = f"/pictures/{job.folder.name}/{name}"
    assert api.get(path).status_code == 404
    studio.keep(job)
    assert api.get(path).content == job.future.result().read_bytes()
    for other in (f"/pictures/{job.folder.name}/..%2F..%2Fx.png", f"/pictures/x/{name}"):
        assert api.get(other).status_code == 404
