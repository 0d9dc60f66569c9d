"""A run's folder: checkpoints that are complete or absent, and a log that follows them."""

from __future__ import annotations

import gzip
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Hashable, Mapping
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
     "parallel", "gradient_checkpointing", "samples", "samples_every", "data.max_bad_fraction")
)  # fmt: skip
# may move, or be written another way: that the samples in them are the same is checked with them
FOLDERS = frozenset(
    ("images", "data.images", "data.features", "data.vae", "control.images", "control.features")
)

# names and sizes of what a run is trained on
SAMPLES = "samples.jsonl.gz"

PACKAGES = (
    "pixart-kernels", "torch", "triton", "accelerate", "diffusers", "transformers", "safetensors",
    "numpy", "peft", "bitsandbytes",
)  # fmt: skip


class RunFolder:
    """``recipe.yaml``, ``starts.jsonl``, ``log.jsonl``, ``samples.jsonl.gz``,
    ``checkpoints/step-*``, ``samples/``, and the export."""

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
            before, now = _flat(yaml.safe_load(file.read_text())), _flat(values)
            free = FREE_TO_CHANGE | ({"steps"} if recipe.schedule.name == "constant" else set())
            changed = [
                f"  {key}: {before.get(key)} -> {now.get(key)}"
                for key in sorted(before.keys() | now.keys())
                if not free & {key, key.split(".")[0]}
                and _differ(key, before.get(key), now.get(key))
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
        file = self.folder / "starts.jsonl"
        _write_rows(file, [*read_rows(file), start])

    def record_samples(self, samples: Mapping[str, Hashable]) -> None:
        """Each sample's size by its name, so that :meth:`changes` can say what became of it."""
        text = "".join(f"{json.dumps(sample)}\n" for sample in samples.items())
        blob = gzip.compress(text.encode(), mtime=0)
        write_atomically(self.folder / SAMPLES, lambda file: file.write(blob))

    def changes(self, samples: Mapping[str, Hashable]) -> str:
        """In words: what was added to the samples that were recorded, and what was lost."""
        path = self.folder / SAMPLES
        if not path.exists():
            return (
                "samples of other names, sizes or number, or in another order, than there are now"
            )
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        before = dict(json.loads(line) for line in lines)
        # sizes as JSON has them
        now = json.loads(json.dumps(dict(samples)))
        changes = {
            "added": [key for key in now if key not in before],
            "lost": [key for key in before if key not in now],
            "of another size": [key for key in now if key in before and now[key] != before[key]],
        }
        said = [
            f"{len(keys)} {what} ({', '.join(keys[:5])}{', ...' * (len(keys) > 5)})"
            for what, keys in changes.items()
            if keys
        ]
        return "; ".join(said) or "the same samples in another order, or as many times"

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
        _write_rows(self.log_file, [row for row in self.read_log() if row["step"] <= step])

    def read_log(self) -> list[dict[str, Any]]:
        return read_rows(self.log_file)

    def log(self, row: dict[str, Any]) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines; none where there is no file."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that a killed run was writing
    return rows


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(file, lambda f: f.write(text.encode()))


def _flat(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Of sections within sections, each value by its key as it is written in an override."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{section}{key}.") if inner else {f"{section}{key}": value}
    return flat


def _differ(key: str, before: Any, now: Any) -> bool:
    if key not in FOLDERS or before is None or now is None:
        return before != now
    # what is no longer there has moved; a name on the hub was never there, nor is another
    moved = Path(now).exists() and not Path(before).exists()
    return not moved and Path(before).resolve() != Path(now).resolve()


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
