"""Before anything is imported: Triton is interpreted without a GPU; and what `-n auto` means."""

from __future__ import annotations

import importlib.util
import os

import psutil
import pytest
import torch

MEMORY = 3 * 2**30  # bytes of a process that runs tests, and of those that it starts

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        from triton_interpreter import install

        install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One for each core that has memory; a single one on a GPU, whose memory they would share."""
    if torch.cuda.is_available():
        return 1
    cores = os.cpu_count() or 1
    workers = max(1, min(cores, psutil.virtual_memory().available // MEMORY))
    # more threads than cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // workers))
    return workers
