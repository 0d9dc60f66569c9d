"""A step of training and what happens between steps: logs, pictures, checkpoints."""

from __future__ import annotations

import copy
import math
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from pixart.data.batches import BatchStream
from pixart.files import write_atomically
from pixart.floor import DEVICES
from pixart.training.checkpointing import Checkpoints
from pixart.training.distributed import Processes, full, local, seed_batch
from pixart.training.recipe import Run, Schedule
from pixart.training.run_state import RunFolder

# a loss so many times the highest of the first logged ones does not come back
DIVERGED, FIRST_LOSSES = 10, 10
# what fp16's losses are multiplied by halves at each overflow: from 2**16, at 30 in a row
LOWEST_SCALE = 1e-4


class Task(Protocol):
    """What is trained: a module, its data, its loss, and what becomes of the result."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def dataset(self) -> Dataset: ...

    @property
    def buckets(self) -> Sequence[Hashable]:
        """Of each sample in ``dataset``; the samples of a batch are of one bucket."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples in ``dataset``; a run goes on with the same ones alone."""
        ...

    averages: dict[str, Tensor] | None
    """Of the trained weights by their names, set by the loop; None: the recipe wants none."""

    @property
    def preview_every(self) -> int:
        """Steps between previews; 0: none."""
        ...

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """A batch; its tensors' first dimension counts the samples that are in it."""
        ...

    def flops(self, batch: dict[str, Any]) -> int | None:
        """Of a forward of a batch, which lies on the host; None: not known."""
        ...

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Means over the samples, to log; ``"loss"`` is the one to minimise.

        May draw from the global RNG, which is seeded for each batch.
        """
        ...

    def preview(self, module: nn.Module) -> Image.Image | None: ...

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes the trained weights for use, complete or not at all."""
        ...


