"""Times a step of our CAME, came-pytorch's and fused AdamW: ``python -m benchmarks optimizer``.

On the parameters of a PixArt of 28 blocks, or of some of them, at three widths; ours by kernels,
where there are any, and by the definition. All CAMEs first take the same steps and must agree.
Writes ``benchmarks/results/<device>/optimizer.jsonl``.
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

import pixart_kernels as pk
from benchmarks.environment import environment, folder, write
from benchmarks.timing import Budget, measure
from pixart import PixArt, PixArtConfig
from pixart.training.optimizers import CAME
from pixart_kernels import dispatch

# width and depth: XL/2's last, with as many blocks as are quick on a CPU
MODELS = ((72, 28), (288, 28), (1152, 2))
THEIRS, ADAMW = "came-pytorch", "fused AdamW"
STEPS = 3

Found = dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]]


def backends(device: torch.device) -> list[str]:
    """Those of our CAME that can run there; Triton's interpreter does not count."""
    x = torch.zeros(1, device=device)
    kernels = "native" if device.type == "cpu" else "triton"
    return [b for b in (kernels, "reference") if dispatch.why_not("came_step", b, x) is None]


def shapes(width: int, depth: int) -> list[torch.Size]:
    with torch.device("meta"):
        model = PixArt(PixArtConfig(hidden_size=width, depth=depth, num_heads=width // 72))
    return [p.shape for p in model.parameters()]


def optimizers(sizes: list[torch.Size], device: torch.device) -> Found:
    """The baseline first; of each its own copy of the same weights, and the same gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(size, device=device, generator=generator) for size in sizes]

    start, gradients = draw(), draw()
    made = {
        THEIRS: partial(Reference, lr=1e-3),
        **dict.fromkeys(backends(device), partial(CAME, lr=1e-3)),
        ADAMW: partial(torch.optim.AdamW, lr=1e-3, fused=True),
    }
    found: Found = {}
    for name, make in made.items():
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        found[name] = parameters, make(parameters)
    return found


def step(found: Found, name: str) -> None:
    parameters, optimizer = found[name]
    with pk.use_backend("auto" if name in (THEIRS, ADAMW) else name):
        optimizer.step()
    if parameters[0].is_cuda:
        torch.cuda.synchronize()


def errors(found: Found) -> dict[str, float]:
    """How far ours are from came-pytorch after some steps, relative to how far it went."""
    before = [p.detach().clone() for p in found[THEIRS][0]]
    ours = [name for name in found if name not in (THEIRS, ADAMW)]
    for name in (THEIRS, *ours):
        for _ in range(STEPS):
            step(found, name)

    def distance(name: str) -> float:
        pairs = zip(found[name][0], found[THEIRS][0], before, strict=True)
        return max(float((a - b).abs().max() / (b - c).abs().max()) for a, b, c in pairs)

    with torch.no_grad():
        return {name: distance(name) for name in ours}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks optimizer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--budget", type=float, default=270, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    about, rows = environment(device), []
    budget = Budget(arguments.budget, len(MODELS))
    for width, depth in track(MODELS, description="timing"):
        sizes = shapes(width, depth)
        found = optimizers(sizes, device)
        apart = errors(found)
        for name, distance in apart.items():
            if not distance < 1e-3:
                raise SystemExit(f"width {width}: {name} is {distance:.2g} of the way off {THEIRS}")
        calls: dict[str, Callable[[], object]] = {
            name: partial(step, found, name) for name in found
        }
        row = {"op": "came_step", "width": width, "depth": depth, "tensors": len(sizes)}
        row |= {"parameters": sum(size.numel() for size in sizes), "error": apart, "incorrect": {}}
        rows.append({**row, **measure(calls, budget.share()).as_json(), **about})
    file = (arguments.output or folder(device)) / "optimizer.jsonl"
    write(file, rows)
    for row in rows:
        times = (f"{name} {timing['median']:.1f} ms" for name, timing in row["timings"].items())
        print(f"width {row['width']}, depth {row['depth']}: {', '.join(times)}")
