"""Processes that find each other as torchrun's do, without its minute of imports."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import TCPStore

# forks processes that have imported everything already
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["pixart.training.text_to_image", "accelerate.tracking"])

Work = Callable[..., object]


class Apart:
    """``work(*arguments)`` in processes of their own; what they print goes to ``output``."""

    def __init__(self, work: Work, *arguments: object, output: Path, processes: int = 1) -> None:
        self.output = output
        # kept here, as torchrun's agent keeps it: a free port that is named may be taken by then
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        self.processes = [
            _server.Process(target=_child, args=(work, arguments, output, rank, processes, port))
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """Exit codes. None: it hung, two minutes after another failed or for many."""
        deadline = time.monotonic() + 500
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + 120)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                # tells where it hangs
                os.kill(process.pid, signal.SIGABRT)
                process.join(5)
            process.kill()
        return codes

    @property
    def text(self) -> str:
        return self.output.read_text()


def run_apart(work: Work, *arguments: object, output: Path, processes: int = 1) -> str:
    """What they printed, once all have ended well."""
    apart = Apart(work, *arguments, output=output, processes=processes)
    assert apart.wait() == [0] * processes, apart.text
    return apart.text


def _child(
    work: Work, arguments: tuple, output: Path, rank: int, processes: int, port: int
) -> None:
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    # buffered, also under `python -u` as pytest-xdist's: each print is written in one piece
    sys.stdout = os.fdopen(1, "w", closefd=False)
    faulthandler.enable()
    work(*arguments)
