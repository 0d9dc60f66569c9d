"""A small random autoencoder, shared by tests of several folders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL


def small_vae(*channels: int, **config: Any) -> AutoencoderKL:
    """The same at each call: a block for each of ``channels``, of which all but one halve sides."""
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    return AutoencoderKL(**{**blocks, "norm_num_groups": 4, "latent_channels": 4, **config})
