"""PixArt, from data to pictures: model, training, generation. The kernels are pixart_kernels'."""

from pixart import checkpoints
from pixart.config import PixArtConfig, presets
from pixart.model import PixArt

__all__ = ["PixArt", "PixArtConfig", "checkpoints", "presets"]
