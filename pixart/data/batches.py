"""Which samples go into which batch: a pure function of the seed and the position."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class BatchStream(Sampler[list[int]]):
    """Endless batches of indices, the same however often a run was stopped and resumed.

    In each epoch every bucket is shuffled and cut into as few batches as hold it, of sizes as even
    as they go; the batches of all buckets are then shuffled. Epochs follow each other without a
    gap, and the processes take the batches in turn: each has one at every step, of one bucket,
    and within an epoch each sample is in exactly one batch. The stream depends neither on the
    number of processes nor on what was consumed before, so resuming needs no replay, also on
    another number of processes.

    Args:
        buckets: of each sample, at least one; samples of a batch are of one bucket.
        batch_size: most samples in a batch; a bucket's batches may have fewer.
        seed: of the shuffling.
        rank, world_size: this process, and how many there are.
        start: batches that all processes together have consumed.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        batch_size: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        start: int,
    ) -> None:
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start
        numbers: dict[Hashable, int] = {}
        self._bucket = np.array([numbers.setdefault(x, len(numbers)) for x in buckets])
        # samples sorted by bucket: where each batch begins, and where the last one ends
        bounds, first = [], 0
        for size in np.bincount(self._bucket).tolist():
            count = -(-size // batch_size)
            bounds += [first + k * size // count for k in range(count)]
            first += size
        self._bounds = np.array([*bounds, first])

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = len(self._bounds) - 1
        epoch = -1
        for number in itertools.count(self.start + self.rank, self.world_size):
            if number // per_epoch != epoch:
                epoch = number // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                samples = torch.randperm(len(self._bucket), generator=generator).numpy()
                samples = samples[np.argsort(self._bucket[samples], kind="stable")]
                batches = torch.randperm(per_epoch, generator=generator).numpy()
            batch = batches[number % per_epoch]
            yield samples[self._bounds[batch] : self._bounds[batch + 1]].tolist()
