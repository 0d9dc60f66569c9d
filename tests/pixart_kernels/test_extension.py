"""What a mismatched, corrupt or missing extension says: one sentence; the package still works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pixart_kernels
from pixart_kernels import _extension

PACKAGE = Path(pixart_kernels.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_C*.so"))
built = pytest.mark.skipif(
    _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
)


@pytest.fixture
def copied(tmp_path):
    """The package in a folder of its own, with its extension linked in."""
    target = tmp_path / "pixart_kernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    for library in LIBRARIES:
        (target / library.name).symlink_to(library)
    return target


def edit_build_info(package: Path, **changes: object) -> None:
    path = package / "_build_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SCRIPT = """
import torch, pixart_kernels as pk
from pixart_kernels import _extension
assert _extension.__file__.startswith({folder!r}), _extension.__file__
x, table, t = torch.randn(1, 3, 8), torch.randn(6, 8), torch.randn(1, 48)
h = pk.adaln_single(x, table, t, shift_row=0, scale_row=1)
assert torch.isfinite(h).all()
print(_extension.status())
try:
    pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend="native")
except RuntimeError as error:
    assert _extension.problem in str(error)
else:
    assert _extension.problem is None
"""


def status_of(package: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(package.parent))],
        capture_output=True,
        text=True,
        cwd=package.parent,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(package.parent), **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def mentions(sentence: str, *words: str) -> None:
    for word in words:
        assert word in sentence, sentence


def test_what_was_built_here_loads():
    """Else every test of the kernels would be skipped."""
    if not LIBRARIES:
        pytest.skip(_extension.problem)
    assert _extension.problem is None


@built
def test_loads(copied):
    mentions(status_of(copied), "loaded", _extension.build_info["torch"], "2.11")


@built
def test_another_package_version(copied):
    edit_build_info(copied, package_version="0.0.7")
    found = status_of(copied)
    mentions(found, "version 0.0.7", f"version {pixart_kernels.__version__}", "rebuild")


@built
def test_sources_that_have_gained_an_op(copied):
    """As after an update of an editable checkout."""
    sources = copied.parent / "csrc" / "registration.cpp"
    sources.parent.mkdir()
    sources.write_bytes((PACKAGE.parent / "csrc" / "registration.cpp").read_bytes())
    mentions(status_of(copied), "loaded")
    sources.write_text("another op")
    mentions(status_of(copied), "other ops than the sources", "rebuild")


@built
def test_torch_older_than_the_abi_target(copied):
    edit_build_info(copied, abi_target="9.9", torch="9.9.1")
    mentions(status_of(copied), "torch 9.9.1", "9.9 or newer", torch.__version__, "upgrade")


@built
def test_another_machine(copied):
    edit_build_info(copied, machine="vax")
    mentions(status_of(copied), "built for vax", "rebuild")


@built
@pytest.mark.skipif(_extension.build_info.get("cpu_level") != "AVX2", reason="not an x86 build")
def test_a_cpu_without_the_instructions(copied):
    """torch is told to see a plain CPU, as it would on an older one."""
    found = status_of(copied, ATEN_CPU_CAPABILITY="default")
    mentions(found, "needs a CPU with AVX2", "DEFAULT")


@built
def test_a_corrupt_library(copied):
    library = next(copied.glob("_C*.so"))
    library.unlink()
    library.write_bytes(b"not a shared object")
    mentions(status_of(copied), library.name, "does not load", torch.__version__, "rebuild")


@built
def test_an_undefined_symbol(copied, tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "broken.c", next(copied.glob("_C*.so"))
    source.write_text("void no_such_symbol(void); void f(void) { no_such_symbol(); }")
    library.unlink()
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    mentions(status_of(copied), "does not load", "no_such_symbol")


@built
def test_a_missing_library(copied):
    next(copied.glob("_C*.so")).unlink()
    mentions(status_of(copied), "missing", "rebuild")


@built
@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_missing_or_broken_description(copied, content):
    path = copied / "_build_info.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    mentions(status_of(copied), "no _build_info.json", "rebuild")


def test_a_pure_python_install_says_why(copied):
    for library in copied.glob("_C*.so"):
        library.unlink()
    info = {"package_version": "0", "native": False, "reason": "no C++ compiler was found"}
    (copied / "_build_info.json").write_text(json.dumps(info))
    assert status_of(copied) == "the compiled extension is not built: no C++ compiler was found"


@pytest.mark.parametrize(
    "archs, ptx, capability, runs",
    [
        (["sm_80", "sm_90a"], "compute_80", (7, 5), False),
        (["sm_80", "sm_90a"], "compute_80", (8, 0), True),
        (["sm_80", "sm_90a"], "compute_80", (8, 9), True),
        (["sm_80", "sm_90a"], "compute_80", (9, 0), True),
        (["sm_80", "sm_90a"], "compute_80", (12, 0), True),
        (["sm_90a"], None, (8, 0), False),
        (["sm_90a"], None, (10, 0), False),
        (["sm_86"], None, (8, 0), False),
        (["sm_100a"], None, (10, 3), False),
    ],
)
def test_which_gpus_the_cuda_kernels_run_on(archs, ptx, capability, runs):
    cuda = {"built": True, "archs": archs, "ptx": ptx}
    assert _extension._runs_on(cuda, capability) == runs


@pytest.mark.parametrize(
    "archs, capability, reason",
    [
        (["sm_80", "sm_90a"], (9, 0), None),
        (["sm_80", "sm_90a"], (8, 0), "these kernels are written for sm_90a alone and .* sm_80"),
        (["sm_80", "sm_90a"], (10, 0), "these kernels are written for sm_90a alone and .* sm_100"),
        (["sm_80"], (9, 0), "built for sm_80, compute_80 and .* sm_90; set PIXART_KERNELS_CUDA_AR"),
    ],
)
def test_kernels_for_one_architecture(archs, capability, reason, monkeypatch):
    monkeypatch.setattr(_extension, "problem", None)
    cuda = {"built": True, "archs": archs, "ptx": "compute_80"}
    monkeypatch.setattr(_extension, "build_info", {"cuda": cuda})
    monkeypatch.setattr(_extension, "_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    found = _extension.why_not_cuda(x, only="sm_90a")
    assert found is None if reason is None else re.search(reason, found), found
    assert _extension.why_not_cuda(x) is None
