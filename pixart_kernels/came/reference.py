"""CAME's step in plain PyTorch: the definition (Luo et al. 2023, arXiv:2307.02047, algorithm 2).

Work as large as the weights is done in passes over them, of which the Triton backend has its own;
what lies between, on rows and columns, is :func:`step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, list[Tensor]]
Reduce = Callable[[Tensor], object]


class Settings(NamedTuple):
    """The numbers of a step, and of what whole weights are shards: see ``came_step``."""

    lr: float
    betas: Sequence[float]
    eps: Sequence[float]
    clip_threshold: float
    weight_decay: float
    shape: torch.Size | None = None
    reduce: Reduce | None = None


# elements updated together: on a CPU what its cache holds (width 288 took 1.3 times as long with
# 2^20 as with 2^18, and 2.2 times with 2^22); on a GPU scratch of 256 MiB for each of two tensors,
# which has not been tuned
TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 26}


class MatrixPasses(Protocol):
    """Passes over n weights of shape (*, R, C), called in this order.

    A row's factors and sums are (n, *, R), a column's (n, *, C), fp32.
    """

    def squares(self) -> tuple[Tensor, Tensor]:
        """Sums of squared gradients, of each row and of each column."""

    def scaled_squares(self, column: Tensor) -> Tensor:
        """Sums of squares of gradient * column, of each row."""

    def move(self, row: Tensor, column: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Takes the update, gradient * row * column, into the moment; sums of squares of what is
        between them then, of each row and of each column."""

    def update(self, row: Tensor, column: Tensor, decay: float) -> None:
        """Takes ``decay`` of itself, and then moment * row * column, from the weight."""


class VectorPasses(Protocol):
    """Passes over n weights of one dimension, called in this order."""

    def squares(self, beta: float, eps: float) -> Tensor:
        """Takes squared gradients + eps into their averages; sums of gradient^2 / average, (n,)."""

    def update(self, clip: Tensor, beta: float, lr: float, decay: float) -> None:
        """Takes gradient / sqrt(average) / clip into the moment; then ``decay`` of itself, and
        then lr * moment, from the weight."""


MakeMatrixPasses = Callable[[list[Tensor], list[Tensor], State], MatrixPasses]
MakeVectorPasses = Callable[[list[Tensor], list[Tensor], State], VectorPasses]


