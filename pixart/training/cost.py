"""What a step of a recipe takes of a device: FLOPs and bytes of its passes, and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from pixart.config import PixArtConfig
from pixart.controlnet import ControlledPixArt
from pixart.floor import Site, block_sites, flops_outside, product, tokens_of
from pixart.model import PixArt
from pixart.training.adapters import add_lora
from pixart.training.recipe import Lora, TrainRecipe

# bytes of a parameter's moments; CAME's row and column means are next to nothing
MOMENTS = {"adamw": 8, "came": 4, "adamw-8bit": 2}

# sites that have weights: their layer, and its widths in and out in hidden sizes; 0 is the MLP's
LAYERS = {
    "qkv": ("attn.qkv", 1, 3),
    "proj": ("attn.proj", 1, 1),
    "text: q": ("cross_attn.q_linear", 1, 1),
    "text: k, v": ("cross_attn.kv_linear", 1, 2),
    "text: proj": ("cross_attn.proj", 1, 1),
    "fc1": ("mlp.fc1", 1, 0),
    "fc2": ("mlp.fc2", 0, 1),
}


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, and the bytes of those that are not trained."""

    trained: int
    frozen: int
    frozen_bytes: int


def weights(recipe: TrainRecipe) -> Weights:
    """Of the module that a recipe trains, with what is frozen about it, but not its teacher.

    Raises ModuleNotFoundError or ValueError as :func:`pixart.training.adapters.add_lora`.
    """
    return _weights(
        json.dumps(recipe.config.to_dict()),
        None if recipe.lora is None else recipe.lora.model_dump_json(),
        0 if recipe.control is None else recipe.control.copies,
    )


@cache
def _weights(config: str, lora: str | None, copies: int) -> Weights:
    with torch.device("meta"):
        model = PixArt(PixArtConfig.from_dict(json.loads(config)))
        if lora is not None:
            add_lora(model, Lora.model_validate_json(lora))
        module = ControlledPixArt(model, copies) if copies else model
    frozen = [p for p in module.parameters() if not p.requires_grad]
    return Weights(
        trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in frozen),
        frozen_bytes=sum(p.nbytes for p in frozen),
    )


def tokens(recipe: TrainRecipe) -> int:
    return tokens_of(recipe.data.size or 8 * recipe.config.input_size, recipe.config)


def text(recipe: TrainRecipe) -> int:
    """Tokens of a caption, at most."""
    return 0 if recipe.config.conditioning == "class" else recipe.config.max_caption_tokens


@dataclass(frozen=True)
class Pass:
    """Blocks that a batch goes through, and the backward that there is of them.

    "inputs": of the tokens alone, as weights are frozen; "copies": of weights too, but not of the
    text that goes in, which nothing trained has made; "all": of everything.
    """

    layers: range
    batch: int
    backward: Literal["none", "inputs", "copies", "all"]
    lora: Lora | None = None


def passes(recipe: TrainRecipe) -> list[Pass]:
    batch, blocks = recipe.batch_size, range(recipe.config.depth)
    if recipe.control is not None:
        # gradients end where the first copy's output comes in
        return [
            Pass(blocks[:1], batch, "none"),
            Pass(blocks[1:], batch, "inputs"),
            Pass(blocks[: recipe.control.copies], batch, "copies"),
        ]
    lora = recipe.lora
    found = [Pass(blocks, batch, "all" if lora is None else "inputs", lora)]
    if recipe.distill is not None:
        # the teacher, without adapters, and the averaged student
        found.append(Pass(blocks, _guided(recipe) * batch, "none"))
        found.append(Pass(blocks, batch, "none", lora))
    return found


def _guided(recipe: TrainRecipe) -> int:
    """Pictures that a teacher sees for each of the batch."""
    return 2 if recipe.distill is not None and recipe.distill.guidance_scale != 1 else 1


