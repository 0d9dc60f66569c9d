"""What a block of XL/2 keeps for its backward, tensor by tensor: ``python -m benchmarks memory``.

Bytes, in float32 and under bf16 autocast, for diffusers' model and for ours in each of its modes:
the middle one of three blocks in a whole model's forward. Needs no GPU.
Writes ``benchmarks/results/<device>/memory.jsonl``.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as global_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cuda import peak_bytes
from benchmarks.environment import environment, folder, write
from pixart import PixArt, PixArtConfig

B, GRID, TEXT_TOKENS = 1, 32, 120


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes live after each allocation and release of a call, relative to its beginning.

    The profiler hears of all that passes through torch's CPU allocator: eager, compiled code, and
    scratch inside C++ ops. It does not hear of oneDNN's own scratch.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _held = call()  # so that what it returns counts as live at the end
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = [0]
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live.append(live[-1] + nbytes)
    return live


def step_memory(
    forward: Callable[[], tuple], backward: Callable[[tuple], object], device: torch.device
) -> dict[str, int]:
    """``saved``: what ``forward`` leaves behind, outputs included; ``peak``: of the whole step.

    Run once before this, or buffers that live for ever are counted too.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        outputs = forward()
        saved = torch.cuda.memory_allocated() - before
        del outputs
        return {"saved": saved, "peak": peak_bytes(lambda: backward(forward()))}
    saved = _allocations(forward)[-1]
    return {"saved": saved, "peak": max(_allocations(lambda: backward(forward())))}


class Kept(TorchDispatchMode):
    """What ops allocate inside and what is left of it, by the module and op that it came from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.within = [""]
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.found: dict[int, tuple[StorageWeakRef, dict]] = {}

    def __enter__(self) -> Kept:
        def enter(module: nn.Module, _: object) -> None:
            self.within.append(self.names.get(module, self.within[-1]))

        def leave(*_: object) -> None:
            self.within.pop()

        self.hooks = (
            global_hooks.register_module_forward_pre_hook(enter),
            global_hooks.register_module_forward_hook(leave),
        )
        return super().__enter__()

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, op, args)
        return result

    def _note(self, tensor: Tensor, op, args: tuple) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        # an address may be of a storage that is gone
        known = address in self.found and not self.found[address][0].expired()
        if known or address in self.weights:
            return
        source = args[0] if op is torch.ops.aten._to_copy.default else None
        if source is not None and source.untyped_storage()._cdata in self.weights:
            # autocast's copy of a weight, which lives as long as the forward, is a weight
            self.weights.add(address)
            return
        row = {"module": self.within[-1], "op": op.overloadpacket.__name__}
        row |= {"dtype": str(tensor.dtype).removeprefix("torch."), "bytes": storage.nbytes()}
        self.found[address] = StorageWeakRef(storage), row

    def rows(self) -> list[dict]:
        return [row for ref, row in self.found.values() if not ref.expired()]


@contextmanager
def everything_kept() -> Iterator[None]:
    """Without the model's own recomputation, which gives way to others' hooks."""
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        yield


def _ours(config: PixArtConfig, device: torch.device) -> tuple[PixArt, dict]:
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(B, 4, 2 * GRID, 2 * GRID, device=device, generator=generator)
    caption = torch.randn(
        B, TEXT_TOKENS, config.caption_channels, device=device, generator=generator
    )
    timestep = torch.full((B,), 500, device=device)
    return PixArt(config).to(device), {"latents": latents, "timestep": timestep, "caption": caption}


def _stock(config: PixArtConfig, arguments: dict) -> tuple[Any, dict]:
    model: Any = PixArtTransformer2DModel(
        num_layers=config.depth,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        sample_size=config.input_size,
        use_additional_conditions=False,
    )
    renamed = {
        "hidden_states": arguments["latents"],
        "timestep": arguments["timestep"],
        "encoder_hidden_states": arguments["caption"],
        "encoder_attention_mask": torch.ones(arguments["caption"].shape[:2]),
    }
    device = arguments["latents"].device
    return model.to(device), {name: value.to(device) for name, value in renamed.items()}


def block_kept(
    model: nn.Module, blocks: nn.ModuleList, arguments: dict, autocast: torch.dtype | None
) -> list[dict]:
    """What one more block keeps: the difference that the last block makes to a whole forward."""
    device = next(model.parameters()).device

    def kept(count: int) -> Counter:
        last = [blocks.pop(-1) for _ in range(len(blocks) - count)]
        precision = torch.autocast(device.type, autocast, enabled=autocast is not None)
        with precision, Kept(model) as found:
            _output = model(**arguments)
        blocks.extend(last)
        # block 1 of two and of three are the same block
        rows = ({**row, "module": _without_index(row["module"])} for row in found.rows())
        return Counter(tuple(row.items()) for row in rows)

    return [dict(row) for row in (kept(3) - kept(2)).elements()]


def _without_index(module: str) -> str:
    return re.sub(r"^(transformer_)?blocks\.\d+\.?", "", module)


def accounts(config: PixArtConfig, device: torch.device) -> Iterator[dict]:
    """A row for each model, mode and precision: ``kept``, and its sum in ``bytes``."""
    ours, arguments = _ours(config, device)
    stock, renamed = _stock(config, arguments)

    def of_ours(
        autocast: torch.dtype | None, checkpointing: bool | Literal["selective"] = False
    ) -> list[dict]:
        ours.gradient_checkpointing = checkpointing
        return block_kept(ours, ours.blocks, arguments, autocast)

    def all_kept(autocast: torch.dtype | None) -> list[dict]:
        with everything_kept():
            return of_ours(autocast)

    modes = {
        "diffusers": partial(block_kept, stock, stock.transformer_blocks, renamed),
        "everything kept": all_kept,
        "default": of_ours,
        "selective": partial(of_ours, checkpointing="selective"),
        "whole blocks": partial(of_ours, checkpointing=True),
    }
    for autocast in (None, torch.bfloat16):
        for mode, run in modes.items():
            kept = run(autocast)
            yield {
                "mode": mode,
                "precision": "bf16 autocast" if autocast else "float32",
                "bytes": sum(row["bytes"] for row in kept),
                "kept": kept,
                "shape": [B, GRID**2, config.hidden_size],
            }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rows = list(accounts(PixArtConfig(depth=3), device))
    about = {"text": TEXT_TOKENS, **environment(device)}
    file = (arguments.output or folder(device)) / "memory.jsonl"
    write(file, [{**row, **about} for row in rows])
    print(f"{len(rows)} rows in {file}")