def step(
    passes: tuple[MakeMatrixPasses, MakeVectorPasses],
    weights: list[Tensor],
    gradients: list[Tensor],
    state: State,
    settings: Settings,
) -> None:
    """A step whose passes are made by ``passes``, of matrices and of vectors."""
    lr, betas, eps, clip_threshold, weight_decay, shape, reduce = settings
    shape = weights[0].shape if shape is None else shape

    def total(x: Tensor) -> Tensor:
        if reduce is not None:
            reduce(x)
        return x

    def across(x: Tensor) -> Tensor:
        # rows of a matrix are what its shards are cut from; further dimensions hold them whole
        return total(x) if len(shape) == 2 else x

    def clip(squares: Tensor) -> Tensor:
        """What divides updates so that their root mean square is at most the threshold."""
        return total(squares).div_(shape.numel()).sqrt_().div_(clip_threshold).clamp_(min=1)

    def factors(
        kind: str, sums: tuple[Tensor, Tensor], beta: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Of the mean of squares so far, 1 / sqrt as a column times a row."""
        rows, columns = sums[0].div_(shape[-1]), across(sums[1]).div_(shape[-2])
        row = smoothed(state[f"exp_avg_{kind}_row"], rows.add_(eps), beta)
        column = smoothed(state[f"exp_avg_{kind}_col"], columns.add_(eps), beta)
        mean = across(row.sum(-1, keepdim=True)).div_(shape[-2])
        return row.div_(mean).rsqrt_(), column.rsqrt_()

    decay = lr * weight_decay
    if len(shape) < 2:
        vectors = passes[1](weights, gradients, state)
        vectors.update(clip(vectors.squares(betas[1], eps[0])), betas[0], lr, decay)
        return
    matrices = passes[0](weights, gradients, state)
    row, column = factors("sq", matrices.squares(), betas[1], eps[0])
    # (g r c)^2 summed over a row is r^2 times the sum of (g c)^2
    squares = matrices.scaled_squares(column).mul_(row.square())
    row.div_(clip(squares.sum(tuple(range(1, squares.ndim)), keepdim=True)))
    row, column = factors("res", matrices.move(row, column, betas[0]), betas[2], eps[1])
    matrices.update(row.mul_(lr), column, decay)


def smoothed(averages: list[Tensor], values: Tensor, beta: float) -> Tensor:
    """Takes ``values`` into the moving averages; returns these, stacked."""
    torch._foreach_lerp_(averages, values.unbind(), 1 - beta)
    return torch.stack(averages)


def _stacked(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


class _Matrices:
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], state: State) -> None:
        self.weights, self.moments = weights, state["exp_avg"]
        self.gradients = _stacked(gradients).float()
        self.scratch = self.gradients.square()

    def squares(self) -> tuple[Tensor, Tensor]:
        return self.scratch.sum(-1), self.scratch.sum(-2)

    def scaled_squares(self, column: Tensor) -> Tensor:
        return self.scratch.matmul(column.square().unsqueeze(-1)).squeeze(-1)

    def move(self, row: Tensor, column: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        scale = torch.mul(row.unsqueeze(-1), column.unsqueeze(-2), out=self.scratch).unbind()
        # moment - update, and so the moment's own step, and the deviation: u - m' = beta (u - m)
        behind = torch._foreach_addcmul(self.moments, self.gradients.unbind(), scale, value=-1)
        torch._foreach_add_(self.moments, behind, alpha=beta - 1)
        squares = torch.square(_stacked(behind), out=self.scratch).mul_(beta**2)
        return squares.sum(-1), squares.sum(-2)

    def update(self, row: Tensor, column: Tensor, decay: float) -> None:
        scale = torch.mul(row.unsqueeze(-1), column.unsqueeze(-2), out=self.scratch).unbind()
        if decay != 0:
            torch._foreach_add_(self.weights, self.weights, alpha=-decay)
        torch._foreach_addcmul_(self.weights, self.moments, scale, value=-1)


class _Vectors:
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], state: State) -> None:
        self.weights, self.state = weights, state
        self.gradients = _stacked(gradients).float()

    def squares(self, beta: float, eps: float) -> Tensor:
        averages = smoothed(self.state["exp_avg_sq"], self.gradients.square().add_(eps), beta)
        self.updates = averages.rsqrt_().mul_(self.gradients)
        return self.updates.square().sum(1)

    def update(self, clip: Tensor, beta: float, lr: float, decay: float) -> None:
        moments = self.state["exp_avg"]
        updates = self.updates.div_(clip.unsqueeze(1)).unbind()
        torch._foreach_lerp_(moments, updates, 1 - beta)
        if decay != 0:
            torch._foreach_add_(self.weights, self.weights, alpha=-decay)
        torch._foreach_add_(self.weights, moments, alpha=-lr)


def came_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    state: State,
    *,
    lr: float,
    betas: Sequence[float],
    eps: Sequence[float],
    clip_threshold: float,
    weight_decay: float,
    shape: torch.Size | None = None,
    reduce: Reduce | None = None,
) -> None:
    settings = Settings(lr, betas, eps, clip_threshold, weight_decay, shape, reduce)
    together = TOGETHER.get(weights[0].device.type, TOGETHER["cuda"])
    # by whole weights: all shards must reduce the same ones together
    whole = weights[0].shape if shape is None else shape
    count = max(1, together // max(1, whole.numel()))
    for start in range(0, len(weights), count):
        part = slice(start, start + count)
        averages = {name: tensors[part] for name, tensors in state.items()}
        step((_Matrices, _Vectors), weights[part], gradients[part], averages, settings)
