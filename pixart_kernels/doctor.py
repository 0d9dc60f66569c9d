"""What would run here and why: versions, the compiled extension, and each op's backends.

``python -m pixart_kernels.doctor``; ``--kernels`` lists every CUDA kernel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import pixart_kernels
from pixart_kernels import _extension, dispatch, introspection
from pixart_kernels.introspection import Kernel


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(cuda))]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {dispatch.architecture(device)}, {memory:.0f} GiB"


def _versions() -> list[str]:
    cuda = torch.version.cuda or "none: a CPU build of torch"
    versions = {
        "pixart_kernels": pixart_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA": cuda,
    }
    return [f"{name:<15} {version}" for name, version in versions.items()]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(detail)}" for name, detail in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


def _extension_lines() -> list[str]:
    lines = [f"compiled extension: {_extension.status()}"]
    lines += [f"  {name:<16} {_plain(value)}" for name, value in _extension.build_info.items()]
    needs = _extension.build_info.get("needs", {})
    if "GLIBC" in needs:
        tag = "manylinux_" + needs["GLIBC"].replace(".", "_")
        lines.append(f"  {'wheel tag':<16} {tag} at best, by the C library it needs")
    return lines


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"


def _summary(arch: str, kernels: list[Kernel]) -> str:
    known = [kernel.occupancy for kernel in kernels if kernel.occupancy is not None]
    spilling = sum(bool(kernel.spills) for kernel in kernels)
    return (
        f"  {arch:<10} {len(kernels)} kernels, at most "
        f"{max(kernel.registers for kernel in kernels)} registers, {spilling} spill, "
        f"lowest occupancy {_percent(min(known, default=None))}"
    )


def _kernel_line(kernel: Kernel) -> str:
    """One row, in the order of _KERNEL_HEADING."""
    columns = (kernel.threads, kernel.registers, kernel.spills, kernel.local, kernel.static_shared)
    numbers = "".join(f"{'?' if value is None else value:>10}" for value in columns)
    return f"    {numbers}{_percent(kernel.occupancy):>10}  {kernel.name}"


_KERNEL_HEADING = "    " + "".join(
    f"{title:>10}" for title in ("threads", "registers", "spilled", "local", "static", "occupancy")
)


def _kernel_lines(every: bool) -> list[str]:
    lines = ["CUDA kernels, as compiled"]
    groups = {"": introspection.kernels(), " (running)": introspection.running_kernels()}
    for where, kernels in groups.items():
        for arch in dict.fromkeys(kernel.arch for kernel in kernels):
            rows = [kernel for kernel in kernels if kernel.arch == arch]
            lines.append(_summary(arch + where, rows))
            if every:
                lines += [_KERNEL_HEADING, *map(_kernel_line, rows)]
    if len(lines) == 1:
        why = _extension.build_info.get("cuda", {}).get("reason", "the build says nothing of them")
        return [f"CUDA kernels: none were built: {_extension.problem or why}"]
    if introspection.problem() is not None:
        lines.append(f"  occupancy is unknown: {introspection.problem()}")
    return lines


def _op_lines(device: torch.device) -> list[str]:
    # kernels choose by device and dtype, so one fp32 and one 16-bit token stand for all
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 1, 8, device=device, dtype=dtype)
        lines.append(f"{device} ({_describe(device)}), {str(dtype).removeprefix('torch.')}")
        for op in dispatch.ops():
            chosen = dispatch.chosen(op, x, "auto")
            lines.append(f"  {op:<22} {chosen}")
            for backend in dispatch.PRIORITY[: dispatch.PRIORITY.index(chosen)]:
                lines.append(f"    not {backend}: {dispatch.why_not_auto(op, backend, x)}")
    return lines


def report(every_kernel: bool = False) -> str:
    """The whole report, as printed; ``every_kernel`` adds a row for each CUDA kernel."""
    sections = [_versions(), _extension_lines(), _kernel_lines(every_kernel)]
    sections += [_op_lines(device) for device in _devices()]
    return "\n\n".join("\n".join(section) for section in sections)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pixart_kernels.doctor")
    parser.add_argument("--kernels", action="store_true", help="a row for each CUDA kernel")
    print(report(every_kernel=parser.parse_args().kernels))
