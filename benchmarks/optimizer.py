"""Times a step of our CAME, came-pytorch's and fused AdamW: ``python -m benchmarks optimizer``.

On the parameters of a PixArt of 28 blocks, or of some of them, at three widths. Both CAMEs first
take the same steps and must agree. Writes ``benchmarks/results/<device>/optimizer.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from came_pytorch import CAME as Reference
from rich.progress import track
from torch import nn

from benchmarks.environment import environment, folder, write
from benchmarks.timing import measure
from pixart import PixArt, PixArtConfig
from pixart.training.optimizers import CAME

# width and depth: XL/2's last, with as many blocks as are quick on a CPU
MODELS = ((72, 28), (288, 28), (1152, 2))
OURS, THEIRS, ADAMW = "CAME", "came-pytorch", "fused AdamW"
STEPS = 3


def shapes(width: int, depth: int) -> list[torch.Size]:
    with torch.device("meta"):
        model = PixArt(PixArtConfig(hidden_size=width, depth=depth, num_heads=width // 72))
    return [p.shape for p in model.parameters()]


def optimizers(
    sizes: list[torch.Size], device: torch.device
) -> dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]]:
    """The baseline first; of each its own copy of the same weights, and the same gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(size, device=device, generator=generator) for size in sizes]

    start, gradients = draw(), draw()
    found: dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]] = {}
    for name, make in (
        (THEIRS, partial(Reference, lr=1e-3)),
        (OURS, partial(CAME, lr=1e-3)),
        (ADAMW, partial(torch.optim.AdamW, lr=1e-3, fused=True)),
    ):
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        found[name] = parameters, make(parameters)
    return found


def error(found: dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]]) -> float:
    """How far the two CAMEs are apart after some steps, relative to how far they went."""
    before = [p.detach().clone() for p in found[THEIRS][0]]
    for name in (OURS, THEIRS):
        for _ in range(STEPS):
            found[name][1].step()
    with torch.no_grad():
        pairs = zip(found[OURS][0], found[THEIRS][0], before, strict=True)
        return max(float((a - b).abs().max() / (b - c).abs().max()) for a, b, c in pairs)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks optimizer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=90, help="for each model")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    about, rows = environment(device), []
    for width, depth in track(MODELS, description="timing"):
        sizes = shapes(width, depth)
        found = optimizers(sizes, device)
        apart = error(found)
        if not apart < 1e-3:
            raise SystemExit(f"width {width}: our CAME is {apart:.2g} of its way off came-pytorch")

        def step(optimizer: torch.optim.Optimizer) -> None:
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        calls: dict[str, Callable[[], object]] = {
            name: partial(step, optimizer) for name, (_, optimizer) in found.items()
        }
        row = {"width": width, "depth": depth, "tensors": len(sizes), "error": apart}
        row["parameters"] = sum(size.numel() for size in sizes)
        rows.append({**row, **measure(calls, arguments.seconds).as_json(), **about})
    file = (arguments.output or folder(device)) / "optimizer.jsonl"
    write(file, rows)
    for row in rows:
        times = (f"{name} {timing['median']:.1f} ms" for name, timing in row["timings"].items())
        print(f"width {row['width']}, depth {row['depth']}: {', '.join(times)}")