def work(recipe: TrainRecipe, residual: int = 4) -> Iterator[tuple[str, int, int]]:
    """Of a micro-batch's forward, backward and what ``gradient_checkpointing`` makes again.

    Args:
        recipe: with any of lora, distill and control.
        residual: bytes of an element of the residual stream, which autocast keeps in float32.

    Yields:
        of one site after another its name, FLOPs and bytes, of forward and backward apart.
    """
    config, element = recipe.config, _element(recipe)
    N, L = tokens(recipe), text(recipe)
    for each in passes(recipe):
        for layer in each.layers:
            dtypes = {"residual": residual, "element": element}
            for site in block_sites(config, N, L, each.batch, **dtypes, layer=layer):
                parts = [(site, _backward(each, site, layer))]
                if each.lora is not None:
                    count = each.batch * (L if site.name == "text: k, v" else N)
                    parts += _adapter(each.lora, config, site, layer, count, element)
                again = each.backward != "none" and _made_again(recipe, site, len(parts) > 1)
                for part, share in parts:
                    yield part.name, (1 + again) * part.flops, (1 + again) * part.bytes
                    if each.backward != "none":
                        flops, moved = part.backward_flops, part.backward_bytes
                        yield part.name, int(share * flops), int(share * moved)
        if each.backward == "copies":
            D = config.hidden_size
            after = product("copies' projections", each.batch * N, D, D, element)
            # one before the first copy, of an image without a gradient
            count = len(each.layers)
            yield after.name, (count + 1) * after.flops, (count + 1) * after.bytes
            flops, moved = after.backward_flops, after.backward_bytes
            yield after.name, int((count + 0.5) * flops), int((count + 0.5) * moved)
        else:
            # where nothing of it is trained, the final layer's backward alone is left
            outside = flops_outside(config, N, L, each.batch)
            yield "outside of blocks", outside * (3 if each.backward == "all" else 1), 0


def _backward(each: Pass, site: Site, layer: int) -> float:
    """The share of a site's backward that there is, where there is one."""
    if site.name not in LAYERS or each.backward == "all":
        return 1.0
    # half of a product's is its weight's gradient, the other half its input's
    of_text = site.name == "text: k, v"
    if each.backward == "copies":
        return 0.5 if of_text else 1.0
    return 0.0 if of_text or (each.lora is not None and _is_first(site, layer)) else 0.5


def _is_first(site: Site, layer: int) -> bool:
    """Whether nothing comes before it but embeddings."""
    return layer == 0 and site.name == "qkv"


def _adapter(
    lora: Lora, config: PixArtConfig, site: Site, layer: int, rows: int, element: int
) -> list[tuple[Site, float]]:
    """Beside a site's layer, where it has one: its two factors and the sum."""
    if site.name not in LAYERS:
        return []
    name, *widths = LAYERS[site.name]
    full = f"blocks.{layer}.{name}"
    if not any(full == ending or full.endswith(f".{ending}") for ending in lora.layers):
        return []
    D, r = config.hidden_size, lora.rank
    inputs, outputs = (D * width or int(D * config.mlp_ratio) for width in widths)
    down = product(f"{site.name}: adapter", rows, inputs, r, element)
    up = product(f"{site.name}: adapter", rows, r, outputs, element)
    # with no gradient of what goes in
    first = 0.5 if site.name == "text: k, v" or _is_first(site, layer) else 1.0
    total = Site(f"{site.name}: adapter", 0, 3 * element * rows * outputs, 0, 0)
    found = [(down, first), (up, 1.0), (total, 0.0)]
    if lora.dora:
        # the weight's norm, of the factors' product, which peft makes from an identity matrix;
        # the magnitude's gradient reads the layer's output and the adapter's
        weight = inputs * outputs
        flops = 2 * r * inputs * (inputs + outputs)
        again = 2 * element * rows * outputs
        found.append((Site(f"{site.name}: magnitude", flops, 3 * 4 * weight, 0, again), 1.0))
    return found


