"""What would run here and why: versions, the compiled extension, and each op's backends.

``python -m pixart_kernels.doctor``
"""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import pixart_kernels
from pixart_kernels import _extension, dispatch


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


def _extension_lines() -> list[str]:
    lines = [f"compiled extension: {_extension.status()}"]
    return lines + [f"  {name:<16} {value}" for name, value in _extension.build_info.items()]


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


def report() -> str:
    """The whole report, as printed."""
    sections = [_versions(), _extension_lines(), *(_op_lines(device) for device in _devices())]
    return "\n\n".join("\n".join(section) for section in sections)


if __name__ == "__main__":
    print(report())
