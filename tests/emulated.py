"""CUDA sources compiled for the CPU, with ``tests/cuda_emulation`` in the place of the GPU."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
COMPILER = shutil.which("c++") or shutil.which("g++")
TORCH = Path(torch.__file__).parent

X86_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"),
    # 16-byte accesses are written as CUDA writes them
    *("-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-psabi"),
    # x86 forgives what a GPU does not
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-isystem", str(TORCH / "include")),
]
EMULATED = ["-x", "c++", "-include", str(EMULATION / "emulation.h")]

needs_compiler = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
        reason="the emulation is built for x86-64 Linux",
    ),
]


def compile_cpp(source: Path, output: Path, *arguments: str) -> Path:
    """With ``FLAGS`` and ``arguments``; ``-c`` among them for an object file."""
    command = [str(COMPILER), *FLAGS, *arguments, str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output
