"""Loads the compiled kernels. What prevents it becomes one sentence, never an import error.

``problem`` is that sentence, or None when the ops are registered; ``library`` is their file;
``build_info`` is what ``setup.py`` recorded about the build.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from functools import lru_cache
from pathlib import Path

import torch

from pixart_kernels import __version__

_FOLDER = Path(__file__).parent
_REBUILD = "rebuild it with `pip install --no-build-isolation --no-deps --force-reinstall .`"


def _read_build_info() -> dict:
    try:
        info = json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _mismatch(info: dict) -> str | None:
    """How this process differs from what the extension was built for, or None."""
    if info.get("package_version") != __version__:
        return (
            f"the compiled extension was built from version {info.get('package_version')} of "
            f"pixart_kernels and this is version {__version__}; {_REBUILD}"
        )
    sources = _FOLDER.parent / "csrc" / "registration.cpp"
    if sources.exists() and info.get("schemas") != _digest(sources):
        return f"the compiled extension has other ops than the sources beside it; {_REBUILD}"
    target = str(info.get("abi_target", ""))
    if _major_minor(torch.__version__) < _major_minor(target):
        return (
            f"the compiled extension was built with torch {info.get('torch')} for torch {target} "
            f"or newer and torch {torch.__version__} is running; upgrade torch"
        )
    if info.get("machine") != platform.machine():
        return (
            f"the compiled extension was built for {info.get('machine')} and this machine is "
            f"{platform.machine()}; {_REBUILD}"
        )
    level, running = info.get("cpu_level"), torch.backends.cpu.get_cpu_capability()
    if level == "AVX2" and running not in ("AVX2", "AVX512"):
        return (
            f"the compiled extension needs a CPU with {level} and torch reports {running} "
            "instructions here; the reference backend runs instead"
        )
    return None


def _load(info: dict) -> str | None:
    if library is None:
        if info.get("native"):
            return f"the compiled extension is missing from {_FOLDER}; {_REBUILD}"
        why = info.get("reason", "it was never built in this checkout")
        return f"the compiled extension is not built: {why}"
    if not info.get("native"):
        return f"{library.name} has no _build_info.json beside it to check it against; {_REBUILD}"
    mismatch = _mismatch(info)
    if mismatch is not None:
        return mismatch
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's own words
        why = str(error.__cause__ or error)
        first_line = (why.splitlines() or [type(error).__name__])[0]
        return (
            f"{library.name}, built with torch {info.get('torch')}, does not load into torch "
            f"{torch.__version__}: {first_line}; {_REBUILD}"
        )
    return None


library: Path | None = next(iter(sorted(_FOLDER.glob("_C*.so"))), None)
build_info: dict = _read_build_info()
problem: str | None = _load(build_info)


def status() -> str:
    """One sentence on the compiled extension, for people."""
    if problem is not None:
        return problem
    level, cuda = build_info.get("cpu_level"), build_info.get("cuda", {})
    return (
        f"loaded; built with torch {build_info['torch']} for torch {build_info['abi_target']} or "
        f"newer, {build_info['machine']}{f' with {level}' if level else ''}, "
        + (f"CUDA {', '.join(cuda['archs'])}" if cuda.get("built") else "no CUDA kernels")
    )


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_native(x: torch.Tensor) -> str | None:
    """Why the compiled CPU kernels cannot run on ``x``, or None."""
    if problem is not None:
        return problem
    if x.device.type != "cpu":
        return f"native kernels run on the CPU and x is on {x.device}"
    return why_not_dtype("native", x)


def why_not_cuda(x: torch.Tensor, only: str | None = None) -> str | None:
    """Why the compiled CUDA kernels cannot run on ``x``, or None.

    ``only``: the one architecture that the kernels in question are written for, like "sm_90a".
    """
    if problem is not None:
        return problem
    cuda = build_info.get("cuda", {})
    if not cuda.get("built"):
        return f"CUDA kernels are not built: {cuda.get('reason', 'the build says nothing of them')}"
    if x.device.type != "cuda":
        return f"CUDA kernels run on a GPU and x is on {x.device}"
    capability = _capability(x.device)
    here = "sm_{}{}".format(*capability)
    code = cuda
    if only is not None:
        if not _runs_on({"archs": [only]}, capability):
            return f"these kernels are written for {only} alone and {x.device} is {here}"
        code = {"archs": [arch for arch in cuda["archs"] if arch == only]}
    if not _runs_on(code, capability):
        built = ", ".join([*cuda.get("archs", ()), *filter(None, [cuda.get("ptx")])])
        return (
            f"CUDA kernels were built for {built} and {x.device} is {here}; "
            f"set PIXART_KERNELS_CUDA_ARCHS and {_REBUILD}"
        )
    return why_not_dtype("cuda", x)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _runs_on(cuda: dict, capability: tuple[int, int]) -> bool:
    """Machine code runs within its major version, from its minor one up; PTX on all that follow."""
    major, minor = capability
    for arch in cuda.get("archs", ()):
        built_major, built_minor = divmod(int(re.sub(r"\D", "", arch)), 10)
        newer = minor == built_minor if arch[-1].isalpha() else minor >= built_minor
        if built_major == major and newer:
            return True
    ptx = cuda.get("ptx")
    return ptx is not None and 10 * major + minor >= int(re.sub(r"\D", "", ptx))


def why_not_dtype(backend: str, x: torch.Tensor) -> str | None:
    if x.dtype in DTYPES:
        return None
    return f"x is {x.dtype}; {backend} kernels take float32, bfloat16 and float16"
