import math

import numpy as np
import pytest
import torch

from pixart.diffusion import SAMPLERS, NoiseSchedule, sample
from pixart.diffusion.samplers import DISTILLED, STARTS_FROM_NOISE_ALONE

MEAN, STD = 0.7, 0.5
CAPTION = torch.zeros(2, 1, 3)
STOCHASTIC = {"sde-dpm-solver++", "sa-solver", "euler-ancestral", "ddpm", "iddpm", "lcm"}
# for models as they were trained
SOLVERS = [name for name in SAMPLERS if name not in DISTILLED]
SCHEDULES = {
    "pixart": NoiseSchedule(),
    # of another length, and noisier at the same t / T
    "other": NoiseSchedule(400, 5e-4, 8e-2),
}


def noise(batch=2, side=64, seed=1234):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))


class GaussianModel:
    """The exact noise prediction for data of independent N(MEAN, STD^2) elements."""

    def __init__(self, schedule, variance_fraction=None):
        self.sigmas = (1 / schedule.alphas_cumprod - 1).sqrt().numpy()
        self.fraction = variance_fraction or (lambda t: torch.full_like(t, -1.0))
        self.timesteps = []

    def __call__(
        self, latents, timestep, caption, caption_mask=None, image_size=None, aspect_ratio=None
    ):
        assert timestep.dtype == torch.float32 and timestep.shape == latents.shape[:1]
        self.timesteps.append(timestep[0].item())
        sigma = np.interp(timestep.numpy(), np.arange(len(self.sigmas)), self.sigmas)
        abar = torch.tensor(1 / (1 + sigma**2), dtype=torch.float32).view(-1, 1, 1, 1)
        eps = (1 - abar).sqrt() * (latents - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)
        fraction = self.fraction(timestep).view(-1, 1, 1, 1).expand_as(eps)
        return torch.cat([eps, fraction], 1)


def run(name, steps, schedule=None, model=None, x=None, **options):
    schedule = schedule or NoiseSchedule()
    x = noise() if x is None else x
    return sample(
        model or GaussianModel(schedule),
        x,
        CAPTION[:1].expand(len(x), 1, 3),
        sampler=name,
        steps=steps,
        schedule=schedule,
        guidance_scale=1,
        **options,
    )


# name, steps, tolerance of the standard deviation: first-order solvers need more steps for less
ACCURACY = [
    ("dpm-solver++", 50, 0.01),
    ("sde-dpm-solver++", 100, 0.02),
    ("sa-solver", 100, 0.02),
    ("unipc", 50, 0.02),
    ("deis", 50, 0.02),
    ("euler", 100, 0.04),
    ("euler-ancestral", 250, 0.04),
    ("heun", 50, 0.02),
    ("ddim", 100, 0.04),
    ("pndm", 50, 0.01),
    ("ddpm", 250, 0.04),
    ("iddpm", 250, 0.04),
]


def test_every_sampler_is_tested():
    assert {name for name, *_ in ACCURACY} == set(SOLVERS)


@pytest.mark.parametrize("which", SCHEDULES)
@pytest.mark.parametrize(("name", "steps", "tolerance"), ACCURACY)
def test_recovers_the_data_distribution(name, steps, tolerance, which):
    torch.manual_seed(0)
    got = run(name, steps, SCHEDULES[which])
    # 32768 elements: the mean's own spread is 0.003. What x_T keeps of the data, sqrt(abar_T) =
    # 0.006, is missing in the noise that sampling starts from, and so a bit of the mean.
    assert got.mean().item() == pytest.approx(MEAN, abs=0.013)
    assert got.std().item() == pytest.approx(STD, rel=tolerance)