def _made_again(recipe: TrainRecipe, site: Site, adapted: bool) -> bool:
    if recipe.gradient_checkpointing == "selective":
        # the MLP's second layer comes on the way to what its adapter's factors need
        last = ("fc1", "fc2") if adapted else ("fc1",)
        return site.name.startswith(("text", "cross")) or site.name in last
    return recipe.gradient_checkpointing is True


def memory(recipe: TrainRecipe, count: int = 1) -> dict[str, int]:
    """Bytes that each of ``count`` devices needs, by what needs them.

    Activations are those that docs/memory.md counts, scaled; ``working`` is a block with all that
    its backward makes again, or a teacher's forward, which are estimates. What the allocator
    wastes, the CUDA context and encoders are not counted.
    """
    config, found, size = recipe.config, {}, weights(recipe)
    shares = count if recipe.parallel.strategy == "fsdp" else 1
    found["weights"] = (4 * size.trained + size.frozen_bytes) // shares
    found["gradients"] = 4 * size.trained // shares
    found["optimizer"] = MOMENTS[recipe.optimizer.name] * size.trained // shares
    found["average"] = (4 * size.trained // shares) if recipe.ema_decay is not None else 0
    half = recipe.mixed_precision != "no"
    if recipe.distill is not None:
        found["teacher"] = _element(recipe) * (size.frozen or size.trained)
    everything = size.trained + size.frozen
    if shares > 1:
        # two blocks at a time
        gathered = 2 * _element(recipe) * everything // config.depth
        found["weights in 16 bits" if half else "gathered weights"] = gathered
    elif half:
        # autocast keeps its copies: of trained weights to the end of the forward, of frozen ones
        # those that the backward needs and does not make again
        rounded = 0 if size.frozen_bytes == 2 * size.frozen else size.frozen
        kept = {False: 1, "selective": 1 / 3, True: 1 / config.depth}
        frozen = int(rounded * kept[recipe.gradient_checkpointing])
        found["weights in 16 bits"] = 2 * (size.trained + frozen)
    if count > 1 and shares == 1:
        found["buckets of gradients"] = 4 * size.trained
    rows = recipe.batch_size * tokens(recipe) // recipe.parallel.sequence
    width = config.hidden_size * _element(recipe)
    of_block, working = _kept_of_block(recipe)
    blocks = sum(len(each.layers) for each in passes(recipe) if each.backward != "none")
    of_text = 0 if recipe.gradient_checkpointing is not False else 2 * text(recipe)
    found["activations"] = int(blocks * width * (rows * of_block + recipe.batch_size * of_text))
    if recipe.control is not None:
        # what goes through the projections
        found["activations"] += (recipe.control.copies + 1) * rows * width
    found["working"] = int(rows * width * working)
    return found


def _kept_of_block(recipe: TrainRecipe) -> tuple[float, float]:
    """In widths of a token: what a block keeps for its backward, and what works on one block."""
    F = recipe.config.mlp_ratio
    half, mode = _element(recipe) == 2, recipe.gradient_checkpointing
    # the residual stream is float32, two of a 16-bit width
    stream = 2 if half else 1
    of_block = {False: 8 + F + stream, "selective": 6 + stream, True: stream}[mode]
    working = 17 + F + stream
    if recipe.lora is not None:
        # rounded inputs of the factors, which are others than the layers' own; and with
        # magnitudes each output of layer and adapter, the former with a float32 bias
        inputs = {False: 5 + F, "selective": 2, True: 0}[mode] if half else 0
        outputs = {False: 7 + F, "selective": 4, True: 0}[mode]
        magnitudes = (3 if half else 2) if recipe.lora.dora else 0
        of_block += inputs + magnitudes * outputs
        if mode is not False:
            working += (5 + 3 * F if half else F) + magnitudes * (7 + F)
    if recipe.distill is not None:
        working = max(working, _guided(recipe) * (13 + F))
    return of_block, working


def _element(recipe: TrainRecipe) -> int:
    """Bytes of an element, as products are computed."""
    return 4 if recipe.mixed_precision == "no" else 2
