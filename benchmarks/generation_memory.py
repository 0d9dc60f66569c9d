"""Memory at the peak of each part of drawing, by mode: ``python -m benchmarks generation_memory``.

One picture with guidance from an XL/2 with T5-XXL and SDXL's autoencoder in bfloat16. On a GPU it
is measured. On a CPU it is counted, without weights or arithmetic: the bytes of all tensors that
live at once, as torch's operations would make them, but neither what a library takes for itself
nor what an allocator rounds up. Writes ``benchmarks/results/<device>/generation_memory.jsonl``.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config, T5EncoderModel

import pixart_kernels as pk
from benchmarks.environment import environment, folder, write
from pixart import PixArt, PixArtConfig, presets
from pixart.conditioning import VAE
from pixart.generation.cache import Cached

DTYPE = torch.bfloat16
SIZES = (1024, 2048, 4096)
TEXT_TOKENS = 300
MODES = ("high", "low")


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that live, now and at the most."""

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


class Parts:
    """Text encoder, transformer and autoencoder with weights of no meaning."""

    def __init__(
        self, text: T5Config, transformer: PixArtConfig, vae: dict, device: torch.device
    ) -> None:
        self.device = device
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            # on a GPU's host there is no need to draw 5 billion numbers either
            with torch.device("meta") if device.type == "cuda" else nullcontext():
                parts = T5EncoderModel(text), PixArt(transformer), AutoencoderKL(**vae)
        finally:
            torch.set_default_dtype(default)
        if device.type == "cuda":
            parts = tuple(part.to_empty(device="cpu") for part in parts)
        self.t5, self.transformer, autoencoder = (part.eval() for part in parts)
        self.vae = VAE(autoencoder)

    def text(self) -> object:
        tokens = torch.ones(1, TEXT_TOKENS, dtype=torch.long, device=self.device)
        return self.t5(input_ids=tokens, attention_mask=tokens).last_hidden_state

    def denoise(self, pixels: int) -> object:
        """Two steps: the first prepares what all share."""
        config, B = self.transformer.config, 2
        side = pixels // self.vae.factor
        latents = torch.zeros(B, config.in_channels, side, side, dtype=DTYPE, device=self.device)
        caption = torch.zeros(
            B, TEXT_TOKENS, config.caption_channels, dtype=DTYPE, device=self.device
        )
        mask = torch.ones(B, TEXT_TOKENS, dtype=torch.bool, device=self.device)
        timesteps = torch.linspace(999, 0, 20, device=self.device)
        # kept from one picture of a size to the next
        self.transformer._positions.clear()
        cached = Cached(self.transformer)
        cached.prepare(timesteps)
        for t in timesteps[:2]:
            latents = cached(latents, t.expand(B), caption, mask)[:, : config.in_channels]
        return latents

    def decode(self, pixels: int, tiled: bool) -> object:
        side = pixels // self.vae.factor
        latents = torch.zeros(1, self.vae.channels, side, side, device=self.device)
        return self.vae.decode(latents, tiled=tiled)


def _weights(*modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def counted(call: Callable[[], object], resident: Sequence[nn.Module], streamed: bool) -> int:
    """Bytes at the peak of ``call``, with the weights that are on the device beside it."""
    weights = _weights(*resident)
    held = max(p.nbytes for p in weights) if streamed else sum(p.nbytes for p in weights)
    with Live(weights) as live:
        call()
    return held + live.peak


def measured(
    call: Callable[[], object], resident: Sequence[nn.Module], streamed: bool, parts: Parts
) -> int:
    for module in (parts.t5, parts.transformer, parts.vae.model):
        module.to(parts.device if module in resident and not streamed else "cpu")
    if streamed:
        (module,) = resident
        cpu_offload(module, execution_device=parts.device)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    if streamed:
        remove_hook_from_module(module, recurse=True)
    return torch.cuda.max_memory_allocated()


def accounts(parts: Parts, sizes: Sequence[int]) -> Iterator[dict]:
    """A row for each size and mode: bytes at the peak of each part, and of the whole."""

    def peak(call: Callable[[], object], *resident: nn.Module, streamed: bool = False) -> int:
        if parts.device.type == "cuda":
            return measured(call, resident, streamed, parts)
        return counted(call, resident, streamed)

    every = parts.t5, parts.transformer, parts.vae.model
    texts = {"high": peak(parts.text, *every), "low": peak(parts.text, parts.t5, streamed=True)}
    for pixels in sizes:
        for mode in MODES:
            low = mode == "low"
            transformer, vae = ((part,) if low else every for part in every[1:])
            peaks = {
                "text": texts[mode],
                "denoise": peak(partial(parts.denoise, pixels), *transformer),
                "decode": peak(partial(parts.decode, pixels, tiled=low), *vae),
            }
            yield {"pixels": pixels, "mode": mode, **peaks, "peak": max(peaks.values())}


def xl(device: torch.device) -> Parts:
    text = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    return Parts(text, presets["sigma-1024"], vae, device)


def rows(device: torch.device, make: Callable[[torch.device], Parts] = xl) -> list[dict]:
    fake = FakeTensorMode() if device.type == "cpu" else nullcontext()
    # what auto takes on a GPU until a kernel is verified there
    with fake, torch.no_grad(), pk.use_backend("reference"):
        return list(accounts(make(device), SIZES))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks generation_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    how = "counted" if device.type == "cpu" else "measured"
    about = {"how": how, "dtype": str(DTYPE).removeprefix("torch."), "text_tokens": TEXT_TOKENS}
    about |= environment(device)
    file = (arguments.output or folder(device)) / "generation_memory.jsonl"
    write(file, [{**row, **about} for row in rows(device)])
    print(f"{len(SIZES) * len(MODES)} rows in {file}")
