"""The CUDA kernels' own source, run on the CPU by ``tests/cuda_emulation``.

A copy of the package gets an extension whose CPU ops run the CUDA kernels; then the ops' tests run
against that copy. They are *emulated*, not verified: only a GPU can do that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated import COMPILER, EMULATED, ROOT, TORCH, X86_FLAGS, compile_cpp, needs_compiler

import pixart_kernels
from pixart_kernels import _extension

SOURCES, PACKAGE = ROOT / "csrc", Path(pixart_kernels.__file__).parent
DEFINES = ["-DPIXART_KERNELS_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"]

pytestmark = [
    *needs_compiler,
    pytest.mark.skipif(
        _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
    ),
]


def compiled(sources: Iterable[Path], folder: Path, *arguments: str) -> dict[Path, Path]:
    """Their object files."""

    def compile_one(source: Path) -> tuple[Path, Path]:
        output = folder / f"{source.parent.name}_{source.name}.o"
        extra = EMULATED if source.suffix == ".cu" else []
        extra = X86_FLAGS if source.name == "cpu.cpp" else extra
        return source, compile_cpp(source, output, *DEFINES, *extra, *arguments, "-c")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(compile_one, sources))


def packaged(objects: dict[Path, Path], folder: Path) -> Path:
    """The folder to put on PYTHONPATH."""
    package = folder / "pixart_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    libraries = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    output = package / "_C.abi3.so"
    subprocess.run([COMPILER, "-shared", *objects.values(), *libraries, "-o", output], check=True)
    return folder


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    patterns = ("registration.cpp", "*/op.cpp", "*/cpu.cpp", "*/*.cu")
    sources = [path for pattern in patterns for path in sorted(SOURCES.glob(pattern))]
    return compiled(sources, tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="session")
def emulated_package(objects: dict[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged(objects, tmp_path_factory.mktemp("emulated"))


def check(package: Path, folder: Path, tests: str, selection: str) -> None:
    # away from the checkout, whose own package would be imported instead
    file = Path(tests)
    shutil.copytree(ROOT / "tests" / "pixart_kernels" / file.parent, folder / file.parent)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["-p", "no:cacheprovider", "-k", selection, str(folder / file)]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# what torch.compile makes of an op does not depend on its kernel
EAGER = "not compiles and not opcheck"


@pytest.mark.parametrize(
    "tests",
    ["adaln/test_adaln_native.py", "mlp/test_mlp_native.py", "attention/test_attention_cuda.py"],
    ids=["adaln", "mlp", "attention"],
)
def test_cuda_kernels_pass_the_tests_of_their_ops(
    emulated_package: Path, tmp_path: Path, tests: str
) -> None:
    check(emulated_package, tmp_path, tests, EAGER)


@pytest.mark.parametrize("panel", [32, 16], ids=lambda panel: f"panel {panel}")
def test_attention_in_other_panels(objects: dict[Path, Path], tmp_path: Path, panel: int) -> None:
    sources = SOURCES.glob("attention/*_sm90.cu")
    others = compiled(sources, tmp_path, f"-DPIXART_ATTENTION_PANEL={panel}")
    package = packaged({**objects, **others}, tmp_path / "package")
    check(package, tmp_path, "attention/test_attention_cuda.py", "lengths or tiles")
