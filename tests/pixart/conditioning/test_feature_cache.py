"""The packed cache: exact round trip, real tokens only, SIGKILL at every step, damage, workers.

The encoders here are stand-ins that compute each sample from that sample alone, so that caches can
be compared byte by byte; test_encode_dataset.py runs the real ones.
"""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import pixart
from pixart.conditioning import (
    CacheMetadata,
    CacheWriter,
    CorruptCacheError,
    FeatureCache,
    collate,
    encode_dataset,
)
from pixart.conditioning.files import header_length, parse_header
from pixart.data import ImageSample

CHANNELS, LATENT_CHANNELS, MAX_TOKENS = 6, 4, 9
METADATA = CacheMetadata("text-a", "vae-a", "float16", MAX_TOKENS, CHANNELS, LATENT_CHANNELS)
NULL = torch.randn(MAX_TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))


def make_sample(number, latent=(LATENT_CHANNELS, 2, 3), tokens=None):
    generator = torch.Generator().manual_seed(100 + number)
    tokens = number % (MAX_TOKENS + 1) if tokens is None else tokens
    return {
        "key": f"images/{number}.png",
        "text": f"caption № {number}",
        "caption": torch.randn(tokens, CHANNELS, generator=generator),
        "latent_mean": torch.randn(latent, generator=generator),
        "latent_std": torch.rand(latent, generator=generator),
        "image_size": (100 + number, 200 + number),
    }


def write_samples(folder, samples, metadata=METADATA, samples_per_shard=4):
    with CacheWriter(folder, metadata, NULL, 2, samples_per_shard=samples_per_shard) as writer:
        for sample in samples:
            if sample["key"] not in writer.samples:
                writer.add(**sample)
    return FeatureCache(folder)


def contents(folder):
    files = (path for path in Path(folder).iterdir() if path.suffix in {".json", ".safetensors"})
    return {path.name: path.read_bytes() for path in files}


class StandInText:
    """Features that spell the caption; each encoded caption is appended to `log`."""

    identity, max_tokens, channels = "text-a", MAX_TOKENS, CHANNELS

    def __init__(self, log):
        self.log = log

    def encode(self, captions):
        with self.log.open("a") as log:
            log.writelines(f"{caption}\n" for caption in captions)
        features = torch.zeros(len(captions), MAX_TOKENS, CHANNELS)
        mask = torch.zeros(len(captions), MAX_TOKENS, dtype=torch.bool)
        for row, caption in enumerate(captions):
            letters = torch.tensor([ord(letter) for letter in caption[:MAX_TOKENS]])
            features[row, : len(letters)] = letters[:, None] / torch.arange(1, CHANNELS + 1)
            mask[row, : len(letters)] = True
        return features, mask

    def encode_null(self):
        return NULL, torch.arange(MAX_TOKENS) < 2


class StandInVAE:
    identity, factor, channels = "vae-a", 8, LATENT_CHANNELS

    def moments(self, images):
        mean = images[:, :1, ::8, ::8].repeat(1, LATENT_CHANNELS, 1, 1)
        return mean, mean.abs() / 10


class Source:
    def __init__(self, count):
        self.keys = [f"{number:02d}" for number in range(count)]

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        image = torch.full((3, 16, 24), index / 100)
        return ImageSample(self.keys[index], image, f"no {index}", (16, 24))

    def stamp(self, index):
        return "as ever"

    def fingerprint(self, index):
        return f"of {index}"


def encode_stand_ins(folder, log, count=7):
    return encode_dataset(
        Source(count),
        StandInVAE(),
        StandInText(log),
        folder,
        batch_size=2,
        samples_per_shard=3,
        progress=False,
    )


# --- round trip ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_is_bitwise_in_the_stored_dtype(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    samples = [make_sample(n) for n in range(10)]  # caption lengths 0 to 9
    cache = write_samples(tmp_path, samples, replace(METADATA, dtype=name))
    assert len(cache) == 10
    assert cache.metadata == replace(METADATA, dtype=name)
    assert cache.null_length == 2
    assert torch.equal(cache.null_caption, NULL.to(dtype))
    for i, sample in enumerate(samples):
        read = cache[i]
        assert (read["key"], read["text"]) == (sample["key"], sample["text"])
        assert read["image_size"].tolist() == list(sample["image_size"])
        assert read["caption"].dtype == dtype
        assert torch.equal(read["caption"], sample["caption"].to(dtype))
        assert torch.equal(read["latent_mean"], sample["latent_mean"].half())
        assert torch.equal(read["latent_std"], sample["latent_std"].half())
    assert cache[-1]["key"] == cache[9]["key"]
    for index in (10, -11):
        with pytest.raises(IndexError, match="out of range for 10 samples"):
            cache[index]


