"""ImageFolder: both layouts, preparation of pixels, and every kind of bad sample."""

import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pixart.data import BadSample, ImageFolder


def save_image(path, size=(16, 16), color=(255, 0, 0), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def one_image(tmp_path, image, name="x.png", size=None):
    image.save(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("a caption")
    return ImageFolder(tmp_path, size)[0]


def assert_bad(folder, pattern, key):
    with pytest.raises(BadSample, match=pattern) as caught:
        ImageFolder(folder)[0]
    assert caught.value.key == key
    assert re.search(pattern, caught.value.reason)


def test_sidecar_captions_in_sorted_order(tmp_path):
    save_image(tmp_path / "b.png")
    save_image(tmp_path / "a" / "z.JPG", size=(20, 10))
    (tmp_path / "b.txt").write_text(" a red square\n")
    (tmp_path / "a" / "z.txt").write_text("ein rotes Rechteck, größer", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    folder = ImageFolder(tmp_path)
    assert list(folder.keys) == ["a/z.JPG", "b.png"]
    assert len(folder) == 2
    key, image, caption, size = folder[0]
    assert (key, caption, size) == ("a/z.JPG", "ein rotes Rechteck, größer", (10, 20))
    assert image.shape == (3, 10, 20) and image.dtype == torch.float32
    assert folder[1].caption == "a red square"


def test_metadata_rows_are_the_samples(tmp_path):
    for name in ("a.png", "b.png", "unlisted.png"):
        save_image(tmp_path / name)
    rows = [{"file_name": "b.png", "text": "second"}, {"file_name": "a.png", "caption": "first"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    folder = ImageFolder(tmp_path)
    assert [(key, folder[i].caption) for i, key in enumerate(folder.keys)] == [
        ("b.png", "second"),
        ("a.png", "first"),
    ]


def test_a_stamp_changes_with_what_a_sample_is_made_of(tmp_path):
    save_image(tmp_path / "x.png")
    source = ImageFolder(tmp_path)
    stamps = [source.stamp(0), source.stamp(0)]
    (tmp_path / "x.txt").write_text("a caption")
    stamps.append(source.stamp(0))
    (tmp_path / "x.txt").write_text("a longer caption")
    stamps.append(source.stamp(0))
    save_image(tmp_path / "x.png", size=(20, 20))
    stamps.append(source.stamp(0))
    (tmp_path / "x.png").unlink()
    stamps.append(source.stamp(0))
    assert stamps[0] == stamps[1] and len(set(stamps)) == 5
    # in one file for all of them, a caption is changed alone
    rows = [{"file_name": "no\0name", "text": "x"}, {"file_name": "y.png"}]
    before = stamps_of(tmp_path, rows)
    rows[1]["text"] = "mended"
    after = stamps_of(tmp_path, rows)
    assert before[0] == after[0] and before[1] != after[1]


def stamps_of(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [ImageFolder(folder).stamp(i) for i in range(len(rows))]


def test_a_stamp_is_another_where_size_and_date_are_equal(tmp_path):
    """As in archives that give all files one date."""
    save_image(tmp_path / "x.bmp")
    date = (tmp_path / "x.bmp").stat()
    source = ImageFolder(tmp_path)
    before = source.stamp(0)
    save_image(tmp_path / "x.bmp", color=(0, 0, 9))
    os.utime(tmp_path / "x.bmp", ns=(date.st_atime_ns, date.st_mtime_ns))
    assert (tmp_path / "x.bmp").stat().st_size == date.st_size
    assert source.stamp(0) != before


def test_a_fingerprint_is_of_the_content_wherever_it_lies(tmp_path):
    def fingerprint(folder, color=(255, 0, 0), caption="a caption"):
        save_image(tmp_path / folder / "x.png", color=color)
        (tmp_path / folder / "x.txt").write_text(caption)
        return ImageFolder(tmp_path / folder).fingerprint(0)

    first = fingerprint("a")
    assert first == fingerprint("b") == fingerprint("c", caption=" a caption\n")
    assert len({first, fingerprint("a", (255, 0, 1)), fingerprint("b", caption="another")}) == 3
    row = {"file_name": "x.png", "text": "a caption"}
    (tmp_path / "c" / "metadata.jsonl").write_text(json.dumps(row))
    assert ImageFolder(tmp_path / "c").fingerprint(0) == first


@pytest.mark.parametrize("name", ["nothing.png", "no\0name", "/dev/zero", "sub"])
def test_what_cannot_be_read_has_no_fingerprint(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert ImageFolder(tmp_path).fingerprint(0) == ""


def test_a_csv_with_the_same_columns_is_read_as_well(tmp_path):
    save_image(tmp_path / "a.png")
    text = '\ufefffile_name,text\r\na.png,"first, and\r\nsecond line"\r\n,lost\r\nb.png\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    folder = ImageFolder(tmp_path)
    assert list(folder.keys) == ["a.png", "metadata.csv:4", "b.png"]
    assert folder[0].caption == "first, and\r\nsecond line"
    with pytest.raises(BadSample, match='no "file_name"'):
        folder[1]
    with pytest.raises(BadSample, match='no "text" or "caption" string in metadata.csv:5'):
        folder[2]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_list_that_is_not_utf8_is_named_with_its_line(tmp_path, name):
    (tmp_path / name).write_bytes("\nfile_name,text\nx.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}: line 3 is not UTF-8; save it as UTF-8"):
        ImageFolder(tmp_path)


def test_values_span_minus_one_to_one(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0] = (0, 128, 255)
    image = one_image(tmp_path, Image.fromarray(pixels)).image
    assert image[:, 0, 0].tolist() == pytest.approx([-1.0, 128 / 127.5 - 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("width, height", [(60, 20), (20, 60), (33, 20), (20, 20), (9, 8)])
def test_size_covers_and_crops_the_centre(tmp_path, width, height):
    size, short = 10, min(width, height)
    # one ramp across and one down, so that a crop off the centre shows
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    sample = one_image(tmp_path, Image.fromarray(ramp), size=size)
    assert sample.image.shape == (3, size, size)
    assert sample.size == (height, width)
    # the long way: cover at four times the size, where rounding is small, crop, average
    big = 4 * size
    covered = Image.fromarray(ramp).resize(
        (round(width * big / short), round(height * big / short)), Image.Resampling.BICUBIC
    )
    left, top = (covered.width - big) // 2, (covered.height - big) // 2
    crop = np.asarray(covered.crop((left, top, left + big, top + big)), np.float32)
    expected = crop.reshape(size, 4, size, 4, 3).mean((1, 3)).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(sample.image.numpy() - expected).max() < 0.04


BUCKETS = [(48, 96), (64, 64), (96, 48)]


@pytest.mark.parametrize(
    "width, height, bucket",
    [
        (200, 200, (64, 64)),
        (230, 200, (64, 64)),
        (400, 200, (48, 96)),
        (444, 100, (48, 96)),
        (90, 200, (96, 48)),
        (51, 49, (64, 64)),
        (40, 20, (48, 96)),
    ],
    ids=str,
)
def test_buckets_keep_circles_round_and_centred(tmp_path, width, height, bucket):
    scale = 8
    disc = Image.new("RGB", (scale * width, scale * height), "white")
    radius = 0.35 * scale * min(width, height)
    x, y = scale * width / 2, scale * height / 2
    ImageDraw.Draw(disc).ellipse((x - radius, y - radius, x + radius, y + radius), "black")
    sample = one_image(tmp_path, disc.resize((width, height), Image.Resampling.BOX), size=BUCKETS)
    assert tuple(sample.image.shape[1:]) == bucket
    assert sample.size == (height, width)
    # darkness as a mass: where its centre is, and how far it spreads each way
    dark = (1 - sample.image.mean(0)).numpy()
    spread = []
    for axis, side in enumerate(bucket):
        mass = dark.sum(1 - axis)
        place = np.arange(side) + 0.5
        centre = (place * mass).sum() / mass.sum()
        assert centre == pytest.approx(side / 2, abs=0.2)
        spread.append(np.sqrt(((place - centre) ** 2 * mass).sum() / mass.sum()))
    assert spread[0] == pytest.approx(spread[1], rel=0.02)
    # of a disc that is covered as the bucket is: half of its radius
    covered = max(bucket[0] / height, bucket[1] / width)
    assert spread[0] == pytest.approx(covered * radius / scale / 2, rel=0.02)


@pytest.mark.parametrize("width, height", [(460, 100), (100, 460)], ids=str)
def test_images_longer_than_buckets_take_are_bad(tmp_path, width, height):
    image = Image.new("RGB", (width, height))
    with pytest.raises(BadSample, match=f"{width}x{height} is longer than 4.5 to 1"):
        one_image(tmp_path, image, size=BUCKETS)
    # five to one is no longer than the longest
    size = one_image(tmp_path, image, size=[*BUCKETS, (32, 160), (160, 32)]).image.shape[1:]
    assert sorted(size) == [32, 160]


def test_downscaling_is_antialiased(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = one_image(tmp_path, Image.fromarray(checkers).convert("RGB"), size=8).image
    # nearest or bilinear without antialiasing would pick black or white squares
    assert image.abs().max() < 0.05


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = one_image(tmp_path, image).image
    assert pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert pixels[:, 5, 5].tolist() == [1.0, 1.0, 1.0]
    assert pixels[:, 0, 1].abs().max() < 0.01


def test_palette_transparency_becomes_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 1)
    image.info["transparency"] = 0
    pixels = one_image(tmp_path, image).image
    assert pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert pixels[:, 5, 5].tolist() == [1.0, 1.0, 1.0]


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    image = one_image(tmp_path, Image.fromarray(ramp)).image
    assert image[0].flatten().diff().min() > 0


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    (tmp_path / "x.txt").write_text("upright")
    sample = ImageFolder(tmp_path)[0]
    assert sample.size == (16, 8)
    assert sample.image.shape == (3, 16, 8)


def test_extreme_aspect_ratio_stays_small(tmp_path):
    # covering first would allocate 256 x 1 280 000 pixels
    sample = one_image(tmp_path, Image.new("RGB", (40000, 8), "green"), size=256)
    assert sample.image.shape == (3, 256, 256)


@pytest.mark.parametrize("keep", [0, 20, 300])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_bad(tmp_path, suffix, keep):
    path = tmp_path / f"x.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    path.with_suffix(".txt").write_text("cut short")
    assert_bad(tmp_path, "unreadable image", path.name)


def test_not_an_image_is_bad(tmp_path):
    (tmp_path / "x.png").write_text("<html>404</html>")
    (tmp_path / "x.txt").write_text("an error page")
    assert_bad(tmp_path, "unreadable image.*cannot identify", "x.png")


def test_no_caption_is_bad(tmp_path):
    save_image(tmp_path / "x.png")
    assert_bad(tmp_path, r"no caption: x\.txt does not exist", "x.png")


def test_blank_caption_is_bad(tmp_path):
    save_image(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text(" \n")
    assert_bad(tmp_path, "caption is empty", "x.png")


def test_caption_in_another_encoding_is_bad(tmp_path):
    save_image(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes("größer".encode("latin-1"))
    assert_bad(tmp_path, "not UTF-8", "x.png")


def test_tiny_side_is_bad(tmp_path):
    save_image(tmp_path / "x.png", size=(100, 7))
    (tmp_path / "x.txt").write_text("a line")
    assert_bad(tmp_path, "100x7 has a side under 8", "x.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 60_000])
def test_gigantic_image_is_bad_before_it_is_decoded(tmp_path, side):
    # a PNG that only claims its size: 10 001 is our own limit, 60 000 is Pillow's
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    (tmp_path / "x.txt").write_text("a bomb")
    assert_bad(tmp_path, "over 100 megapixels|absurdly large", "x.png")


def test_float_pixels_are_bad(tmp_path):
    Image.new("F", (16, 16), 0.5).save(tmp_path / "x.tiff")
    (tmp_path / "x.txt").write_text("no range")
    assert_bad(tmp_path, "pixel mode F", "x.tiff")


@pytest.mark.parametrize(
    "row, key, pattern",
    [
        ({"file_name": "../secret.png", "text": "t"}, "../secret.png", "leaves the folder"),
        ({"file_name": "link.png", "text": "t"}, "link.png", "leaves the folder"),
        ({"file_name": "gone.png", "text": "t"}, "gone.png", "does not exist"),
        ({"file_name": "x.png"}, "x.png", 'no "text" or "caption"'),
        ({"file_name": "x.png", "text": 7}, "x.png", 'no "text" or "caption"'),
        ({"file_name": "x.png", "text": "  "}, "x.png", "caption is empty"),
        ({"text": "t"}, "metadata.jsonl:1", 'no "file_name"'),
        (["x.png", "t"], "metadata.jsonl:1", 'no "file_name"'),
    ],
)
def test_bad_metadata_row(tmp_path, row, key, pattern):
    save_image(tmp_path / "secret.png")
    folder = tmp_path / "images"
    save_image(folder / "x.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert_bad(folder, pattern, key)


def test_absolute_path_is_bad(tmp_path):
    save_image(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    row = {"file_name": str(tmp_path / "secret.png"), "text": "t"}
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps(row))
    assert_bad(tmp_path / "images", "leaves the folder", row["file_name"])


def test_broken_row_spares_its_neighbours(tmp_path):
    save_image(tmp_path / "x.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": \n{"file_name": "x.png", "text": "t"}')
    assert_bad(tmp_path, "not JSON", "metadata.jsonl:1")
    assert ImageFolder(tmp_path)[1].caption == "t"


def test_caption_link_may_not_leave_the_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("password")
    save_image(tmp_path / "images" / "x.png")
    (tmp_path / "images" / "x.txt").symlink_to(tmp_path / "secret.txt")
    assert_bad(tmp_path / "images", "caption file leaves the folder", "x.png")


def test_folder_and_size_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    for size in (0, -8, 1.5, True, []):
        with pytest.raises(ValueError, match=re.escape(f"size={size}")):
            ImageFolder(tmp_path, size)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file_name": "a\0b.png", "text": "x"}, "file name cannot be used"),
        ({"file_name": "n" * 300 + ".png", "text": "x"}, "file name cannot be used"),
        ({"file_name": "ok.png", "text": "a \ud800 b"}, "no valid Unicode"),
    ],
)
def test_names_and_captions_that_no_system_takes(tmp_path, row, reason):
    Image.new("RGB", (16, 16)).save(tmp_path / "ok.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadSample, match=reason):
        ImageFolder(tmp_path)[0]
