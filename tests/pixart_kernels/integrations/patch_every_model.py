"""A pytest plugin: every PixArtTransformer2DModel is patched as soon as it is made.

For diffusers' own tests; see ``make diffusers-tests``. A model that differs from the stock one
fails its test; a test that needs a file of the hub which is not in the cache is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from diffusers import PixArtTransformer2DModel
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    for error in _causes(call.excinfo.value if call.excinfo else None):
        if report.failed and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            report.outcome = "skipped"
            reason = "needs a file of the hub that is not in the cache"
            report.longrepr = (str(item.path), item.location[1], f"Skipped: {reason}")
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{patched} models were patched")
