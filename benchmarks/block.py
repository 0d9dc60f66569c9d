"""A PixArt block's training step with our ops and without: ``python -m benchmarks block``.

The block of XL/2 with 120 tokens of text, forward and backward in eager mode and compiled; and
its adaLN part alone (residuals, gates, norms and modulation, with the branches given), which
shows what the matrix products of a whole block drown. Held against float64 before it is timed.
Writes ``benchmarks/results/<device>/block.jsonl``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor, nn

import pixart_kernels as pk
from benchmarks.cases import command
from benchmarks.memory import step_memory
from benchmarks.providers import Outputs
from benchmarks.timing import measure
from pixart.config import PixArtConfig
from pixart.model import Block
from pixart_kernels import dispatch
from pixart_kernels.testing import assert_within_eager_error

B, TEXT_TOKENS = 2, 120
GRIDS = ((16, 16), (32, 32))
PARTS = ("block", "adaLN part")  # in the order of `parts`


class AdalnPart(nn.Module):
    """The block's residual stream: its branches are inputs, as if computed elsewhere."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.hidden_size))

    def forward(self, x, attn, cross, mlp, t0, next_table) -> tuple[Tensor, ...]:
        modulation = self.scale_shift_table, t0
        x = pk.gated_residual(x, attn, *modulation, gate_row=2)
        x, before_mlp = pk.gated_residual_adaln(x, cross, modulation=(*modulation, 3, 4))
        after = next_table, t0, 0, 1
        return before_mlp, *pk.gated_residual_adaln(x, mlp, gate=(*modulation, 5), modulation=after)