def test_latents_of_different_sizes_share_a_shard(tmp_path):
    shapes = [(LATENT_CHANNELS, 2, 3), (LATENT_CHANNELS, 5, 1), (LATENT_CHANNELS, 1, 1)]
    samples = [make_sample(n, shape) for n, shape in enumerate(shapes)]
    cache = write_samples(tmp_path, samples)
    assert cache.latent_shapes() == shapes
    assert cache.image_sizes() == [
        tuple(map(int, cache[i]["image_size"])) for i in range(len(cache))
    ]
    assert cache.keys() == [sample["key"] for sample in samples]
    for i, sample in enumerate(samples):
        assert torch.equal(cache[i]["latent_mean"], sample["latent_mean"].half())


def test_only_real_tokens_are_on_disk(tmp_path):
    samples = [make_sample(n) for n in range(8)]
    write_samples(tmp_path, samples, samples_per_shard=8)
    blob = (tmp_path / "shard-000000.safetensors").read_bytes()
    values = sum(
        sample["caption"].numel() + 2 * sample["latent_mean"].numel() for sample in samples
    )
    assert len(blob) == header_length(blob) + 2 * values


def test_an_item_owns_its_memory_alone(tmp_path):
    # a view of the memory map would make a worker send the whole shard for each sample
    item = write_samples(tmp_path, [make_sample(n) for n in range(4)])[3]
    for name in ("caption", "latent_mean", "latent_std"):
        assert item[name].untyped_storage().nbytes() == item[name].numel() * 2


def test_writer_copies_what_it_buffers(tmp_path):
    sample = make_sample(5)
    sample["caption"] = sample["caption"].half()
    expected = sample["caption"].clone()
    with CacheWriter(tmp_path, METADATA, NULL, 2) as writer:
        writer.add(**sample)
        sample["caption"].zero_()
    assert torch.equal(FeatureCache(tmp_path)[0]["caption"], expected)


# --- resuming ---


def test_reopening_knows_what_is_there(tmp_path):
    samples = [make_sample(n) for n in range(6)]
    write_samples(tmp_path, samples[:5], samples_per_shard=2)
    with CacheWriter(tmp_path, METADATA, NULL, 2) as writer:
        assert writer.samples == {sample["key"]: {None: None} for sample in samples[:5]}
        with pytest.raises(ValueError, match=r"key='images/0.png' is already in"):
            writer.add(**samples[0])
        writer.add(**samples[5])
        with pytest.raises(ValueError, match=r"key='images/5.png' is already in"):
            writer.add(**samples[5])
    cache = FeatureCache(tmp_path)
    assert sorted(cache.keys()) == [sample["key"] for sample in samples]
    assert torch.equal(cache[5]["latent_mean"], samples[5]["latent_mean"].half())


def test_an_exception_drops_the_buffer_only(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        CacheWriter(tmp_path, METADATA, NULL, 2, samples_per_shard=2) as writer,
    ):
        for number in range(3):
            writer.add(**make_sample(number))
        raise KeyboardInterrupt
    assert FeatureCache(tmp_path).keys() == ["images/0.png", "images/1.png"]