@pytest.mark.parametrize(("name", "steps", "tolerance"), ACCURACY)
def test_a_wrong_schedule_would_show(name, steps, tolerance):
    # the schedule given to the sampler is not the one of the model
    torch.manual_seed(0)
    wrong = NoiseSchedule(1000, 1e-4, 1e-2)
    got = run(name, steps, wrong, GaussianModel(NoiseSchedule()))
    mean_off = abs(got.mean().item() - MEAN) > 0.03
    assert mean_off or abs(got.std().item() / STD - 1) > 2 * tolerance


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 61, 334])
def test_any_number_of_steps(name, steps):
    """Counts that do not divide T, and the smallest: diffusers' DDIM at 334 has a mean of 0.53."""
    torch.manual_seed(0)
    model = GaussianModel(NoiseSchedule())
    got = run(name, steps, model=model, x=noise(side=16))
    calls = {"heun": 2 * steps - 1, "pndm": steps + 1 if steps > 1 else 1}.get(name, steps)
    assert len(model.timesteps) == calls
    assert model.timesteps[0] == 999 and min(model.timesteps) >= 0
    assert got.mean().item() == pytest.approx(MEAN, abs=0.04)


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc", "deis", "sa-solver"])
def test_multistep_solvers_stop_short_of_all_timesteps(name):
    assert run(name, 999, x=noise(1, 2)).isfinite().all()
    with pytest.raises(ValueError, match="steps must be below 1000 for this sampler, got 1000"):
        run(name, 1000, x=noise(1, 2))


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_iddpm_is_exact_with_the_exact_variance(steps):
    """On Gaussian data p(x_{t-1} | x_t) is Gaussian, and its variance is within learned range.

    A model that tells it leaves no discretisation error, however few the steps; the variance
    range of un-respaced betas could not express it.
    """
    schedule = NoiseSchedule()
    kept = [1000 * i // steps - 1 for i in range(1, steps + 1)]
    abar = schedule.alphas_cumprod.numpy()[kept]
    abar_prev = np.append(1, abar[:-1])
    beta = 1 - abar / abar_prev
    smallest = beta * (1 - abar_prev) / (1 - abar)
    # Var(x_{t-1} | x_t) = posterior variance + (coefficient of x_0)^2 Var(x_0 | x_t)
    x0_variance = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    exact = smallest + (beta * np.sqrt(abar_prev) / (1 - abar)) ** 2 * x0_variance
    fraction = dict.fromkeys(kept, 0.0)
    for t, e, low, high in list(zip(kept, exact, smallest, beta, strict=True))[1:]:
        fraction[t] = 2 * math.log(e / low) / math.log(high / low) - 1

    model = GaussianModel(schedule, lambda t: torch.tensor([fraction[int(i)] for i in t]))
    draws = []
    torch.manual_seed(0)
    run("iddpm", steps, model=model, callback=lambda i, n, x: draws.append(x))
    assert model.timesteps == [float(t) for t in reversed(kept)]
    # the last step returns the mean; the one before is a full draw of x at the lowest kept level
    mean, std = math.sqrt(abar[0]) * MEAN, math.sqrt(abar[0] * STD**2 + 1 - abar[0])
    assert draws[-2].mean().item() == pytest.approx(mean, abs=0.015)
    assert draws[-2].std().item() == pytest.approx(std, rel=0.012)


def test_iddpm_over_all_timesteps_is_the_plain_posterior_step():
    schedule = NoiseSchedule(12, 0.05, 0.4)
    model = GaussianModel(schedule, lambda t: torch.cos(t))
    x = noise(2, 4)
    got = run(
        "iddpm",
        12,
        schedule,
        model,
        x,
        generators=[torch.Generator().manual_seed(i) for i in (5, 6)],
    )
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    for step in reversed(range(12)):
        t = torch.tensor([step, step])
        eps, v = model(x, t.float(), None).chunk(2, 1)
        x_start = schedule.predict_x_start(x, eps, t)
        x, variance, _ = schedule.posterior_mean_variance(x_start, x, t)
        if step > 0:
            # eq. 15 of Improved DDPM, written out
            fraction = (v + 1) / 2
            log_variance = fraction * schedule.betas[step].log() + (1 - fraction) * variance.log()
            z = torch.cat([torch.randn(1, 4, 4, 4, generator=g) for g in generators])
            x = x + (log_variance / 2).exp() * z
    torch.testing.assert_close(got, x.float(), rtol=1e-5, atol=1e-6)


def test_iddpm_needs_a_learned_variance():
    def model(latents, timestep, caption, **_):
        return latents

    with pytest.raises(ValueError, match=r'"iddpm" needs .* \(8 output channels\), got 4'):
        run("iddpm", 3, model=model, x=noise(1, 2))
    for name in set(SAMPLERS) - {"iddpm"}:
        assert run(name, None, model=model, x=noise(1, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    x = noise(3, 4)

    def draw(rows):
        generators = [torch.Generator().manual_seed(100 + i) for i in rows]
        return run(name, 1 if name == "dmd" else 6, x=x[rows], generators=generators)

    together = draw([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(draw([i])[0], together[i], rtol=1e-6, atol=1e-6)
    assert torch.equal(draw([2, 0, 1]), together[[2, 0, 1]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_generators_alone_decide_the_noise(name):
    def draw(seed):
        torch.manual_seed(seed)
        x = noise(1, 4)
        steps = 1 if name == "dmd" else 6
        return run(name, steps, x=x, generators=[torch.Generator().manual_seed(seed)])

    assert torch.equal(draw(3), draw(3))
    assert torch.equal(draw(3), draw(4)) == (name not in STOCHASTIC)


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 50])
def test_lcm_predicts_clean_latents_and_noises_them_again(steps):
    """Latent consistency models, algorithm 3, written out."""
    schedule, x = NoiseSchedule(), noise(2, 4)
    model = GaussianModel(schedule)
    seeds = [torch.Generator().manual_seed(i) for i in (5, 6)]
    got = run("lcm", steps, model=model, x=x, generators=seeds)
    # spread over the 50 timesteps 19, 39, ... 999 of the distillation
    distilled = range(999, 0, -20)
    timesteps = [distilled[50 * i // steps] for i in range(steps)]
    assert model.timesteps == timesteps

    seeds = [torch.Generator().manual_seed(i) for i in (5, 6)]
    for i, t in enumerate(timesteps):
        at = torch.tensor([t, t])
        x_start = schedule.predict_x_start(x, model(x, at.float(), None)[:, :4], at)
        # the boundary: at t = 0 it would be x itself
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        x = c_skip * x + c_out * x_start
        if i + 1 < steps:
            z = torch.cat([torch.randn(1, 4, 4, 4, generator=g) for g in seeds])
            x = schedule.add_noise(x, z, torch.tensor([timesteps[i + 1]] * 2))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_dmd_is_one_call_that_takes_noise_for_timestep_400():
    schedule, x = NoiseSchedule(), noise(2, 4)
    model = GaussianModel(schedule)
    got = run("dmd", 1, model=model, x=x)
    assert model.timesteps == [400]
    at = torch.tensor([400, 400])
    expected = schedule.predict_x_start(x, model(x, at.float(), None)[:, :4], at)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("lcm", 4), ("dmd", 1)])
def test_a_student_draws_as_it_was_taught_unless_told_otherwise(name, steps):
    """In its number of steps and without guidance; an exact student, exactly."""
    schedule, batches = NoiseSchedule(), []

    def model(latents, timestep, caption, caption_mask=None, **_):
        batches.append(len(latents))
        abar = schedule.alphas_cumprod[timestep.long()].float().view(-1, 1, 1, 1)
        target = caption.mean((1, 2)).view(-1, 1, 1, 1)
        return (latents - abar.sqrt() * target) / (1 - abar).sqrt()

    caption = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    got = sample(model, noise(2, 2), caption, sampler=name)
    assert batches == [2] * steps
    torch.testing.assert_close(got, caption[..., None].expand_as(got), rtol=1e-4, atol=1e-3)
    batches.clear()
    guided = {"null_caption": torch.ones(1, 1), "guidance_scale": 1.5}
    got = sample(model, noise(2, 2), caption, sampler=name, steps=1, **guided)
    assert batches == [4]
    expected = 1 + 1.5 * (caption[..., None] - 1)
    torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-3, atol=1e-2)


def test_guidance_reaches_the_sampler():
    """A model that predicts the caption as x_0 ends at the extrapolated caption."""
    schedule = NoiseSchedule()

    def model(latents, timestep, caption, caption_mask=None, **_):
        target = (caption * caption_mask[..., None]).sum((1, 2)).view(-1, 1, 1, 1)
        abar = schedule.alphas_cumprod[timestep.long()].float().view(-1, 1, 1, 1)
        return (latents - abar.sqrt() * target) / (1 - abar).sqrt()

    caption = torch.tensor([2.0, 3.0]).view(2, 1, 1).expand(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    null, null_mask = torch.ones(4, 1), torch.tensor([1, 0, 0, 0])
    options = {"null_caption": null, "null_mask": null_mask, "guidance_scale": 3.0}
    got = sample(model, noise(2, 2), caption, mask, **options)
    # conditional targets 4 and 9; unconditional 2 and 3 (official), 1 and 1 (diffusers)
    expected = torch.tensor([2 + 3 * 2.0, 3 + 3 * 6.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(got, expected.expand(2, 4, 2, 2), rtol=1e-3, atol=1e-2)
    got = sample(model, noise(2, 2), caption, mask, guidance_mask="diffusers", **options)
    expected = torch.tensor([1 + 3 * 3.0, 1 + 3 * 8.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(got, expected.expand(2, 4, 2, 2), rtol=1e-3, atol=1e-2)


def test_default_steps_are_those_of_the_stock_pipeline():
    model = GaussianModel(NoiseSchedule())
    sample(model, noise(2, 2), CAPTION, guidance_scale=1)
    expected = np.linspace(0, 999, 21).round()[:0:-1]
    assert model.timesteps == expected.tolist()


def test_callback_sees_every_step():
    seen = []
    got = run("dpm-solver++", 4, x=noise(1, 2), callback=lambda *args: seen.append(args))
    assert [(i, n) for i, n, _ in seen] == [(i, 4) for i in range(4)]
    assert torch.equal(seen[-1][2], got)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_previews_are_the_clean_latents_that_the_model_sees(name):
    schedule, target, seen = NoiseSchedule(), noise(1, 2, seed=7), []
    sigmas = (1 / schedule.alphas_cumprod - 1).sqrt().numpy()

    def model(latents, timestep, caption, **_):
        sigma = np.interp(timestep.numpy(), np.arange(len(sigmas)), sigmas).item()
        eps = (latents * math.sqrt(1 + sigma**2) - target) / sigma
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    steps = 1 if name == "dmd" else 4
    calls = []
    run(name, steps, model=model, x=noise(1, 2), preview=seen.append,
        callback=lambda index, *_: calls.append((index, len(seen))))  # fmt: skip
    # one before each call's callback
    assert calls == [(index, index + 1) for index in range(len(seen))]
    # samplers whose timesteps are not whole numbers are answered for the nearest one
    assert all((preview - target).abs().max() < 0.02 for preview in seen)


def test_no_gradient_and_dtype_follows_noise():
    dtypes = set()
    weight = torch.ones((), requires_grad=True)

    def model(latents, timestep, caption, **_):
        dtypes.add((latents.dtype, timestep.dtype))
        return latents * weight.to(latents.dtype)

    got = run("euler", 3, model=model, x=noise(1, 2).bfloat16())
    assert got.dtype == torch.bfloat16 and not got.requires_grad
    assert dtypes == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, r"sampler must be one of .*'ddim'.* got 'magic'"),
        ({"steps": 0}, r"steps must be in \[1, 1000\], got 0"),
        ({"steps": 1001}, r"steps must be in \[1, 1000\], got 1001"),
        ({"noise": torch.zeros(2, 4, 2)}, r"noise must .* got torch.float32 of shape \(2, 4, 2\)"),
        ({"noise": torch.zeros(3, 4, 2, 2)}, r"latents .* got \(3, 4, 2, 2\)"),
        ({"generators": [torch.Generator()]}, "generators must be 2, .* got 1"),
        ({"sampler": "lcm", "steps": 51}, '"lcm" takes at most 50 steps, got 51'),
        ({"sampler": "dmd", "steps": 2}, '"dmd" takes 1 step, got 2'),
        ({"schedule": NoiseSchedule().respaced([0, 9])}, "schedule must be the one trained with"),
        ({"start": noise(1, 2)}, r"start must have the shape of noise, .* got \(1, 4, 2, 2\)"),
        ({"start": noise(2, 2), "strength": 0}, r"strength must be in \(0, 1\], got 0"),
        ({"strength": 0.5}, "mask and strength need start"),
        ({"guidance_scale": 2.0}, "null_caption is needed for guidance_scale 2.0"),
    ],
)
def test_wrong_input_is_named(change, message):
    args = {"noise": noise(2, 2), "caption": CAPTION, "guidance_scale": 1} | change
    with pytest.raises(ValueError, match=message):
        sample(GaussianModel(NoiseSchedule()), **args)


FROM_THE_MIDDLE = [row for row in ACCURACY if row[0] not in STARTS_FROM_NOISE_ALONE]


@pytest.mark.parametrize(("name", "steps", "tolerance"), FROM_THE_MIDDLE)
def test_starts_from_latents_at_their_noise_level(name, steps, tolerance):
    """Noised data denoises to data again: the wrong level of noise would change its spread."""
    torch.manual_seed(0)
    start = MEAN + STD * noise(seed=5)
    whole, part = GaussianModel(NoiseSchedule()), GaussianModel(NoiseSchedule())
    run(name, steps, model=whole, x=noise(1, 2))
    got = run(name, steps, model=part, start=start, strength=0.3)
    assert part.timesteps == whole.timesteps[-len(part.timesteps) :]
    calls = round(0.3 * steps)
    assert len(part.timesteps) == (2 * calls - 1 if name == "heun" else calls)
    assert got.mean().item() == pytest.approx(MEAN, abs=0.013)
    assert got.std().item() == pytest.approx(STD, rel=tolerance)
    # it is still that image, and less so the more is done
    near, far = (
        torch.corrcoef(torch.stack([run(name, steps, start=start, strength=s).flatten(),
                                    start.flatten()]))[0, 1]
        for s in (0.05, 0.9)
    )  # fmt: skip
    assert near > 0.8 and far < 0.2


NOT_FROM_NOISE_ALONE = [name for name in SAMPLERS if name not in STARTS_FROM_NOISE_ALONE]


@pytest.mark.parametrize("name", NOT_FROM_NOISE_ALONE)
def test_the_last_step_draws_no_noise_even_if_it_is_the_only_one(name):
    def last_step(seed):
        torch.manual_seed(seed)
        steps = 1 if name == "dmd" else 10
        return run(name, steps, x=noise(1, 4), start=noise(1, 4, seed=5), strength=0.1)

    assert torch.equal(last_step(0), last_step(1))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", NOT_FROM_NOISE_ALONE)
def test_what_a_mask_keeps_is_at_every_level_its_own(name, strength):
    schedule, x = NoiseSchedule(), noise(2, 8)
    start = MEAN + STD * noise(2, 8, seed=5)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:5] = True
    exact = GaussianModel(schedule)

    def model(latents, timestep, caption, **micro):
        expected = schedule.add_noise(start, x, timestep.long())
        kept = ~mask.expand_as(x)
        torch.testing.assert_close(latents[kept], expected[kept], rtol=1e-3, atol=1e-3)
        return exact(latents, timestep, caption, **micro)

    steps = 1 if name == "dmd" else 10
    got = run(name, steps, schedule, model, x, start=start, strength=strength, mask=mask)
    assert torch.equal(got[~mask.expand_as(got)], start[~mask.expand_as(got)])
    assert (got - start)[mask.expand_as(got)].abs().min() > 0


@pytest.mark.parametrize("name", STARTS_FROM_NOISE_ALONE)
def test_some_cannot_start_from_latents(name):
    with pytest.raises(ValueError, match=f"{name}' cannot begin with an image"):
        run(name, 4, start=noise())
