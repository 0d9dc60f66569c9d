"""Times a step of our CAME, came-pytorch's and fused AdamW: ``python -m benchmarks optimizer``.

On the parameters of a PixArt of 28 blocks, or of some of them, at three widths; ours by kernels,
where there are any, and by the definition. All CAMEs first take the same steps and must agree.
Writes ``benchmarks/results/<device>/optimizer.jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from came_pytorch import CAME as Reference
from torch import nn

import pixart_kernels as pk
from benchmarks.cases import command
from benchmarks.timing import measure
from pixart import PixArt, PixArtConfig
from pixart.training.optimizers import CAME
from pixart_kernels import dispatch

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


@dataclass(frozen=True)
class Model:
    """Whose parameters are updated."""

    width: int
    depth: int

    def about(self) -> dict:
        return {"op": "came_step", "dtype": "float32", "width": self.width, "depth": self.depth}


# XL/2's width last, with as many blocks as are quick on a CPU
MODELS = (Model(72, 28), Model(288, 28), Model(1152, 2))


def time_case(case: Model, device: torch.device, dtype: torch.dtype, seconds: float) -> dict:
    """Raises ValueError where a CAME is not came-pytorch's."""
    sizes = shapes(case.width, case.depth)
    found = optimizers(sizes, device)
    apart = errors(found)
    for name, distance in apart.items():
        if not distance < 1e-3:
            raise ValueError(f"{name} is {distance:.2g} of the way off {THEIRS}")
    calls: dict[str, Callable[[], object]] = {name: partial(step, found, name) for name in found}
    about = {"tensors": len(sizes), "parameters": sum(size.numel() for size in sizes)}
    return {**about, "error": apart, "incorrect": {}, **measure(calls, seconds).as_json()}


def main(argv: list[str]) -> None:
    command(argv, "optimizer", __doc__, lambda device: MODELS, time_case, budget=270.0)
