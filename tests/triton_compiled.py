"""Compiles what the Triton backends launch, in a process of its own, and reads what came of it.

A test module that asks for ``compiled_launches(__file__)`` calls ``print_resources`` when it is
run as a script: kernels that are interpreted cannot be compiled in the same process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_kernels import _triton
from pixart_kernels.testing import Launch, Resources, compiled_resources

ARCHS = (80, 90, 100)
# of at least 163 KB on each of them
SHARED_LIMIT = 100 * 1024

Compiled = list[tuple[str, str, int, Resources]]


def print_resources(configuration: str, launches: list[Launch]) -> None:
    """One line of JSON for each launch and architecture."""
    for launch in launches:
        for arch in ARCHS:
            found = vars(compiled_resources(launch, arch))
            print(json.dumps([configuration, launch.kernel.__name__, arch, found]), flush=True)


def compiled_launches(script: str) -> Compiled:
    """(configuration, kernel, architecture, resources) of everything that ``script`` compiles."""
    if _triton.problem is not None:
        pytest.skip(_triton.problem)
    import triton

    if not Path(triton.knobs.nvidia.cuobjdump.path).exists():
        pytest.skip("this build of triton has no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # the root as well: the package, not the folder of its tests, is what its name finds
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    command = [sys.executable, script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return [(name, kernel, arch, Resources(**found)) for name, kernel, arch, found in rows]


def assert_nothing_spills(compiled: Compiled) -> None:
    """Nor takes so much shared memory that little else fits."""
    for *where, resources in compiled:
        assert resources.stack == 0, (where, resources)
        assert resources.shared <= SHARED_LIMIT, (where, resources)


def share_of_wide_loads(resources: Resources) -> float:
    """Of the bytes that a thread reads from global memory, how many come 16 at a time."""
    return sum(size for size in resources.loads if size == 16) / sum(resources.loads)
