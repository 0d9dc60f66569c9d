"""The training loop: the same for the transformer and for the autoencoder.

What is trained is a :class:`Task`. The loop adds accelerate's devices, processes and precision,
gradient accumulation and clipping, AdamW and its learning rate, a moving average of the weights,
progress, curves, pictures, and checkpoints from which the loss curve goes on bit for bit.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from pixart.data.batches import BatchStream
from pixart.files import finish_folder, unfinished_folder, write_atomically
from pixart.training.recipe import Run, Schedule
from pixart.training.run_state import RunFolder


class Task(Protocol):
    """What is trained: a module, its data, its loss, and what becomes of the result."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def dataset(self) -> Dataset: ...

    @property
    def preview_every(self) -> int:
        """Steps between previews; 0: none."""
        ...

    def collate(self, samples: list[Any]) -> dict[str, Any]: ...

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalars to log; ``"loss"`` is the one to minimise. May draw from the global RNG."""
        ...

    def preview(self, module: nn.Module) -> Image.Image | None: ...

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes the trained weights for use, complete or not at all."""
        ...


def train(recipe: Run, make_task: Callable[[torch.device], Task]) -> RunFolder:
    """Trains to ``recipe.steps``, from the run's last complete checkpoint where there is one.

    Args:
        recipe: the run; ``recipe.output`` becomes its folder.
        make_task: builds the task, with its tensors on the given device. Called after seeding,
            so that fresh weights follow from the recipe's seed.

    Returns:
        The run's folder. The averaged weights are exported into it.

    Raises:
        ValueError: the folder holds a run of another recipe.
        RuntimeError: the loss is not finite, or a checkpoint cannot be written; says what to do.
    """
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        log_with="tensorboard",
        project_dir=str(recipe.output),
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > accelerator.num_processes:
        raise RuntimeError(
            f"{started} processes were started and each would train alone in {recipe.output}: "
            "without a GPU, set ACCELERATE_USE_CPU=true"
        )
    run = RunFolder(recipe.output)
    if accelerator.is_main_process:
        run.begin(recipe)
    # weights are drawn alike on every process; noise, timesteps and dropout are not
    set_seed(recipe.seed)
    task = make_task(accelerator.device)
    set_seed(recipe.seed, device_specific=True)
    # weights that were loaded, and not drawn, come in evaluation mode
    task.module.train()

    optimizer = torch.optim.AdamW(
        [p for p in task.module.parameters() if p.requires_grad],
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    rate = learning_rate(recipe.schedule, recipe.steps)
    schedule = LambdaLR(optimizer, rate)
    ema = None
    if recipe.ema_decay is not None:
        ema = EMAModel(task.module.parameters(), decay=recipe.ema_decay, foreach=True)
        ema.to(accelerator.device)
    module, optimizer = accelerator.prepare(task.module, optimizer)

    start = 0
    last = run.last_checkpoint()
    if last is not None:
        start, folder = last
        try:
            accelerator.load_state(str(folder))
            _load_own_state(folder, accelerator, schedule, ema)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RuntimeError(
                f"{folder} cannot be read ({type(error).__name__}: {reason}). Delete it, and the "
                "run goes on from the checkpoint before"
            ) from error
        accelerator.print(f"resuming {recipe.output} after step {start}")
    if accelerator.is_main_process:
        run.rewind_log(start)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start + 1}})

    loop = _Loop(recipe, accelerator, run, task, module, schedule, ema)
    batches = _batches(task, recipe, accelerator, start * recipe.gradient_accumulation)
    with _progress(accelerator.is_main_process) as progress:
        bar = progress.add_task(recipe.output.name, total=recipe.steps, completed=start, note="")
        for step in range(start + 1, recipe.steps + 1):
            for _ in range(recipe.gradient_accumulation):
                batch = _to(next(batches), accelerator.device)
                with accelerator.accumulate(module):
                    losses = task.loss(module, batch)
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients and recipe.gradient_clip is not None:
                        norm = accelerator.clip_grad_norm_(
                            module.parameters(), recipe.gradient_clip
                        )
                        losses = {**losses, "gradient_norm": norm}
                    optimizer.step()
                    optimizer.zero_grad()
                loop.add(losses)
            lr = float(schedule.get_last_lr()[0])
            schedule.step()
            if ema is not None:
                ema.step(task.module.parameters())
            at_end = step == recipe.steps
            at_checkpoint = at_end or step % recipe.checkpoint_every == 0
            if at_checkpoint or step % recipe.log_every == 0:
                note = loop.log(step, lr)
                progress.update(bar, note=note)
                # a bar that nobody watches is drawn once, at the end: a log file gets lines
                watched = progress.console.is_terminal or not accelerator.is_main_process
                if at_checkpoint and not watched:
                    progress.console.print(f"  step {step} of {recipe.steps}: {note}")
            if task.preview_every and (at_end or step % task.preview_every == 0):
                loop.preview(step)
            # last, so that a run with its final checkpoint has everything else as well
            if at_checkpoint:
                loop.checkpoint(step)
            progress.update(bar, completed=step)
    if start >= recipe.steps:
        loop.export()
    accelerator.end_training()
    return run


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