def kill_at_every_step(root):
    """Run in a process of its own: fork an encoding run for each call that changes the disk, and
    SIGKILL it just before that call. Ends with the first run that finishes."""
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for step in range(1000):
        child = os.fork()
        if child == 0:
            calls = 0

            def counted(name, last=step):
                def call(*args):
                    nonlocal calls
                    if calls == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    calls += 1
                    return real[name](*args)

                return call

            for name in real:
                setattr(os, name, counted(name))
            folder = root / f"killed-{step:03d}"
            encode_stand_ins(folder / "cache", folder / "log")
            os._exit(0)
        (root / f"killed-{step:03d}").mkdir(exist_ok=True)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def test_killed_at_any_step_resumes_to_the_same_cache(tmp_path):
    encode_stand_ins(tmp_path / "whole", tmp_path / "log")
    whole = contents(tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": str(Path(pixart.__file__).parents[1])}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment)
    *killed, finished = sorted(tmp_path.glob("killed-*"))
    assert contents(finished / "cache") == whole
    # three steps a file (sync, rename, sync): null caption, index, and both for three shards
    # with the index once more
    assert len(killed) == 3 * (2 + 2 * 3)

    seen_progress = set()
    for folder in killed:
        cache, log = folder / "cache", folder / "log"
        for path in cache.glob("shard-*.safetensors"):
            assert path.read_bytes() == whole[path.name], "half a shard under its final name"
        stored = {key for name in contents(cache) for key in stored_keys(cache / name)}
        seen_progress.add(len(stored))
        if (cache / "index.json").exists():  # what the index names can be read at any instant
            readable = FeatureCache(cache)
            assert {readable[i]["key"] for i in range(len(readable))} <= stored
        before = log.read_text().splitlines() if log.exists() else []
        report = encode_stand_ins(cache, log)
        assert contents(cache) == whole
        assert not list(cache.glob("*.partial"))
        after = log.read_text().splitlines()[len(before) :]
        missing = sorted(set(Source(7).keys) - stored)
        assert after == [f"no {int(key)}" for key in missing]
        assert (report.encoded, report.already_present) == (len(missing), len(stored))
    assert seen_progress == {0, 3, 6, 7}


def stored_keys(path):
    if not path.name.startswith("shard-"):
        return []
    blob = path.read_bytes()
    return [sample["key"] for sample in parse_header(blob[: header_length(blob)])["samples"]]


def test_leftover_of_a_half_written_shard_is_removed(tmp_path):
    cache = write_samples(tmp_path, [make_sample(0)])
    (tmp_path / "shard-000007.safetensors.partial").write_bytes(b"half")
    (tmp_path / "index.json.partial").write_bytes(b"{")
    assert write_samples(tmp_path, [make_sample(1)]).keys() == [*cache.keys(), "images/1.png"]
    assert not list(tmp_path.glob("*.partial"))


def test_full_disk_says_what_to_do_and_leaves_nothing_behind(tmp_path, monkeypatch):
    write_samples(tmp_path, [make_sample(0)])
    before = contents(tmp_path)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="free some space"):
            write_samples(tmp_path, [make_sample(1)])
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob("*.partial"))


def test_one_writer_at_a_time(tmp_path):
    with (
        CacheWriter(tmp_path, METADATA, NULL, 2),
        pytest.raises(RuntimeError, match="another writer has the cache"),
    ):
        CacheWriter(tmp_path, METADATA, NULL, 2)
    write_samples(tmp_path, [make_sample(0)])


# --- metadata ---


@pytest.mark.parametrize(
    "field, value",
    [
        ("text_encoder", "text-b"),
        ("vae", "vae-b"),
        ("dtype", "bfloat16"),
        ("max_tokens", 12),
        ("latent_channels", 16),
    ],
)
def test_other_metadata_is_refused_with_both_values(tmp_path, field, value):
    write_samples(tmp_path, [make_sample(0)])
    before = contents(tmp_path)
    other = replace(METADATA, **{field: value})
    null = torch.zeros(other.max_tokens, CHANNELS)
    pattern = f"{field}={getattr(METADATA, field)!r} there, {value!r} in this run"
    with pytest.raises(ValueError, match=pattern):
        CacheWriter(tmp_path, other, null, 2)
    # the shards know where they come from, even when the index is gone
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=pattern):
        CacheWriter(tmp_path, other, null, 2)
    write_samples(tmp_path, [])
    assert contents(tmp_path) == before


def test_folder_of_another_version_or_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no feature cache"):
        FeatureCache(tmp_path)
    write_samples(tmp_path, [make_sample(0)])
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 2}))
    with pytest.raises(ValueError, match="version=2"):
        FeatureCache(tmp_path)
    with pytest.raises(ValueError, match="version=2"):
        CacheWriter(tmp_path, METADATA, NULL, 2)


# --- damage ---


