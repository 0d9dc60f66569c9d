"""Latent consistency distillation (LCM, arXiv:2310.04378): a model that draws in a few steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pixart.diffusion import NoiseSchedule
from pixart.diffusion.guidance import GuidedModel
from pixart.diffusion.samplers import LCM_TIMESTEPS
from pixart.model import CaptionEmbedder, PixArt
from pixart.training.text_to_image import TextToImage

# of the boundary condition, as released models were distilled with them
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def consistency(schedule: NoiseSchedule, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x_0, which at t = 0 is x_t itself.

    Consistency models (arXiv:2303.01469, section 3 and appendix C), with x_0 by the predicted
    noise (LCM, section 4.1) and s = 10 t::

        c_skip = sigma^2 / (s^2 + sigma^2),  c_out = s / sqrt(s^2 + sigma^2)

    Args:
        x_t, eps: (B, C, H, W). t: (B,) integers.
    """
    s = (TIMESTEP_SCALING * t.float()).view(-1, 1, 1, 1)
    norm = s**2 + SIGMA_DATA**2
    x_start = schedule.predict_x_start(x_t, eps, t)
    return SIGMA_DATA**2 / norm * x_t + s / norm.sqrt() * x_start


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, eps: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """A step of the probability-flow ODE, from t to an earlier timestep (DDIM, 2010.02502, eq. 12).

    Args:
        x_t, eps: (B, C, H, W). t, to: (B,) integers.
    """
    return schedule.add_noise(schedule.predict_x_start(x_t, eps, t), eps, to)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mean of sqrt((x - y)^2 + c^2) - c over all elements."""
    return (((x - y).square() + c**2).sqrt() - c).mean()


class Distillation(TextToImage):
    """A :class:`pixart.training.loop.Task`: the student of ``model.init``, its teacher.

    Trained is that the student says the same of two neighbours on a way that the teacher takes
    with guidance (LCM, algorithm 1, with one guidance scale for all as in PixArt-delta,
    arXiv:2401.05252, section 3); of the nearer one by its averaged weights. The timesteps are the
    50 that sampler "lcm" chooses from. With adapters (``lora``) they are the student.
    """

    def _model(self) -> PixArt:
        model = super()._model()
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self._teacher = teacher.to(self.device, _DTYPES[self.recipe.mixed_precision])
        assert isinstance(model.y_embedder, CaptionEmbedder)
        assert isinstance(teacher.y_embedder, CaptionEmbedder)
        self._null = teacher.y_embedder.y_embedding
        # the teacher's guidance takes the place of captions that are dropped
        model.y_embedder.dropout = 0.0
        return model

    def flops(self, batch: dict[str, Any]) -> int:
        # besides a forward, whose backward is twice as much: two of the teacher, one of averages
        return 2 * super().flops(batch)

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        settings, schedule = self.recipe.distill, self.schedule
        assert settings is not None
        mean, std = batch["latent_mean"], batch["latent_std"]
        latents = mean + std * torch.randn_like(std)
        jump = len(schedule) // LCM_TIMESTEPS
        t = jump * torch.randint(1, LCM_TIMESTEPS + 1, (len(latents),), device=latents.device) - 1
        earlier = (t - jump).clamp(min=0)
        (caption, mask), micro = self._condition(batch), self._keywords(batch)
        channels = latents.shape[1]
        noisy = schedule.add_noise(latents, torch.randn_like(latents), t)
        eps = module(noisy, t, caption, mask, **micro)[:, :channels]
        predicted = consistency(schedule, noisy, eps, t)
        with torch.no_grad():
            guided = GuidedModel(
                self._teacher,
                caption,
                mask,
                null_caption=self._null.float(),
                guidance_scale=settings.guidance_scale,
                image_size=micro.get("image_size"),
                aspect_ratio=micro.get("aspect_ratio"),
            )
            nearer = ddim_step(schedule, noisy, guided(noisy, t)[:, :channels], t, earlier)
            inputs = (nearer, earlier, caption, mask)
            eps = functional_call(self.module, self.averages or {}, inputs, micro)[:, :channels]
            target = consistency(schedule, nearer, eps, earlier)
        return {"loss": pseudo_huber(predicted, target, settings.huber_c)}
