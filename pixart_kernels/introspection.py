"""The compiled CUDA kernels: registers, spills, shared memory and occupancy of each.

``kernels()`` tells of every architecture they were built for, from what the compiler reported;
``running_kernels()`` asks the driver about the code it chose for the current GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pixart_kernels import _extension


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. Sizes are bytes; None is what nobody could say."""

    name: str
    arch: str  # "sm_90a"; of a running kernel, "sm_90"
    registers: int  # per thread
    spills: int | None  # stored and loaded; the driver does not say
    local: int  # per thread; spills are a part of it
    static_shared: int  # per block
    dynamic_shared: int | None
    threads: int | None  # per block
    occupancy: float | None  # resident warps at full load, as a share of what the hardware holds


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor holds at once (CUDA C++ Programming Guide, "Compute Capabilities")."""

    warps: int
    blocks: int
    shared: int  # bytes


REGISTERS = 64 * 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024),
}


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float | None:
    """The share of a multiprocessor's warps that one kernel keeps resident, by CUDA's own rule.

    A warp takes ``32 * registers`` rounded up to 256 from one of four equal register files; a
    block takes ``shared`` bytes, static and dynamic, plus 1 KiB for the driver, rounded up to 128.
    Blocks fit as long as warps, registers, shared memory and the number of blocks all do. None for
    an architecture that is not in ``MULTIPROCESSORS``.
    """
    limits = MULTIPROCESSORS.get(arch.rstrip("af"))
    if limits is None:
        return None
    warps = _divided_up(threads, 32)
    of_warp = 256 * _divided_up(32 * registers, 256)
    by_registers = 4 * (REGISTERS // 4 // of_warp) // warps if registers else limits.blocks
    by_shared = limits.shared // (128 * _divided_up(shared + 1024, 128))
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


def _divided_up(a: int, b: int) -> int:
    return -(-a // b)


def short_name(signature: str) -> str:
    """``adaln::forward<float>`` of ``void pixart::adaln::(anonymous ...)::forward<float>(...)``."""
    name = signature.replace("(anonymous namespace)::", "").replace("pixart::", "")
    name = name.removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for i in reversed(range(len(name))):
            depth += {")": 1, "(": -1}.get(name[i], 0)
            if depth == 0:
                return name[:i]
    return name


def problem() -> str | None:
    """Why launch parameters and the driver's figures are not known here, or None."""
    if _extension.problem is not None:
        return _extension.problem
    try:
        importlib.import_module("pixart_kernels._introspection")
    except ImportError:
        built = _extension.build_info.get("introspection", {})
        here = sys.implementation.cache_tag
        why = built.get("reason", f"it was built for {built.get('python')} and this is {here}")
        return f"the introspection module is missing: {why}"
    return None


def _table() -> dict[str, dict]:
    """Name -> launch parameters and the driver's figures of each kernel in the loaded library."""
    if problem() is not None:
        return {}
    module = importlib.import_module("pixart_kernels._introspection")
    rows = module.kernels(str(_extension.library))
    wrapped = re.compile(r"pixart::KernelType<&\(?(.*?)\)?>", re.DOTALL)
    return {short_name(wrapped.fullmatch(row["type"]).group(1)): row for row in rows}


def kernels() -> list[Kernel]:
    """Every kernel of this build on every architecture it was compiled for; needs no GPU."""
    try:
        rows = json.loads((Path(__file__).parent / "_kernels.json").read_text())
    except (OSError, ValueError):
        return []
    table = _table()
    found = []
    for row in rows:
        name = short_name(row["name"])
        launch = table.get(name, {})
        threads, dynamic = launch.get("threads"), launch.get("dynamic_shared")
        share = None
        if threads is not None:
            share = occupancy(row["arch"], row["registers"], threads, row["shared"] + dynamic)
        found.append(
            Kernel(
                name=name,
                arch=row["arch"],
                registers=row["registers"],
                spills=row["spill_stores"] + row["spill_loads"],
                local=row["stack"],
                static_shared=row["shared"],
                dynamic_shared=dynamic,
                threads=threads,
                occupancy=share,
            )
        )
    return found


def running_kernels() -> list[Kernel]:
    """Every kernel as the driver runs it on the current CUDA device; empty without one."""
    if not torch.cuda.is_available():
        return []
    return [
        Kernel(
            name=name,
            arch=f"sm_{row['binary']}",
            registers=row["registers"],
            spills=None,
            local=row["local"],
            static_shared=row["static_shared"],
            dynamic_shared=row["dynamic_shared"],
            threads=row["threads"],
            occupancy=row["blocks"] * _divided_up(row["threads"], 32) * 32 / row["max_threads"],
        )
        for name, row in _table().items()
        if row["registers"] is not None
    ]
