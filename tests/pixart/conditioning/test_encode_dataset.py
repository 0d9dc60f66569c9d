"""encode_dataset with a real text encoder and a tiny VAE: contents, grouping, bad samples."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_vae import small_vae

from pixart.conditioning import (
    VAE,
    FeatureCache,
    TextEncoder,
    TooManyBadSamplesError,
    bucket_table,
    collate,
    encode,
    encode_dataset,
    encoded_rows,
)
from pixart.data import BadSample, ImageFolder, ImageSample


@pytest.fixture(scope="module")
def vae():
    return VAE(small_vae(8, 16, scaling_factor=0.4, shift_factor=0.1))


@pytest.fixture(scope="module")
def text_encoder():
    return TextEncoder.from_pretrained("minilm", max_tokens=12)


class RecordingVAE(VAE):
    """Remembers the shape of each batch."""

    def __init__(self, vae):
        super().__init__(vae.model)
        self.batches = []

    def moments(self, images):
        self.batches.append(tuple(images.shape))
        return super().moments(images)


class ListSource:
    """Samples, or the exceptions to raise in their place."""

    def __init__(self, items):
        self.items = items
        self.keys = [item.key for item in items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]

    def stamp(self, index):
        return str(isinstance(self.items[index], Exception))

    def fingerprint(self, index):
        return f"of {self.keys[index]}"


def good(number, height=8, width=8):
    generator = torch.Generator().manual_seed(number)
    image = torch.rand(3, height, width, generator=generator) * 2 - 1
    return ImageSample(f"{number:03d}", image, f"image number {number}", (height * 2, width * 2))


def bad(number):
    return BadSample(f"{number:03d}", "unreadable image (made up)")


def skipped_rows(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_cache_holds_what_the_encoders_say(tmp_path, vae, text_encoder, capsys):
    captions = ["a red gem", "a green tank seen from above", "a robot", "two birds", "x"]
    (tmp_path / "images").mkdir()
    for number, caption in enumerate(captions):
        noise = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(caption)
    source = ImageFolder(tmp_path / "images", size=16)
    report = encode_dataset(
        source, vae, text_encoder, tmp_path / "cache", batch_size=2, device="cpu"
    )
    assert (report.encoded, report.already_present, report.skipped) == (5, 0, 0)
    assert "encoding" in capsys.readouterr().out and skipped_rows(tmp_path / "cache") == []

    cache = FeatureCache(tmp_path / "cache")
    assert cache.keys() == list(source.keys)
    assert cache.metadata.text_encoder == text_encoder.identity
    assert cache.metadata.vae == vae.identity
    assert (cache.metadata.max_tokens, cache.metadata.caption_channels) == (12, 384)
    null, mask = text_encoder.encode_null()
    assert torch.equal(cache.null_caption, null.half())
    assert cache.null_length == int(mask.sum()) == 2
    for i, sample in enumerate(source):
        item = cache[i]
        mean, std = vae.moments(sample.image[None])
        features, _ = text_encoder.encode([sample.caption])
        assert item["text"] == captions[i]
        assert item["image_size"].tolist() == [20, 30]
        assert item["caption"].shape == features[0].shape
        torch.testing.assert_close(item["caption"].float(), features[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(item["latent_mean"].float(), mean[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(item["latent_std"].float(), std[0], rtol=2e-3, atol=2e-3)
    assert collate([cache[i] for i in range(5)])["latent_mean"].shape == (5, 4, 8, 8)


def test_second_run_encodes_nothing_and_new_samples_are_added(tmp_path, vae, text_encoder):
    recording = RecordingVAE(vae)
    arguments = (recording, text_encoder, tmp_path)
    encode_dataset(ListSource([good(n) for n in range(4)]), *arguments, progress=False)
    recording.batches.clear()
    report = encode_dataset(ListSource([good(n) for n in range(4)]), *arguments, progress=False)
    assert (report.encoded, report.already_present) == (0, 4)
    assert recording.batches == []
    report = encode_dataset(ListSource([good(n) for n in range(6)]), *arguments, progress=False)
    assert (report.encoded, report.already_present) == (2, 4)
    assert recording.batches == [(2, 3, 8, 8)]
    assert FeatureCache(tmp_path).keys() == [f"{n:03d}" for n in range(6)]


def test_images_of_one_size_share_batches(tmp_path, vae, text_encoder):
    recording = RecordingVAE(vae)
    items = [good(n, *((8, 8) if n % 2 else (4, 16))) for n in range(10)]
    encode_dataset(
        ListSource(items), recording, text_encoder, tmp_path, batch_size=4, progress=False
    )
    assert sorted(recording.batches) == sorted(
        [(4, 3, 8, 8), (4, 3, 4, 16), (1, 3, 8, 8), (1, 3, 4, 16)]
    )
    cache = FeatureCache(tmp_path)
    for i, shape in enumerate(cache.latent_shapes()):
        assert shape == ((4, 4, 4) if int(cache[i]["key"]) % 2 else (4, 2, 8))


def test_large_images_come_in_smaller_batches(tmp_path, vae, text_encoder, monkeypatch):
    monkeypatch.setattr(encode, "_MAX_BATCH_PIXELS", 4 * 8 * 8)
    recording = RecordingVAE(vae)
    items = [good(n, *((4, 8), (8, 16), (32, 32))[n % 3]) for n in range(18)]
    arguments = (recording, text_encoder, tmp_path)
    encode_dataset(ListSource(items), *arguments, batch_size=6, progress=False)
    counts = {size[2:]: [b[0] for b in recording.batches if b[2:] == size[2:]]
              for size in recording.batches}  # fmt: skip
    assert counts == {(4, 8): [6], (8, 16): [2, 2, 2], (32, 32): [1] * 6}


def test_buckets_are_counted(tmp_path, vae, text_encoder):
    sizes = [(4, 16)] * 3 + [(8, 8), (16, 4)]
    items = [good(n, *size) for n, size in enumerate(sizes)]
    # an original a little too low for its bucket
    items[2] = items[2]._replace(size=(3, 100))
    items += [bad(5)]
    encode_dataset(
        ListSource(items), vae, text_encoder, tmp_path, max_bad_fraction=0.5, progress=False
    )
    table = bucket_table(FeatureCache(tmp_path), range(5), vae.factor)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("16 x 4", "3", "60.0%", "1"),
        ("8 x 8", "1", "20.0%", "0"),
        ("4 x 16", "1", "20.0%", "0"),
    ]
    assert table.caption == "1 more were skipped: skipped.jsonl"


def test_images_of_many_sizes_do_not_pile_up(tmp_path, vae, text_encoder):
    recording = RecordingVAE(vae)
    held = []

    class Watched(ListSource):
        def __getitem__(self, index):
            held.append(index - sum(batch[0] for batch in recording.batches))
            return super().__getitem__(index)

    source = Watched([good(n, 4 + 2 * n, 4) for n in range(60)])
    report = encode_dataset(source, recording, text_encoder, tmp_path, batch_size=2, progress=False)
    assert report.encoded == 60
    # eight batches waiting for company, and two read ahead
    assert max(held) <= 8 * 2 + 2 * 2


def test_bad_samples_are_skipped_listed_and_tried_again(tmp_path, vae, text_encoder):
    items = [bad(n) if n in (3, 30) else good(n) for n in range(40)]
    arguments = (vae, text_encoder, tmp_path)
    report = encode_dataset(ListSource(items), *arguments, progress=False)
    assert (report.encoded, report.skipped) == (38, 2)
    assert skipped_rows(tmp_path) == [
        {"key": "003", "reason": "unreadable image (made up)", "stamp": "True"},
        {"key": "030", "reason": "unreadable image (made up)", "stamp": "True"},
    ]
    items[3] = good(3)
    report = encode_dataset(ListSource(items), *arguments, progress=False)
    assert (report.encoded, report.already_present, report.skipped) == (1, 38, 1)
    assert [row["key"] for row in skipped_rows(tmp_path)] == ["030"]


def test_bad_samples_are_left_alone_until_they_change(tmp_path, vae, text_encoder):
    items = [bad(n) if n in (3, 30) else good(n) for n in range(40)]
    assert encoded_rows(ListSource(items), tmp_path) is None
    encode_dataset(ListSource(items), vae, text_encoder, tmp_path, progress=False)
    assert encoded_rows(ListSource(items), tmp_path) == list(range(38))
    # fewer are accepted now, one was repaired, one is new, nobody knows of them any more
    assert encoded_rows(ListSource(items), tmp_path, max_bad_fraction=0.04) is None
    assert encoded_rows(ListSource([*items[:30], good(30), *items[31:]]), tmp_path) is None
    assert encoded_rows(ListSource([*items, good(40)]), tmp_path) is None
    # as a killed run leaves it, and as one that kept no stamps did
    rows = (tmp_path / "skipped.jsonl").read_text()
    (tmp_path / "skipped.jsonl").write_text(rows[:-9])
    assert encoded_rows(ListSource(items), tmp_path) is None
    (tmp_path / "skipped.jsonl").write_text(rows.replace("stamp", "other"))
    assert encoded_rows(ListSource(items), tmp_path) is None
    (tmp_path / "skipped.jsonl").unlink()
    assert encoded_rows(ListSource(items), tmp_path) is None


def pictures(folder, captions, color="red"):
    """0.bmp and so on: of one size, whatever is on them."""
    folder.mkdir(exist_ok=True)
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8), color).save(folder / f"{number}.bmp")
        (folder / f"{number}.txt").write_text(caption)
    return ImageFolder(folder)


def seen(source, folder):
    """Key, caption and mean of what a run on `source` is shown."""
    cache, rows = FeatureCache(folder), encoded_rows(source, folder)
    items = [cache[row] for row in rows]
    return [(item["key"], item["text"], item["latent_mean"].mean().item()) for item in items]


def test_a_changed_sample_is_encoded_once_more(tmp_path, vae, text_encoder):
    arguments = (vae, text_encoder, tmp_path / "cache")
    cats = pictures(tmp_path / "cats", ["a cat"] * 4)
    encode_dataset(cats, *arguments, progress=False)
    of_cats = seen(cats, tmp_path / "cache")
    assert [row[:2] for row in of_cats] == [(f"{i}.bmp", "a cat") for i in range(4)]

    # equal names and sizes, and a picture fewer
    dogs = pictures(tmp_path / "dogs", ["a dog"] * 3, "blue")
    assert encoded_rows(dogs, tmp_path / "cache") is None
    report = encode_dataset(dogs, *arguments, progress=False)
    assert (report.encoded, report.already_present) == (3, 0)
    of_dogs = seen(dogs, tmp_path / "cache")
    assert [row[:2] for row in of_dogs] == [(f"{i}.bmp", "a dog") for i in range(3)]
    assert of_dogs[0][2] != of_cats[0][2]
    assert seen(cats, tmp_path / "cache") == of_cats

    (tmp_path / "cats" / "1.txt").write_text("a fat cat")
    Image.new("RGB", (8, 8), "green").save(tmp_path / "cats" / "2.bmp")
    (tmp_path / "cats" / "3.bmp").unlink()
    cats = ImageFolder(tmp_path / "cats")
    report = encode_dataset(cats, *arguments, progress=False)
    assert (report.encoded, report.already_present) == (2, 1)
    (zero, one, two) = seen(cats, tmp_path / "cache")
    assert zero == of_cats[0] and one[1:] == ("a fat cat", of_cats[1][2])
    assert two[:2] == of_cats[2][:2] and two[2] != of_cats[2][2]


def test_a_copy_is_the_same_and_read_once(tmp_path, vae, text_encoder, monkeypatch):
    source = pictures(tmp_path / "a", ["one", "two", "three"])
    encode_dataset(source, vae, text_encoder, tmp_path / "cache", progress=False)
    read = []
    real = ImageFolder.fingerprint
    monkeypatch.setattr(ImageFolder, "fingerprint", lambda self, i: read.append(i) or real(self, i))
    assert encoded_rows(source, tmp_path / "cache") == [0, 1, 2] and read == []
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = ImageFolder(tmp_path / "b")
    for _ in range(2):
        assert encoded_rows(copy, tmp_path / "cache") == [0, 1, 2] and sorted(read) == [0, 1, 2]
    # what was remembered is only where to look: a change is seen, and damage does not matter
    (tmp_path / "b" / "1.txt").write_text("other")
    assert encoded_rows(copy, tmp_path / "cache") is None
    (tmp_path / "b" / "1.txt").write_text("two")
    (tmp_path / "cache" / "stamps.json").write_text("{")
    assert encoded_rows(copy, tmp_path / "cache") == [0, 1, 2]


def test_the_order_of_samples_is_that_of_their_keys(tmp_path, vae, text_encoder):
    """Which they have in no cache that was interrupted, repaired or added to."""
    items = [good(n, *((8, 8) if n % 3 else (4, 16))) for n in range(23)]
    source = ListSource(items[::-1])
    arguments = (vae, text_encoder, tmp_path)
    for part in (source, ListSource(items[5:9]), source):
        encode_dataset(part, *arguments, samples_per_shard=4, batch_size=4, progress=False)
        (tmp_path / "shard-000001.safetensors").unlink(missing_ok=True)
    encode_dataset(source, *arguments, samples_per_shard=3, batch_size=2, progress=False)
    keys = FeatureCache(tmp_path).keys()
    rows = encoded_rows(source, tmp_path)
    assert [keys[row] for row in rows] == [f"{n:03d}" for n in range(23)]
    assert rows != sorted(rows) and keys != source.keys


def test_a_cache_without_fingerprints_is_taken_by_its_names(tmp_path, vae, text_encoder):
    class Old(ListSource):
        def stamp(self, index):
            return None

        fingerprint = stamp

    encode_dataset(Old([good(n) for n in (2, 0)]), vae, text_encoder, tmp_path, progress=False)
    assert encoded_rows(ListSource([good(0), good(2)]), tmp_path) == [1, 0]


def test_all_bad_samples_of_a_small_folder_are_listed(tmp_path, vae, text_encoder):
    items = [bad(n) if n % 2 else good(n) for n in range(8)]
    with pytest.raises(TooManyBadSamplesError, match="4 of 8 samples failed"):
        encode_dataset(ListSource(items), vae, text_encoder, tmp_path, progress=False)
    assert [row["key"] for row in skipped_rows(tmp_path)] == ["001", "003", "005", "007"]
    assert len(FeatureCache(tmp_path)) == 4


def test_too_many_bad_samples_stop_the_run(tmp_path, vae, text_encoder, monkeypatch):
    monkeypatch.setattr(encode, "_LISTED", 3)
    # 2 of 40 are the tolerated 5 %, the third is not
    items = [bad(n) if n in (10, 20, 30) else good(n) for n in range(40)]
    arguments = {"batch_size": 2, "samples_per_shard": 4, "progress": False}
    with pytest.raises(TooManyBadSamplesError, match=r"3 of 40 samples.*0\.05.*030: unreadable"):
        encode_dataset(ListSource(items), vae, text_encoder, tmp_path, **arguments)
    assert len(skipped_rows(tmp_path)) == 3
    kept = FeatureCache(tmp_path).keys()
    assert len(kept) == 28 and set(kept) < {item.key for item in items[:30]}
    report = encode_dataset(
        ListSource(items), vae, text_encoder, tmp_path, max_bad_fraction=0.1, **arguments
    )
    assert (report.encoded, report.already_present, report.skipped) == (9, 28, 3)


def test_samples_that_do_not_fit_are_bad(tmp_path, vae, text_encoder):
    items = [good(0), good(1, 8, 9), good(0), good(2)]
    report = encode_dataset(
        ListSource(items), vae, text_encoder, tmp_path, max_bad_fraction=0.5, progress=False
    )
    assert (report.encoded, report.skipped) == (2, 2)
    assert [(row["key"], row["reason"]) for row in skipped_rows(tmp_path)] == [
        ("001", "9x8 is not divisible by the VAE's 2; set a size"),
        ("000", "the key appears twice in the source"),
    ]


def test_other_errors_of_a_source_are_not_swallowed(tmp_path, vae, text_encoder):
    class Broken(ListSource):
        def __getitem__(self, index):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        encode_dataset(Broken([good(0)]), vae, text_encoder, tmp_path, progress=False)


def test_another_encoder_is_refused(tmp_path, vae, text_encoder):
    encode_dataset(ListSource([good(0)]), vae, text_encoder, tmp_path, progress=False)
    shorter = TextEncoder(text_encoder.model, text_encoder.tokenizer, max_tokens=8)
    with pytest.raises(ValueError, match="max_tokens=12 there, 8 in this run"):
        encode_dataset(ListSource([good(0)]), vae, shorter, tmp_path, progress=False)
    with pytest.raises(ValueError, match="dtype='float16' there, 'bfloat16' in this run"):
        encode_dataset(
            ListSource([good(0)]),
            vae,
            text_encoder,
            tmp_path,
            dtype=torch.bfloat16,
            progress=False,
        )


@pytest.mark.parametrize(
    "items, arguments, pattern",
    [
        ([], {}, "source is empty"),
        ([good(0)], {"batch_size": 0}, "batch_size=0"),
        ([good(0)], {"max_bad_fraction": 5}, "max_bad_fraction=5"),
        ([good(0)], {"dtype": torch.float32}, "float16 or bfloat16"),
    ],
)
def test_wrong_encoding_arguments(tmp_path, vae, text_encoder, items, arguments, pattern):
    with pytest.raises(ValueError, match=pattern):
        encode_dataset(ListSource(items), vae, text_encoder, tmp_path, progress=False, **arguments)