@dataclass
class Part:
    """A module and the tensors it is a function of, besides its parameters."""

    module: nn.Module
    inputs: list[Tensor]
    call: Callable[..., Outputs]  # call(module, *inputs)

    def forward(self, module: Callable[..., Outputs] | None = None) -> Outputs:
        return self.call(self.module if module is None else module, *self.inputs)

    def backward(self, outputs: Outputs, out_grads: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [*self.inputs, *self.module.parameters()]
        return torch.autograd.grad(outputs, leaves, out_grads)

    def backward_without_parameters(self, outputs: Outputs, out_grads: list[Tensor]) -> None:
        """The backward of a model whose parameter gradients are put away as they come."""

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        parameters = self.module.parameters()
        hooks = [p.register_post_accumulate_grad_hook(drop) for p in parameters]
        torch.autograd.backward(outputs, out_grads)
        for hook in hooks:
            hook.remove()
        for tensor in self.inputs:
            tensor.grad = None

    def in_double(self) -> Part:
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        return Part(copy.deepcopy(self.module).double(), inputs, self.call)


def parts(grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[Part]:
    torch.manual_seed(0)
    config = PixArtConfig(depth=1)
    D, N = config.hidden_size, grid[0] * grid[1]
    lengths = torch.full((B,), TEXT_TOKENS, dtype=torch.int32, device=device)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    block = Block(config, 0).to(device, dtype)
    adaln = AdalnPart(config).to(device, dtype)
    for table in (block.scale_shift_table, adaln.scale_shift_table):
        nn.init.normal_(table, std=D**-0.5)

    def call_block(module, x, branch, text, t0, table_before) -> Outputs:
        pending = branch, (table_before, t0)
        x, (mlp, _) = module(x, pending, grid, text, lengths, t0[:, :D], t0)
        return x, mlp

    tokens, vectors = (B, N, D), (leaf(B, 6 * D), leaf(6, D))
    block_inputs = [leaf(*tokens), leaf(*tokens), leaf(B, TEXT_TOKENS, D), *vectors]
    return [
        Part(block, block_inputs, call_block),
        Part(
            adaln,
            [*(leaf(*tokens) for _ in range(4)), *vectors],
            lambda module, *inputs: module(*inputs),
        ),
    ]


@cache
def _trusting(*backends: str) -> dict:
    proof = dispatch.Verification("", "")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    places = [dispatch.architecture(torch.device(device)) for device in devices]
    return dict.fromkeys(product(dispatch.ops(), backends, places), proof)


@contextmanager
def only(*backends: str) -> Iterator[None]:
    """``auto`` as it will choose once ``backends``, and no others, are verified."""
    verified = dispatch.VERIFIED
    # one dict for each choice: torch.compile guards on it
    dispatch.VERIFIED = _trusting(*backends)
    try:
        with pk.use_backend("auto"):
            yield
    finally:
        dispatch.VERIFIED = verified


def _variants(part: Part) -> dict[str, tuple[str, Callable[..., Outputs]]]:
    """The ways to run the part: a backend, and its module as it is or compiled."""
    x = part.inputs[0]
    backends = [b for b in dispatch.PRIORITY if dispatch.why_not("adaln_single", b, x) is None]
    torch._dynamo.reset()
    found: dict[str, tuple[str, Callable[..., Outputs]]] = {}
    # the reference, which comes last and always can, is what "without our ops" means
    for backend in reversed(backends):
        eager, compiled = backend, f"{backend}, compiled"
        if backend == "reference":
            eager, compiled = "eager", "torch.compile"
        found[eager] = backend, part.module
        found[compiled] = backend, torch.compile(part.module, dynamic=False)
    return found


def _wrong(found: list[Tensor], exact: list[Tensor], eager: list[Tensor]) -> str | None:
    width = found[0].shape[-1]
    terms = max(found[0].numel() // width, width)
    try:
        for actual, reference, low in zip(found, exact, eager, strict=True):
            assert_within_eager_error(actual, reference, low, terms=terms)
    except AssertionError as error:
        return str(error)
    return None


def time_part(part: Part, device: torch.device, seconds: float) -> dict:
    deadline = time.perf_counter() + seconds
    variants = _variants(part)
    out_grads = [torch.randn_like(output) for output in part.forward()]

    def results(part: Part, module: Callable[..., Outputs], out_grads: list[Tensor]) -> list:
        outputs = part.forward(module)
        return [*outputs, *part.backward(outputs, out_grads)]

    double = part.in_double()
    with only("reference"):
        exact = results(double, double.module, [grad.double() for grad in out_grads])
        eager = results(part, part.module, out_grads)
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, dict[str, int]] = {}
    incorrect: dict[str, str] = {}
    for name, (backend, module) in variants.items():

        def step(backend: str = backend, module: Callable[..., Outputs] = module) -> None:
            # the backward too, which runs some ops again
            with only(backend):
                part.backward(part.forward(module), out_grads)
            if device.type == "cuda":
                torch.cuda.synchronize()

        with only(backend):
            problem = _wrong(results(part, module, out_grads), exact, eager)
            if problem is not None:
                incorrect[name] = problem
                continue
            memory[name] = step_memory(
                partial(part.forward, module),
                lambda outputs: part.backward_without_parameters(outputs, out_grads),
                device,
            )
        steps[name] = step
    measured = measure(steps, max(0.0, deadline - time.perf_counter())).as_json()
    return {"incorrect": incorrect, "memory": memory, **measured}


@dataclass(frozen=True)
class PartCase:
    grid: tuple[int, int]
    index: int  # in PARTS

    def about(self) -> dict:
        rows, columns = self.grid
        shape = [B, rows * columns, PixArtConfig(depth=1).hidden_size]
        return {"part": PARTS[self.index], "shape": shape, "text": TEXT_TOKENS}


def time_case(case: PartCase, device: torch.device, dtype: torch.dtype, seconds: float) -> dict:
    # weights are drawn when their turn comes: all at once would not fit
    return time_part(parts(case.grid, device, dtype)[case.index], device, seconds)


def cases(_device: str) -> list[PartCase]:
    return [PartCase(grid, index) for grid in GRIDS for index in range(len(PARTS))]


def main(argv: list[str]) -> None:
    command(argv, "block", __doc__, cases, time_case, budget=300.0)