@pytest.fixture
def encoded(tmp_path):
    folder = tmp_path / "cache"
    encode_stand_ins(folder, tmp_path / "log")
    (tmp_path / "log").unlink()
    return folder


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped header length": lambda path: flip_byte(path, 6),
    "flipped header": lambda path: flip_byte(path, 60),
    "flipped data": lambda path: flip_byte(path, -100),
    "flipped last byte": lambda path: flip_byte(path, -1),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_shard_is_named_and_only_its_samples_return(encoded, damage):
    whole = contents(encoded)
    shard = encoded / "shard-000001.safetensors"
    damage(shard)
    cache = FeatureCache(encoded)
    assert cache[0]["key"] == "00" and cache[6]["key"] == "06"
    for _ in range(2):  # the second try must not find it half open
        with pytest.raises(CorruptCacheError, match=rf"{shard} is .*[Rr]erun the encoding"):
            cache[3]
    shard.unlink(missing_ok=True)
    log = encoded.parent / "log"
    report = encode_stand_ins(encoded, log)
    assert (report.encoded, report.already_present) == (3, 4)
    assert log.read_text().splitlines() == ["no 3", "no 4", "no 5"]
    assert contents(encoded) == whole


@pytest.mark.parametrize("damage", ["truncated", "flipped header"])
def test_writer_does_not_build_on_a_damaged_shard(encoded, damage):
    shard = encoded / "shard-000001.safetensors"
    DAMAGES[damage](shard)
    with pytest.raises(CorruptCacheError, match=f"{shard} is damaged"):
        encode_stand_ins(encoded, encoded.parent / "log")
    assert shard.exists()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_null_caption(encoded, damage):
    whole = contents(encoded)
    path = encoded / "null-caption.safetensors"
    damage(path)
    with pytest.raises(CorruptCacheError, match=f"{path} is"):
        FeatureCache(encoded)
    path.unlink(missing_ok=True)
    assert encode_stand_ins(encoded, encoded.parent / "log").encoded == 0
    assert contents(encoded) == whole


def test_damaged_index_is_rebuilt_from_the_shards(encoded):
    whole = contents(encoded)
    index = encoded / "index.json"
    index.write_bytes(index.read_bytes()[:-5])
    with pytest.raises(CorruptCacheError, match=r"index.json is damaged.*Delete it and rerun"):
        FeatureCache(encoded)
    with pytest.raises(CorruptCacheError, match="index.json is damaged"):
        encode_stand_ins(encoded, encoded.parent / "log")
    index.unlink()
    assert encode_stand_ins(encoded, encoded.parent / "log").encoded == 0
    assert contents(encoded) == whole


def test_unlisted_shards_are_taken_in_only_when_whole_and_new(encoded):
    stray = encoded / "shard-000009.safetensors"
    shutil.copy(encoded / "shard-000000.safetensors", stray)
    with pytest.raises(CorruptCacheError, match=f"{stray} is damaged: it repeats 3 samples"):
        encode_stand_ins(encoded, encoded.parent / "log")
    stray.write_bytes(stray.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=f"{stray} is damaged: it is not a readable shard"):
        encode_stand_ins(encoded, encoded.parent / "log")
    stray.unlink()
    assert encode_stand_ins(encoded, encoded.parent / "log").encoded == 0


def test_damage_is_looked_for_once_per_shard(encoded, monkeypatch):
    from pixart.conditioning import cache as module

    verified = []
    real = module.verify
    monkeypatch.setattr(
        module, "verify", lambda *args: verified.append(args[1]["file"]) or real(*args)
    )
    cache = FeatureCache(encoded)
    for _ in range(3):
        for i in range(len(cache)):
            cache[i]
    assert verified == ["null-caption.safetensors"] + [
        f"shard-00000{n}.safetensors" for n in range(3)
    ]


# --- wrong samples ---


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"caption": torch.zeros(MAX_TOKENS + 1, CHANNELS)}, r"shape \(10, 6\).*at most 9 tokens"),
        ({"caption": torch.zeros(3, 5)}, r"shape \(3, 5\).*6 channels"),
        ({"caption": torch.zeros(1, 3, CHANNELS)}, r"shape \(1, 3, 6\)"),
        ({"caption": torch.full((3, CHANNELS), 7e4)}, "not finite in float16.*bfloat16"),
        ({"latent_mean": torch.zeros(3, 2, 3)}, r"shapes \(3, 2, 3\) and \(4, 2, 3\)"),
        ({"latent_std": torch.zeros(4, 2, 2)}, r"shapes \(4, 2, 3\) and \(4, 2, 2\)"),
        ({"latent_mean": torch.full((4, 2, 3), torch.nan)}, "latent_mean of .* is not finite"),
        ({"latent_std": torch.full((4, 2, 3), torch.inf)}, "latent_std of .* is not finite"),
    ],
)
def test_wrong_sample_is_refused_whole(tmp_path, change, pattern):
    with CacheWriter(tmp_path, METADATA, NULL, 2) as writer:
        with pytest.raises(ValueError, match=pattern):
            writer.add(**(make_sample(0) | change))
        writer.add(**make_sample(0))
    assert FeatureCache(tmp_path).keys() == ["images/0.png"]


