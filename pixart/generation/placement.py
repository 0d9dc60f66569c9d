"""Whether a pipeline's parts stay on the device together, or take turns."""

from __future__ import annotations

import logging

import psutil
import torch
from torch import nn

from pixart.conditioning import VAE
from pixart.model import PixArt

MODES = ("auto", "low", "high")
# the rest is for the sampler's tensors, a larger batch, and what other programs come to take
SHARE = 0.9

logger = logging.getLogger(__name__)


def choose(model: PixArt, vae: VAE, text_encoder_bytes: int, device: torch.device) -> str:
    """``"high"`` where all parts fit into what is free on the device now, else ``"low"``.

    Weights that are there already take nothing more. To the others' comes what decoding takes for
    a picture of the size that the model was trained at, which is more than drawing it takes. Logs
    the choice and its reason.
    """
    side = model.config.input_size * vae.factor
    needed = {
        "text encoder": text_encoder_bytes,
        "transformer": _bytes_elsewhere(model, device),
        "autoencoder": _bytes_elsewhere(vae.model, device),
        f"decoding {side}x{side}": vae.decoding_bytes(side, side),
    }
    mode = "high" if fits(sum(needed.values()), device) else "low"
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in needed.items())
    logger.info(
        "memory: %s, because %s (%s) %s into %d %% of the %s free on %s",
        mode,
        _gigabytes(sum(needed.values())),
        parts,
        "fit" if mode == "high" else "do not fit",
        100 * SHARE,
        _gigabytes(free_bytes(device)),
        device,
    )
    return mode


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes are free on the device now, with some to spare."""
    return size <= SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """What can be allocated on a GPU, or in the host's memory for any other device."""
    if device.type == "cuda":
        # torch keeps what it freed, for its next allocations
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _bytes_elsewhere(module: nn.Module, device: torch.device) -> int:
    return sum(p.nbytes for p in module.parameters() if p.device.type != device.type)
