"""Memory and time of a training step by conditioning: ``python -m benchmarks conditioning``.

The ablation of PixArt-alpha (arXiv:2310.00426): XL/2 at 256px with a modulation layer in
each block ("adaln", 833M) against adaLN-single (611M). A step is forward, backward with all blocks
recomputed, fused AdamW and averaged weights, in mixed precision. On a GPU both are measured. On a
CPU the memory is counted, without weights or arithmetic, as all tensors that live at once, and the
time is that of a small model in float32. Writes
``benchmarks/results/<device>/conditioning.jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pixart_kernels as pk
from benchmarks.cases import command
from benchmarks.cuda import peak_bytes
from benchmarks.generation_memory import Live
from benchmarks.timing import measure
from pixart import PixArt, PixArtConfig, presets
from pixart.training.ema import EMA

CONDITIONINGS = ("adaln", "adaln_single")
# the ablation's is not known; 178 is that of the paper's stages on a GPU of 32 GB
BATCHES = (64, 178)
XL_2 = presets["alpha-256"]
SMALL = PixArtConfig(hidden_size=288, depth=4, num_heads=4, max_caption_tokens=120)
SMALL_BATCH = 2


class Step:
    """A model, its optimiser and averages, and calls that train them."""

    def __init__(
        self, config: PixArtConfig, batch: int, device: torch.device, autocast: bool
    ) -> None:
        torch.manual_seed(0)
        with device:
            self.model = PixArt(config).train()
            self.latents = torch.randn(
                batch, config.in_channels, config.input_size, config.input_size
            )
            self.timestep = torch.full((batch,), 500)
            self.caption = torch.randn(batch, config.max_caption_tokens, config.caption_channels)
        self.model.gradient_checkpointing = True
        self.precision = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.ema = EMA(self.model, 0.9999)

    def __call__(self) -> None:
        with self.precision:
            output: Tensor = self.model(self.latents, self.timestep, self.caption)
        output.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(10)


def counted(config: PixArtConfig, batch: int) -> int:
    """Bytes at the peak of a second step, with weights, moments and averages."""
    # what auto takes on a GPU until a kernel is verified there
    with FakeTensorMode(), pk.use_backend("reference"), Live() as live:
        step = Step(config, batch, torch.device("cpu"), autocast=True)
        step()
        live.peak = live.now
        step()
    return live.peak


def on_device(config: PixArtConfig, batch: int, device: torch.device) -> int:
    """As :func:`counted`, on a GPU."""
    before = torch.cuda.memory_allocated()
    step = Step(config, batch, device, autocast=True)
    step()
    return torch.cuda.memory_allocated() - before + peak_bytes(step)


def memory(shape: PixArtConfig, batch: int, device: torch.device) -> dict:
    """By conditioning: parameters, and bytes at the peak of a step."""
    parameters, peaks, on_gpu = {}, {}, device.type == "cuda"
    for name in CONDITIONINGS:
        config = replace(shape, conditioning=name)
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in PixArt(config).parameters())
        peaks[name] = on_device(config, batch, device) if on_gpu else counted(config, batch)
    how = "measured" if on_gpu else "counted"
    return {"how": how, "parameters": parameters, "peak_bytes": peaks}


def time_steps(shape: PixArtConfig, batch: int, device: torch.device, seconds: float) -> dict:
    """Milliseconds of a step by conditioning, in turn."""
    on_gpu = device.type == "cuda"

    def call(step: Step) -> None:
        step()
        if on_gpu:
            torch.cuda.synchronize()

    calls: dict[str, Callable[[], object]] = {
        name: partial(call, Step(replace(shape, conditioning=name), batch, device, autocast=on_gpu))
        for name in CONDITIONINGS
    }
    return measure(calls, seconds).as_json()


@dataclass(frozen=True)
class Case:
    """A step's memory, or its time."""

    what: Literal["memory", "time"]
    shape: PixArtConfig
    batch: int
    autocast: bool

    def about(self) -> dict:
        shape = {"depth": self.shape.depth, "width": self.shape.hidden_size}
        dtype = "bf16 autocast" if self.autocast else "float32"
        return {"what": self.what, **shape, "batch": self.batch, "dtype": dtype}


def cases(device: str) -> list[Case]:
    on_gpu = device == "cuda"
    timed = (XL_2, BATCHES[0]) if on_gpu else (SMALL, SMALL_BATCH)
    counts = [Case("memory", XL_2, batch, autocast=True) for batch in BATCHES]
    return [*counts, Case("time", *timed, autocast=on_gpu)]


def time_case(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> dict:
    if case.what == "memory":
        return memory(case.shape, case.batch, device)
    return time_steps(case.shape, case.batch, device, seconds)


def main(argv: list[str]) -> None:
    command(argv, "conditioning", __doc__, cases, time_case, budget=270.0)