def learning_rate(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """Share of the full rate at each step (0-based): linear warm-up, then the named shape."""

    def rate(step: int) -> float:
        if step < schedule.warmup_steps:
            return (step + 1) / schedule.warmup_steps
        done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        if schedule.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        return max(0.0, 1 - done) if schedule.name == "linear" else 1.0

    return rate


class Loop:
    """A run under way.

    ``about`` is what checkpoints say of it besides tensors: ``batches`` of a step on all processes
    together, ``data``, and ``updates``, the steps that moved the weights.
    """

    def __init__(
        self,
        recipe: Run,
        accelerator: Accelerator,
        processes: Processes,
        run: RunFolder,
        task: Task,
        bare: nn.Module,
        checkpoints: Checkpoints,
        start: int,
        about: dict[str, Any],
    ) -> None:
        self.recipe, self.accelerator, self.processes = recipe, accelerator, processes
        self.run, self.task, self.bare = run, task, bare
        self.checkpoints, self.about = checkpoints, about
        for group in checkpoints.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        rate = learning_rate(recipe.schedule, recipe.steps)
        self.schedule = LambdaLR(checkpoints.optimizer, rate, last_epoch=about["updates"] - 1)
        # after the schedule: each wraps the optimiser's step, and accelerate puts back what it met
        self.optimizer = accelerator.prepare_optimizer(checkpoints.optimizer)
        # FSDP's hooks are on the module itself
        self.module = accelerator.prepare_model(task.module, evaluation_mode=processes.sharded)
        self.loader = _batches(
            task, recipe, processes, accelerator.device, start * about["batches"]
        )
        self._first_losses = [row["loss"] for row in run.read_log()[:FIRST_LOSSES]]
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._scale = accelerator.scaler.get_scale() if accelerator.scaler else 0.0
        self._skipped = 0
        self._peak = _peak_flops(accelerator.device, recipe.mixed_precision)
        self._flops, self._saved = 0, start
        self._waited, self._since = 0.0, time.perf_counter()

    def step(self, step: int, received: list[int]) -> bool:
        """Moves the weights; False, and nothing done, where a process received a signal."""
        self.checkpoints.poll()
        recipe, processes = self.recipe, self.processes
        # before the data, whose processes may have been told as well
        if self._told(received):
            return False
        before = self._sums.copy(), self._weights.copy(), self._flops, self._waited
        count = self.about["batches"] // processes.streams
        batches = self._fetch(count)
        sizes = [_samples(batch) for batch in batches]
        (samples,) = processes.total(sum(sizes))
        for k, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            # a step may take longer than a launcher waits before it kills
            if k and self._told(received):
                self._sums, self._weights, self._flops, self._waited = before
                return False
            seed_batch(recipe.seed, ((step - 1) * count + k) * processes.streams + processes.stream)
            # gradients become their mean over the processes
            weight = size * processes.count / samples
            with self._apart() if k < count - 1 else nullcontext():
                losses = self.task.loss(self.module, _to(batch, self.accelerator.device))
                self.accelerator.backward(losses["loss"] * weight)
            self._add(losses, size)
        if recipe.gradient_clip is not None:
            parameters = list(self.task.module.parameters())
            norm = full(self.accelerator.clip_grad_norm_(parameters, recipe.gradient_clip))
        self._lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._overflowed(step):
            return True
        if recipe.gradient_clip is not None:
            self._add({"gradient_norm": norm}, 1)
        self.about["updates"] += 1
        self.schedule.step()
        if self.checkpoints.ema is not None:
            self.checkpoints.ema.step(self.about["updates"])
        return True

    def _told(self, received: list[int]) -> bool:
        (told,) = self.processes.total(bool(received))
        return bool(told)

    def _overflowed(self, step: int) -> bool:
        """Whether a gradient was infinite or nan in fp16, and the weights stayed what they were."""
        if self.accelerator.scaler is None:
            return False
        # not accelerate's step_was_skipped: a fused optimiser is called, and skips by itself
        before, self._scale = self._scale, self.accelerator.scaler.get_scale()
        if self._scale >= before:
            return False
        self._skipped += 1
        if self._scale < LOWEST_SCALE:
            raise self._diverged(
                f"gradients are infinite or nan at step {step}, even of the loss times {before:.1g}"
            )
        return True

    def _fetch(self, count: int) -> list[dict[str, Any]]:
        since = time.perf_counter()
        batches = [next(self.loader) for _ in range(count)]
        self._waited += time.perf_counter() - since
        if self._peak is not None:
            self._flops += sum(self.task.flops(batch) or 0 for batch in batches)
        return batches

    def _apart(self) -> AbstractContextManager:
        """Gradients stay on this process; sharded ones do not, there would be no room."""
        ddp = isinstance(self.module, DistributedDataParallel)
        return self.module.no_sync() if ddp else nullcontext()

    def _add(self, values: dict[str, Tensor], weight: float) -> None:
        # stays on the device: reading a number would wait for the step to finish
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + weight * value.detach().float()
            self._weights[name] = self._weights.get(name, 0) + weight

    def log(self, step: int) -> str:
        """Writes the means since the last call; returns the progress bar's note."""
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).tolist()
        seconds = time.perf_counter() - self._since
        waited, flops, *totals = self.processes.total(
            self._waited, self._flops, *self._weights.values(), *sums
        )
        weights, sums = totals[: len(names)], totals[len(names) :]
        self._sums, self._weights, self._flops = {}, {}, 0
        self._waited, self._since = 0.0, time.perf_counter()
        row = {name: a / b for name, a, b in zip(names, sums, weights, strict=True)}
        self._check(row["loss"], step)
        if self.accelerator.scaler is not None:
            row |= {"loss_scale": self._scale, "skipped_steps": self._skipped}
        skipped, self._skipped = self._skipped, 0
        count, same = self.processes.count, self.recipe.parallel.sequence
        # processes that share a picture have counted it each
        speed = weights[names.index("loss")] / same / seconds
        row |= {
            "lr": self._lr,
            "images_per_second": speed,
            "data_wait": waited / count / seconds,
            "memory_gib": _peak_memory(self.accelerator.device) / 2**30,
        }
        if self._peak is not None and flops:
            # a backward is two forwards; what checkpointing makes again does not count
            row["mfu"] = 3 * flops / same / count / seconds / self._peak
        if self.processes.rank == 0:
            self.run.log({"step": step, **row})
        # TensorBoard shows what is in the log, and is no reason to end a run
        with suppress(OSError):
            self.accelerator.log(row, step=step)
        note = f"loss {row['loss']:.4f}  {speed:.1f} images/s"
        return note + (f"  {skipped} skipped: fp16 overflowed" if skipped else "")

    def _check(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss} at or before step {step}")
        first = self._first_losses
        if len(first) < FIRST_LOSSES:
            first.append(loss)
        elif loss > DIVERGED * max(first):
            raise self._diverged(
                f"the loss grew from {max(first):.4g} at first to {loss:.4g} by step {step}"
            )

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Says what to do where a disk is full, or a process that reads data fails or dies.

        torch raises of its death wherever this process is.

        Ends the loader's processes: at exit Python would wait for what ignores its SIGTERM.
        """
        try:
            yield
        except (RuntimeError, OSError) as error:
            # where a file was being written, what said that it cannot be was told so
            died = error.__cause__ if isinstance(error, OSError) else error
            if re.search("DataLoader worker .*(exited unexpectedly|killed by signal)", str(died)):
                raise RuntimeError(
                    f"a process that reads data died: {died} {self._kept()}. If memory ran out, "
                    "lower workers; then run the same command again"
                ) from error
            # what one says comes at the end of its traceback
            caught = rf"(?sm)Caught .* in DataLoader worker.*^\S*{type(error).__name__}: (.*)"
            if said := re.match(caught, str(error)):
                raise type(error)(said[1].strip()) from error
            if isinstance(error, OSError):
                raise OSError(
                    f"the run in {self.run.folder} ended: {error}. {self._kept()}. Once that is "
                    "mended, run the same command again"
                ) from error
            raise
        finally:
            if self.recipe.workers:
                self.loader._shutdown_workers()

    def _diverged(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what}. {self._kept()}. Lower optimizer.lr, set gradient_clip, or use "
            "mixed_precision: bf16 or no; running the same recipe again would meet it again"
        )

    def _kept(self) -> str:
        self.checkpoints.wait()
        last = self.run.last_checkpoint()
        return f"The last good checkpoint is {last[1]}" if last else "No checkpoint was written"

    def stop(self, step: int, number: int) -> NoReturn:
        """Saves what ``step`` left, if it is not saved yet, and ends the process."""
        if self._sums:
            # no other run would have them
            self.log(step)
        if step > self._saved:
            self.checkpoint(step)
        name, kept = signal.Signals(number).name, self._kept()
        self.accelerator.print(f"{name}. {kept}; the same command goes on from there")
        raise SystemExit(128 + number)

    def checkpoint(self, step: int) -> None:
        # a finite loss may come with an infinite gradient, and what it made of the weights must
        # not take a good checkpoint's place
        parameters = self.task.module.parameters()
        (bad,) = self.processes.total(not all(bool(local(p).isfinite().all()) for p in parameters))
        if bad:
            raise self._diverged(f"weights became infinite or nan at or before step {step}")
        # before the checkpoint counts, so that none is without its export
        self.export()
        scaler = self.accelerator.scaler
        self.checkpoints.save(step, self.about | {"scaler": scaler and scaler.state_dict()})
        self._saved = step

    def export(self) -> None:
        with self._averaged() as module:
            if module is not None:
                self.task.export(module, self.run.folder)
        self.processes.wait()

    def preview(self, step: int) -> None:
        begun = time.perf_counter()
        with self._averaged() as module, torch.no_grad():
            picture = None if module is None else self.task.preview(module)
        if picture is not None:
            path = self.run.folder / "samples" / f"step-{step:07d}.png"
            write_atomically(path, lambda file: picture.save(file, "PNG"))
        self.processes.wait()
        self._since += time.perf_counter() - begun

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module | None]:
        """The module in eval mode with averaged weights, whole; None but on the main process."""
        ema = self.checkpoints.ema
        state = self.task.module.state_dict() | (ema.averages if ema is not None else {})
        whole = {}
        for name, tensor in state.items():
            gathered = full(tensor)
            if self.processes.rank == 0:
                whole[name] = gathered
        if not whole:
            yield None
            return
        module = copy.deepcopy(self.bare).eval()
        # takes the tensors themselves
        module.load_state_dict(whole, assign=True)
        yield module


def _batches(
    task: Task, recipe: Run, processes: Processes, device: torch.device, start: int
) -> Any:
    stream = BatchStream(
        task.buckets,
        recipe.batch_size,
        seed=recipe.seed,
        rank=processes.stream,
        world_size=processes.streams,
        start=start,
    )
    return iter(
        DataLoader(
            task.dataset,
            batch_sampler=stream,
            collate_fn=task.collate,
            num_workers=recipe.workers,
            pin_memory=device.type == "cuda",
            # the loader seeds its workers from this; the global RNG belongs to the noise
            generator=torch.Generator().manual_seed(recipe.seed),
            worker_init_fn=_leave_signals,
        )
    )


def _leave_signals(_worker: int) -> None:
    """To the process that trains: a terminal tells all, and without its data that one is lost."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _samples(batch: dict[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Of a GPU whose data sheet is known, FLOP/s in the type that is used."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known in DEVICES.values():
        if known.driver_name == name:
            return 1e12 * (known.float32_tflops if mixed_precision == "no" else known.tflops)
    return None


def _peak_memory(device: torch.device) -> int:
    """Bytes, of a GPU's tensors since the start; on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
