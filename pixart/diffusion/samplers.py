"""From noise to latents: diffusers' solvers on our schedule, and Improved DDPM's own sampler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guidance import GuidedModel
from .schedule import NoiseSchedule


class LearnedRangeSampler:
    """Ancestral sampling with the model's own variance (Improved DDPM, section 4).

    Has the interface of a diffusers scheduler and visits every timestep of ``schedule``, so that
    few steps take a respaced one. diffusers' DDPMScheduler is no substitute: it interpolates
    towards the betas of all T steps, which are far too small when few are taken.
    """

    init_noise_sigma = 1.0
    order = 1

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def set_timesteps(self, steps: int, device: torch.device | str = "cpu") -> None:
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)
        self._steps_left = steps

    def set_begin_index(self, begin: int) -> None:
        self._steps_left = len(self.timesteps) - begin

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        t = timesteps.expand(len(original_samples))
        return self.schedule.add_noise(original_samples, noise, t)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: list[torch.Generator] | None = None,
    ) -> SchedulerOutput:
        """One draw of p(x_{t-1} | x_t); ``model_output`` is (B, 2C, H, W): [eps, v]."""
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f'sampler "iddpm" needs a model with learned variance ({2 * sample.shape[1]} '
                f'output channels), got {model_output.shape[1]}; "ddpm" goes without'
            )
        eps, fraction = model_output.chunk(2, dim=1)
        t = timestep.expand(len(sample))
        mean, log_variance, _ = self.schedule.predicted_posterior(eps, fraction, sample, t)
        self._steps_left -= 1
        if self._steps_left == 0:
            return SchedulerOutput(prev_sample=mean)
        noise = randn_tensor(
            sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
        )
        return SchedulerOutput(prev_sample=mean + torch.exp(0.5 * log_variance) * noise)


# (schedule, steps, device) -> the scheduler, ready to step, and what the model must be told at
# each of its timesteps.
Solver = Callable[[NoiseSchedule, int, torch.device], tuple[Any, Tensor]]


def _diffusers_scheduler(name: str, schedule: NoiseSchedule, **options: Any) -> Any:
    return getattr(diffusers, name)(
        num_train_timesteps=len(schedule),
        trained_betas=schedule.betas.tolist(),
        prediction_type="epsilon",
        **options,
    )


def _multistep(name: str, **options: Any) -> Solver:
    """A high-order solver with its own spacing, which is that of the stock PixArt pipelines."""

    def build(schedule: NoiseSchedule, steps: int, device: torch.device) -> tuple[Any, Tensor]:
        # It splits [0, T-1] into as many intervals as steps: with T of them two coincide.
        if steps >= len(schedule):
            raise ValueError(f"steps must be below {len(schedule)} for this sampler, got {steps}")
        scheduler = _diffusers_scheduler(name, schedule, **options)
        scheduler.set_timesteps(steps, device=device)
        return scheduler, scheduler.timesteps

    return build


def _every_step(make: Callable[[NoiseSchedule], Any]) -> Solver:
    """A solver that visits every timestep of the schedule respaced to ``steps``.

    diffusers' own subsampling in these goes wrong unless ``steps`` divides T: DDIM and PNDM step
    by T // steps over timesteps further apart than that, and the float arithmetic of "trailing"
    adds a timestep -1 for 61, 103, ... steps. On a respaced schedule every jump is 1.
    """

    def build(schedule: NoiseSchedule, steps: int, device: torch.device) -> tuple[Any, Tensor]:
        # Ends at T-1 ("trailing" in arXiv:2305.08891, table 2), the level that pure noise is at.
        kept = [len(schedule) * i // steps - 1 for i in range(1, steps + 1)]
        return _visiting(kept, schedule, make, device)

    return build


def _visiting(
    kept: list[int],
    schedule: NoiseSchedule,
    make: Callable[[NoiseSchedule], Any],
    device: torch.device,
) -> tuple[Any, Tensor]:
    respaced = schedule.respaced(kept)
    scheduler = make(respaced)
    scheduler.set_timesteps(len(kept), device=device)
    return scheduler, respaced.timesteps.to(device)[scheduler.timesteps.long()]


def _one_step(name: str, **options: Any) -> Solver:
    return _every_step(lambda schedule: _diffusers_scheduler(name, schedule, **options))


def _sa_solver(schedule: NoiseSchedule, steps: int, device: torch.device) -> tuple[Any, Tensor]:
    """SA-Solver (arXiv:2309.05019), stochastic in the middle of the way as PixArt runs it."""
    low, high = 0.2 * len(schedule), 0.8 * len(schedule)
    solver = _multistep("SASolverScheduler", tau_func=lambda t: int(low <= t <= high))
    return solver(schedule, steps, device)


LCM_TIMESTEPS = 50
DMD_TIMESTEP = 400


def _lcm(schedule: NoiseSchedule, steps: int, device: torch.device) -> tuple[Any, Tensor]:
    """Multistep consistency sampling (arXiv:2310.04378, algorithm 3; PixArt-delta, 2401.05252).

    Each call predicts clean latents, which are noised again, to the level of the next. Its
    timesteps are some of the 50 that the student was distilled at.
    """
    if steps > LCM_TIMESTEPS:
        raise ValueError(f'sampler "lcm" takes at most {LCM_TIMESTEPS} steps, got {steps}')
    options = {"original_inference_steps": LCM_TIMESTEPS, "clip_sample": False}
    scheduler = _diffusers_scheduler("LCMScheduler", schedule, **options)
    scheduler.set_timesteps(steps, device=device)
    return scheduler, scheduler.timesteps


def _dmd(schedule: NoiseSchedule, steps: int, device: torch.device) -> tuple[Any, Tensor]:
    """The clean latents that a one-step student (arXiv:2311.18828) predicts from noise.

    PixArt's takes pure noise for latents of timestep 400: see the appendix of arXiv:2403.04692.
    """
    if steps != 1:
        raise ValueError(f'sampler "dmd" takes 1 step, got {steps}')
    ddim = partial(_diffusers_scheduler, "DDIMScheduler", clip_sample=False)
    return _visiting([DMD_TIMESTEP], schedule, ddim, device)


# Latents are not confined to [-1, 1]: nothing is clipped. A step is one call of the model, except
# that n steps of "heun" are 2 n - 1 calls and n of "pndm" n + 1.
SAMPLERS: dict[str, Solver] = {
    "dpm-solver++": _multistep("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++"),
    "sde-dpm-solver++": _multistep("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "sa-solver": _sa_solver,
    "unipc": _multistep("UniPCMultistepScheduler"),
    "deis": _multistep("DEISMultistepScheduler"),
    "euler": _one_step("EulerDiscreteScheduler"),
    "euler-ancestral": _one_step("EulerAncestralDiscreteScheduler"),
    "heun": _one_step("HeunDiscreteScheduler"),
    "ddim": _one_step("DDIMScheduler", clip_sample=False),
    "pndm": _one_step("PNDMScheduler", set_alpha_to_one=True, skip_prk_steps=True),
    "ddpm": _one_step("DDPMScheduler", clip_sample=False),
    "iddpm": _every_step(LearnedRangeSampler),
    "lcm": _lcm,
    "dmd": _dmd,
}

# those for distilled models, and in how many steps these draw
DISTILLED = {"lcm": 4, "dmd": 1}

# its multistep formula is for a run whose first timestep comes twice
STARTS_FROM_NOISE_ALONE = ("pndm",)


def defaults(sampler: str, guidance_scale: float = 4.5) -> tuple[int, float]:
    """Steps, and the guidance scale: the one that suits the model, but 1 for a distilled one.

    A distilled model was taught what its teacher draws with guidance.
    """
    return (DISTILLED[sampler], 1.0) if sampler in DISTILLED else (20, guidance_scale)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    noise: Tensor,
    caption: Tensor,
    caption_mask: Tensor | None = None,
    *,
    null_caption: Tensor | None = None,
    null_mask: Tensor | None = None,
    sampler: str = "dpm-solver++",
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_mask: str = "official",
    generators: Sequence[torch.Generator] | None = None,
    image_size: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
    preview: Callable[[Tensor], None] | None = None,
    prepare: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Turn noise into latents, or latents into others.

    The model sees latents in the dtype of ``noise`` and float32 timesteps (B,) in [0, T), not
    always whole numbers; the solver's state is float32 throughout.

    Args:
        model, caption, caption_mask, null_caption, null_mask, guidance_mask, image_size,
            aspect_ratio: see ``GuidedModel``.
        noise: (B, C, H, W) unit Gaussian.
        sampler: a name in ``SAMPLERS``.
        steps: steps of the solver, 1 ... T ("lcm": to 50, "dmd": 1); None: see ``defaults``.
        guidance_scale: see ``GuidedModel``; None: see ``defaults``.
        generators: B generators, on the CPU or the device of ``noise``: stochastic samplers draw
            each sample's noise from its own, so that a picture does not depend on its batch.
            None draws from the global one.
        start: (B, C, H, W) clean latents to begin with, under ``noise``; None: noise alone.
        strength: share of the steps that are taken, the last ones, with ``start``; in (0, 1].
        mask: (B or 1, 1, H, W) bool: where to draw. Elsewhere the result is ``start``, and every
            model call sees it under the same noise at the call's level.
        schedule: the schedule ``model`` was trained with; None: PixArt's.
        callback: called after every model call as ``callback(index, total, latents)`` with
            float32 latents in the solver's own scale.
        preview: called after every model call with the clean latents (B, C, H, W) float32 that
            the model sees in its noisy ones, by the level of the nearest whole timestep.
        prepare: called once before the first model call with all its timesteps, (calls,) float32.

    Returns:
        (B, C, H, W) latents in the dtype of ``noise``.

    Raises:
        ValueError: an unknown sampler, or a shape, count or schedule that does not fit.
    """
    schedule = schedule or NoiseSchedule()
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, got {sampler!r}")
    if not torch.equal(schedule.timesteps, torch.arange(len(schedule))):
        raise ValueError("schedule must be the one trained with, not a respaced one: use steps")
    by_default = defaults(sampler)
    steps = by_default[0] if steps is None else steps
    guidance_scale = by_default[1] if guidance_scale is None else guidance_scale
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps must be in [1, {len(schedule)}], got {steps}")
    if start is None and (mask is not None or strength != 1):
        raise ValueError("mask and strength need start, the latents to change")
    if start is not None and sampler in STARTS_FROM_NOISE_ALONE:
        raise ValueError(f"sampler {sampler!r} cannot begin with an image; the others can")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    if noise.ndim != 4 or not noise.is_floating_point():
        raise ValueError(
            f"noise must be floats of shape (B, C, H, W), got {noise.dtype} of shape "
            f"{tuple(noise.shape)}"
        )
    if start is not None and start.shape != noise.shape:
        raise ValueError(
            f"start must have the shape of noise, {tuple(noise.shape)}, got {tuple(start.shape)}"
        )
    if generators is not None and len(generators) != len(noise):
        raise ValueError(
            f"generators must be {len(noise)}, one for each sample of noise, got {len(generators)}"
        )
    guided = GuidedModel(
        model,
        caption,
        caption_mask,
        null_caption=null_caption,
        null_mask=null_mask,
        guidance_scale=guidance_scale,
        guidance_mask=guidance_mask,
        image_size=image_size,
        aspect_ratio=aspect_ratio,
    )
    scheduler, timesteps = SAMPLERS[sampler](schedule, steps, noise.device)
    latents, first = noise.float() * scheduler.init_noise_sigma, 0
    if start is not None:
        first = scheduler.order * (steps - max(1, round(steps * strength)))
        # those without find their place by the timestep
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(
            start.float(), noise.float(), scheduler.timesteps[first : first + 1]
        )
    scheduler_timesteps, timesteps = scheduler.timesteps[first:], timesteps[first:]
    if prepare is not None:
        prepare(timesteps.float())
    step_options: dict[str, Any] = {}
    # Deterministic solvers have no such parameter.
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = list(generators)

    total = len(timesteps)
    for index, (t, model_t) in enumerate(zip(scheduler_timesteps, timesteps, strict=True)):
        model_input = scheduler.scale_model_input(latents, t).to(noise.dtype)
        output = guided(model_input, model_t.float().expand(len(noise)))
        if sampler != "iddpm":
            output = output[:, : noise.shape[1]]
        if preview is not None:
            nearest = model_t.round().long().expand(len(noise))
            eps = output[:, : noise.shape[1]]
            preview(schedule.predict_x_start(model_input.float(), eps.float(), nearest))
        latents = scheduler.step(output, t, latents, **step_options).prev_sample
        if start is not None and mask is not None:
            kept = start.float()
            if index + 1 < total:
                following = scheduler_timesteps[index + 1 : index + 2]
                kept = scheduler.add_noise(kept, noise.float(), following)
            latents = torch.where(mask, latents, kept)
        if callback is not None:
            callback(index, total, latents)
    return latents.to(noise.dtype)
