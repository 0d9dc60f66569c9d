"""The page, its API and its pictures as one ASGI application."""

from __future__ import annotations

import asyncio
import json

import gradio as gr
from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response

from pixart.webui import page
from pixart.webui.access import Gate, problem
from pixart.webui.limits import Refused
from pixart.webui.studio import Studio


def build(studio: Studio, token: str | None) -> Gate:
    """Everything behind the gate; ``token`` as there."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/api/generate")
    async def generate(request: Request) -> Response:
        try:
            asked = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            return problem(400, f"the body is not JSON: {error}")
        try:
            job = studio.submit(asked, request.client.host if request.client else "")
        except ValueError as error:
            return problem(422, str(error))
        except Refused as error:
            return problem(error.status, str(error), error.retry_after)
        try:
            while not job.future.done():
                await asyncio.sleep(0.05)
                if await request.is_disconnected():
                    job.cancel()
            if job.cancelled:
                return problem(503, "the server is closing")
            if (failure := job.future.exception()) is not None:
                return problem(422 if isinstance(failure, ValueError) else 500, page.told(failure))
            png = Response(job.future.result().read_bytes(), media_type="image/png")
            if job.notes:
                png.headers["PixArt-Notes"] = json.dumps(job.notes)
            return png
        finally:
            studio.drop(job)

    @app.get("/pictures/{folder}/{name}")
    def picture(folder: str, name: str) -> Response:
        png = studio.find(folder, name)
        if png is None:
            return problem(404, "this picture is no longer here")
        return FileResponse(png, media_type="image/png")

    gr.mount_gradio_app(
        app,
        page.build(studio),
        path="/",
        theme=page.THEME,
        css_paths=page.CSS,
        js=page.SCRIPT,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )
    # a character in JSON may be twelve
    return Gate(app, token, max_body=2**15 + 24 * studio.limits.prompt)
