"""Which samples go into which batch: a pure function of the seed and the position."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class BatchStream(Sampler[list[int]]):
    """Endless batches of indices, the same however often a run was stopped and resumed.

    Epochs are permutations of the data set laid end to end; batch ``k`` of all processes
    together is the k-th slice of that stream, so within an epoch nothing is lost or seen twice,
    a data set smaller than a batch works, and resuming needs no replay.

    Args:
        length: samples in the data set, at least 1.
        batch_size: samples per process and batch.
        seed: of the permutations.
        rank, world_size: this process, and how many there are.
        start: batches (of all processes together) already consumed.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, rank: int, world_size: int, start: int
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        position = (self.start * self.world_size + self.rank) * self.batch_size
        while True:
            batch = []
            for k in range(position, position + self.batch_size):
                if k // self.length != epoch:
                    epoch = k // self.length
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.length, generator=generator)
                batch.append(int(order[k % self.length]))
            yield batch
            position += self.batch_size * self.world_size