class _Loop:
    """What happens between steps: logging, checkpoints, pictures."""

    def __init__(
        self,
        recipe: Run,
        accelerator: Accelerator,
        run: RunFolder,
        task: Task,
        module: nn.Module,
        schedule: LambdaLR,
        ema: EMAModel | None,
    ) -> None:
        self.recipe, self.accelerator, self.run, self.task = recipe, accelerator, run, task
        self.module, self.schedule, self.ema = module, schedule, ema
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since = time.perf_counter()
        self._last_step: int | None = None

    def add(self, losses: dict[str, Tensor]) -> None:
        # stays on the device: reading a number would wait for the step to finish
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, step: int, lr: float) -> str:
        """Writes the means since the last call; returns the progress bar's note."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        reduced: dict[str, Tensor] = self.accelerator.reduce(means, "mean")
        row = {name: value.item() for name, value in reduced.items()}
        micro_steps = self._counts["loss"]
        self._sums, self._counts = {}, {}
        if not math.isfinite(row["loss"]):
            raise self._diverged(f"the loss became {row['loss']} at or before step {step}")
        now = time.perf_counter()
        samples = micro_steps * self.recipe.batch_size * self.accelerator.num_processes
        speed, self._since = samples / (now - self._since), now
        row |= {"lr": lr, "images_per_second": speed}
        self.accelerator.log(row, step=step)
        if self.accelerator.is_main_process:
            self.run.log({"step": step, **row})
        return f"loss {row['loss']:.4f}  {speed:.1f} images/s"

    def _diverged(self, what: str) -> RuntimeError:
        last = self.run.last_checkpoint()
        kept = f"The last good checkpoint is {last[1]}" if last else "No checkpoint was written"
        return RuntimeError(
            f"{what}. {kept}. Lower optimizer.lr, set gradient_clip, or use mixed_precision: bf16 "
            "or no; running the same recipe again would meet it again"
        )

    def export(self) -> None:
        if self.accelerator.is_main_process:
            with self.averaged() as module:
                self.task.export(module, self.run.folder)
        self.accelerator.wait_for_everyone()

    def checkpoint(self, step: int) -> None:
        last = self.run.last_checkpoint()
        # a finite loss may come with an infinite gradient, and what it made of the weights must
        # not take a good checkpoint's place
        if not all(bool(p.isfinite().all()) for p in self.module.parameters()):
            raise self._diverged(f"weights became infinite or nan at or before step {step}")
        accelerator, final = self.accelerator, self.run.name(step)
        if accelerator.is_main_process:
            unfinished_folder(final)
        accelerator.wait_for_everyone()
        partial = final.with_name(f".{final.name}.unfinished")
        try:
            accelerator.save_state(str(partial))
            _save_own_state(partial, accelerator, self.schedule, self.ema)
            # before the checkpoint counts, so that none is without its export
            self.export()
            if accelerator.is_main_process:
                finish_folder(final)
                self.run.prune(self.recipe.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = f"the last complete one is {last[1]}" if last else "there is no earlier one"
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written ({error}); {kept}. Make room "
                f"in {self.run.folder} and run the same command again"
            ) from error
        accelerator.wait_for_everyone()

    def preview(self, step: int) -> None:
        if self.accelerator.is_main_process:
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            # drawing must not move the noise that training sees
            with self.averaged() as module, torch.random.fork_rng(devices), torch.no_grad():
                picture = self.task.preview(module)
            if picture is not None:
                path = self.run.folder / "samples" / f"step-{step:07d}.png"
                write_atomically(path, lambda file: picture.save(file, "PNG"))
        self.accelerator.wait_for_everyone()
        self._since = time.perf_counter()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The bare module in eval mode with averaged weights; afterwards as it was."""
        module = self.accelerator.unwrap_model(self.module)
        training, parameters = module.training, list(module.parameters())
        module.eval()
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        try:
            yield module
        finally:
            if self.ema is not None:
                self.ema.restore(parameters)
            module.train(training)


# accelerate would pickle these, and pass over random numbers that it cannot read; written and
# read here, they are tensors and numbers alone, and damage is an error
def _save_own_state(
    folder: Path, accelerator: Accelerator, schedule: LambdaLR, ema: EMAModel | None
) -> None:
    random = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    torch.save(random, folder / f"random-{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        state = {"schedule": schedule.state_dict(), "ema": ema and ema.state_dict()}
        torch.save(state, folder / "schedule-and-ema.pt")
    accelerator.wait_for_everyone()


def _load_own_state(
    folder: Path, accelerator: Accelerator, schedule: LambdaLR, ema: EMAModel | None
) -> None:
    state = torch.load(folder / "schedule-and-ema.pt", map_location="cpu", weights_only=True)
    schedule.load_state_dict(state["schedule"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
    file = folder / f"random-{accelerator.process_index}.pt"
    random = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], accelerator.device)


def _batches(
    task: Task, recipe: Run, accelerator: Accelerator, start: int
) -> Iterator[dict[str, Any]]:
    stream = BatchStream(
        len(task.dataset),  # type: ignore[arg-type]  # map-style data sets have a length
        recipe.batch_size,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=start,
    )
    return iter(
        DataLoader(
            task.dataset,
            batch_sampler=stream,
            collate_fn=task.collate,
            num_workers=recipe.workers,
            pin_memory=accelerator.device.type == "cuda",
            # the loader seeds its workers from this; the global RNG belongs to the noise
            generator=torch.Generator().manual_seed(recipe.seed),
        )
    )


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _progress(shown: bool) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not shown,
    )
