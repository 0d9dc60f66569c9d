"""A pytest plugin: every PixArtTransformer2DModel is patched as soon as it is made.

For diffusers' own tests; see ``make diffusers-tests``. A model that differs from the stock one
fails its test.
"""

from __future__ import annotations

import functools

import pytest
from diffusers import PixArtTransformer2DModel

import pixart_kernels as pk

patched = 0
initialize = PixArtTransformer2DModel.__init__


@functools.wraps(initialize)
def initialize_patched(self, *args, **kwargs) -> None:
    global patched
    initialize(self, *args, **kwargs)
    pk.patch(self)
    patched += 1


def pytest_configure(config: pytest.Config) -> None:
    PixArtTransformer2DModel.__init__ = initialize_patched
    config.addinivalue_line("filterwarnings", "error:pk.patch")


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{patched} models were patched")
