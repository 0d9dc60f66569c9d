"""Generation: pipelines from prompts to pictures."""

from pixart.generation.contact_sheet import contact_sheet
from pixart.generation.pipeline import PixArtPipeline, Prompts

__all__ = ["PixArtPipeline", "Prompts", "contact_sheet"]