def test_bfloat16_holds_what_overflows_float16(tmp_path):
    sample = make_sample(0) | {"caption": torch.full((3, CHANNELS), 7e4)}
    cache = write_samples(tmp_path, [sample], replace(METADATA, dtype="bfloat16"))
    assert torch.equal(cache[0]["caption"], sample["caption"].bfloat16())


def test_wrong_writer_arguments(tmp_path):
    with pytest.raises(ValueError, match="dtype='float32'.*float16 or bfloat16"):
        CacheWriter(tmp_path, replace(METADATA, dtype="float32"), NULL, 2)
    with pytest.raises(ValueError, match="samples_per_shard=0"):
        CacheWriter(tmp_path, METADATA, NULL, 2, samples_per_shard=0)
    with pytest.raises(ValueError, match=r"null_caption has shape \(2, 6\)"):
        CacheWriter(tmp_path, METADATA, NULL[:2], 2)
    with pytest.raises(ValueError, match="null_length is 10"):
        CacheWriter(tmp_path, METADATA, NULL, 10)


# --- batches and workers ---


def test_collate_pads_captions_and_masks_the_padding(tmp_path):
    samples = [make_sample(n) for n in (3, 0, 7)]
    cache = write_samples(tmp_path, samples)
    batch = collate([cache[i] for i in range(3)])
    assert set(batch) == {
        "latent_mean",
        "latent_std",
        "caption",
        "caption_mask",
        "image_size",
        "keys",
    }
    assert batch["caption"].shape == (3, 7, CHANNELS) and batch["caption"].dtype == torch.float16
    assert batch["caption_mask"].dtype == torch.bool
    assert batch["caption_mask"].sum(1).tolist() == [3, 0, 7]
    assert batch["latent_mean"].dtype == batch["latent_std"].dtype == torch.float32
    for i, sample in enumerate(samples):
        length = sample["caption"].shape[0]
        assert torch.equal(batch["caption"][i, :length], sample["caption"].half())
        assert not batch["caption"][i, length:].any()
        assert batch["caption_mask"][i, :length].all()
        assert torch.equal(batch["latent_mean"][i], sample["latent_mean"].half().float())
        assert torch.equal(batch["latent_std"][i], sample["latent_std"].half().float())
        assert batch["image_size"][i].tolist() == list(sample["image_size"])
    assert batch["keys"] == [sample["key"] for sample in samples]


def test_collate_refuses_mixed_shapes(tmp_path):
    cache = write_samples(tmp_path, [make_sample(0), make_sample(1, (LATENT_CHANNELS, 4, 4))])
    with pytest.raises(ValueError, match=r"\(4, 2, 3\), \(4, 4, 4\).*use buckets"):
        collate([cache[0], cache[1]])
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_workers_read_what_the_main_process_reads(tmp_path):
    cache = write_samples(tmp_path, [make_sample(n) for n in range(11)], samples_per_shard=3)
    expected = [collate([cache[i] for i in range(a, min(a + 2, 11))]) for a in range(0, 11, 2)]
    # the shards are open here already, and must not trouble the workers
    loader = DataLoader(cache, batch_size=2, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert [batch["keys"] for batch in batches] == [batch["keys"] for batch in expected]
    for batch, wanted in zip(batches, expected, strict=True):
        for name in ("caption", "caption_mask", "latent_mean", "latent_std", "image_size"):
            assert torch.equal(batch[name], wanted[name])


def test_an_open_cache_can_be_pickled(tmp_path):
    cache = write_samples(tmp_path, [make_sample(n) for n in range(5)])
    first = cache[3]
    copy = pickle.loads(pickle.dumps(cache))
    assert len(copy) == 5 and copy.metadata == cache.metadata
    assert torch.equal(copy[3]["caption"], first["caption"])
    assert torch.equal(copy.null_caption, cache.null_caption)


if __name__ == "__main__":
    kill_at_every_step(Path(sys.argv[1]))
