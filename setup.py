"""Builds the compiled kernels where it can; without them the package is pure Python and works.

PIXART_KERNELS_NATIVE=auto|0|1: with 1 whatever prevents the build is an error, with 0 there is
no build. MAX_JOBS bounds the number of compilers running at once; CXX names the compiler.

torch is located, not imported: kernels use its stable ABI, so they need its headers and one of
its libraries, and an isolated build, which cannot import the environment's torch, sees them too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "pixart_kernels"
NATIVE = os.environ.get("PIXART_KERNELS_NATIVE", "auto")
ABI_TARGET = (2, 11)


def sources(pattern: str) -> tuple[str, ...]:
    return tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)))


# compiled for any CPU: they run before the CPU has been checked, when the library is loaded
SOURCES = ("csrc/registration.cpp", *sources("csrc/*/op.cpp"))
# compiled for the CPU level below
KERNELS = sources("csrc/*/cpu.cpp")

# the instructions that torch's own AVX2 kernels are compiled for, and the level's name in
# torch.backends.cpu.get_cpu_capability()
X86_FLAGS, X86_LEVEL = ("-mavx2", "-mfma", "-mf16c"), "AVX2"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # one result per build whatever the compiler's default; products feed sums without rounding
    "-ffp-contract=fast",
    # std::sqrt as one instruction; nothing here reads errno
    "-fno-math-errno",
    # vector types never cross a library boundary here
    "-Wno-psabi",
    "-Wall",
    "-DNDEBUG",
)


class CannotBuild(Exception):
    """One sentence for the user: what is missing and what to do."""


@dataclass(frozen=True)
class Toolchain:
    compiler: tuple[str, ...]
    compiler_version: str
    torch: Path
    torch_version: str
    x86: bool

    @property
    def flags(self) -> list[str]:
        major, minor = ABI_TARGET
        target = f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48):#018x}"
        return [*FLAGS, target, "-isystem", str(self.torch / "include")]

    @property
    def link_flags(self) -> list[str]:
        library = f"-L{self.torch / 'lib'}"
        if sys.platform == "darwin":
            return ["-shared", "-undefined", "dynamic_lookup", library, "-ltorch", "-ltorch_cpu"]
        # kept as needed libraries although torch is always loaded first: symbols that only some
        # builds of torch have are found through them
        needed = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        return ["-shared", "-Wl,--no-undefined", library, *needed]


def package_version() -> str:
    text = (ROOT / PACKAGE / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


def find_torch() -> Path:
    """The installed torch's folder, also from inside an isolated build environment."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "version.py").exists():
            return folder
    raise CannotBuild(
        "torch was not found by the build; install torch first, then run "
        "`pip install --no-build-isolation .`"
    )


def find_toolchain() -> Toolchain:
    if NATIVE not in ("auto", "0", "1"):
        raise SystemExit(f"PIXART_KERNELS_NATIVE is {NATIVE!r}; accepted: auto, 0, 1")
    if NATIVE == "0":
        raise CannotBuild("PIXART_KERNELS_NATIVE=0 was set during the build")
    if sys.platform not in ("linux", "darwin"):
        raise CannotBuild(f"compiled kernels are built on Linux and macOS, not {sys.platform}")
    torch = find_torch()
    found = re.search(r"__version__ = ['\"](.+?)['\"]", (torch / "version.py").read_text())
    version = found.group(1) if found else "0.0"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < ABI_TARGET:
        wanted = ".".join(map(str, ABI_TARGET))
        raise CannotBuild(f"torch {version} is installed and the kernels need {wanted} or newer")
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    # CXX may hold a wrapper or flags as well: "ccache g++"
    commands = (shlex.split(name) for name in candidates)
    compiler = next((tuple(words) for words in commands if words and shutil.which(words[0])), None)
    if compiler is None:
        raise CannotBuild(f"no C++ compiler was found (looked for {', '.join(candidates)})")
    described = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    first_line = described.stdout.splitlines()[0] if described.stdout else shlex.join(compiler)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return Toolchain(compiler, first_line, torch, version, x86)


