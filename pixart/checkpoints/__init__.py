"""Checkpoints: our folder, the official files, diffusers folders, and a start from DiT."""

from pixart.checkpoints.diffusers import diffusers_config, to_diffusers
from pixart.checkpoints.dit import Change, from_dit
from pixart.checkpoints.grow import grow
from pixart.checkpoints.lora import load_lora, save_lora
from pixart.checkpoints.official import to_official
from pixart.checkpoints.storage import load, save, save_diffusers, save_official

__all__ = [
    "Change",
    "diffusers_config",
    "from_dit",
    "grow",
    "load",
    "load_lora",
    "save",
    "save_diffusers",
    "save_lora",
    "save_official",
    "to_diffusers",
    "to_official",
]
