"""Which samples share a batch, which process takes it, and where a resumed run goes on."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart.data.batches import BatchStream

# of each sample, its bucket: few and many, of one sample and of several batches
BUCKETS = (
    st.lists(st.integers(1, 20), min_size=1, max_size=6)
    .map(lambda sizes: [bucket for bucket, size in enumerate(sizes) for _ in range(size)])
    .flatmap(st.permutations)
)


def take(count: int, buckets: list, batch_size: int, **where: int) -> list[list[int]]:
    where = {"seed": 3, "rank": 0, "world_size": 1, "start": 0, **where}
    return list(itertools.islice(BatchStream(buckets, batch_size, **where), count))


def batches_per_epoch(buckets: list, batch_size: int) -> int:
    return sum(-(-size // batch_size) for size in Counter(buckets).values())


@given(BUCKETS, st.integers(1, 9), st.integers(1, 8))
def test_every_process_has_one_bucket_at_each_step_and_an_epoch_each_sample_once(
    buckets: list[int], batch_size: int, world_size: int
) -> None:
    per_epoch = batches_per_epoch(buckets, batch_size)
    steps = -(-3 * per_epoch // world_size)
    ranks = [
        take(steps, buckets, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {steps}
    stream = [batch for step in zip(*ranks, strict=True) for batch in step]
    for batch in stream:
        assert 1 <= len(batch) <= batch_size
        assert len({buckets[i] for i in batch}) == 1
    for epoch in range(3):
        shown = itertools.chain(*stream[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(shown) == list(range(len(buckets)))
    # the batches of a bucket are as even as they go
    sizes: dict[int, set[int]] = {}
    for batch in stream[:per_epoch]:
        sizes.setdefault(buckets[batch[0]], set()).add(len(batch))
    assert all(max(found) - min(found) <= 1 for found in sizes.values())


@given(BUCKETS, st.integers(1, 9), st.integers(1, 8), st.integers(0, 100))
def test_a_resumed_stream_goes_on_where_it_was_on_any_number_of_processes(
    buckets: list[int], batch_size: int, world_size: int, start: int
) -> None:
    whole = take(start + 3 * world_size, buckets, batch_size)
    ranks = [
        take(3, buckets, batch_size, rank=rank, world_size=world_size, start=start)
        for rank in range(world_size)
    ]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == whole[start:]


@pytest.mark.parametrize("buckets", [["a"] * 30, ["a", "b", "b"] * 10], ids=["one", "two"])
def test_epochs_and_seeds_differ(buckets: list[str]) -> None:
    per_epoch = batches_per_epoch(buckets, 4)
    epochs = take(2 * per_epoch, buckets, 4)
    assert epochs[:per_epoch] != epochs[per_epoch:]
    assert take(per_epoch, buckets, 4, seed=4) != epochs[:per_epoch]
    # a bucket is no run of batches
    order = [buckets[batch[0]] for batch in take(100, buckets, 4)]
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches > 30 or set(buckets) == {"a"}


def test_resuming_late_is_as_quick_as_beginning() -> None:
    (batch,) = take(1, [0, 1, 1], 2, start=10**15)
    assert batch


def test_fewer_samples_than_a_batch_are_one() -> None:
    assert [sorted(batch) for batch in take(3, [0, 0, 0], 8)] == [[0, 1, 2]] * 3
