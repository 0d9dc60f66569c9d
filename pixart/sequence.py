"""A picture's tokens shared by several processes, for pictures too large for one.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509, section 3): each process holds some rows of
tokens and computes all that looks at one token alone. For self-attention an all-to-all exchanges
them for all tokens of some heads, and another one back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Grid = tuple[int, int]


class SharedTokens:
    """One process's place among those that share each picture's tokens.

    Args:
        group: the processes.
        rows: rows are dealt out in multiples of this, such that KV compression needs no others'.
    """

    def __init__(self, group: dist.ProcessGroup, rows: int = 1) -> None:
        self.group, self.rows = group, rows
        self.rank, self.size = group.rank(), group.size()

    def grids(self, grid: Grid) -> list[Grid]:
        """Each process's rows and columns; raises ValueError where there are too few rows."""
        height, width = grid
        units = -(-height // self.rows)
        if units < self.size:
            raise ValueError(
                f"a picture of {height} rows of tokens cannot be shared by {self.size} processes "
                f"in multiples of {self.rows} rows: lower parallel.sequence"
            )
        bounds = [min(units * k // self.size * self.rows, height) for k in range(self.size + 1)]
        return [(end - start, width) for start, end in pairwise(bounds)]

    def split(self, x_BND: Tensor, grid: Grid) -> Tensor:
        """This process's tokens, (B, n, D)."""
        return x_BND.split(self._tokens(grid), dim=1)[self.rank]

    def gather(self, x_BnD: Tensor, grid: Grid) -> Tensor:
        """All tokens on every process, (B, N, D)."""
        counts, n = self._tokens(grid), x_BnD.shape[1]
        copies = x_BnD.transpose(0, 1).repeat(self.size, 1, 1)
        return _Exchange.apply(copies, [n] * self.size, counts, self.group).transpose(0, 1)

    def to_heads(self, x_BnCHK: Tensor, counts: Sequence[int]) -> Tensor:
        """All tokens for this process's heads, (B, N, C, H / size, K).

        Args:
            x_BnCHK: this process's tokens, for all heads.
            counts: how many tokens each process has.
        """
        of_ranks = x_BnCHK.unflatten(3, (self.size, -1)).permute(3, 1, 0, 2, 4, 5).flatten(0, 1)
        own = [x_BnCHK.shape[1]] * self.size
        return _Exchange.apply(of_ranks, own, list(counts), self.group).transpose(0, 1)

    def to_tokens(self, x_BNd: Tensor, counts: Sequence[int]) -> Tensor:
        """The reverse, of heads that lie side by side: (B, N, D / size) -> (B, n, D)."""
        n = counts[self.rank]
        own = [n] * self.size
        x = _Exchange.apply(x_BNd.transpose(0, 1), list(counts), own, self.group)
        return x.unflatten(0, (self.size, n)).permute(2, 1, 0, 3).flatten(2)

    def _tokens(self, grid: Grid) -> list[int]:
        return [height * width for height, width in self.grids(grid)]


class _Exchange(torch.autograd.Function):
    """All-to-all along the first dimension; its derivative is the one back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grads[0], *ctx.back), None, None, None
