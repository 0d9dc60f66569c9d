from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from small_runs import write_features


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded samples, for tests that only read them."""
    folder = tmp_path_factory.mktemp("features")
    write_features(folder)
    return folder


@pytest.fixture
def any_precision() -> Iterator[None]:
    """For runs that differ in it: accelerate holds a process to the first that it was asked for."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
