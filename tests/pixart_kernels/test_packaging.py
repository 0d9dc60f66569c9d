"""``pip install .`` ends in something that works, with and without a compiler and nvcc."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pixart_kernels import _extension

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")

CUDA = _extension.build_info.get("cuda", {})
no_compiler = shutil.which("c++") is None


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """This source tree with its compiled objects, which are up to date wherever they lie."""
    target = tmp_path_factory.mktemp("source") / "tree"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy2(ROOT / name, target)
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "_kernels.json")
    for name in ("csrc", "pixart", "pixart_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=built)
    for objects in ROOT.glob("build/kernels.*"):
        shutil.copytree(objects, target / "build" / objects.name)
    return target


def environment(**changes: str) -> dict[str, str]:
    ours = ("PIXART_KERNELS", "CXX", "CUDA_", "MAX_JOBS", "PYTHON")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # one compiler at a time, in the order of the sources: nvcc first
    return {**inherited, "MAX_JOBS": "1", **changes}


def build_wheel(tree: Path, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    return subprocess.run(
        [*command, "--wheel-dir", str(folder)],
        cwd=tree,
        env=environment(**changes),
        capture_output=True,
        text=True,
    )


@dataclass(frozen=True)
class Installed:
    problem: str | None
    build_info: dict
    backend: str  # what auto takes for adaLN on the CPU
    kernels: int
    introspection: str | None
    doctor: str


SCRIPT = """
import json, sys
import torch
import pixart_kernels as pk
from pixart_kernels import _extension, dispatch, doctor, introspection

assert _extension.__file__.startswith(sys.prefix), _extension.__file__
x, table, t = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(2, 48)
expected = pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend="reference")
torch.testing.assert_close(pk.adaln_single(x, table, t, shift_row=0, scale_row=1), expected)
print(json.dumps({
    "problem": _extension.problem,
    "build_info": _extension.build_info,
    "backend": dispatch.chosen("adaln_single", x),
    "kernels": len(introspection.kernels()),
    "introspection": introspection.problem(),
    "doctor": doctor.report(),
}))
"""


def install(tree: Path, folder: Path, **changes: str) -> Installed:
    """Builds a wheel and runs what it installs, in an environment with nothing else but torch."""
    done = build_wheel(tree, folder, **changes)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (site / "torch.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--ignore-installed", str(wheel)], check=True)
    done = subprocess.run(
        [python, "-c", SCRIPT], capture_output=True, text=True, cwd=folder, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return Installed(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(
    _extension.problem is not None or not CUDA.get("built"), reason="no CUDA kernels are built"
)
def test_with_compiler_and_nvcc(tree, tmp_path):
    """First, while what the checkout has compiled is still up to date."""
    installed = install(tree, tmp_path)
    assert (installed.problem, installed.backend) == (None, "native")
    assert installed.build_info["cuda"] == CUDA
    assert installed.kernels > 0
    assert installed.introspection == _extension.build_info["introspection"].get("reason")


def test_without_a_compiler(tree, tmp_path):
    installed = install(tree, tmp_path, CXX="/nonexistent/c++")
    assert "no C++ compiler was found (looked for /nonexistent/c++); install" in installed.problem
    assert installed.problem in installed.doctor
    assert (installed.backend, installed.kernels) == ("reference", 0)


@pytest.mark.skipif(no_compiler, reason="no C++ compiler")
def test_without_nvcc(tree, tmp_path):
    installed = install(tree, tmp_path, CUDA_HOME="/nonexistent")
    assert (installed.problem, installed.backend) == (None, "native")
    assert installed.build_info["cuda"] == {
        "built": False,
        "reason": "no nvcc was found in /nonexistent/bin; "
        "set CUDA_HOME to the CUDA toolkit's folder",
    }
    assert "CUDA kernels: none were built: no nvcc was found" in installed.doctor
    assert installed.kernels == 0


@pytest.mark.skipif(no_compiler, reason="no C++ compiler")
def test_nvcc_that_fails_costs_nothing_but_the_cuda_kernels(tree, tmp_path):
    nvcc = fake_nvcc(tmp_path / "cuda", compiles=False)
    installed = install(tree, tmp_path, CUDA_HOME=str(nvcc.parents[1]))
    assert (installed.problem, installed.backend) == (None, "native")
    assert not installed.build_info["cuda"]["built"]
    assert "the compiler failed: fake.cu(1): error: no" in installed.build_info["cuda"]["reason"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PIXART_KERNELS_NATIVE": "1", "CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ({"PIXART_KERNELS_CUDA": "1", "CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ({"PIXART_KERNELS_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "no nvcc was found"),
        (
            {"PIXART_KERNELS_CUDA_ARCHS": "90a", "CUDA_HOME": "/nonexistent"},
            "no nvcc was found",
        ),
        ({"PIXART_KERNELS_CUDA": "yes"}, "PIXART_KERNELS_CUDA is 'yes'; accepted: auto, 0, 1"),
        ({"MAX_JOBS": "all"}, "MAX_JOBS is 'all'; accepted: a number from 1 up"),
        (
            {"PIXART_KERNELS_CUDA": "1", "PIXART_KERNELS_NATIVE": "0"},
            "PIXART_KERNELS_CUDA=1 needs the library that PIXART_KERNELS_NATIVE=0 leaves out",
        ),
    ],
    ids=[
        *("native", "cuda-without-compiler", "cuda-without-nvcc", "archs-without-nvcc"),
        *("unknown-value", "jobs", "cuda-without-native"),
    ],
)
def test_what_was_demanded_and_cannot_be_is_an_error(tree, tmp_path, changes, words):
    if no_compiler and "nvcc" in words:
        pytest.skip("no C++ compiler")
    done = build_wheel(tree, tmp_path, **changes)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_the_source_distribution_has_every_source_and_nothing_built(tree, tmp_path):
    (tree / "pixart_kernels/_C.abi3.so").write_bytes(b"left by an editable install")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    try:
        command = [sys.executable, "-c", build]
        subprocess.run(command, cwd=tree, env=environment(), check=True, capture_output=True)
    finally:
        (tree / "pixart_kernels/_C.abi3.so").unlink()
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*.*")}
    assert any(name.endswith(".cu") for name in sources)
    assert sources <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


def fake_nvcc(home: Path, release: str = "13.0", compiles: bool = True, refuses: str = "") -> Path:
    """A toolkit whose compiler is a script."""
    program = home / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f"""#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.1";;
  *--dryrun*{refuses or "nothing"}*) echo "nvcc fatal   : Unsupported gpu '{refuses}'"; exit 1;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L/lib/stubs" "-L/lib"';;
  *) echo "fake.cu(1): error: no"; exit {int(not compiles)};;
