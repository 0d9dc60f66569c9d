import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from pixart.diffusion import NoiseSchedule, Objective

GOLDEN = Path(__file__).parents[2] / "data" / "iddpm_objective.safetensors"


@pytest.fixture
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def objective():
    return Objective(NoiseSchedule())


def inputs(golden):
    return golden["model_output"], golden["x_start"], golden["noise"], golden["timestep"]


def close(got, expected, rtol=2e-6, atol=1e-7):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["loss", "mse", "vb"])
def test_loss_equals_the_official_one(objective, golden, name):
    # a vb near 1e-2 is what is left of terms near 1, whence its absolute tolerance
    close(objective(*inputs(golden))[name], golden[name], atol=3e-7)


def test_gradient_equals_the_official_one(objective, golden):
    output = golden["model_output"].requires_grad_()
    objective(output, *inputs(golden)[1:])["loss"].mean().backward()
    close(output.grad, golden["grad.model_output"], rtol=1e-5, atol=1e-9)


def test_posterior_equals_the_official_one(objective, golden):
    output, x_start, noise, t = inputs(golden)
    x_t = objective.schedule.add_noise(x_start, noise, t)
    assert torch.equal(x_t, golden["x_t"])
    mean, log_variance, pred = objective.schedule.predicted_posterior(*output.chunk(2, 1), x_t, t)
    close(mean, golden["p_mean"])
    close(log_variance, golden["p_log_variance"])
    # at t = 999 x_0 is a difference of numbers 160 times as large
    close(pred, golden["pred_xstart"], atol=2e-5)


def test_vb_is_the_kl_of_the_two_gaussians(objective):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 40, 300, 800, 999])
    output = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    x, noise = torch.randn(2, 5, 2, 3, 3, generator=generator, dtype=torch.float64)

    # written out from the definitions, sharing nothing with the code under test
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    beta, a, a_prev = (v.view(5, 1, 1, 1) for v in (betas[t], abar[t], abar[t - 1]))
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise

    def posterior_mean(x0):
        return (beta * a_prev.sqrt() * x0 + (1 - a_prev) * (1 - beta).sqrt() * x_t) / (1 - a)

    variance = beta * (1 - a_prev) / (1 - a)
    eps, v = output.chunk(2, 1)
    learned = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log())
    true = Normal(posterior_mean(x), variance.sqrt())
    model = Normal(posterior_mean((x_t - (1 - a).sqrt() * eps) / a.sqrt()), learned.sqrt())
    expected = kl_divergence(true, model).mean((1, 2, 3)) / math.log(2)

    got = objective(output, x, noise, t)["vb"]
    assert got.dtype == torch.float64
    # the coefficients of the code under test are float32
    close(got, expected, rtol=1e-4, atol=1e-6)


def test_vb_at_zero_is_the_mass_of_an_eight_bit_bin(objective):
    # two latents inside the range, one in either open-ended bin
    x = torch.tensor([0.3, -0.2, -1.5, 1.2], dtype=torch.float64).view(1, 4, 1, 1)
    noise = torch.tensor([0.5, -1.0, 0.2, 0.9], dtype=torch.float64).view(1, 4, 1, 1)
    output = torch.cat([noise + 0.3, torch.zeros_like(noise)], 1)
    t = torch.zeros(1, dtype=torch.long)
    schedule = objective.schedule
    x_t = schedule.add_noise(x, noise, t)
    mean, log_variance, _ = schedule.predicted_posterior(*output.chunk(2, 1), x_t, t)
    normal = Normal(mean, (0.5 * log_variance).exp())
    low, high = normal.cdf(x - 1 / 255), normal.cdf(x + 1 / 255)
    low[:, 2], high[:, 3] = 0, 1
    expected = -(high - low).log().mean() / math.log(2)
    # the tanh approximation is within 4e-4 of the exact CDF
    close(objective(output, x, noise, t)["vb"][0], expected, rtol=5e-3)


def test_vb_trains_the_variance_and_only_that(objective, golden):
    output = golden["model_output"].requires_grad_()
    objective(output, *inputs(golden)[1:])["vb"].sum().backward()
    eps_grad, variance_grad = output.grad.chunk(2, 1)
    assert torch.equal(eps_grad, torch.zeros_like(eps_grad))
    assert (variance_grad.flatten(1).abs().amax(1) > 0).all()


def test_without_learned_sigma(objective, golden):
    output, *rest = inputs(golden)
    losses = Objective(objective.schedule, learn_sigma=False)(output[:, :4], *rest)
    assert set(losses) == {"loss", "mse"}
    close(losses["mse"], golden["mse"])
    assert torch.equal(losses["loss"], losses["mse"])


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_min_snr_weights_the_regression_alone(objective, golden, learn_sigma):
    output, *rest = inputs(golden)
    output = output if learn_sigma else output[:, :4]
    losses = Objective(objective.schedule, learn_sigma, min_snr_gamma=5.0)(output, *rest)
    abar = objective.schedule.alphas_cumprod[golden["timestep"]]
    snr = abar / (1 - abar)
    weight = (snr.clamp(max=5) / snr).float()
    assert weight[0] < 0.01 and weight[-1] == 1
    vb = golden["vb"] if learn_sigma else 0
    close(losses["mse"], golden["mse"])
    close(losses["loss"], weight * golden["mse"] + vb, atol=1e-6)


def test_bfloat16_output_is_computed_in_float32(objective, golden):
    output, *rest = inputs(golden)
    low = output.bfloat16()
    got, expected = objective(low, *rest), objective(low.float(), *rest)
    for name, value in got.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (6, 4, 8, 8)}, r"model_output .* \(6, 8, 8, 8\).*got \(6, 4, 8, 8\)"),
        ({0: (6, 8, 8, 4)}, r"model_output .* got \(6, 8, 8, 4\)"),
        ({2: (6, 4, 8, 1)}, r"noise .* \(6, 4, 8, 8\), got \(6, 4, 8, 1\)"),
        ({3: (1,)}, r"t must have shape \(6,\).* got \(1,\)"),
    ],
)
def test_wrong_shape_is_named(objective, golden, change, message):
    args = list(inputs(golden))
    for index, shape in change.items():
        args[index] = torch.zeros(shape, dtype=args[index].dtype)
    with pytest.raises(ValueError, match=message):
        objective(*args)


def test_channels_must_match_learn_sigma(objective, golden):
    with pytest.raises(ValueError, match=r"\(6, 4, 8, 8\).*learn_sigma=False.*\(6, 8, 8, 8\)"):
        Objective(objective.schedule, learn_sigma=False)(*inputs(golden))


def test_min_snr_gamma_must_be_positive(objective):
    with pytest.raises(ValueError, match="min_snr_gamma must be positive or None, got 0"):
        Objective(objective.schedule, min_snr_gamma=0)
