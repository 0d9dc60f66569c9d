"""Builds the compiled kernels where it can; without them the package is pure Python and works.

PIXART_KERNELS_NATIVE=auto|0|1: with 1 whatever prevents the build is an error, with 0 there is
no build. PIXART_KERNELS_CUDA says the same of the CUDA kernels in it, which are built where nvcc
is, whatever torch is installed; PIXART_KERNELS_CUDA_ARCHS, "80;90a" by default, lists what they
are built for. MAX_JOBS bounds the number of compilers running at once, CXX names the compiler, and
CUDA_HOME the toolkit.

torch is located, not imported: kernels use its stable ABI, so they need its headers and one of
its libraries, and an isolated build, which cannot import the environment's torch, sees them too.

Beside the library the build leaves _build_info.json, what was built or why not, and _kernels.json,
what ptxas said of each CUDA kernel.
"""

from __future__ import annotations

import hashlib
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
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "pixart_kernels"
OPS, INTROSPECTION = f"{PACKAGE}._C", f"{PACKAGE}._introspection"
ABI_TARGET = (2, 11)
OLDEST_NVCC = (12, 5)  # has cudaGetDriverEntryPointByVersion
# what a build leaves in the package besides Python
BUILT = ("_C*.so", "_introspection*.so", "_build_info.json", "_kernels.json")


def sources(pattern: str) -> tuple[str, ...]:
    return tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)))


# compiled for any CPU: they run before the CPU has been checked, when the library is loaded
SOURCES = ("csrc/registration.cpp", *sources("csrc/*/op.cpp"))
# compiled for the CPU level below
KERNELS = sources("csrc/*/cpu.cpp")
CUDA_SOURCES = (*sources("csrc/*.cu"), *sources("csrc/*/*.cu"))
# written for one architecture: built where it is asked for, and for it alone
SM_90A_SOURCES = tuple(source for source in CUDA_SOURCES if source.endswith("_sm90.cu"))

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

# a library that leaves symbols to the process that loads it
PYTHON_LINK_FLAGS = (
    ("-shared", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
)

NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-v",
    "-DNDEBUG",
)


class CannotBuild(Exception):
    """One sentence for the user: what is missing and what to do."""


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is {value!r}; accepted: auto, 0, 1")
    return value


def max_jobs() -> str | None:
    jobs = os.environ.get("MAX_JOBS")
    if jobs and not (jobs.isdigit() and int(jobs) > 0):
        raise SystemExit(f"MAX_JOBS is {jobs!r}; accepted: a number from 1 up")
    return jobs or None


MAX_JOBS = max_jobs()
NATIVE, CUDA = switch("PIXART_KERNELS_NATIVE"), switch("PIXART_KERNELS_CUDA")
if NATIVE == "0" and CUDA == "1":
    raise SystemExit(
        "PIXART_KERNELS_CUDA=1 needs the library that PIXART_KERNELS_NATIVE=0 leaves out"
    )
ARCHS = os.environ.get("PIXART_KERNELS_CUDA_ARCHS", "")
# architectures asked for by name are not left out quietly either
CUDA_REQUIRED = CUDA == "1" or (CUDA == "auto" and ARCHS != "")
REQUIRED = NATIVE == "1" or CUDA_REQUIRED


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str
    archs: tuple[str, ...]  # "80", "90a"
    ptx: str | None  # the one that other GPUs compile for themselves
    host: tuple[str, ...]  # which compiler takes the host's part
    library_folders: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        left_out = () if "90a" in self.archs else SM_90A_SOURCES
        return [source for source in CUDA_SOURCES if source not in left_out]

    def flags(self, source: str) -> list[str]:
        # a library of 3 MB instead of 15; needs a driver that CUDA 13 needs anyway
        size = ["--compress-mode=size"] if int(self.version.split(".")[0]) >= 13 else []
        only = source in SM_90A_SOURCES
        code = _gencode(("90a",), None) if only else _gencode(self.archs, self.ptx)
        return [*NVCC_FLAGS, *size, *code, *self.host]


def _gencode(archs: tuple[str, ...], ptx: str | None) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return flags + ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])


