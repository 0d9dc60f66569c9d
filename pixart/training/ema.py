"""A moving average of a module's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Averages of the trained parameters, laid out and sharded as those are.

    The decay of step s, from 1, is ``min(decay, s / (9 + s))``, and 0 at the first: fresh weights
    do not weigh on the average for long (as in diffusers' ``EMAModel``).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Takes in the weights after optimiser step ``step``, counted from 1."""
        decay = min(self.decay, step / (9 + step)) if step > 1 else 0.0
        current = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)
