"""What a result must say about where it came from, and how it is kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from pixart_kernels import _extension, dispatch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def folder(device: torch.device) -> Path:
    """Where results of ``device`` live: ``cpu``, or architecture and name of the GPU."""
    if device.type == "cpu":
        return RESULTS / "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    return RESULTS / f"{dispatch.architecture(device)}-{name}"


def write(file: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.replace(file)


def read(file: Path) -> list[dict]:
    """The rows; none where there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def measured(rows: Iterable[dict]) -> list[dict]:
    """Those that hold figures."""
    return [row for row in rows if "not_measured" not in row and "failed" not in row]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _commit() -> str:
    """The commit, marked when the checkout differs from it in more than what benchmarks write."""
    written = ("benchmarks/results", "docs", "README.md")
    changed = ("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in written))
    commit = _git("rev-parse", "--short=12", "HEAD")
    return commit + "-dirty" * bool(_git(*changed)) if commit else "unknown"


def environment(device: torch.device) -> dict:
    about = {
        "device": _cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": _extension.build_info.get("compiler"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        about["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        about["malloc"] = os.environ.get("MALLOC_MMAP_THRESHOLD_", "default")
        return about
    import triton

    return {
        **about,
        "device": torch.cuda.get_device_name(device),
        "host": about["device"],
        "architecture": dispatch.architecture(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        **gpu_state(device, ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")),
    }


STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def gpu_state(device: torch.device, fields: tuple[str, ...] = STATE) -> dict[str, str]:
    """What the driver says of the card just now; empty where nvidia-smi is missing."""
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(fields)}"]
    try:
        answer = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if answer.returncode != 0:
        return {}
    return dict(zip(fields, answer.stdout.strip().split(", "), strict=False))
