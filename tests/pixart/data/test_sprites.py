"""The sprite data set: what is written, and what is said when the sprites are not there."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pixart.data import sprites

needs_arcade = pytest.mark.skipif(
    importlib.util.find_spec("arcade") is None, reason="the arcade package is not installed"
)


def read_rows(folder):
    lines = (folder / sprites.METADATA_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_captions_are_distinct_and_short():
    captions = [caption for _, caption in sprites.SPRITES]
    assert 48 <= len(captions) <= 64
    assert len(set(captions)) == len(captions)
    # The caption encoder keeps 20 tokens, two of which mark the ends.
    assert max(len(caption.split()) for caption in captions) <= 10
    files = [name for names, _ in sprites.SPRITES for name in names]
    assert len(set(files)) == len(files)


@needs_arcade
@pytest.mark.parametrize("size", [32, 48])
def test_build_writes_pictures_and_captions(tmp_path, size):
    count = sprites.build_sprites(tmp_path / "new" / "set", size=size)
    rows = read_rows(tmp_path / "new" / "set")
    assert count == len(rows) == sum(len(names) for names, _ in sprites.SPRITES)
    assert {row["text"] for row in rows} == {caption for _, caption in sprites.SPRITES}
    assert {path.name for path in (tmp_path / "new" / "set").glob("*.png")} == {
        row["file_name"] for row in rows
    }
    for row in rows:
        with Image.open(tmp_path / "new" / "set" / row["file_name"]) as image:
            assert image.mode == "RGB"
            assert image.size == (size, size)


@needs_arcade
def test_build_twice_gives_the_same_files(tmp_path):
    for name in ("first", "second"):
        sprites.build_sprites(tmp_path / name)
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


@needs_arcade
def test_no_two_captions_share_a_look(tmp_path):
    sprites.build_sprites(tmp_path)
    rows = read_rows(tmp_path)
    pixels = np.stack(
        [np.asarray(Image.open(tmp_path / row["file_name"]), np.float32) / 255 for row in rows]
    ).reshape(len(rows), -1)
    distance = ((pixels[:, None] - pixels[None]) ** 2).mean(-1) ** 0.5
    other = np.array([[a["text"] != b["text"] for b in rows] for a in rows])
    # A retrieval score over lookalikes would measure luck; 0.05 is 13 grey levels of 255.
    assert distance[other].min() > 0.05


@needs_arcade
def test_arcade_is_not_imported(tmp_path):
    code = (
        "import sys; from pixart.data.sprites import build_sprites;"
        f"build_sprites({str(tmp_path)!r}); sys.exit('arcade' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_frame_crops_and_fills():
    sprite = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    sprite.paste((255, 0, 0, 255), (10, 20, 50, 40))
    framed = np.asarray(sprites.frame_sprite(sprite, 32, background=(0, 0, 255)))
    red = (framed == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    # 40x20 visible pixels become 30x15, in the middle, with one free pixel left and right.
    assert (columns.min(), columns.max()) == (1, 30)
    assert (rows.min(), rows.max()) == (8, 22)
    assert red.sum() == 30 * 15
    assert ((framed == (0, 0, 255)).all(-1) | red).all()


def test_frame_refuses_an_invisible_sprite():
    with pytest.raises(ValueError, match="fully transparent"):
        sprites.frame_sprite(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 32)


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps arcade"):
        sprites.build_sprites(tmp_path)


def test_missing_sprite_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "find_arcade_images", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="playerShip1_blue.png"):
        sprites.build_sprites(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tiny_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        sprites.build_sprites(tmp_path, size=4)
