"""Checkpoints: our folder, the official files, diffusers folders, and a start from DiT."""

from pixart.checkpoints.diffusers import diffusers_config, to_diffusers
from pixart.checkpoints.dit import from_dit
from pixart.checkpoints.official import to_official
from pixart.checkpoints.storage import load, save, save_diffusers, save_official

__all__ = [
    "diffusers_config",
    "from_dit",
    "load",
    "save",
    "save_diffusers",
    "save_official",
    "to_diffusers",
    "to_official",
]
