"""A whole model's forward and training step: ``python -m benchmarks model``.

With our ops, with their definitions and, with the same weights, diffusers' model. On a CPU two
small models in float32; on a GPU XL/2 in bf16, 256 to 2048px, also with compiled blocks and as one
CUDA graph. Outputs and gradients are held against a more exact model's before anything is timed.
Writes ``benchmarks/results/<device>/model.jsonl``; ``--resume`` goes on from there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

import pixart_kernels as pk
from benchmarks.block import Part, only
from benchmarks.cases import command
from benchmarks.memory import step_memory
from benchmarks.providers import in_short
from benchmarks.timing import measure
from pixart import PixArt, PixArtConfig, presets
from pixart.checkpoints import diffusers_config, to_diffusers
from pixart.checkpoints.diffusers import to_diffusers_names
from pixart.generation.cache import Cached, CudaGraphs
from pixart_kernels import dispatch

STOCK, EAGER = "diffusers", "definitions"
NULL = "caption_projection.y_embedding"  # of ours alone
TOKENS = 16 * 1024  # of a training step's pictures together, on a GPU
GUIDED = 2  # pictures of a forward: with the caption and without
MAY_ERR = 2.0  # times the definitions' error; other weights would be off by all of their values
LEAST = 32 * torch.finfo(torch.float32).eps  # that any result may be off by


@dataclass(frozen=True)
class ModelCase:
    name: str
    config: PixArtConfig
    which: str  # "forward" without gradients, or "step": forward and backward
    batch: int
    text: int
    lengths: tuple[int, ...]  # real tokens, in turn

    def about(self) -> dict:
        tokens = (self.config.input_size // self.config.patch_size) ** 2
        return {
            **{"model": self.name, "pass": self.which},
            **{"shape": [self.batch, tokens, self.config.hidden_size], "text": self.text},
            "lengths": list(self.lengths),
            # by which plans of recipes find it
            "config": self.config.to_dict(),
        }

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """latents, timestep, caption, mask."""
        generator = torch.Generator(device).manual_seed(1)
        config, batch = self.config, self.batch

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        lengths = torch.tensor(list(islice(cycle(self.lengths), batch)), device=device)
        return [
            random(batch, config.in_channels, config.input_size, config.input_size),
            torch.linspace(0, 999, batch, device=device).long(),
            random(batch, self.text, config.caption_channels),
            (torch.arange(self.text, device=device) < lengths[:, None]).to(dtype),
        ]


def cases(kind: str) -> list[ModelCase]:
    """The most important first."""
    if kind == "cpu":
        # imports packages that a GPU machine may lack
        from pixart.training import TrainRecipe, load_recipe

        quickstart = load_recipe(TrainRecipe, "quickstart", [])
        # its captions are a few words
        small = ("quickstart", quickstart.config), quickstart.batch_size, 20, (7, 5, 9)
        wide = PixArtConfig(depth=4, hidden_size=384, num_heads=6, max_caption_tokens=120)
        of_256px = ("depth 4, width 384", wide), 2, 120, (60, 20)
        return [
            ModelCase(*named, which, *rest)
            for named, *rest in (small, of_256px)
            for which in ("forward", "step")
        ]
    found = []
    for pixels, which in (
        *((1024, "forward"), (512, "step"), (1024, "step"), (2048, "forward")),
        *((256, "forward"), (512, "forward"), (256, "step"), (2048, "step")),
    ):
        config = presets["sigma-2k" if pixels == 2048 else f"sigma-{pixels}"]
        batch = GUIDED if which == "forward" else max(1, TOKENS // (pixels // 16) ** 2)
        found.append(ModelCase("XL/2", config, which, batch, 300, (120, 20)))
    return found


def _call_ours(inputs: list[Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda model: (model(*inputs),)


def _call_stock(inputs: list[Tensor]) -> Callable[..., tuple[Tensor]]:
    latents, timestep, caption, mask = inputs
    text = {"encoder_hidden_states": caption, "encoder_attention_mask": mask}
    return lambda model: model(latents, timestep=timestep, return_dict=False, **text)


def _call_graph(model: PixArt) -> Callable[[list[Tensor]], Callable[..., tuple[Tensor]]]:
    """As pictures are drawn: keys and values of the text kept, the rest one CUDA graph."""
    cached = Cached(model, CudaGraphs(model))
    return lambda inputs: lambda _: (cached(*inputs),)


def models(
    config: PixArtConfig, device: torch.device, dtype: torch.dtype
) -> tuple[PixArt, nn.Module]:
    """Ours, of which no layer is left at zero, and diffusers' with the same tensors."""
    torch.manual_seed(0)
    with device:
        # the backward is that of training, which drops captions at random
        ours = PixArt(replace(config, caption_dropout=0.0)).to(dtype)
        stock: Any = PixArtTransformer2DModel.from_config(diffusers_config(ours.config))
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    state = to_diffusers(ours)
    del state[NULL]
    stock.load_state_dict(state, assign=True)
    return ours, stock


