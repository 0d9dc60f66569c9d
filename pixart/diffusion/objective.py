"""The training loss of Improved DDPM: noise regression plus a variational bound on the variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import NoiseSchedule


@dataclass(frozen=True)
class Objective:
    """Per-sample loss of a noise-predicting model.

    With ``learn_sigma`` this is L_hybrid of Improved DDPM (Nichol & Dhariwal 2021,
    arXiv:2102.09672, section 3.1) with the weight DiT and PixArt train with::

        loss = mean (eps_theta - eps)^2 + L_vb / ln 2

    L_vb is one term of the bound, KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), or
    -log p_theta(x_0 | x_1) at t = 0, averaged over the sample's elements. It sees the predicted
    noise as a constant and so trains the variance alone; unlike in L_hybrid it is not multiplied
    by T / 1000 or by 0.001.

    Args:
        schedule: the noise schedule the model is trained with.
        learn_sigma: the model gives 2C channels, [eps, v], instead of C.
        min_snr_gamma: weight the noise regression by min(SNR_t, gamma) / SNR_t (Hang et al. 2023,
            arXiv:2303.09556, section 3.4, for noise prediction). None gives every t weight 1.

    Raises:
        ValueError: ``min_snr_gamma`` is not positive.
    """

    schedule: NoiseSchedule
    learn_sigma: bool = True
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive or None, got {self.min_snr_gamma}")

    def __call__(
        self, model_output: Tensor, x_start: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """The loss of ``model_output = model(schedule.add_noise(x_start, noise, t), t, ...)``.

        Args:
            model_output: (B, 2C, H, W), or (B, C, H, W) without ``learn_sigma``; any float dtype.
            x_start: (B, C, H, W) clean latents.
            noise: (B, C, H, W) unit Gaussian.
            t: (B,) integers in [0, T).

        Returns:
            ``loss`` (weighted mse + vb), ``mse`` (unweighted), and with ``learn_sigma`` ``vb`` in
            bits per element; each (B,), float32 whatever the model's precision.

        Raises:
            ValueError: a shape or the dtype of ``t`` is not as above.
        """
        channels = x_start.shape[1] * (2 if self.learn_sigma else 1)
        expected = (x_start.shape[0], channels, *x_start.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output must have shape {tuple(expected)} for x_start of shape "
                f"{tuple(x_start.shape)} with learn_sigma={self.learn_sigma}, "
                f"got {tuple(model_output.shape)}"
            )
        model_output, x_start, noise = (
            x.to(torch.promote_types(x.dtype, torch.float32))
            for x in (model_output, x_start, noise)
        )
        # Also the check of the other shapes, so it comes before any arithmetic with them.
        x_t = self.schedule.add_noise(x_start, noise, t)

        eps = model_output[:, : x_start.shape[1]]
        mse = (eps - noise).square().flatten(1).mean(1)
        loss = mse
        if self.min_snr_gamma is not None:
            loss = loss * (self.min_snr_gamma / self.schedule.snr(t)).clamp(max=1)
        if not self.learn_sigma:
            return {"loss": loss, "mse": mse}
        vb = self._variational_bound(eps.detach(), model_output[:, eps.shape[1] :], x_start, x_t, t)
        return {"loss": loss + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self, eps: Tensor, variance_fraction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """One term of the bound in bits per element, (B,)."""
        true_mean, _, true_log_var = self.schedule.posterior_mean_variance(x_start, x_t, t)
        mean, log_var, _ = self.schedule.predicted_posterior(eps, variance_fraction, x_t, t)
        kl = _gaussian_kl(true_mean, true_log_var, mean, log_var)
        nll = _discretized_gaussian_nll(x_start, mean, log_var)
        # Both are computed for every sample: selecting rows by t would wait for the device.
        nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2)


def _gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(q || p) of two diagonal Gaussians, in nats, elementwise."""
    scaled_error = (mean_q - mean_p).square() * torch.exp(-log_var_p)
    return 0.5 * (log_var_p - log_var_q + torch.exp(log_var_q - log_var_p) + scaled_error - 1)


def _discretized_gaussian_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log of a Gaussian's mass on the 1/127.5-wide bin around ``x``, in nats, elementwise.

    DDPM, eq. 13: pixels with 256 levels in [-1, 1], the outermost bins reaching to infinity.
    Latents are no such pixels; released models were trained with this term on them regardless,
    and it only ever applies at t = 0.
    """
    centered, inv_std = x - mean, torch.exp(-0.5 * log_var)
    cdf_above = _normal_cdf((centered + 1 / 255) * inv_std)
    cdf_below = _normal_cdf((centered - 1 / 255) * inv_std)
    mass = torch.where(
        x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below)
    )
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation to the normal CDF (Page 1977), which released models trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
