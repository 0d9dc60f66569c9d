"""The moving average of the weights: that of diffusers, at every step."""

from __future__ import annotations

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from pixart.training.ema import EMA


def test_equals_that_of_diffusers() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    ema, expected = EMA(module, decay=0.7), EMAModel(module.parameters(), decay=0.7)
    assert list(ema.averages) == ["0.weight", "1.weight", "1.bias"]
    for step in range(1, 40):
        with torch.no_grad():
            for parameter in ema.parameters.values():
                parameter.add_(torch.randn_like(parameter))
        ema.step(step)
        expected.step(module.parameters())
        shadows = [s for s in expected.shadow_params if s is not expected.shadow_params[1]]
        for found, shadow in zip(ema.averages.values(), shadows, strict=True):
            torch.testing.assert_close(found, shadow)
