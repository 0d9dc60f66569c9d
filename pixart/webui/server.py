"""A process that serves one model until it is interrupted."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from pixart.generation import PixArtPipeline
from pixart.webui.access import is_loopback
from pixart.webui.limits import Limits
from pixart.webui.studio import Studio


def serve(
    pipeline: PixArtPipeline,
    limits: Limits,
    note: Mapping[str, Any],
    *,
    sampler: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
) -> None:
    """Serves the page and its API until SIGINT or SIGTERM.

    Args:
        note: see ``pictures.draw``; its "model" is shown on the page.
        sampler: see ``pixart.diffusion.sample``; None: what suits the model.
        port: 0 takes a free one.
        token: what every visitor has to show; where others than this machine can reach ``host``,
            one is made up if none is given.

    Raises:
        ValueError: a token that cannot be sent, or an unknown sampler.
        OSError: host and port are not to be had.
    """
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe()
    if token is not None and not (token and all("!" <= letter <= "~" for letter in token)):
        raise ValueError("`token` is empty or not of ASCII letters, digits and signs alone")
    with (
        _listen(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="pixart-serve-") as folder,
    ):
        # read when Gradio is imported; its own folder may be another user's
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/gradio"
        from pixart.webui.app import build

        studio = Studio(pipeline, limits, Path(folder) / "pictures", note, sampler)
        config = uvicorn.Config(
            build(studio, token),
            log_level="warning",
            # else whoever sends X-Forwarded-For is as many clients as they like
            proxy_headers=False,
            timeout_graceful_shutdown=10,
        )
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{listener.getsockname()[1]}/"
        print(address if token is None else f"{address}?token={token}", flush=True)
        # raises where it would kill, and leave the folder
        killed = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with suppress(KeyboardInterrupt):
                _Server(config).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, killed)
            studio.close()


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # an open page would never let go of its own
        for connection in list(self.server_state.connections):
            connection.transport.close()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port} ({error.strerror}): give another --port or "
            "--host"
        ) from error
