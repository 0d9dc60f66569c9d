"""A run of training: the same for the transformer and for the autoencoder.

What is trained is a :class:`pixart.training.loop.Task`. A run adds processes and precision,
gradient accumulation and clipping, an optimiser and its learning rate, a moving average of the
weights, progress, curves, pictures, and checkpoints from which the loss curve goes on as if nothing
had happened, also on another number of processes.
"""

from __future__ import annotations

import copy
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from pixart.training.checkpointing import Checkpoints, read_about
from pixart.training.distributed import Processes, check_started, shard, share_tokens
from pixart.training.ema import EMA
from pixart.training.loop import Loop, Task
from pixart.training.optimizers import make_optimizer
from pixart.training.recipe import Run
from pixart.training.run_state import RunFolder

# seconds in which signals are one wish: torchrun passes on what Slurm or a terminal sent already
ONE_WISH = 5.0


def train(recipe: Run, make_task: Callable[[torch.device], Task]) -> RunFolder:
    """Trains to ``recipe.steps``, from the run's last complete checkpoint where there is one.

    A step is ``gradient_accumulation`` batches on each process, and its gradient the mean over
    all their samples. A run that goes on with another number of processes keeps its steps: each
    process then has more or fewer of their batches.

    Args:
        recipe: the run; ``recipe.output`` becomes its folder.
        make_task: builds the task, with its tensors on the given device. Called after seeding,
            so that fresh weights follow from the recipe's seed.

    Returns:
        The run's folder. The averaged weights are exported into it.

    Raises:
        ValueError: the folder holds a run of another recipe or other data, or the number of
            processes does not suit the run.
        RuntimeError: the loss is not finite or grows without end, a process that reads data died,
            or a checkpoint cannot be read or written; says what to do.
        SystemExit: SIGTERM or SIGINT came, and the run was saved. One that comes seconds later ends
            it at once.
    """
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        log_with="tensorboard",
        project_dir=str(recipe.output),
    )
    if recipe.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32, and not say so
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    check_started(accelerator.num_processes)
    processes = Processes(recipe.parallel)
    run = RunFolder(recipe.output)
    if accelerator.is_main_process:
        run.begin(recipe)
    processes.wait()
    last = run.last_checkpoint()
    about = read_about(last[1], processes) if last is not None else {}
    # of a step, on all processes together
    batches = about.get("batches", recipe.gradient_accumulation * processes.streams)
    if batches % processes.streams:
        raise ValueError(
            f"a step of {recipe.output} is {batches} batches, which {processes.streams} processes "
            "cannot share evenly: start as many as divide it"
        )

    set_seed(recipe.seed)
    task = make_task(accelerator.device)
    data = {"samples": len(task.keys), "digest": _digest(task)}
    samples = dict(zip(task.keys, task.buckets, strict=True))
    if about.get("data", data) != data:
        raise ValueError(
            f"{recipe.output} was trained on other data: {run.changes(samples)}. Take away what "
            "was added and bring back what is lost, or give a new output, with model.init to start "
            "from what was trained"
        )
    if accelerator.is_main_process:
        run.record_samples(samples)
    # weights that were loaded, and not drawn, come in evaluation mode
    task.module.train()
    bare = _without_weights(task.module)
    share_tokens(task.module, recipe.parallel.sequence)
    if processes.sharded:
        shard(task.module, accelerator.device, recipe.mixed_precision)
    ema = None if recipe.ema_decay is None else EMA(task.module, recipe.ema_decay)
    task.averages = None if ema is None else ema.averages
    optimizer = make_optimizer(
        task.module.parameters(), recipe.optimizer, recipe.batch_size * batches
    )
    checkpoints = Checkpoints(recipe, run, processes, task.module, optimizer, ema)
    start = 0
    if last is not None:
        start, folder = last
        checkpoints.load(folder)
        # fp16 on a CPU had none once
        if accelerator.scaler is not None and about["scaler"] is not None:
            accelerator.scaler.load_state_dict(about["scaler"])
        accelerator.print(f"resuming {recipe.output} after step {start}")
    if accelerator.is_main_process:
        run.rewind_log(start)
        run.record_start(start, processes.count, accelerator.device)
    processes.wait()
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start + 1}})

    updates = about.get("updates", start)
    kept = {"batches": batches, "data": data, "updates": updates}
    loop = Loop(recipe, accelerator, processes, run, task, bare, checkpoints, start, kept)
    progress = _progress(processes.rank == 0)
    with checkpoints, progress, _signals() as received, loop.explaining():
        bar = progress.add_task(recipe.output.name, total=recipe.steps, completed=start, note="")
        for step in range(start + 1, recipe.steps + 1):
            if not loop.step(step, received):
                loop.stop(step - 1, received[0] if received else signal.SIGTERM)
            at_end = step == recipe.steps
            at_checkpoint = at_end or step % recipe.checkpoint_every == 0
            if at_checkpoint or step % recipe.log_every == 0:
                note = loop.log(step)
                progress.update(bar, note=note)
                # a bar that nobody watches is drawn once, at the end: a log file gets lines
                watched = progress.console.is_terminal or processes.rank
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
    with suppress(OSError):
        accelerator.end_training()
    return run


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters have no memory."""
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, empty)


def _digest(task: Task) -> str:
    """Of all that says which samples a batch has."""
    digest = hashlib.sha256()
    for sample in zip(task.keys, task.buckets, strict=True):
        digest.update(repr(sample).encode())
    return digest.hexdigest()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Takes SIGTERM and SIGINT as a wish to stop after the step; a later one stops at once."""
    received: list[int] = []
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        received.append(number)
        first = first or time.monotonic()
        if time.monotonic() - first > ONE_WISH:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
