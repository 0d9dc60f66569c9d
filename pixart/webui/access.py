"""Who may call which address, with how much, and what a browser may load."""

from __future__ import annotations

import html
import ipaddress
import re
import secrets
from http import HTTPStatus
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixart.webui.limits import Rate

COOKIE = "pixart"
WRONG_TOKENS_PER_MINUTE = 10
# ours, and of Gradio's what the page needs: nothing that reads or takes files
ADDRESSES = {
    "/",
    "/api/generate",
    "/config",
    "/favicon.ico",
    "/theme.css",
    "/gradio_api/cancel",
    "/gradio_api/queue/data",
    "/gradio_api/queue/join",
    "/gradio_api/startup-events",
}
FOLDERS = ("/assets/", "/static/", "/pictures/", "/gradio_api/heartbeat/")
# nothing comes from, or goes to, anywhere else; Gradio's templates are scripts in strings
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware that lets through what may pass, and answers the rest in one sentence.

    With a token, a request carries it as ``Authorization: Bearer ...``, or a browser its cookie,
    which it gets for ``/?token=...`` or a form. Without one, only addresses of this machine are
    served, so that no site can reach the page under a name of its own. No other site's page may
    call at all.

    Args:
        token: None where the server listens on loopback.
        max_body: bytes.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_body: int) -> None:
        self.app, self.token, self.max_body = app, token, max_body
        # not the token itself: what is stolen from a browser ends with this process
        self._cookie = secrets.token_urlsafe()
        self._wrong = Rate(WRONG_TOKENS_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "same-origin"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        answer = await self._check(Request(scope, receive)) or self.app
        await answer(scope, receive, send_with_policy)

    async def _check(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return problem(403, f"pages of {origin} may not call this server")
        # chunks have no length, and stand above one that is sent beside them
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            return problem(411, "the body's length is missing: send Content-Length, and no chunks")
        if len(length) > 9 or int(length) > self.max_body:
            return problem(413, f"the body has {length} bytes; accepted: up to {self.max_body}")
        if self.token is None:
            if not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
                return problem(403, f"{host} is not this machine: start the server with --token")
        elif (answer := await self._check_token(request, self.token)) is not None:
            return answer
        path = request.url.path
        if path not in ADDRESSES and not path.startswith(FOLDERS):
            return problem(404, f"{path} is not here")
        if path == "/api/generate" and request.method != "POST":
            return problem(405, f"{path} takes POST, not {request.method}")
        return None

    async def _check_token(self, request: Request, token: str) -> Response | None:
        at_page = request.url.path == "/"
        form = at_page and request.method == "POST"
        # browsers send a name's cookies to all of its ports
        port = re.search(r":(\d+)$", request.headers.get("host", ""))
        cookie = COOKIE if port is None else f"{COOKIE}-{port[1]}"
        if not form and _same(request.cookies.get(cookie, ""), self._cookie):
            return None
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else ""
        link = at_page and request.method == "GET" and "token" in request.query_params
        if form:
            shown = parse_qs((await request.body()).decode(errors="replace")).get("token", [""])[0]
        elif link:
            shown = shown or request.query_params["token"]
        # before it is compared: else the limit would not slow down who guesses
        if shown and (wait := self._wrong.wait(_client(request))):
            return problem(429, "too many wrong tokens; try again later", wait)
        if _same(shown, token):
            if not (form or link):
                return None
            # away from the address bar, and from what is copied out of it
            answer: Response = RedirectResponse("./", 303)
            answer.set_cookie(cookie, self._cookie, httponly=True, samesite="lax")
            return answer
        if shown:
            self._wrong.count(_client(request))
        why = "the token is wrong" if shown else "a token is needed"
        if at_page and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_ASK_FOR_TOKEN.format(why=html.escape(why)), 401)
        answer = problem(401, f"{why}: send Authorization: Bearer TOKEN")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer


def problem(status: int, message: str, retry_after: float | None = None) -> Response:
    """An error as JSON: {"error": message}."""
    headers = None if retry_after is None else {"Retry-After": str(int(retry_after) + 1)}
    return JSONResponse({"error": message or HTTPStatus(status).phrase}, status, headers)


def _same(shown: str, expected: str) -> bool:
    return secrets.compare_digest(shown.encode(), expected.encode())


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


_ASK_FOR_TOKEN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>PixArt</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; display: grid; place-items: center;
       min-height: 90vh; margin: 0 }}
form {{ display: grid; gap: .6rem; width: min(20rem, 90vw) }}
input, button {{ font: inherit; padding: .5rem .7rem }}
</style></head>
<body><form action="./" method="post">
<label for="token">PixArt: {why}</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open</button>
</form></body></html>
"""
