"""A run's folder: checkpoints that are complete or absent, and a log that follows them."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from pixart.files import remove_folder, write_atomically
from pixart.training.recipe import Run

# what may change between a run and its continuation, because no trained weight depends on it;
# so may `steps` where the learning rate does not hang on them
FREE_TO_CHANGE = frozenset(
    ("output", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every",
     "parallel", "gradient_checkpointing", "samples", "samples_every")
)  # fmt: skip


PACKAGES = (
    "pixart-kernels", "torch", "triton", "accelerate", "diffusers", "transformers", "safetensors",
    "numpy", "peft", "bitsandbytes",
)  # fmt: skip


class RunFolder:
    """``recipe.yaml``, ``starts.jsonl``, ``log.jsonl``, ``checkpoints/step-*``, ``samples/``, and
    the export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.log_file = folder / "log.jsonl"

    def begin(self, recipe: Run) -> None:
        """Records the recipe; raises ValueError if the folder belongs to a different one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"output: cannot write to {self.folder} ({error}); name another"
            ) from error
        values = recipe.model_dump(mode="json")
        file = self.folder / "recipe.yaml"
        if file.exists() and self.last_checkpoint() is not None:
            before = yaml.safe_load(file.read_text())
            free = FREE_TO_CHANGE | ({"steps"} if recipe.schedule.name == "constant" else set())
            changed = [
                f"  {key}: {before.get(key)} -> {values.get(key)}"
                for key in sorted(before.keys() | values.keys())
                if key not in free and before.get(key) != values.get(key)
            ]
            if changed:
                raise ValueError(
                    f"{self.folder} holds a run of another recipe:\n" + "\n".join(changed) +
                    "\nGive a new `output`, or delete that folder to start again."
                )  # fmt: skip
        # of a checkpoint that a killed run was writing or dropping
        for leftover in self.checkpoints.glob(".step-*"):
            shutil.rmtree(leftover)
        write_atomically(file, lambda f: f.write(yaml.safe_dump(values, sort_keys=False).encode()))

    def record_start(self, step: int, processes: int, device: torch.device) -> None:
        """Adds to ``starts.jsonl`` what a repetition needs to know beside the recipe."""
        on_gpu = device.type == "cuda"
        start = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "after_step": step,
            "command": shlex.join(sys.orig_argv),
            "processes": processes,
            "device": torch.cuda.get_device_name(device)
            if on_gpu
            else platform.processor() or platform.machine(),
            "commit": commit_of(Path(__file__)),
            "versions": {"python": platform.python_version(), **_versions()},
        }
        with (self.folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")

    def last_checkpoint(self) -> tuple[int, Path] | None:
        found = self._complete()
        return found[-1] if found else None

    def _complete(self) -> list[tuple[int, Path]]:
        if not self.checkpoints.is_dir():
            return []
        matches = ((re.fullmatch(r"step-(\d+)", p.name), p) for p in self.checkpoints.iterdir())
        return sorted((int(match[1]), path) for match, path in matches if match)

    def name(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:07d}"

    def prune(self, keep: int, keep_every: int | None) -> None:
        """Drops all checkpoints but the last ``keep`` and those of multiples of ``keep_every``."""
        for step, old in self._complete()[:-keep]:
            if keep_every is None or step % keep_every:
                remove_folder(old)

    def rewind_log(self, step: int) -> None:
        """Drops what a killed run logged after the checkpoint that it is resumed from."""
        rows = [row for row in self.read_log() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.log_file, lambda f: f.write(text.encode()))

    def read_log(self) -> list[dict[str, Any]]:
        if not self.log_file.exists():
            return []
        rows = []
        for line in self.log_file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that a killed run was writing
        return rows

    def log(self, row: dict[str, Any]) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit_of(file: Path) -> str | None:
    """The commit of the checkout that ``file`` belongs to, marked where the checkout differs."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # what is installed into an environment may lie in somebody else's checkout
        if not git("ls-files", file.name):
            return None
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None
