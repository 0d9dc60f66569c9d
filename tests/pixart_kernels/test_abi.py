"""The ops' library asks for nothing but the stable ABI, so that one build serves every torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pixart_kernels
from pixart_kernels import _extension

LIBRARY = _extension.library
CUDA = _extension.build_info.get("cuda", {}).get("built", False)
SM_90A = CUDA and "sm_90a" in _extension.build_info["cuda"]["archs"]

pytestmark = [
    pytest.mark.skipif(
        _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols"),
]

# what C, C++ and the linker leave to be found or not
WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
WEAK |= {"__cxa_finalize"}
# a CPU build of torch has no streams, and a build without CUDA, or without sm_90a, not all kernels
STREAM = "aoti_torch_get_current_cuda_stream"
CUDA_TABLE = r"_ZN6pixart\d+\w+5kCudaE"
OF_SM_90A = r"_ZN6pixart\d+\w+_sm90E\w+"
SYSTEM = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")
SHIMS = ("aoti_torch_", "torch_")


def symbols(which: str) -> list[tuple[str, str, str]]:
    """(type, name, version) of each dynamic symbol."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    done = subprocess.run(
        ["nm", "-D", which, str(LIBRARY)], capture_output=True, text=True, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        kind, name = line.split()[-2:]
        name, _, version = name.partition("@")
        found.append((kind, name, version.lstrip("@")))
    return found


def test_undefined_symbols_are_torch_shims_and_the_c_and_cxx_libraries():
    strong = [(name, version) for kind, name, version in symbols("-u") if kind == "U"]
    assert any(name.startswith("aoti_torch_") for name, _ in strong)
    for name, version in strong:
        known = name.startswith(SHIMS) if not version else version.split("_")[0] in SYSTEM
        assert known, (name, version)


def test_weak_symbols_are_those_that_are_looked_at_before_use():
    weak = {name for kind, name, _ in symbols("-u") if kind in "wv"} - WEAK - {STREAM}
    absent = [*([] if CUDA else [CUDA_TABLE]), *([] if SM_90A else [OF_SM_90A])]
    assert [x for x in weak if not any(re.fullmatch(name, x) for name in absent)] == []


def test_exports_are_the_kernel_table_alone():
    """So that no other library, such as another CUDA runtime, binds to a symbol of ours."""
    # W, V and u are inline code and data of the C++ library, the same in every library
    exported = {name for kind, name, _ in symbols("--defined-only") if kind in "TDBR"}
    exported -= {"__bss_start", "_edata", "_end", "_init", "_fini"}
    table = {"pixart_kernels_count", "pixart_kernels_describe"}
    assert exported == (table if CUDA else set())


def test_shims_are_as_old_as_the_abi_target():
    audit = pytest.importorskip("torch_abi_audit")
    torch = audit.inspect_extension(LIBRARY).torch
    assert torch.stable
    assert not torch.unstable_symbols and not torch.unknown_shim_symbols
    needed = tuple(map(int, torch.min_torch_version.split(".")[:2]))
    assert needed <= tuple(map(int, _extension.build_info["abi_target"].split(".")))


def test_build_info_names_the_oldest_system():
    newest: dict[str, tuple[int, ...]] = {}
    for _, _, version in symbols("-u"):
        if found := re.fullmatch(r"([A-Z]+)_([\d.]+)", version):
            number = tuple(map(int, found.group(2).split(".")))
            newest[found.group(1)] = max(newest.get(found.group(1), ()), number)
    recorded = _extension.build_info["needs"]
    for name in ("GLIBC", "GLIBCXX"):
        assert recorded[name] == ".".join(map(str, newest[name]))


OTHER = """
import ctypes, json, sys
import torch
import pixart_kernels as pk
from pixart_kernels import _extension

assert _extension.problem is None, _extension.problem
torch.manual_seed(0)
x, branch = torch.randn(2, 2, 5, 72).unbind()
table, t = torch.randn(6, 72), torch.randn(2, 6 * 72)
leaves = [tensor.requires_grad_() for tensor in (x.clone(), branch.clone(), table, t)]

def run(backend):
    x, branch, table, t = leaves
    x, h = pk.gated_residual_adaln(
        x, branch, gate=(table, t, 2), modulation=(table, t, 3, 4), backend=backend
    )
    return [x, h, *torch.autograd.grad((x * h.sin()).sum(), leaves)]

for native, reference in zip(run("native"), run("reference")):
    torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-4)
if torch.version.cuda and _extension.build_info["cuda"]["built"]:
    # as the loader resolves the weak symbol: through the libraries that ours needs
    assert ctypes.CDLL(str(_extension.library)).aoti_torch_get_current_cuda_stream
print(json.dumps([sys.version.split()[0], torch.__version__]))
"""


@pytest.mark.skipif(
    "PIXART_KERNELS_TEST_PYTHONS" not in os.environ,
    reason="PIXART_KERNELS_TEST_PYTHONS names no interpreters with another torch",
)
@pytest.mark.parametrize(
    "python", os.environ.get("PIXART_KERNELS_TEST_PYTHONS", "none").split(os.pathsep)
)
def test_this_build_runs_in(python):
    """An interpreter with a torch of its own, new or old, runs the library that is built here."""
    root = str(Path(pixart_kernels.__file__).parent.parent)
    done = subprocess.run(
        [python, "-c", OTHER], capture_output=True, text=True, env={"PYTHONPATH": root}, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    version, torch_version = json.loads(done.stdout)
    print(f"ran in Python {version} with torch {torch_version}")