def find_nvcc(compiler: tuple[str, ...]) -> Nvcc:
    """The CUDA compiler, once it has said that it takes what it is going to be asked."""
    if CUDA == "0":
        raise CannotBuild("PIXART_KERNELS_CUDA=0 was set during the build")
    archs = tuple((ARCHS or "80;90a").split(";"))
    numbers = [re.fullmatch(r"(\d{2,3})[af]?", arch) for arch in archs]
    if not all(number and int(number.group(1)) >= 80 for number in numbers):
        raise SystemExit(
            f"PIXART_KERNELS_CUDA_ARCHS is {ARCHS!r}; accepted: a list like 80;90a, from 80 up"
        )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None and not home:
        found = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        where = f" in {home}/bin" if home else ""
        raise CannotBuild(f"no nvcc was found{where}; set CUDA_HOME to the CUDA toolkit's folder")
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or tuple(map(int, release.groups())) < OLDEST_NVCC:
        version = ".".join(release.groups()) if release else "of an unknown version"
        wanted = ".".join(map(str, OLDEST_NVCC))
        raise CannotBuild(f"{found} is {version} and the CUDA kernels need {wanted} or newer")
    # PTX of an architecture with a letter runs nowhere else
    generic = [arch for arch in archs if arch.isdigit()]
    ptx = max(generic, key=int, default=None)
    host: list[str] = []
    if os.environ.get("CXX"):
        # a wrapper such as ccache is not for nvcc, the compiler's flags are
        flags = [word for word in compiler if word.startswith("-")]
        program = [word for word in compiler if not word.startswith("-")][-1]
        host = [f"-ccbin={program}", *(f"-Xcompiler={flag}" for flag in flags)]
    trial = [found, "--dryrun", *_gencode(archs, ptx), *host, "-x", "cu", "-c", os.devnull]
    done = subprocess.run(trial, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        words = [line for line in done.stdout.splitlines() if not line.startswith("#$")]
        raise CannotBuild(f"{found} refuses: {words[-1] if words else done.returncode}")
    libraries = re.findall(r'"-L(.+?)"', re.search(r"#\$ LIBRARIES=(.*)", done.stdout).group(1))
    return Nvcc(Path(found), ".".join(release.groups()), archs, ptx, tuple(host), tuple(libraries))


@dataclass(frozen=True)
class Kernel:
    """What ptxas said of one kernel on one architecture."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse_ptxas(source: str, report: str) -> list[Kernel]:
    kernels, name, arch, function = [], "", "", ""
    frame = (0, 0, 0)
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, arch = found.groups()
            frame = (0, 0, 0)
        elif found := re.search(r"Function properties for (\S+)", line):
            function = found.group(1)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+)\D+(\d+)", line):
            # functions that were not inlined have lines of their own
            frame = tuple(map(int, found.groups())) if function == name else frame
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            size = int(shared.group(1)) if shared else 0
            kernels.append(Kernel(source, name, arch, int(found.group(1)), *frame, size))
    return kernels


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    lines = "\n".join(names)
    return subprocess.run(
        ["c++filt"], input=lines, capture_output=True, text=True, check=True
    ).stdout.splitlines()


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
            return [*PYTHON_LINK_FLAGS, library, "-ltorch", "-ltorch_cpu"]
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
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    # CXX may hold a wrapper or flags as well: "ccache g++"
    commands = (shlex.split(name) for name in candidates)
    compiler = next((tuple(words) for words in commands if words and shutil.which(words[0])), None)
    if compiler is None:
        raise CannotBuild(
            f"no C++ compiler was found (looked for {', '.join(candidates)}); install one, such as "
            "g++, then install this package again"
        )
    described = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    first_line = described.stdout.splitlines()[0] if described.stdout else shlex.join(compiler)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return Toolchain(compiler, first_line, torch, version, x86)


def write_build_info(folder: Path, **info: object) -> None:
    info = {"package_version": package_version(), **info}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def remove_built(folder: Path) -> None:
    for pattern in BUILT:
        for stale in folder.glob(pattern):
            stale.unlink()


def say(sentence: str) -> None:
    print(f"{PACKAGE}: {sentence}", file=sys.stderr, flush=True)


def pure_python(folder: Path, reason: str) -> None:
    """Says so in the build's output and, since pip hides that, in what doctor reads."""
    say(f"installing without compiled kernels: {reason}")
    remove_built(folder)
    write_build_info(folder, native=False, reason=reason)


@dataclass(frozen=True)
class Step:
    """One compiler call. Paths are relative to ROOT, where it runs, or absolute."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]

    @property
    def depfile(self) -> Path | None:
        return depfile(self.output) if "-MD" in self.command else None


def depfile(output: Path) -> Path:
    return output.with_suffix(".d")


def ptxas_report(output: Path) -> Path:
    return output.with_suffix(".ptxas")


def run_steps(steps: list[Step], folder: Path) -> None:
    """Runs what is out of date, in parallel where ninja is installed.

    Raises CannotBuild with the compiler's last words.
    """
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    ninja = ninja or shutil.which("ninja")
    for step in steps:
        (ROOT / step.output).parent.mkdir(parents=True, exist_ok=True)
    if ninja is None:
        commands = [step.command for step in steps]
    else:
        lines = [f"builddir = {_escaped(folder)}"]
        for i, step in enumerate(steps):
            lines += [f"rule r{i}", f"  command = {shlex.join(step.command)}".replace("$", "$$")]
            if step.depfile is not None:
                lines += [f"  depfile = {step.depfile}", "  deps = gcc"]
            inputs = " ".join(_escaped(path) for path in step.inputs)
            lines += [f"build {_escaped(step.output)}: r{i} {inputs}"]
        file = folder / f"{steps[-1].output.name}.ninja"
        (ROOT / file).write_text("\n".join(lines) + "\n")
        commands = [(ninja, "-f", str(file), *(["-j", MAX_JOBS] if MAX_JOBS else []))]
    for command in commands:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if re.search("error:|FAILED|fatal ", line)]
            said = (errors or lines or [f"exit status {done.returncode}"])[-1]
            raise CannotBuild(f"the compiler failed: {said}")


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def object_step(folder: Path, source: str, command: list[str]) -> Step:
    output = folder / f"{source}.o"
    # system headers too: torch's change with torch
    command = [*command, "-MD", "-MF", str(depfile(output)), "-c", source, "-o", str(output)]
    return Step(output, (Path(source),), tuple(command))


def nvcc_step(folder: Path, source: str, nvcc: Nvcc) -> Step:
    """Also writes ptxas's report beside the object, for builds that find it up to date."""
    step = object_step(folder, source, [str(nvcc.path), *nvcc.flags(source)])
    script = 'report=$0; "$@" >"$report" 2>&1 || { status=$?; cat "$report"; exit $status; }'
    command = ("sh", "-c", script, str(ptxas_report(step.output)), *step.command)
    return Step(step.output, step.inputs, command)


def install(built: Path, library: Path) -> None:
    """Replaced in one step: a process may have the old one mapped."""
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, library.with_suffix(".new"))
    os.replace(library.with_suffix(".new"), library)


