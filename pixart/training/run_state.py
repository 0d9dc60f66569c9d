"""A run's folder: checkpoints that are complete or absent, and a log that follows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from pixart.files import remove_folder, write_atomically
from pixart.training.recipe import Run

# what may change between a run and its continuation, because no trained weight depends on it;
# so may `steps` where the learning rate does not hang on them
FREE_TO_CHANGE = frozenset(
    ("output", "workers", "log_every", "checkpoint_every", "keep_checkpoints",
     "samples", "samples_every")
)  # fmt: skip


class RunFolder:
    """``recipe.yaml``, ``log.jsonl``, ``checkpoints/step-*``, ``samples/``, and the export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.log_file = folder / "log.jsonl"

    def begin(self, recipe: Run) -> None:
        """Records the recipe; raises ValueError if the folder belongs to a different one."""
        self.folder.mkdir(parents=True, exist_ok=True)
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
        write_atomically(file, lambda f: f.write(yaml.safe_dump(values, sort_keys=False).encode()))

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

    def prune(self, keep: int) -> None:
        """Drops all checkpoints but the last ``keep``."""
        for _, old in self._complete()[:-keep]:
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
