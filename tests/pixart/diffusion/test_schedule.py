import diffusers
import numpy as np
import pytest
import torch

from pixart.diffusion import NoiseSchedule

ALL_T = torch.arange(1000)


@pytest.fixture
def schedule():
    return NoiseSchedule()


def reference():
    """alphas_cumprod of the trained schedule, by numpy in float64."""
    betas = np.linspace(1e-4, 2e-2, 1000)
    return betas, np.cumprod(1 - betas)


def batch(rows=1000):
    return (torch.randn(rows, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (1, 2))


def test_coefficients_are_float64_rounded_once(schedule):
    betas, abar = reference()
    np.testing.assert_allclose(schedule.betas.numpy(), betas, rtol=1e-15)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), abar, rtol=1e-13)
    ones, zeros = torch.ones(1000, 1), torch.zeros(1000, 1)
    # multiplying by 1 and adding 0 exposes the float32 coefficient itself
    got = schedule.add_noise(ones, zeros, ALL_T)[:, 0]
    assert torch.equal(got, torch.tensor(np.sqrt(abar)).float())
    got = schedule.add_noise(zeros, ones, ALL_T)[:, 0]
    assert torch.equal(got, torch.tensor(np.sqrt(1 - abar)).float())
    snr = torch.tensor(abar / (1 - abar)).float()
    torch.testing.assert_close(schedule.snr(ALL_T), snr, rtol=1e-6, atol=0)


def test_add_noise_is_bitwise_the_diffusers_formula(schedule):
    x, noise = batch()
    peer = diffusers.DDPMScheduler(trained_betas=schedule.betas.tolist())
    # diffusers accumulates abar in float32: half of the elements differ in the last bits ...
    torch.testing.assert_close(
        schedule.add_noise(x, noise, ALL_T), peer.add_noise(x, noise, ALL_T), rtol=0, atol=5e-6
    )
    # ... and from the same abar the two formulas agree to the last bit.
    peer.alphas_cumprod = schedule.alphas_cumprod
    expected = peer.add_noise(x.double(), noise.double(), ALL_T)
    ours = NoiseSchedule()
    ours._on_device[ALL_T.device] = ours._coefficients  # float64 instead of its rounding
    assert torch.equal(ours.add_noise(x.double(), noise.double(), ALL_T), expected)


def test_predict_x_start_inverts_add_noise(schedule):
    x, noise = batch()
    x_t = schedule.add_noise(x, noise, ALL_T)
    # near T x_0 is 0.6 % of x_t, so that a rounding of x_t is 160 times larger in it
    torch.testing.assert_close(
        schedule.predict_x_start(x_t, noise, ALL_T), x, rtol=1e-5, atol=160 * 1e-6
    )


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_is_bayes_rule(schedule, t):
    # precision-weighted product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}), both known Gaussians
    betas, abar = reference()
    x_start, x_t = 0.7, -1.3
    precision = 1 / (1 - abar[t - 1]) + (1 - betas[t]) / betas[t]
    mean = (
        np.sqrt(abar[t - 1]) * x_start / (1 - abar[t - 1]) + np.sqrt(1 - betas[t]) * x_t / betas[t]
    ) / precision
    got = schedule.posterior_mean_variance(
        torch.full((1, 1), x_start), torch.full((1, 1), x_t), torch.tensor([t])
    )
    expected = [mean, 1 / precision, np.log(1 / precision)]
    np.testing.assert_allclose([x.item() for x in got], expected, rtol=2e-5)


def test_posterior_of_the_last_step(schedule):
    zero, one = torch.tensor([0]), torch.tensor([1])
    x = torch.ones(1, 1)
    mean, variance, log_variance = schedule.posterior_mean_variance(3 * x, x, zero)
    assert mean.item() == pytest.approx(3) and variance.item() == 0
    assert torch.equal(log_variance, schedule.posterior_mean_variance(x, x, one)[2])