def _compiled(model: Any) -> nn.Module:
    """The same parameters, its blocks compiled: once for all of them, not for minutes."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in twin.blocks if isinstance(twin, PixArt) else twin.transformer_blocks:
        block.compile(dynamic=False)
    return twin


@dataclass
class Variant:
    context: Callable[[], AbstractContextManager]  # decides which ops run
    module: nn.Module
    call: Callable[[list[Tensor]], Callable[..., tuple[Tensor]]]

    def part(self, inputs: list[Tensor]) -> Part:
        return Part(self.module, [], self.call(inputs))


def variants(
    ours: PixArt, stock: nn.Module, device: torch.device, which: str
) -> dict[str, Variant]:
    """The ways to run a model; the first is what the others are compared with."""
    definitions = partial(only, "reference")
    found = {
        STOCK: Variant(definitions, stock, _call_stock),
        EAGER: Variant(definitions, ours, _call_ours),
    }
    auto = partial(pk.use_backend, "auto")
    if device.type == "cpu":
        return {**found, "auto": Variant(auto, ours, _call_ours)}
    x = next(ours.parameters())
    for backend in ("triton", "cuda"):
        if dispatch.why_not("adaln_single", backend, x) is None:
            # an op that CUDA C++ does not have is Triton's
            context = partial(only, *dict.fromkeys((backend, "triton")))
            found[backend] = Variant(context, ours, _call_ours)
    graphed = {}
    if which == "forward":
        graphed = {
            f"{name}, graph": replace(variant, call=_call_graph(ours))
            for name, variant in found.items()
            if name not in (STOCK, EAGER)
        }
    for name, variant in list(found.items()):
        found[f"{name}, compiled"] = replace(variant, module=_compiled(variant.module))
    # what training takes
    if which == "step":
        found["auto"] = Variant(auto, ours, _call_ours)
    return {**found, **graphed}


@torch.no_grad()
def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of all tensors taken as one vector, relative to its length."""
    error = sum((a.double() - b.double()).square().sum() for a, b in zip(found, exact, strict=True))
    return float((error / sum(b.double().square().sum() for b in exact)).sqrt())


def _results(variant: Variant, inputs: list[Tensor], which: str) -> list[list[Tensor]]:
    """The output and, of a step, the gradient, by diffusers' names in their order."""
    part = variant.part(inputs)
    with variant.context():
        if which == "forward":
            with torch.no_grad():
                return [[part.forward()[0]]]
        (output,) = part.forward()
        weight = torch.Generator(output.device).manual_seed(2)
        weights = torch.randn(output.shape, generator=weight, device=output.device)
        grads = part.backward((output,), [weights.to(output.dtype)])
    named = dict(zip((n for n, _ in variant.module.named_parameters()), grads, strict=True))
    if isinstance(variant.module, PixArt):
        named = to_diffusers_names(named)
    return [[output], [named[name] for name in sorted(named)]]


def errors(
    found: dict[str, Variant], inputs: list[Tensor], which: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """How far each output and gradient is from a more exact model's, and who is wrong."""
    # float64 would not fit at 2048px
    exactly = torch.float64 if inputs[0].device.type == "cpu" else torch.float32
    twin = copy.deepcopy(found[EAGER].module).to(exactly)
    assert isinstance(twin, PixArt)
    twin.gradient_checkpointing = True
    exact_inputs = [x.to(exactly) if x.is_floating_point() else x for x in inputs]
    exact = _results(replace(found[EAGER], module=twin), exact_inputs, which)
    del twin
    distances: dict[str, list[float]] = {}
    incorrect: dict[str, str] = {}
    for name in sorted(found, key=lambda name: name != EAGER):
        try:
            results = _results(found[name], inputs, which)
        # one that cannot even run is a finding, not the end of a benchmark
        except Exception as error:
            incorrect[name] = in_short(error)
            continue
        distances[name] = [_distance(r, e) for r, e in zip(results, exact, strict=True)]
        bounds = [max(LEAST, MAY_ERR * error) for error in distances[EAGER]]
        # written so that a NaN is wrong
        if not all(error <= bound for error, bound in zip(distances[name], bounds, strict=True)):
            incorrect[name] = f"is off by {distances[name]}, may be by {bounds}"
    return distances, incorrect


def time_case(case: ModelCase, device: torch.device, dtype: torch.dtype, seconds: float) -> dict:
    deadline = time.perf_counter() + seconds
    torch._dynamo.reset()
    # as in providers: beyond the limit torch would go on in eager mode, and be timed as if compiled
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found = variants(*models(case.config, device, dtype), device, case.which)
    inputs = case.inputs(device, dtype)
    distances, incorrect = errors(found, inputs, case.which)
    latents = inputs[0]
    out_shape = (case.batch, case.config.out_channels, *latents.shape[2:])
    out_grads = [latents.new_ones(out_shape)] if case.which == "step" else []

    def call(variant: Variant, part: Part) -> None:
        with variant.context(), torch.set_grad_enabled(bool(out_grads)):
            outputs = part.forward()
            if out_grads:
                part.backward(outputs, out_grads)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def peak(variant: Variant, part: Part) -> int:
        def backward(outputs: tuple[Tensor, ...]) -> None:
            if out_grads:
                part.backward_without_parameters(outputs, out_grads)

        with variant.context(), torch.set_grad_enabled(bool(out_grads)):
            return step_memory(part.forward, backward, device)["peak"]

    calls: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int] = {}
    for name, variant in found.items():
        if name in incorrect:
            continue
        part = variant.part(inputs)
        try:
            # the first call compiles, and makes buffers that live for ever
            call(variant, part)
            # a graph's buffers are there before its replay
            if not name.endswith("graph"):
                peaks[name] = peak(variant, part)
        except torch.OutOfMemoryError as error:
            incorrect[name] = in_short(error)
            continue
        calls[name] = partial(call, variant, part)
    measured = measure(calls, max(0.0, deadline - time.perf_counter())).as_json()
    return {"incorrect": incorrect, "errors": distances, "peak_bytes": peaks, **measured}


def main(argv: list[str]) -> None:
    command(argv, "model", __doc__, cases, time_case, budget=200.0)
