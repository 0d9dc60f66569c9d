"""Diffusion: the noise schedule, the training objective, and sampling with guidance."""

from .guidance import GUIDANCE_MASKS, GuidedModel
from .objective import Objective
from .samplers import SAMPLERS, defaults, sample
from .schedule import NoiseSchedule

__all__ = [
    "GUIDANCE_MASKS",
    "SAMPLERS",
    "GuidedModel",
    "NoiseSchedule",
    "Objective",
    "defaults",
    "sample",
]
