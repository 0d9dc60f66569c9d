"""Optimisers: fused AdamW, CAME batched over parameters, and bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from pixart.training.recipe import Optimizer

# elements updated together: on a CPU what its cache holds (width 288 took 1.3 times as long with
# 2^20 as with 2^18, and 2.2 times with 2^22); on a GPU scratch of 256 MiB for each of two tensors,
# which has not been tuned
_TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 26}


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: Optimizer, batch_size: int
) -> torch.optim.Optimizer:
    """The optimiser that a recipe asks for. All parameters decay, as in the official training.

    Args:
        parameters: what is trained; those without gradients are left out. Sharded ones (FSDP2)
            keep their state sharded alike.
        settings: the recipe's section.
        batch_size: samples of a whole step, over processes and accumulation. With
            ``settings.base_batch_size`` the learning rate is multiplied by the square root of
            their ratio (the official ``auto_lr``).

    Raises:
        ModuleNotFoundError: 8-bit AdamW was asked for and bitsandbytes is not installed.
    """
    trained = [p for p in parameters if p.requires_grad]
    lr = settings.lr
    if settings.base_batch_size is not None:
        lr *= math.sqrt(batch_size / settings.base_batch_size)
    if settings.name == "came":
        return CAME(trained, lr, betas=settings.betas, weight_decay=settings.weight_decay)
    adamw = {"lr": lr, **settings.model_dump(include={"betas", "eps", "weight_decay"})}
    if settings.name == "adamw":
        return torch.optim.AdamW(trained, fused=True, **adamw)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optimizer.name: adamw-8bit needs bitsandbytes: pip install bitsandbytes, or take "
            "adamw or came"
        ) from error
    return AdamW8bit(trained, **adamw)


class CAME(torch.optim.Optimizer):
    """Confidence-guided adaptive memory-efficient optimisation (Luo et al. 2023, arXiv:2307.02047,
    algorithm 2), with the results of ``came-pytorch`` and its names of state.

    Of a weight it keeps one moment and, of squared gradients and of squared deviations, row and
    column means over the last two dimensions. Parameters of one shape are updated together, in
    fewer passes: the product of two means is formed once, and a deviation is computed from the
    moment before its update, ``u - m' = beta_1 (u - m)``.

    Args:
        params: float parameters of any shape. DTensors may be replicated, or sharded along their
            first dimension over one dimension of their mesh, as FSDP2 does it: their state is
            sharded with them, and of a sum over a sharded dimension the parts are reduced.
        lr: learning rate.
        betas: decays of the moment, of squared gradients and of squared deviations.
        eps: added to squared gradients, and to squared deviations.
        clip_threshold: largest root mean square of an update before the moment.
        weight_decay: share of a weight, times ``lr``, that each step takes away.

    State is float32 whatever the parameters are, and stays so when it is loaded.

    Raises:
        ValueError: a number is out of range, or a DTensor is laid out otherwise.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, ...] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; accepted: 0 or more")
        if len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; accepted: three numbers in [0, 1)")
        if not clip_threshold > 0:
            raise ValueError(f"clip_threshold is {clip_threshold}; accepted: above 0")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch rounds the state of a 16-bit parameter to 16 bits; this takes it as it was saved
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and value.dtype == torch.float32:
                        self.state[p][name] = value.to(p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
                    alike.setdefault((p.shape, p.dtype, p.device, layout), []).append(p)
            for (shape, _, device, _), params in alike.items():
                together = _TOGETHER.get(device.type, _TOGETHER["cuda"])
                count = max(1, together // max(1, shape.numel()))
                for start in range(0, len(params), count):
                    self._update(params[start : start + count], group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step of ``params``, which share shape, precision, device and layout."""
        shape, factored = params[0].shape, params[0].ndim > 1
        beta_moment, beta_square, beta_deviation = group["betas"]
        shards = _shards(params[0])
        for p in params:
            if not self.state[p]:
                self.state[p] = _fresh_state(p)

        def state(name: str) -> list[Tensor]:
            return [_local(self.state[p][name]) for p in params]

        def total(x: Tensor) -> Tensor:
            if shards is not None:
                dist.all_reduce(x, group=shards)
            return x

        def factors(kind: str, beta: float, squares: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            """Of the mean of ``squares`` so far, 1 / sqrt as a column times a row."""
            # rows of a matrix are what its shards are cut from; further dimensions hold them whole
            across = total if len(shape) == 2 else _unchanged
            columns = across(squares.sum(-2)).div_(shape[-2])
            row = _smoothed(state(f"exp_avg_{kind}_row"), squares.mean(-1).add_(eps), beta)
            column = _smoothed(state(f"exp_avg_{kind}_col"), columns.add_(eps), beta)
            mean = across(row.sum(-1, keepdim=True)).div_(shape[-2])
            return row.div_(mean).rsqrt_(), column.rsqrt_()

        weights = [_local(p) for p in params]
        gradients = _stacked([_local(p.grad) for p in params]).float()  # type: ignore[arg-type]
        dims = tuple(range(1, gradients.ndim))
        scratch = gradients.square()
        if factored:
            row, column = factors("sq", beta_square, scratch, group["eps"][0])
            # (g r c)^2 summed over a row is r^2 times the product of g^2 with c^2
            squares = scratch.matmul(column.square().unsqueeze(-1)).squeeze(-1)
            mean_square = squares.mul_(row.square()).sum(dims[:-1], keepdim=True)
        else:
            scale = _smoothed(state("exp_avg_sq"), scratch.add_(group["eps"][0]), beta_square)
            scale.rsqrt_()
            mean_square = (gradients * scale).square_().sum(dims, keepdim=True)
        root = total(mean_square).div_(shape.numel()).sqrt_()
        clip = root.div_(group["clip_threshold"]).clamp_(min=1)
        if factored:
            row.div_(clip)
            scale = torch.mul(row.unsqueeze(-1), column.unsqueeze(-2), out=scratch)
        else:
            scale.div_(clip)

        moments = state("exp_avg")
        # moment - update, and so the moment's own step
        behind = torch._foreach_addcmul(moments, gradients.unbind(), scale.unbind(), value=-1)
        torch._foreach_add_(moments, behind, alpha=beta_moment - 1)
        lr, decay = group["lr"], group["weight_decay"]
        if decay != 0:
            torch._foreach_add_(weights, weights, alpha=-decay * lr)
        if not factored:
            torch._foreach_add_(weights, moments, alpha=-lr)
            return
        deviations = torch.square(_stacked(behind), out=scratch).mul_(beta_moment**2)
        row, column = factors("res", beta_deviation, deviations, group["eps"][1])
        torch.mul(row.mul_(-lr).unsqueeze(-1), column.unsqueeze(-2), out=scratch)
        torch._foreach_addcmul_(weights, moments, scratch.unbind())


def _fresh_state(p: Tensor) -> dict[str, Tensor]:
    def zeros(shape: torch.Size, whole: bool = False) -> Tensor:
        if not isinstance(p, DTensor):
            return torch.zeros(shape, dtype=torch.float32, device=p.device)
        mesh = p.device_mesh
        placements = [Replicate()] * mesh.ndim if whole else p.placements
        return sharded_zeros(shape, dtype=torch.float32, device_mesh=mesh, placements=placements)

    state = {"exp_avg": zeros(p.shape)}
    if p.ndim < 2:
        return state | {"exp_avg_sq": zeros(p.shape)}
    for kind in ("sq", "res"):
        state[f"exp_avg_{kind}_row"] = zeros(p.shape[:-1])
        # a mean over the sharded dimension of a matrix is the same everywhere
        state[f"exp_avg_{kind}_col"] = zeros(p.shape[:-2] + p.shape[-1:], whole=p.ndim == 2)
    return state


def _shards(p: Tensor) -> dist.ProcessGroup | None:
    """The processes among which a parameter is cut along its first dimension, if it is."""
    if not isinstance(p, DTensor):
        return None
    cut = [dim for dim, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not cut:
        return None
    if len(cut) > 1 or p.placements[cut[0]] != Shard(0):
        raise ValueError(
            f"CAME: a parameter of shape {tuple(p.shape)} is laid out as {p.placements}; accepted: "
            "replicated, or Shard(0) over one dimension of its mesh"
        )
    return p.device_mesh.get_group(cut[0])


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _unchanged(x: Tensor) -> Tensor:
    return x


def _stacked(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _smoothed(averages: list[Tensor], values: Tensor, beta: float) -> Tensor:
    """Takes ``values`` into the moving averages; returns these, stacked."""
    torch._foreach_lerp_(averages, values.unbind(), 1 - beta)
    return torch.stack(averages)
