"""Checkpoints of a run: sharded, written while training goes on, and complete or absent.

A checkpoint is a folder of safetensors files, written by torch.distributed.checkpoint, so that any
number of processes can read what any other wrote, and nothing in it is executed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from pixart.files import digest, finish_folder, unfinished_folder
from pixart.training.distributed import Processes
from pixart.training.ema import EMA
from pixart.training.recipe import Run
from pixart.training.run_state import RunFolder

# beside the tensors: what else the run goes on from, and the files that belong to it
ABOUT = "checkpoint.json"

# said by torch of every process that is alone
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unin")


class Checkpoints:
    """Of one run and its training state. As a context it waits for what is being written."""

    def __init__(
        self,
        recipe: Run,
        run: RunFolder,
        processes: Processes,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
    ) -> None:
        self.recipe, self.run, self.processes = recipe, run, processes
        self.module, self.optimizer, self.ema = module, optimizer, ema
        self._writing: tuple[int, dict[str, Any], Future] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        # what is being written was good when it was copied; the first error is the one to tell
        with suppress(RuntimeError):
            self.wait()

    def save(self, step: int, about: dict[str, Any]) -> None:
        """Copies the state and returns; :meth:`poll` makes it count once it is written.

        Raises RuntimeError where the checkpoint, or the one before it, cannot be written.
        """
        self.wait()
        final = self.run.name(step)
        try:
            if self.processes.rank == 0:
                partial = unfinished_folder(final)
            self.processes.wait()
            partial = final.with_name(f".{final.name}.unfinished")
            future = dcp.async_save(
                self._state(),
                storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=self.processes.saving,
            )
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(step, error) from error
        assert isinstance(future, Future)
        if self.processes.rank == 0:
            beside = ThreadPoolExecutor(1)
            future = beside.submit(_digests, future, partial)
            beside.shutdown(wait=False)
        self._writing = step, about, future

    def poll(self) -> None:
        """Finishes a checkpoint that is written; raises RuntimeError where it could not be."""
        if self._writing is not None and self._writing[2].done():
            self.wait()

    def wait(self) -> None:
        """Like :meth:`poll`, but waits for it."""
        if self._writing is None:
            return
        (step, about, future), self._writing = self._writing, None
        try:
            files = future.result()
            # the future says that all processes have written
            if self.processes.rank == 0:
                final = self.run.name(step)
                partial = final.with_name(f".{final.name}.unfinished")
                about = {**about, "files": files}
                (partial / ABOUT).write_text(json.dumps(about, indent=2))
                finish_folder(final)
                self.run.prune(self.recipe.keep_checkpoints, self.recipe.keep_every)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(step, error) from error

    def load(self, folder: Path) -> None:
        """Puts a checkpoint's state in place. Raises RuntimeError where this run cannot have it."""
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            # none where fp16 overflowed at every step so far
            if any(x.startswith("optimizer.") for x in reader.read_metadata().state_dict_metadata):
                self._make_optimizer_state()
            state = self._state()
            dcp.load(state, storage_reader=reader, process_group=self.processes.saving)
            self._take_numbers(state)
        except (Exception, CheckpointException) as error:
            raise RuntimeError(
                f"{folder} is whole, but cannot be loaded here ({_reason(error)}). Keep it: try "
                f"the versions in {self.run.folder / 'starts.jsonl'}, or more memory"
            ) from error

    def _state(self) -> dict[str, Tensor]:
        """The training state by name: tensors in place, and copies of an optimiser's numbers."""
        # what is frozen is where the run has it from, and may be most of all
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        state = {
            f"model.{name}": tensor
            for name, tensor in self.module.state_dict().items()
            if name not in frozen
        }
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                state[f"optimizer.{key}.{name}"] = tensor
        if self.ema is not None:
            state |= {f"ema.{name}": tensor for name, tensor in self.ema.averages.items()}
        return state

    def _make_optimizer_state(self) -> None:
        """A step that moves nothing: until its first an optimiser has no state to read into."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _take_numbers(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            values = self.optimizer.state.get(parameter, {})
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    values[key] = state[f"optimizer.{key}.{name}"].item()

    def _failed(self, step: int, error: BaseException) -> RuntimeError:
        last = self.run.last_checkpoint()
        if self.processes.rank == 0:
            final = self.run.name(step)
            shutil.rmtree(final.with_name(f".{final.name}.unfinished"), ignore_errors=True)
        kept = f"the last complete one is {last[1]}" if last else "there is no earlier one"
        return RuntimeError(
            f"the checkpoint of step {step} could not be written ({_reason(error)}); {kept}. Make "
            f"room in {self.run.folder} and run the same command again"
        )


def read_about(folder: Path, processes: Processes) -> dict[str, Any]:
    """What :meth:`Checkpoints.save` was told. All processes must call it.

    Raises RuntimeError where a file is missing or is not what was written.
    """
    about, damage = {}, None
    try:
        about = json.loads((folder / ABOUT).read_text())
        files = about["files"]
        # a part that nobody misses would be read as what was in memory before
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)} is missing")
        for name in sorted(files)[processes.rank :: processes.count]:
            _verify(folder / name, files[name] if isinstance(files, dict) else None)
    except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
        damage = error
    (damaged,) = processes.total(damage is not None)
    if damaged:
        reason = "another process says why" if damage is None else _reason(damage)
        raise RuntimeError(
            f"{folder} cannot be read ({reason}). Delete it, and the run goes on from the "
            "checkpoint before"
        ) from damage
    return about


def _digests(written: Future, folder: Path) -> dict[str, str]:
    """Of each file in a folder, once it is written."""
    written.result()
    return {file.name: digest(file) for file in sorted(folder.iterdir())}


def _verify(file: Path, expected: str | None) -> None:
    """Reads the file; or its header alone, which tells its size, where no digest was kept."""
    if expected is not None:
        if digest(file) != expected:
            raise ValueError(f"{file.name} is not what was written: its checksum does not match")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        # its own text is a traceback of each process
        error = next(iter(error.failures.values()))[0]
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