def oldest_system(library: Path) -> dict[str, str]:
    """The newest version of each C and C++ library that ``library`` asks of a machine."""
    if shutil.which("objdump") is None:
        return {}
    said = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\b", said):
        newest[name] = max(newest.get(name, ()), tuple(map(int, version.split("."))))
    return {name: ".".join(map(str, version)) for name, version in sorted(newest.items())}


class BuildExt(build_ext):
    def run(self) -> None:
        # not setuptools' own temporary folder, which is another at each editable install
        self.folder = Path("build") / f"kernels.{sysconfig.get_platform()}"
        self.toolchain: Toolchain | None = None
        self.info: dict[str, object] = {}
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        if ext.name == INTROSPECTION:
            self._build_introspection(library)
        else:
            self._build_ops(library)

    def _build_ops(self, library: Path) -> None:
        remove_built(library.parent)
        try:
            toolchain = find_toolchain()
            cuda = self._build_with_or_without_cuda(toolchain, library)
        except CannotBuild as problem:
            if REQUIRED:
                raise
            pure_python(library.parent, str(problem))
            return
        self.toolchain = toolchain
        self.info.update(
            native=True,
            torch=toolchain.torch_version,
            schemas=hashlib.sha256((ROOT / "csrc/registration.cpp").read_bytes()).hexdigest()[:12],
            abi_target=".".join(map(str, ABI_TARGET)),
            compiler=toolchain.compiler_version,
            machine=platform.machine(),
            cpu_level=X86_LEVEL if toolchain.x86 else None,
            flags=shlex.join([*FLAGS, *(X86_FLAGS if toolchain.x86 else ())]),
            cuda=cuda,
            needs=oldest_system(library),
        )
        write_build_info(library.parent, **self.info)

    def _build_with_or_without_cuda(self, toolchain: Toolchain, library: Path) -> dict:
        try:
            nvcc = find_nvcc(toolchain.compiler)
            self._compile(toolchain, nvcc, library)
        except CannotBuild as problem:
            if CUDA_REQUIRED:
                raise
            say(f"building without CUDA kernels: {problem}")
            self._compile(toolchain, None, library)
            return {"built": False, "reason": str(problem)}
        self._report_kernels(nvcc, library.parent)
        archs = [f"sm_{arch}" for arch in nvcc.archs]
        ptx = nvcc.ptx and f"compute_{nvcc.ptx}"
        return {"built": True, "nvcc": nvcc.version, "archs": archs, "ptx": ptx}

    def _compile(self, toolchain: Toolchain, nvcc: Nvcc | None, library: Path) -> None:
        steps = [nvcc_step(self.folder, name, nvcc) for name in nvcc.sources] if nvcc else []
        for name in (*SOURCES, *KERNELS):
            cpu = X86_FLAGS if toolchain.x86 and name in KERNELS else ()
            cuda = ["-DPIXART_KERNELS_WITH_CUDA"] if nvcc else []
            command = [*toolchain.compiler, *toolchain.flags, *cpu, *cuda]
            steps.append(object_step(self.folder, name, command))
        objects = tuple(step.output for step in steps)
        linked = self.folder / library.name
        link = [*toolchain.compiler, *map(str, objects), *toolchain.link_flags]
        if nvcc:
            link += [f"-L{folder}" for folder in nvcc.library_folders]
            link += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        steps.append(Step(linked, objects, (*link, "-o", str(linked))))
        run_steps(steps, self.folder)
        install(ROOT / linked, library)

    def _report_kernels(self, nvcc: Nvcc, folder: Path) -> None:
        kernels = []
        for source in nvcc.sources:
            report = (ROOT / ptxas_report(self.folder / f"{source}.o")).read_text()
            kernels += parse_ptxas(source, report)
            for line in report.splitlines():
                # the latter of asynchronous products that were made to wait for each other
                if re.search("warning|performance loss", line, re.IGNORECASE):
                    say(line)
        names = demangled([kernel.name for kernel in kernels])
        rows = [
            {**asdict(kernel), "name": name} for kernel, name in zip(kernels, names, strict=True)
        ]
        (folder / "_kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
        for row in rows:
            spilled = row["spill_stores"] + row["spill_loads"]
            if spilled:
                say(f"WARNING: {spilled} bytes spill on {row['arch']} in {row['name']}")

    def _build_introspection(self, library: Path) -> None:
        if self.toolchain is None:
            return  # there is nothing to look into
        try:
            self._compile_introspection(self.toolchain, library)
            self.info["introspection"] = {"built": True, "python": sys.implementation.cache_tag}
        except CannotBuild as problem:
            say(f"building without introspection: {problem}")
            self.info["introspection"] = {"built": False, "reason": str(problem)}
        write_build_info(library.parent, **self.info)

    def _compile_introspection(self, toolchain: Toolchain, library: Path) -> None:
        pybind11 = importlib.util.find_spec("pybind11")
        if pybind11 is None:
            raise CannotBuild(
                "pybind11 was not found by the build; install it, then this package again"
            )
        python = Path(sysconfig.get_path("include"))
        if not (python / "Python.h").exists():
            raise CannotBuild(f"{python} has no Python.h; install Python's development files")
        folder = self.folder / sys.implementation.cache_tag
        includes = [Path(pybind11.origin).parent / "include", python]
        flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
        flags += [word for path in includes for word in ("-isystem", str(path))]
        step = object_step(folder, "csrc/module.cpp", [*toolchain.compiler, *flags])
        linked = folder / library.name
        link = (*toolchain.compiler, str(step.output), *PYTHON_LINK_FLAGS, "-o", str(linked))
        run_steps([step, Step(linked, (step.output,), link)], folder)
        install(ROOT / linked, library)

    def copy_extensions_to_source(self) -> None:
        """What an editable install adds: all that was built, and nothing from before."""
        remove_built(ROOT / PACKAGE)
        super().copy_extensions_to_source()
        for name in ("_build_info.json", "_kernels.json"):
            built = Path(self.build_lib) / PACKAGE / name
            if built.exists():
                shutil.copy2(built, ROOT / PACKAGE / name)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if REASON is not None:
            pure_python((ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE, REASON)


def reason_against_building() -> str | None:
    try:
        find_toolchain()
    except CannotBuild as problem:
        if REQUIRED:
            raise
        return str(problem)
    return None


REASON = reason_against_building() if __name__ == "__main__" else None

if __name__ == "__main__" and REASON is None:
    setup(
        ext_modules=[
            Extension(OPS, sources=[], py_limited_api=True, optional=True),
            Extension(INTROSPECTION, sources=[], optional=True),
        ],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
        # for the ops, which serve every Python; another one goes without the introspection
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
elif __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
