"""Optimisers: fused AdamW, CAME batched over parameters, and bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as sharded_zeros

import pixart_kernels as pk
from pixart.training.distributed import local
from pixart.training.recipe import Optimizer

_SETTINGS = ("lr", "betas", "eps", "clip_threshold", "weight_decay")
# what CAME keeps of a parameter: of one dimension or none, and of more
_AVERAGES = (
    ("exp_avg", "exp_avg_sq"),
    ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"),
)


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
    four passes over them: :func:`pixart_kernels.came_step`.

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
            settings = {name: group[name] for name in _SETTINGS}
            # parameters and gradients
            alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
                    key = p.shape, p.dtype, p.grad.dtype, p.device, layout
                    params, gradients = alike.setdefault(key, ([], []))
                    params.append(p)
                    gradients.append(p.grad)
            for params, gradients in alike.values():
                self._update(params, gradients, settings)
        return loss

    def _update(
        self, params: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]
    ) -> None:
        """One step of ``params``, which share shape, precision, device and layout."""
        shape, shards = params[0].shape, _shards(params[0])
        for p in params:
            if not self.state[p]:
                self.state[p] = _fresh_state(p)
        states = [self.state[p] for p in params]
        pk.came_step(
            [local(p) for p in params],
            [local(gradient) for gradient in gradients],
            {name: [local(s[name]) for s in states] for name in _AVERAGES[len(shape) > 1]},
            shape=shape,
            reduce=None if shards is None else partial(dist.all_reduce, group=shards),
            **settings,
        )


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
