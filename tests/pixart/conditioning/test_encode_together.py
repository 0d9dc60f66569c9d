"""Many processes encode one data set: the cache of one process, whatever happens to them.

The encoders are the stand-ins of test_feature_cache.py, whose features depend on a sample alone.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
from accelerate import PartialState
from processes import Apart, run_apart
from test_feature_cache import Source, StandInText, StandInVAE

from pixart.conditioning import (
    FeatureCache,
    TooManyBadSamplesError,
    encode_dataset,
    encoded_rows,
)
from pixart.data import BadSample

# which neither the processes nor the shards of these tests divide
COUNT = 41
BAD = (1, 2, 20, 33)


class WithBad(Source):
    def __getitem__(self, index):
        if index in BAD:
            raise BadSample(self.keys[index], "made up")
        return super().__getitem__(index)


class Slow(StandInVAE):
    """Calls `before` for each batch; long enough a batch to be interrupted in."""

    def __init__(self, before=lambda: None):
        self.before = before

    def moments(self, images):
        time.sleep(0.02)
        self.before()
        return super().moments(images)


def encode(folder, source=None, vae=None, max_bad_fraction=0.1):
    if "RANK" in os.environ:
        PartialState(cpu=True)
    report = encode_dataset(
        source or WithBad(COUNT),
        vae or Slow(),
        StandInText(folder.with_suffix(".log")),
        folder,
        batch_size=2,
        samples_per_shard=3,
        progress=False,
        max_bad_fraction=max_bad_fraction,
    )
    print(f"report {report.encoded} {report.already_present} {report.skipped}", flush=True)


def content(folder):
    cache = FeatureCache(folder)
    items = [cache[i] for i in range(len(cache))]
    assert len({item["key"] for item in items}) == len(items), "a sample is there twice"
    tensors = ("caption", "latent_mean", "latent_std", "image_size")
    return {
        item["key"]: (item["text"], *(item[name].numpy().tobytes() for name in tensors))
        for item in items
    }


def shards(folder):
    """Their numbers."""
    return [int(path.stem[6:]) for path in folder.glob("shard-*.safetensors")]


def skipped(folder):
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    return sorted((row["key"], row["reason"]) for row in rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of one process."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    encode(folder)
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_write_what_one_does(tmp_path, whole, processes):
    folder = tmp_path / "cache"
    text = run_apart(encode, folder, output=tmp_path / "out", processes=processes)
    assert text.count(f"report {COUNT - len(BAD)} 0 {len(BAD)}\n") == processes
    assert content(folder) == content(whole)
    null = "null-caption.safetensors"
    assert (folder / null).read_bytes() == (whole / null).read_bytes()
    # each had its share, in shards of its own
    for rank in range(processes):
        share = len(set(range(rank, COUNT, processes)) - set(BAD))
        assert sum(number % processes == rank for number in shards(folder)) == -(-share // 3)
    # one list of what is bad, and nothing that only one of them had
    assert skipped(folder) == skipped(whole) == [(f"{i:02d}", "made up") for i in BAD]
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "index.json", null, "skipped.jsonl",
        *(f"shard-{number:06d}.safetensors" for number in shards(folder)),
    }  # fmt: skip
    cache = FeatureCache(folder)
    rows = encoded_rows(WithBad(COUNT), folder, max_bad_fraction=0.1)
    assert [cache.keys()[row] for row in rows] == sorted(cache.keys())


def freezes(folder):
    """Stands still once it has written a shard of its own."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def own():
        return sum(number % count == rank for number in shards(folder))

    begun = own()
    encode(folder, vae=Slow(lambda: time.sleep(600 * (own() > begun))))


@contextmanager
def frozen(folder, output, processes):
    """Processes that have written a shard each, and have samples in memory; killed at the end."""
    expected = len(shards(folder)) + processes
    apart = Apart(freezes, folder, output=output, processes=processes)
    try:
        while len(shards(folder)) < expected:
            assert all(process.exitcode is None for process in apart.processes), apart.text
            time.sleep(0.001)
        yield apart.processes
    finally:
        for process in apart.processes:
            process.kill()
            process.join()


def test_killed_again_and_again_other_numbers_of_processes_go_on(tmp_path, whole):
    folder, log = tmp_path / "cache", tmp_path / "cache.log"
    for processes in (3, 1, 2):
        with frozen(folder, tmp_path / "out", processes):
            pass
    named = json.loads((folder / "index.json").read_text())["shards"]
    assert len(named) < len(shards(folder)) == 6
    log.unlink()
    text = run_apart(encode, folder, output=tmp_path / "last", processes=2)
    assert text.count(f"report {37 - 18} 18 {len(BAD)}\n") == 2
    assert content(folder) == content(whole) and skipped(folder) == skipped(whole)
    # what was in a shard was not encoded again
    assert len(log.read_text().splitlines()) == 37 - 18


def loses_one(folder, how):
    rank = int(os.environ["RANK"])

    def before():
        if rank == 1 and len(shards(folder)) >= 4:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a bug")

    encode(folder, vae=Slow(before))


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_when_a_process_is_lost_the_others_end_and_nothing_else_is(tmp_path, whole, how):
    folder = tmp_path / "cache"
    apart = Apart(loses_one, folder, how, output=tmp_path / "out", processes=2)
    assert apart.wait() == [1, -signal.SIGKILL if how == "killed" else 1]
    assert "another process has ended" in apart.text and "run the same command" in apart.text
    assert ("a bug" in apart.text) == (how == "raises")
    encode(folder)
    assert content(folder) == content(whole)


def test_while_one_lives_no_other_begins(tmp_path, whole):
    """Both would encode what is missing."""
    folder = tmp_path / "cache"
    with frozen(folder, tmp_path / "out", 2) as (first, _):
        first.kill()
        first.join()
        with pytest.raises(RuntimeError, match="another writer has the cache"):
            encode(folder)
    encode(folder)
    assert content(folder) == content(whole)


def waits(folder):
    from torch.distributed import distributed_c10d

    # what waits otherwise would give up after this
    distributed_c10d._get_default_timeout = lambda _backend: timedelta(seconds=1)
    slowly = int(os.environ["RANK"]) == 1
    encode(folder, vae=Slow(partial(time.sleep, 0.4) if slowly else lambda: None))


def test_waiting_for_one_that_works_never_ends(tmp_path, whole):
    run_apart(waits, tmp_path / "cache", output=tmp_path / "out", processes=2)
    assert content(tmp_path / "cache") == content(whole)


def with_another_picture(folder):
    encode(folder, source=WithBad(COUNT + int(os.environ["RANK"])))


def test_processes_that_see_different_pictures_are_told(tmp_path):
    apart = Apart(with_another_picture, tmp_path / "cache", output=tmp_path / "out", processes=2)
    assert apart.wait() == [1, 1]
    assert apart.text.count("the processes do not see the same samples") == 2
    assert not (tmp_path / "cache").exists()


def test_bad_samples_of_all_processes_count(tmp_path, whole):
    folder = tmp_path / "cache"
    # two each, of the three that are accepted
    few = partial(encode, max_bad_fraction=3 / COUNT)
    apart = Apart(few, folder, output=tmp_path / "out", processes=2)
    assert apart.wait() == [1, 1]
    assert apart.text.count(f"TooManyBadSamplesError: 4 of {COUNT} samples failed") == 2
    assert skipped(folder) == skipped(whole)
    with pytest.raises(TooManyBadSamplesError, match="4 of 41"):
        few(folder)
    assert content(folder) == content(whole)
    assert encoded_rows(WithBad(COUNT), folder, max_bad_fraction=3 / COUNT) is None
