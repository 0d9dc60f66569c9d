"""The CUDA kernels' own source, run on the CPU by ``tests/cuda_emulation``.

A copy of the package gets an extension whose CPU ops run the CUDA kernels; then the tests of the
C++ kernels run against that copy. They are *emulated*, not verified: only a GPU can do that.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pixart_kernels
from pixart_kernels import _extension

ROOT = Path(__file__).parents[2]
SOURCES, PACKAGE = ROOT / "csrc", Path(pixart_kernels.__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")
X86_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
EMULATION = ["-x", "c++", "-include", str(ROOT / "tests" / "cuda_emulation" / "emulation.h")]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
        reason="the emulation is built for x86-64 Linux",
    ),
    pytest.mark.skipif(
        _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
    ),
]


@pytest.fixture(scope="session")
def emulated_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to put on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("emulated")
    torch_folder = Path(torch.__file__).parent
    flags = [
        *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"),
        # 16-byte accesses are written as CUDA writes them
        *("-fno-strict-aliasing", "-Wno-unknown-pragmas"),
        # x86 forgives what a GPU does not
        *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
        *("-DPIXART_KERNELS_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *("-isystem", str(torch_folder / "include")),
    ]

    def compiled(source: Path) -> str:
        output = folder / f"{source.parent.name}_{source.name}.o"
        extra = EMULATION if source.suffix == ".cu" else []
        extra = X86_FLAGS if source.name == "cpu.cpp" else extra
        command = [COMPILER, *flags, *extra, "-c", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(output)

    patterns = ("registration.cpp", "*/op.cpp", "*/cpu.cpp", "*/*.cu")
    sources = [path for pattern in patterns for path in sorted(SOURCES.glob(pattern))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    package = folder / "pixart_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    libraries = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    output = str(package / "_C.abi3.so")
    subprocess.run([COMPILER, "-shared", *objects, *libraries, "-o", output], check=True)
    return folder


@pytest.mark.parametrize(
    "tests", ["adaln/test_adaln_native.py", "mlp/test_mlp_native.py"], ids=["adaln", "mlp"]
)
def test_cuda_kernels_pass_the_tests_of_the_cpu_kernels(
    emulated_package: Path, tmp_path: Path, tests: str
) -> None:
    # away from the checkout, whose own package would be imported instead
    file = Path(tests)
    shutil.copytree(ROOT / "tests" / "pixart_kernels" / file.parent, tmp_path / file.parent)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={tmp_path}"]
    # what torch.compile makes of an op does not depend on its kernel
    command += [
        "-p",
        "no:cacheprovider",
        "-k",
        "not compiles and not opcheck",
        str(tmp_path / file),
    ]
    environment = {**os.environ, "PYTHONPATH": str(emulated_package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