def write_build_info(folder: Path, **info: object) -> None:
    info = {"package_version": package_version(), **info}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def pure_python(folder: Path, reason: str) -> None:
    """Says so in the build's output and, since pip hides that, in what doctor reads."""
    print(f"{PACKAGE}: installing without compiled kernels: {reason}", file=sys.stderr, flush=True)
    for stale in folder.glob("_C*.so"):
        stale.unlink()
    write_build_info(folder, native=False, reason=reason)


@dataclass(frozen=True)
class Step:
    """One compiler call."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]

    @property
    def depfile(self) -> Path | None:
        return self.output.with_suffix(".d") if "-MMD" in self.command else None


def run_steps(steps: list[Step], folder: Path) -> None:
    """Runs what is out of date, in parallel where ninja is installed.

    Raises CannotBuild with the compiler's last words.
    """
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    ninja = ninja or shutil.which("ninja")
    if ninja is None:
        commands = [step.command for step in steps]
    else:
        lines = []
        for i, step in enumerate(steps):
            lines += [f"rule r{i}", f"  command = {shlex.join(step.command)}".replace("$", "$$")]
            if step.depfile is not None:
                lines += [f"  depfile = {step.depfile}", "  deps = gcc"]
            inputs = " ".join(_escaped(path) for path in step.inputs)
            lines += [f"build {_escaped(step.output)}: r{i} {inputs}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        commands = [(ninja, "-C", str(folder), *(["-j", jobs] if jobs else []))]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if "error:" in line or "FAILED" in line]
            said = (errors or lines or [f"exit status {done.returncode}"])[-1]
            raise CannotBuild(f"the compiler failed: {said}")


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            toolchain = find_toolchain()
            self._compile(toolchain, library)
        except CannotBuild as problem:
            if NATIVE == "1":
                raise
            pure_python(library.parent, str(problem))
            return
        write_build_info(
            library.parent,
            native=True,
            torch=toolchain.torch_version,
            abi_target=".".join(map(str, ABI_TARGET)),
            compiler=toolchain.compiler_version,
            machine=platform.machine(),
            cpu_level=X86_LEVEL if toolchain.x86 else None,
            flags=shlex.join([*FLAGS, *(X86_FLAGS if toolchain.x86 else ())]),
        )

    def copy_extensions_to_source(self) -> None:
        """What an editable install adds: the library and its description, or neither library."""
        for stale in (ROOT / PACKAGE).glob("_C*.so"):
            stale.unlink()
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / PACKAGE / "_build_info.json"
        shutil.copy2(built, ROOT / PACKAGE / "_build_info.json")

    def _compile(self, toolchain: Toolchain, library: Path) -> None:
        folder = Path(self.build_temp).resolve()
        steps = []
        for name in (*SOURCES, *KERNELS):
            source, output = (ROOT / name).resolve(), (folder / name).with_suffix(".o")
            output.parent.mkdir(parents=True, exist_ok=True)
            cpu = X86_FLAGS if toolchain.x86 and name in KERNELS else ()
            command = [*toolchain.compiler, *toolchain.flags, *cpu]
            command += ["-MMD", "-MF", str(output.with_suffix(".d")), "-c", str(source)]
            steps.append(Step(output, (source,), (*command, "-o", str(output))))
        objects = tuple(step.output for step in steps)
        linked = folder / library.name
        link = [*toolchain.compiler, *map(str, objects), *toolchain.link_flags, "-o", str(linked)]
        steps.append(Step(linked, objects, tuple(link)))
        run_steps(steps, folder)
        library.parent.mkdir(parents=True, exist_ok=True)
        # replaced in one step: a process may have the old one mapped
        shutil.copy2(linked, library.with_suffix(".new"))
        os.replace(library.with_suffix(".new"), library)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if REASON is not None:
            pure_python((ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE, REASON)


def reason_against_building() -> str | None:
    try:
        find_toolchain()
    except CannotBuild as problem:
        if NATIVE == "1":
            raise
        return str(problem)
    return None


REASON = reason_against_building()

if REASON is None:
    setup(
        ext_modules=[Extension(f"{PACKAGE}._C", sources=[], py_limited_api=True, optional=True)],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup(cmdclass={"build_py": BuildPy})
