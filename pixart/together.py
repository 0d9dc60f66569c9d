"""Processes that share one long job, and wait for each other for as long as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")

# a process that is lost ends the waiting at once, by its closed connections
_PATIENCE = timedelta(days=365)


class Together:
    """This process among those of `group`; alone where there is none.

    All of them must call each method, in the same order; RuntimeError is raised in those that are
    left when one has ended.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        values: list[T | None] = [None] * self.count
        if self._group is None:
            return [value]
        with _explaining():
            dist.all_gather_object(values, value, group=self._group)
        return cast(list[T], values)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process; the others wait for it."""
        value = [work() if self.rank == 0 else None]
        if self._group is not None:
            with _explaining():
                dist.broadcast_object_list(value, src=0, group=self._group)
        return cast(T, value[0])


def all_processes() -> Together:
    """Those of the default group. All of them must call it."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return Together(_waiting(dist.group.WORLD) if several else None)


@cache
def _waiting(world: dist.ProcessGroup) -> dist.ProcessGroup:
    # gloo: whoever waits leaves the GPU alone
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "another process has ended, and this one cannot go on without it. Its own message says "
            "why; what was complete is kept: mend that, then run the same command again"
        ) from error
