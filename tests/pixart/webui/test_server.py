"""The process: what it prints, where it listens, and that it ends without a trace."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from generation.small_pipeline import small_pipeline
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="the page is an extra: pip install 'pixart-kernels[web]'")

from pixart.cli import app
from pixart.generation import PixArtPipeline
from pixart.webui.limits import Limits
from pixart.webui.server import serve


def call(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


class Visitor(threading.Thread):
    """Waits until a server says where it is, calls it, stays connected, and interrupts it.

    As a context manager it begins, and ends no later than the server did.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], ends_with: signal.Signals) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.capsys, self.ends_with, self.said = capsys, ends_with, ""
        self.status, self.folders = 0, []

    def __enter__(self) -> Visitor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(60)

    def run(self) -> None:
        end = time.monotonic() + 60
        try:
            while not self.said.endswith("\n"):
                self.said += self.capsys.readouterr().out
                if self.over.wait(0.01) or time.monotonic() > end:
                    return
            self.status = call(self.said.strip())
            self.folders = list(Path(tempfile.gettempdir()).iterdir())
            address = self.said.split("?")[0].strip()
            if self.status == 200:
                self.page = urllib.request.urlopen(f"{address}gradio_api/heartbeat/a", timeout=60)
                self.page.readline()
        finally:
            # a server that failed is not there to take it
            if not self.over.is_set():
                os.kill(os.getpid(), self.ends_with)


@pytest.mark.parametrize("ends_with", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupt_ends_it_and_leaves_nothing(
    ends_with: signal.Signals,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with Visitor(capsys, ends_with) as visitor:
        serve(small_pipeline(), Limits(side=32), {"model": "small"}, port=0)
    assert visitor.said.startswith("http://127.0.0.1:")
    assert visitor.status == 200
    assert len(visitor.folders) == 1
    assert not any(tmp_path.iterdir())
    with pytest.raises(urllib.error.URLError):
        call(visitor.said.strip())
    assert (capsys.readouterr().err, caplog.text) == ("", "")
    assert signal.getsignal(signal.SIGTERM) == before


def test_others_than_this_machine_need_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with Visitor(capsys, signal.SIGINT) as visitor:
        serve(small_pipeline(), Limits(side=32), {"model": "small"}, host="0.0.0.0", port=0)
    assert re.fullmatch(r"http://0\.0\.0\.0:\d+/\?token=[\w-]{20,}\n", visitor.said)


@pytest.mark.parametrize("token", ["", "two words", "sécret", "line\n"], ids=ascii)
def test_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(ValueError, match="`token` is empty or not of ASCII"):
        serve(small_pipeline(), Limits(side=32), {"model": "small"}, token=token)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1, port {port}"):
            serve(small_pipeline(), Limits(side=32), {"model": "small"}, port=port)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict = {}
    monkeypatch.setattr(
        PixArtPipeline,
        "from_pretrained",
        lambda _, memory, **__: served.update(memory=memory) or small_pipeline(),
    )
    monkeypatch.setattr(
        "pixart.webui.server.serve", lambda _, limits, note, **rest: served.update(
            limits=limits, note=note, **rest)
    )  # fmt: skip
    done = CliRunner().invoke(
        app,
        ["serve", "a/folder/pipeline", "--max-steps", "9", "--sampler", "ddim", "--device", "cpu",
         "--memory", "low"],
        env={"PIXART_TOKEN": "of-the-environment"},
    )  # fmt: skip
    assert (done.exit_code, done.exception) == (0, None)
    assert served["limits"] == Limits(side=32, steps=9)
    assert (served["note"], served["sampler"]) == ({"model": "folder"}, "ddim")
    assert (served["host"], served["token"]) == ("127.0.0.1", "of-the-environment")
    assert served["memory"] == "low"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "gradio" else find(name)
    )
    done = CliRunner().invoke(app, ["serve", "a/folder"])
    assert "pip install 'pixart-kernels[web]'" in str(done.exception)