esac
""")
    program.chmod(0o755)
    return program


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """setup.py as a module."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "PIXART_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "setup_script", module)
    spec.loader.exec_module(module)
    return module


def test_nvcc_is_asked_for_code_of_each_architecture_and_ptx(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path).parents[1]))
    nvcc = script.find_nvcc(("c++",))
    assert (nvcc.version, nvcc.library_folders) == ("13.0", ("/lib/stubs", "/lib"))
    flags = nvcc.flags("csrc/adaln/fwd.cu")
    assert [flag for flag in flags if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert not [flag for flag in flags if "ccbin" in flag]
    monkeypatch.setattr(script, "ARCHS", "90a")
    assert script.find_nvcc(("c++",)).ptx is None


def test_sources_for_sm_90a_are_built_for_it_alone(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path).parents[1]))
    source = "csrc/attention/fwd_sm90.cu"
    nvcc = script.find_nvcc(("c++",))
    assert source in nvcc.sources and "csrc/adaln/fwd.cu" in nvcc.sources
    gencode = [flag for flag in nvcc.flags(source) if "gencode" in flag]
    assert gencode == ["-gencode=arch=compute_90a,code=sm_90a"]
    monkeypatch.setattr(script, "ARCHS", "80;90")
    others = script.find_nvcc(("c++",)).sources
    assert source not in others and "csrc/adaln/fwd.cu" in others


def test_nvcc_takes_the_compiler_and_flags_of_cxx(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path).parents[1]))
    monkeypatch.setenv("CXX", "ccache g++-12 -m64")
    nvcc = script.find_nvcc(("ccache", "g++-12", "-m64"))
    assert nvcc.host == ("-ccbin=g++-12", "-Xcompiler=-m64")


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"release": "11.8"}, "is 11.8 and the CUDA kernels need 12.5 or newer"),
        ({"release": "unknown"}, "of an unknown version"),
        ({"refuses": "sm_90a"}, "refuses: nvcc fatal   : Unsupported gpu 'sm_90a'"),
    ],
    ids=["too-old", "no-version", "architecture"],
)
def test_what_nvcc_cannot_do_is_one_sentence(script, tmp_path, monkeypatch, fake, words):
    nvcc = fake_nvcc(tmp_path, **fake)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(script.CannotBuild, match=words) as raised:
        script.find_nvcc(("c++",))
    assert str(nvcc) in str(raised.value)


@pytest.mark.parametrize("archs", ["8.0", "80 90a", "sm_80", "80;", "75"])
def test_a_malformed_list_of_architectures_is_refused(script, monkeypatch, archs):
    monkeypatch.setattr(script, "ARCHS", archs)
    with pytest.raises(SystemExit, match="accepted: a list like 80;90a"):
        script.find_nvcc(("c++",))


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z6helperf
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 1.426 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers
"""


def test_the_compilers_report_is_read(script):
    assert script.parse_ptxas("f.cu", REPORT) == [
        script.Kernel("f.cu", "_Z1fPf", "sm_80", 40, 16, 4, 8, 4096),
        script.Kernel("f.cu", "_Z1fPf", "sm_90a", 38, 0, 0, 0, 0),
    ]


def test_what_the_compiler_warns_of_is_shown(script, tmp_path, monkeypatch, capsys):
    lost = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async are serialized"
    warned = "ptxas warning : setmaxnreg is ignored"
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "f.cu.ptxas").write_text("\n".join([REPORT, lost, warned]))
    builder = SimpleNamespace(folder=Path())
    script.BuildExt._report_kernels(builder, SimpleNamespace(sources=["f.cu"]), tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [f"pixart_kernels: {line}" for line in (lost, warned)]
    assert "12 bytes spill on sm_80" in said[2] and len(said) == 3


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without-ninja"])
def test_steps_run_in_order_and_end_with_the_compilers_words(script, tmp_path, monkeypatch, ninja):
    if ninja and shutil.which("ninja") is None:
        pytest.skip("no ninja")
    if not ninja:
        monkeypatch.setattr(script.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "source").write_text("text")
    names = [Path("source"), Path("a b/$first"), Path("second")]
    steps = [
        script.Step(output, (given,), ("cp", str(given), str(output)))
        for given, output in pairwise(names)
    ]
    (tmp_path / "build").mkdir()
    script.run_steps(steps, Path("build"))
    assert (tmp_path / "second").read_text() == "text"
    broken = ("sh", "-c", "echo 'a.cu(3): error: broken'; exit 1")
    with pytest.raises(script.CannotBuild, match=r"the compiler failed: a.cu\(3\): error: broken"):
        script.run_steps([script.Step(Path("third"), names[:1], broken)], Path("build"))
