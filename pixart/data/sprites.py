"""A small captioned data set from the CC0 sprites that the ``arcade`` package ships.

The quickstart has to train something recognisable in minutes, on a CPU and without internet, so
it needs pictures that are already on the disk. ``arcade`` carries a few hundred public-domain
sprites, most of them drawn by Kenney; `SPRITES` names the ones that stay distinct at 32x32 pixels
and says in words what each of them shows.

Only files of that package are read. It is never imported, so it may be installed without its
dependencies (``pip install --no-deps arcade``) and no window system is needed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

__all__ = ["BACKGROUND", "SPRITES", "build_sprites", "find_arcade_images"]

METADATA_NAME = "metadata.jsonl"
"""Name of the caption file that `build_sprites` writes, one JSON object a line."""

BACKGROUND = (236, 240, 245)
"""Colour behind every sprite. Not quite white, so that white parts (an alien's helmet, a bee's
wings, a playing card) keep their outline."""

SPRITES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("space_shooter/playerShip1_blue.png",), "a blue spaceship"),
    (("space_shooter/playerShip1_green.png",), "a green spaceship"),
    (("space_shooter/playerShip3_orange.png",), "a red spaceship"),
    (("space_shooter/meteorGrey_big1.png",), "a grey meteor"),
    (("alien/alienBlue_front.png",), "a pale blue alien in a helmet"),
    (("items/coinGold.png",), "a gold coin"),
    (("items/coinSilver.png",), "a silver coin"),
    (("items/coinBronze.png",), "a bronze coin"),
    (("items/flagGreen1.png",), "a green flag"),
    (("items/flagRed1.png",), "a red flag"),
    (("items/flagYellow1.png",), "a yellow flag"),
    (("items/gemBlue.png",), "a blue gem"),
    (("items/gemGreen.png",), "a green gem"),
    (("items/gemRed.png",), "a red gem"),
    (("items/gemYellow.png",), "a yellow gem"),
    (("items/keyBlue.png",), "a blue key"),
    (("items/keyGreen.png",), "a green key"),
    (("items/keyRed.png",), "a red key"),
    (("items/keyYellow.png",), "a yellow key"),
    (("items/ladderMid.png",), "a wooden ladder"),
    (("items/star.png",), "a yellow star"),
    (("enemies/bee.png",), "a bee"),
    (("enemies/fishGreen.png",), "a green fish"),
    (("enemies/fishPink.png",), "a pink fish"),
    (("enemies/fly.png",), "a black fly"),
    (("enemies/frog.png",), "a frog sitting"),
    (("enemies/frog_move.png",), "a frog jumping"),
    (("enemies/ladybug.png",), "a ladybug"),
    (("enemies/mouse.png",), "a grey mouse"),
    (("enemies/slimeBlock.png",), "a square green monster"),
    (("enemies/slimeBlue.png",), "a blue slime"),
    (("enemies/slimePurple.png",), "a purple slime"),
    (("enemies/wormPink.png",), "a pink worm"),
    (("animated_characters/robot/robot_walk0.png",), "a robot walking"),
    (("animated_characters/zombie/zombie_idle.png",), "a green zombie"),
    (
        ("animated_characters/female_adventurer/femaleAdventurer_idle.png",),
        "a woman with red hair in a blue shirt",
    ),
    (
        ("animated_characters/female_person/femalePerson_idle.png",),
        "a woman with black hair in a green shirt",
    ),
    (("animated_characters/male_person/malePerson_idle.png",), "a man with a moustache"),
    (("cards/cardSpadesA.png",), "the ace of spades"),
    (("cards/cardBack_red2.png",), "a playing card with a red back"),
    (("topdown_tanks/tank_blue.png",), "a blue tank seen from above"),
    (("topdown_tanks/tank_green.png",), "a green tank seen from above"),
    (("topdown_tanks/tank_red.png",), "a red tank seen from above"),
    (("topdown_tanks/treeGreen_large.png",), "a green tree seen from above"),
    (("topdown_tanks/treeBrown_large.png",), "a brown tree seen from above"),
    (("topdown_tanks/tileGrass_roadCrossing.png",), "a crossroads in the grass"),
    (("tiles/bomb.png",), "a grey bomb"),
    (("tiles/boxCrate_double.png",), "a wooden crate"),
    (("tiles/brickTextureWhite.png",), "a white brick wall"),
    (("tiles/bush.png",), "a green bush"),
    (("tiles/cactus.png",), "a cactus"),
    (("tiles/doorClosed_mid.png",), "a wooden door"),
    (("tiles/grass.png",), "earth covered with grass"),
    (("tiles/lava.png",), "red hot lava"),
    (("tiles/leverLeft.png",), "a lever pulled to the left"),
    (("tiles/lockYellow.png",), "a yellow lock"),
    (("tiles/mushroomRed.png",), "a red mushroom"),
    (("tiles/signExit.png",), "an exit sign"),
    (("tiles/signRight.png",), "an arrow sign pointing right"),
    (("tiles/spikes.png",), "sharp metal spikes"),
    (("tiles/switchGreen.png",), "a green button"),
    (("tiles/switchRed.png",), "a red button"),
    (("tiles/torch1.png",), "a burning torch"),
    (("tiles/water.png",), "blue water"),
)
"""Pairs of (files below ``arcade/resources/assets/images``, caption). Objects that look alike at
32x32 pixels are left out rather than told apart by longer captions."""


def find_arcade_images() -> Path:
    """Returns the folder with the images of the installed ``arcade`` package.

    Raises:
        FileNotFoundError: when the package, or that folder in it, is not there.
    """
    # find_spec only looks at paths; `import arcade` would want pyglet and a display.
    spec = importlib.util.find_spec("arcade")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the sprites come with the 'arcade' package, which is not installed;"
            " run: pip install --no-deps arcade"
        )
    for location in spec.submodule_search_locations:
        images = Path(location) / "resources" / "assets" / "images"
        if images.is_dir():
            return images
    raise FileNotFoundError(
        f"the 'arcade' package at {', '.join(spec.submodule_search_locations)} has no folder"
        " resources/assets/images; run: pip install --no-deps --force-reinstall arcade"
    )


def frame_sprite(
    sprite: Image.Image, size: int, background: Sequence[int] = BACKGROUND
) -> Image.Image:
    """Crops a sprite to what is visible, scales it to fill a square and puts it on a background.

    Args:
        sprite: picture with or without transparency.
        size: side of the square in pixels. One thirty-second of it stays free on every side.
        background: red, green and blue of the colour behind the sprite.

    Returns:
        An RGB picture of ``size`` by ``size`` pixels.
    """
    sprite = sprite.convert("RGBA")
    box = sprite.getchannel("A").getbbox()
    if box is None:
        raise ValueError("the sprite is fully transparent")
    sprite = sprite.crop(box)
    room = size - 2 * max(1, size // 32)
    scale = room / max(sprite.size)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    # Pillow weights colours by alpha when it resizes RGBA, so invisible pixels leave no fringe.
    sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (size, size), (*background, 255))
    frame.alpha_composite(sprite, ((size - width) // 2, (size - height) // 2))
    return frame.convert("RGB")


def build_sprites(folder: str | Path, size: int = 32) -> int:
    """Writes the sprite data set: PNG files and a ``metadata.jsonl`` with their captions.

    Every line of ``metadata.jsonl`` is an object with the keys ``file_name`` and ``text``. The
    pictures depend on the installed ``arcade`` package and ``size`` alone, so building twice
    gives the same files.

    Args:
        folder: where to write; made when missing.
        size: side of the square pictures in pixels.

    Returns:
        The number of pictures written.

    Raises:
        FileNotFoundError: when ``arcade`` or one of its sprites is missing.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    images = find_arcade_images()
    sources = [(images / name, caption) for names, caption in SPRITES for name in names]
    missing = [str(source.relative_to(images)) for source, _ in sources if not source.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{images} lacks {len(missing)} of the sprites, {missing[0]} among them;"
            " the list was made for arcade 3.3: pip install --no-deps 'arcade>=3.3,<4'"
        )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (source, caption) in enumerate(sources):
        # The number keeps names unique when two source folders use the same file name.
        file_name = f"{number:03d}_{source.stem}.png"
        with Image.open(source) as sprite:
            frame_sprite(sprite, size).save(folder / file_name)
        rows.append(json.dumps({"file_name": file_name, "text": caption}))
    # Last, so that a folder with captions is a complete one.
    (folder / METADATA_NAME).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)
