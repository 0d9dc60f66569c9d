"""Who gets in: tokens, names of this machine, other sites' pages, addresses, bodies."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page is an extra: pip install 'pixart-kernels[web]'")

from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from pixart.webui.access import COOKIE, Gate, is_loopback

HERE = "http://127.0.0.1:7860"


async def echo(scope, receive, send) -> None:
    await PlainTextResponse(f"inside {scope['path']}")(scope, receive, send)


def client(token: str | None = None, at: str = HERE) -> TestClient:
    return TestClient(Gate(echo, token, max_body=20), base_url=at, follow_redirects=False)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil", False),
     ("", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/assets/index.js", 200),
        ("/gradio_api/queue/data", 200),
        ("/pictures/x/y.png", 200),
        ("/gradio_api/upload", 404),
        ("/gradio_api/file=/etc/passwd", 404),
        ("/gradio_api/proxy=http://example.org", 404),
        ("/gradio_api/run/draw", 404),
        ("/monitoring", 404),
        ("/docs", 404),
    ],
)
def test_only_what_the_page_needs_is_there(path: str, status: int) -> None:
    assert client().get(path).status_code == status


def test_no_other_sites_names_and_pages() -> None:
    assert client(at="http://localhost:1").get("/").status_code == 200
    assert client(at="http://[::1]:1").get("/").status_code == 200
    for host in ("localhost.evil.example:1", "", "127.0.0.1@evil.example", "[::1]evil"):
        assert client().get("/", headers={"Host": host}).status_code == 403
    elsewhere = client(at="http://evil.example").get("/")
    assert elsewhere.status_code == 403
    assert "--token" in elsewhere.json()["error"]
    assert client().get("/", headers={"Origin": HERE}).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        answer = client().post("/api/generate", headers={"Origin": origin})
        assert answer.status_code == 403
        assert origin in answer.json()["error"]
    named = client("secret", at="http://studio.example")
    assert named.get("/", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_token_opens_the_api() -> None:
    gate = client("secret")
    assert gate.get("/pictures/x").status_code == 401
    answer = gate.get("/pictures/x", headers={"Authorization": "Bearer wrong"})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "wrong" in answer.json()["error"]
    # an address that a server's log or a referrer would tell on
    assert gate.get("/pictures/x?token=secret").status_code == 401
    right = {"Authorization": "Bearer secret".encode("latin-1")}
    assert gate.get("/pictures/x", headers=right).status_code == 200


@pytest.mark.parametrize("way", ["link", "form"])
def test_a_token_opens_the_page_and_leaves_the_address(way: str) -> None:
    gate = client("a secret")
    asks = gate.get("/", headers={"Accept": "text/html"})
    assert asks.status_code == 401
    assert "<form" in asks.text
    # told by a form, and not a second time by the browser's own window
    assert "WWW-Authenticate" not in asks.headers

    def enter(token: str) -> Any:
        if way == "link":
            return gate.get("/", params={"token": token}, headers={"Accept": "text/html"})
        return gate.post("/", data={"token": token}, headers={"Accept": "text/html"})

    assert "is wrong" in enter("no").text
    opened = enter("a secret")
    assert (opened.status_code, opened.headers["Location"]) == (303, "./")
    cookie = opened.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "secret" not in cookie
    assert gate.get("/").text == "inside /"
    assert gate.get("/pictures/x").status_code == 200
    stranger = TestClient(gate.app, base_url=HERE, cookies={f"{COOKIE}-7860": "made-up"})
    assert stranger.get("/").status_code == 401


def test_servers_of_one_machine_keep_their_cookies() -> None:
    # as a browser has it: cookies know no ports
    first, second = client("one", "http://127.0.0.1:1"), client("two", "http://127.0.0.1:2")
    first.get("/?token=one")
    second.get("/?token=two")
    both = {**first.cookies, **second.cookies}
    for gate in (first, second):
        browser = TestClient(gate.app, base_url=str(gate.base_url), cookies=both)
        assert browser.get("/").status_code == 200


def test_tokens_cannot_be_tried_without_end() -> None:
    gate = client("right")
    inside = TestClient(gate.app, base_url=HERE, follow_redirects=False)
    inside.get("/?token=right")
    tried = [gate.post("/", data={"token": f"{i}"}).status_code for i in range(4)]
    tried += [gate.get(f"/?token={i}").status_code for i in range(4)]
    tried += [gate.get("/", headers={"Authorization": f"Bearer {i}"}).status_code for i in range(4)]
    assert tried == [401] * 10 + [429] * 2
    # not even the right one is compared, else guesses were as many as anybody likes
    late = gate.get("/", headers={"Authorization": "Bearer right"})
    assert (late.status_code, 1 <= int(late.headers["Retry-After"]) <= 61) == (429, True)
    # but whoever is in stays in
    assert inside.get("/").status_code == 200
    elsewhere = TestClient(gate.app, base_url=HERE, client=("10.0.0.2", 1))
    assert elsewhere.get("/", headers={"Authorization": "Bearer right"}).status_code == 200


def test_bodies_are_bounded() -> None:
    gate = client()
    assert gate.post("/api/generate", content=b"x" * 20).status_code == 200
    answer = gate.post("/api/generate", content=b"x" * 21)
    assert answer.status_code == 413
    assert answer.json()["error"] == "the body has 21 bytes; accepted: up to 20"
    assert (
        gate.post("/api/generate", content=b"x", headers={"Content-Length": "9" * 5000}).status_code
        == 413
    )
    # a length beside chunks is not theirs
    for headers in ({}, {"Content-Length": "1", "Transfer-Encoding": "chunked"}):
        for method in ("POST", "PUT", "GET"):
            answer = gate.request(method, "/", content=iter([b"x"]), headers=headers)
            assert answer.status_code == 411
    assert gate.put("/", content=b"x" * 21).status_code == 413
    assert client("secret").post("/", content=b"token=" + b"x" * 21).status_code == 413


def test_a_browser_loads_nothing_from_elsewhere() -> None:
    for answer in (client().get("/"), client().get("/nowhere"), client("x").get("/")):
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "http" not in answer.headers["Content-Security-Policy"]
