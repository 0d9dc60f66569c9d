"""The discrete-time variance-preserving noise schedule and its closed forms.

Notation of DDPM (Ho et al. 2020, arXiv:2006.11239): x_0 is a clean latent, x_t the same latent
after t + 1 noising steps (t is 0-based), eps the unit Gaussian noise in it, and
abar_t = prod_{s <= t} (1 - beta_s), so that x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class NoiseSchedule:
    """T betas and every per-timestep coefficient that follows from them.

    Coefficients are computed once in float64 and kept per device in float32. A method gathers
    them with ``t`` where ``t`` lives, so that none of them waits for the device. All take ``t`` of
    shape (B,), integers in [0, T), next to tensors of shape (B, ...); they compute, and return,
    in float32 even if their inputs are narrower.

    Args:
        num_timesteps: T.
        beta_start: beta_0.
        beta_end: beta_{T-1}; the betas between are spaced linearly (DDPM, section 4).

    Attributes:
        betas: (T,) float64, on the CPU.
        alphas_cumprod: (T,) float64, abar_t, on the CPU.
        timesteps: (T,) int64: the timestep a model was trained with at each index. It is
            0 ... T-1 except after ``respaced``.

    Raises:
        ValueError: a beta is not inside (0, 1).
    """

    def __init__(
        self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
    ) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        self._init(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> NoiseSchedule:
        """A schedule with the given (T,) betas instead of linear ones."""
        schedule = cls.__new__(cls)
        schedule._init(torch.as_tensor(betas, dtype=torch.float64, device="cpu"))
        return schedule

    def _init(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        if betas.ndim != 1 or betas.numel() == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas must be one or more numbers inside (0, 1), got shape {tuple(betas.shape)}"
                + (f" in [{betas.min():g}, {betas.max():g}]" if betas.numel() else "")
            )
        self.betas = betas
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.alphas_cumprod = abar = torch.cumprod(1 - betas, dim=0)
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        variance = betas * (1 - abar_prev) / (1 - abar)
        # The posterior of the last step (t = 0) has no variance; its logarithm borrows the
        # neighbour's, as in Improved DDPM, so that interpolating towards it stays finite.
        log_variance = torch.cat([variance[1:2] if len(betas) > 1 else betas, variance[1:]]).log()
        self._coefficients: dict[str, Tensor] = {
            "sqrt_abar": abar.sqrt(),
            "sqrt_one_minus_abar": (1 - abar).sqrt(),
            "sqrt_recip_abar": (1 / abar).sqrt(),
            "sqrt_recip_abar_minus_one": (1 / abar - 1).sqrt(),
            "posterior_x_start": betas * abar_prev.sqrt() / (1 - abar),
            "posterior_x_t": (1 - abar_prev) * (1 - betas).sqrt() / (1 - abar),
            "posterior_variance": variance,
            "posterior_log_variance": log_variance,
            "log_beta": betas.log(),
            "snr": abar / (1 - abar),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def _gather(self, name: str, t: Tensor, ndim: int) -> Tensor:
        """Coefficient ``name`` at each ``t``, (B,) -> float32 (B, 1, ..., 1) of ``ndim`` axes."""
        if t.ndim != 1 or t.dtype.is_floating_point or t.dtype == torch.bool:
            raise ValueError(
                f"t must be integers of shape (B,), got {t.dtype} of shape {tuple(t.shape)}"
            )
        if t.device not in self._on_device:
            self._on_device[t.device] = {
                key: value.to(t.device, torch.float32) for key, value in self._coefficients.items()
            }
        return self._on_device[t.device][name][t.long()].view(-1, *[1] * (ndim - 1))

    def add_noise(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM eq. 4)."""
        _check_same_shape("noise", noise, "x_start", x_start)
        _check_batch(t, "x_start", x_start)
        return (
            self._gather("sqrt_abar", t, x_start.ndim) * x_start
            + self._gather("sqrt_one_minus_abar", t, x_start.ndim) * noise
        )

    def predict_x_start(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The x_0 that has noise ``eps`` in ``x_t``: x_t / sqrt(abar) - eps sqrt(1/abar - 1)."""
        _check_same_shape("eps", eps, "x_t", x_t)
        _check_batch(t, "x_t", x_t)
        return (
            self._gather("sqrt_recip_abar", t, x_t.ndim) * x_t
            - self._gather("sqrt_recip_abar_minus_one", t, x_t.ndim) * eps
        )

    def posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).

        Returns:
            The mean, shaped as ``x_t``; the variance and its logarithm, (B, 1, ..., 1). At t = 0
            the variance is 0, and the logarithm is that of t = 1.
        """
        _check_same_shape("x_start", x_start, "x_t", x_t)
        _check_batch(t, "x_t", x_t)
        mean = (
            self._gather("posterior_x_start", t, x_t.ndim) * x_start
            + self._gather("posterior_x_t", t, x_t.ndim) * x_t
        )
        return (
            mean,
            self._gather("posterior_variance", t, x_t.ndim),
            self._gather("posterior_log_variance", t, x_t.ndim),
        )

    def predicted_posterior(
        self, eps: Tensor, variance_fraction: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_{t-1} | x_t) of a model with learned-range variance.

        Improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15): the log-variance lies
        between log beta_t and the posterior's, at (v + 1) / 2 of the way.

        Args:
            eps: the predicted noise, shaped as ``x_t``.
            variance_fraction: v, shaped as ``x_t``; -1 is the posterior's variance, 1 is beta_t.

        Returns:
            Mean, log-variance and predicted x_0, all shaped as ``x_t``.
        """
        _check_same_shape("variance_fraction", variance_fraction, "x_t", x_t)
        x_start = self.predict_x_start(x_t, eps, t)
        mean, _, log_min = self.posterior_mean_variance(x_start, x_t, t)
        fraction = (variance_fraction + 1) / 2
        log_max = self._gather("log_beta", t, x_t.ndim)
        return mean, fraction * log_max + (1 - fraction) * log_min, x_start

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t), (B,) float32."""
        return self._gather("snr", t, 1)

    def respaced(self, timesteps: Sequence[int]) -> NoiseSchedule:
        """The schedule whose every step jumps from one kept timestep to the one before it.

        Improved DDPM, section 4: beta'_i = 1 - abar_{S_i} / abar_{S_{i-1}}. The result is indexed
        by i; its ``timesteps`` maps i back to what the model must be told.

        Args:
            timesteps: strictly increasing indices into this schedule.
        """
        kept = [int(t) for t in timesteps]
        increasing = all(a < b for a, b in pairwise(kept))
        if not kept or not increasing or kept[0] < 0 or kept[-1] >= len(self):
            raise ValueError(
                f"timesteps must be strictly increasing in [0, {len(self)}), got {kept}"
            )
        index = torch.tensor(kept)
        abar = self.alphas_cumprod[index]
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        schedule = NoiseSchedule.__new__(NoiseSchedule)
        schedule._init(1 - abar / abar_prev, self.timesteps[index])
        return schedule


def _check_same_shape(name: str, got: Tensor, like_name: str, like: Tensor) -> None:
    if got.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"got {tuple(got.shape)}"
        )


def _check_batch(t: Tensor, name: str, x: Tensor) -> None:
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape ({len(x)},) for {name} of shape {tuple(x.shape)}, "
            f"got {tuple(t.shape)}"
        )