def test_learned_range_ends(schedule):
    x, eps = batch()
    x_t, one = schedule.add_noise(x, eps, ALL_T), torch.ones_like(x)
    mean, log_max, x_start = schedule.predicted_posterior(eps, one, x_t, ALL_T)
    expected_mean, _, expected_min = schedule.posterior_mean_variance(x_start, x_t, ALL_T)
    log_min = schedule.predicted_posterior(eps, -one, x_t, ALL_T)[1]
    assert torch.equal(mean, expected_mean)
    torch.testing.assert_close(log_max[:, 0, 0, 0], schedule.betas.log().float())
    torch.testing.assert_close(log_min, expected_min.expand_as(log_min))


def test_respaced_keeps_the_noise_levels(schedule):
    kept = [0, 9, 10, 400, 999]
    few = schedule.respaced(kept)
    assert few.timesteps.tolist() == kept and len(few) == 5
    torch.testing.assert_close(
        few.alphas_cumprod, schedule.alphas_cumprod[kept], rtol=1e-12, atol=0
    )
    # keeping 9 and 10 leaves one original step between them
    torch.testing.assert_close(few.betas[2], schedule.betas[10], rtol=1e-10, atol=0)
    assert few.betas[3] > 0.8
    assert few.respaced([1, 3]).timesteps.tolist() == [9, 400]
    every = schedule.respaced(range(1000))
    torch.testing.assert_close(every.betas, schedule.betas, rtol=1e-9, atol=0)


def test_single_step_schedule_is_finite(schedule):
    one = schedule.respaced([999])
    x, zero = torch.ones(1, 1), torch.tensor([0])
    mean, log_variance, x_start = one.predicted_posterior(0 * x, 0 * x, x, zero)
    assert mean.isfinite() and log_variance.isfinite()
    torch.testing.assert_close(mean, x_start)


def test_from_betas():
    linear = NoiseSchedule(10, 0.1, 0.2)
    again = NoiseSchedule.from_betas(linear.betas.tolist())
    assert torch.equal(again.alphas_cumprod, linear.alphas_cumprod)


def test_low_precision_is_computed_in_float32(schedule):
    x, noise = (a.bfloat16() for a in batch())
    got = schedule.add_noise(x, noise, ALL_T)
    assert got.dtype == torch.float32
    assert torch.equal(got, schedule.add_noise(x.float(), noise.float(), ALL_T))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x, t: s.add_noise(x, x[:, :1], t), r"noise .* \(3, 4\), got \(3, 1\)"),
        (lambda s, x, t: s.add_noise(x, x, t[:1]), r"t must have shape \(3,\).*got \(1,\)"),
        (lambda s, x, t: s.add_noise(x, x, t.float()), "t must be integers.*float32"),
        (lambda s, x, t: s.predict_x_start(x, x[:1], t), r"eps must .* got \(1, 4\)"),
        (lambda s, x, t: s.posterior_mean_variance(x[:1], x, t), "x_start must have"),
        (lambda s, x, t: s.predicted_posterior(x, x[:1], x, t), "variance_fraction must have"),
        (lambda s, x, t: s.snr(t[None]), r"t must be .* got torch.int64 of shape \(1, 3\)"),
        (lambda s, x, t: s.respaced([5, 5]), r"strictly increasing.*got \[5, 5\]"),
        (lambda s, x, t: s.respaced([0, 1000]), r"in \[0, 1000\)"),
        (lambda s, x, t: s.respaced([]), r"got \[\]"),
        (lambda s, x, t: NoiseSchedule(0), "num_timesteps must be at least 1, got 0"),
        (lambda s, x, t: NoiseSchedule(10, 0.1, 1.0), r"betas must be .* inside \(0, 1\)"),
        (lambda s, x, t: NoiseSchedule.from_betas([]), r"betas .* got shape \(0,\)"),
    ],
)
def test_wrong_input_is_named(schedule, call, message):
    with pytest.raises(ValueError, match=message):
        call(schedule, torch.ones(3, 4), torch.tensor([0, 1, 2]))
