"""What a block of XL/2 must compute and move, and what it does: ``python -m benchmarks floor``.

The floor is a formula, site by site. Beside it, all that is dispatched in eager mode is counted on
fake tensors, which hold no data: by our ops, by their definitions, by diffusers' model. Needs no
GPU and says nothing of time, unless it is given rates: ``--tflops`` and ``--gbs``, or a folder of
results that has them. Writes ``benchmarks/results/cpu/floor.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from rich.progress import track
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention import ROOF
from benchmarks.block import only
from benchmarks.cuda import COPY
from benchmarks.environment import RESULTS, environment, read, write
from pixart import PixArt, PixArtConfig
from pixart.checkpoints import diffusers_config
from pixart.floor import Site, block_sites, model_flops, seconds, tokens_of

PIXELS = (256, 512, 1024, 2048)
TEXTS = (120, 300)
MODELS = ("ours", "definitions", "diffusers")


class MovedBytes(TorchDispatchMode):
    """What dispatched ops read and write: each tensor once for each op. Views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        mine = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in mine]
        in_place = op._schema.is_mutable
        if (fresh or in_place) and "empty" not in op.overloadpacket.__name__:
            self.total += sum(map(_bytes, (*inputs, *(outputs if in_place else fresh))))
        return result


def _bytes(x: Tensor) -> int:
    """Of the elements in memory: a broadcast one counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """Formulas for the attention ops that torch's counter does not know."""

    def heads_first(query, key, *_, **__) -> int:
        return 4 * query[0] * query[1] * query[2] * query[3] * key[2]

    def cross(query, kv, *_, **__) -> int:
        return 4 * query[0] * query[1] * query[2] * query[3] * kv[1]

    def backward(forward: Callable[..., int]) -> Callable[..., int]:
        return lambda grad, *shapes, **named: 5 * forward(*shapes) // 2

    found: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: heads_first,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward(heads_first),
    }
    ours = torch.ops.pixart_kernels_cpu
    return found | {ours.cross_attention_fwd: cross, ours.cross_attention_bwd: backward(cross)}


@contextmanager
def _bf16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _forward(which: str, config: PixArtConfig, grid: int, text: int, batch: int):
    """A fake model, and a call of its forward."""
    latents = torch.empty(batch, config.in_channels, *[grid * config.patch_size] * 2)
    caption = torch.empty(batch, text, config.caption_channels)
    timestep, mask = torch.full((batch,), 500), torch.ones(batch, text)
    if which == "diffusers":
        stock: Any = PixArtTransformer2DModel.from_config(diffusers_config(config))
        inputs = {"encoder_hidden_states": caption, "encoder_attention_mask": mask}
        return lambda: stock(latents, timestep=timestep, return_dict=False, **inputs)[0]
    model: nn.Module = PixArt(config)
    return lambda: model(latents, timestep, caption, mask)


def counted(
    which: str, config: PixArtConfig, grid: int, text: int, batch: int = 1
) -> dict[str, dict[str, int]]:
    """FLOPs and bytes of a whole model's "forward" and of its "step", forward and backward.

    ``which`` of ``MODELS``, all tokens of text real, in bf16 as a CPU would run it.
    """
    # no op looks at its device
    with FakeTensorMode(), _bf16(), only("native" if which == "ours" else "reference"):
        forward = _forward(which, replace(config, caption_dropout=0.0), grid, text, batch)
        found = {}
        for name in ("forward", "step"):
            flops = FlopCounterMode(display=False, custom_mapping=_attention_flops())
            with torch.set_grad_enabled(name == "step"), flops, MovedBytes() as moved:
                output = forward()
                if name == "step":
                    output.sum().backward()
            found[name] = {"flops": flops.get_total_flops(), "bytes": moved.total}
    return found


def counted_block(
    which: str, config: PixArtConfig, grid: int, text: int, batch: int = 1
) -> dict[str, dict[str, int]]:
    """Of one block: the difference that a second one makes to a whole model."""
    one, two = (counted(which, replace(config, depth=depth), grid, text, batch) for depth in (1, 2))
    return {
        name: {key: two[name][key] - one[name][key] for key in two[name]}
        for name in ("forward", "step")
    }


def measured_rates(folder: Path) -> tuple[float, float]:
    """TFLOP/s of a matrix product and GB/s of a copy, the best of a device's results.

    Raises ValueError where they were not measured.
    """
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read(file)]
    timed = [row for row in rows if "timings" in row]
    products = [
        row["roof_flops"] / row["timings"][ROOF]["median"]
        for row in timed
        if ROOF in row["timings"]
    ]
    copies = [
        row["bytes"] / row["timings"][COPY]["median"] for row in timed if COPY in row["timings"]
    ]
    if not products or not copies:
        raise ValueError(f"{folder}: no result has the rates of a matrix product and of a copy")
    return max(products) / 1e9, max(copies) / 1e6


def rows() -> Iterator[dict]:
    """One for each size of picture and of text: the floor's sites, and what was counted."""
    config = PixArtConfig()
    for pixels, text in product(PIXELS, TEXTS):
        tokens = tokens_of(pixels, config)
        wide = block_sites(config, tokens, text, residual=4)
        yield {
            **{"pixels": pixels, "tokens": tokens, "text": text},
            "model_flops": model_flops(config, tokens, text),
            "sites": [asdict(site) for site in block_sites(config, tokens, text)],
            "float32_residual": {
                "bytes": sum(site.bytes for site in wide),
                "backward_bytes": sum(site.backward_bytes for site in wide),
            },
            "counted": {
                which: counted_block(which, config, pixels // 8 // config.patch_size, text)
                for which in MODELS
            },
        }


def _print_times(found: list[dict], tflops: float, gbs: float) -> None:
    print(f"Least time of a block at {tflops:g} TFLOP/s and {gbs:g} GB/s, one picture:")
    for row in found:
        sites = [Site(**site) for site in row["sites"]]
        forward = sum(seconds(site.flops, site.bytes, tflops, gbs) for site in sites)
        backward = sum(
            seconds(site.backward_flops, site.backward_bytes, tflops, gbs) for site in sites
        )
        print(
            f"{row['pixels']:>5} px, {row['text']} tokens of text: forward {1e3 * forward:.3f} ms, "
            f"with its backward {1e3 * (forward + backward):.3f} ms"
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks floor", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tflops", type=float, help="rate of a matrix product, for times")
    parser.add_argument("--gbs", type=float, help="rate of a copy, bytes read and written")
    parser.add_argument("--rates", type=Path, help="folder of results to take both rates from")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu", help="folder")
    arguments = parser.parse_args(argv)
    rates = arguments.tflops, arguments.gbs
    if arguments.rates is not None:
        if rates != (None, None):
            parser.error("--rates or --tflops with --gbs, not both")
        rates = measured_rates(arguments.rates)
    elif None in rates and rates != (None, None):
        parser.error("--tflops and --gbs go together")
    found = list(track(rows(), total=len(PIXELS) * len(TEXTS), description="counting"))
    file = arguments.output / "floor.jsonl"
    about = environment(torch.device("cpu"))
    write(file, [{**row, **about} for row in found])
    if None not in rates:
        _print_times(found, *rates)
    print(f"{len(found)} rows in {file}")
