"""Memory and time of a training step by conditioning: ``python -m benchmarks conditioning``.

The ablation of PixArt-alpha (arXiv:2310.00426): XL/2 at 256px with a modulation layer in
each block ("adaln", 833M) against adaLN-single (611M). A step is forward, backward with all blocks
recomputed, fused AdamW and averaged weights, in mixed precision. On a GPU both are measured. On a
CPU the memory is counted, without weights or arithmetic, as all tensors that live at once, and the
time is that of a small model in float32. Writes
``benchmarks/results/<device>/conditioning.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pixart_kernels as pk
from benchmarks.cuda import peak_bytes
from benchmarks.environment import environment, folder, write
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
    parameters, peaks = {}, {}
    for name in CONDITIONINGS:
        config = replace(shape, conditioning=name)
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in PixArt(config).parameters())
        on_gpu = device.type == "cuda"
        peaks[name] = on_device(config, batch, device) if on_gpu else counted(config, batch)
    return {"how": "measured" if on_gpu else "counted", "batch": batch, "depth": shape.depth,
            "width": shape.hidden_size, "parameters": parameters, "peak_bytes": peaks}  # fmt: skip


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
    found = measure(calls, seconds).as_json()
    return {"batch": batch, "depth": shape.depth, "width": shape.hidden_size,
            "dtype": "bf16 autocast" if on_gpu else "float32", **found}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks conditioning", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--budget", type=float, default=90, help="seconds for the timing")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    shape, batch = (XL_2, BATCHES[0]) if device.type == "cuda" else (SMALL, SMALL_BATCH)
    rows = [memory(XL_2, count, device) for count in track(BATCHES, description="memory")]
    rows.append(time_steps(shape, batch, device, arguments.budget))
    file = (arguments.output or folder(device)) / "conditioning.jsonl"
    about = environment(device)
    write(file, [{**row, **about} for row in rows])
    for row in rows[:-1]:
        peaks = (f"{name} {size / 2**30:.1f} GiB" for name, size in row["peak_bytes"].items())
        print(f"batch {row['batch']}, {row['how']}: {', '.join(peaks)}")
    times = (f"{name} {timing['median']:.1f} ms" for name, timing in rows[-1]["timings"].items())
    print(f"a step of width {shape.hidden_size}, depth {shape.depth}: {', '.join(times)}")
