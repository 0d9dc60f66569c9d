"""Many pictures: files of prompts, batches, recipes in PNGs, and going on after a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_pipeline import CONFIG, small_pipeline
from typer.testing import CliRunner

from pixart import PixArt
from pixart.cli import app
from pixart.generation import PixArtPipeline
from pixart.generation.pictures import (
    Picture,
    Request,
    Source,
    draw,
    read_requests,
    resolve,
    sheet_of,
)
from pixart.generation.pipeline import to_image, to_pixels


@pytest.fixture(scope="module")
def pipeline() -> PixArtPipeline:
    return small_pipeline()


@pytest.fixture
def photo() -> Image.Image:
    return to_image(torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(8)) * 2 - 1)


def some(pipeline: PixArtPipeline, **settings) -> list[Picture]:
    """Five pictures of two sizes and two negative prompts, their order mixed."""
    requests = [
        Request(prompt="a cat"),
        Request(prompt="one very long prompt", height=12),
        Request(prompt="dog", negative_prompt="a cat"),
        Request(prompt="a cat", seed=9),
        Request(prompt="a big dog", height=12, seed=2**40),
    ]
    return resolve(requests, pipeline, **{"steps": 2, "guidance_scale": 2.0, **settings})


def recipe_of(path: Path) -> dict:
    return json.loads(Image.open(path).text["pixart"])


def test_reads_prompts_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  {a} dog, 犬 \r\n", encoding="utf-8")
    assert read_requests(file) == [Request(prompt="a cat"), Request(prompt="{a} dog, 犬")]
    upper = file.rename(tmp_path / "prompts.JSONL")
    upper.write_text('{"prompt": "a cat"}')
    assert read_requests(upper) == [Request(prompt="a cat")]
    with pytest.raises(ValueError, match=r"p\.json: accepted: \.jsonl"):
        read_requests(tmp_path / "p.json")
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt"):
        read_requests(file)
    file.write_bytes("a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not text in UTF-8"):
        read_requests(file)


def test_reads_objects_and_names_every_mistake(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    every = {"prompt": "a\u2028b", "negative_prompt": "b", "seed": 0, "height": 8, "width": 12,
             "steps": 3, "guidance_scale": 1.0}  # fmt: skip
    file.write_text(
        f'{json.dumps(every, ensure_ascii=False)}\n\n{{"prompt": "c", "aspect_ratio": "2:1"}}'
    )
    assert read_requests(file) == [Request(**every), Request(prompt="c", aspect_ratio="2:1")]
    file.write_text(
        '{"prompt": "fine"}\n{"promt": "x", "colour": 1}\n\n["x"]\n{"prompt": \n'
        '{"prompt": "x", "seed": -1, "steps": 1.5, "guidance_scale": 0}'
    )
    with pytest.raises(ValueError) as error:
        read_requests(file)
    said = str(error.value).replace(f"{file}:", "")
    for words in (
        "2: prompt is required",
        "2: unknown key 'promt' (did you mean prompt?)",
        "2: unknown key 'colour' (prompt, negative_prompt, height,",
        "4: the line is ['x']",
        "5: not JSON",
        "6: seed is -1",
        "6: steps is 1.5",
        "6: guidance_scale is 0",
    ):
        assert words in said
    assert len(said.splitlines()) == 8


def test_a_request_goes_before_the_run(pipeline: PixArtPipeline) -> None:
    requests = [
        Request(prompt="a"),
        Request(prompt="b", aspect_ratio="16:9", seed=3, steps=5, negative_prompt=""),
        Request(prompt="c", height=8, guidance_scale=1),
    ]
    a, b, c = resolve(requests, pipeline, seed=10, width=20, steps=7, negative_prompt="bad")
    assert (a.height, a.width, a.seed, a.steps, a.negative_prompt) == (16, 20, 10, 7, "bad")
    assert (b.height, b.width, b.seed, b.steps, b.negative_prompt) == (12, 20, 3, 5, "")
    assert (c.height, c.width, c.seed, c.guidance_scale) == (8, 16, 12, 1)
    assert a.guidance_scale == pipeline.guidance_scale
    with pytest.raises(ValueError, match="'c': `height` is 9; accepted: a multiple of 4"):
        resolve([Request(prompt="c", height=9)], pipeline)


@pytest.mark.parametrize("sampler", ["dpm-solver++", "iddpm"])
def test_batches_leave_pictures_as_they_are(
    pipeline: PixArtPipeline, tmp_path: Path, sampler: str
) -> None:
    pictures = some(pipeline, sampler=sampler)
    drawn = [
        [Image.open(path) for path in draw(pipeline, order, tmp_path / name, batch_size=size)]
        for name, order, size in [
            ("alone", pictures, 1),
            ("together", pictures, 4),
            ("reversed", pictures[::-1], 4),
        ]
    ]
    drawn[2].reverse()
    for alone, *others in zip(*drawn, strict=True):
        for other in others:
            # rounding in differently shaped matrix products, at most one of 255 steps
            assert (to_pixels(alone) - to_pixels(other)).abs().max() < 1.5 / 127.5
    assert [image.size for image in drawn[0]] == [(16, 16), (16, 12), (16, 16), (16, 16), (16, 12)]
    # which says something only where pictures differ
    assert (to_pixels(drawn[0][0]) - to_pixels(drawn[0][3])).abs().max() > 0.1


def test_a_png_has_its_recipe(pipeline: PixArtPipeline, tmp_path: Path) -> None:
    pictures = some(pipeline)
    paths = draw(pipeline, pictures, tmp_path, note={"model": "here"})
    assert [path.name.rsplit("-", 1)[0] for path in paths] == [
        "a-cat-0", "one-very-long-prompt-1", "dog-2", "a-cat-9", "a-big-dog-1099511627776",
    ]  # fmt: skip
    recipe = recipe_of(paths[1])
    assert recipe.pop("weights") == pipeline.identity
    assert recipe.pop("model") == "here"
    assert Picture(**recipe) == pictures[1]


def test_goes_on_after_a_kill(
    pipeline: PixArtPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = some(pipeline)
    encoded: list[str] = []
    encode = pipeline.encode

    def dies_at_the_third_batch(prompts, negative_prompt):
        if len(encoded) >= 3:
            raise RuntimeError("killed")
        encoded.extend(prompts)
        return encode(prompts, negative_prompt)

    monkeypatch.setattr(pipeline, "encode", dies_at_the_third_batch)
    with pytest.raises(RuntimeError, match="killed"):
        draw(pipeline, pictures, tmp_path, batch_size=2)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(there) == len(encoded) == 4
    encoded.clear()
    done: list[tuple[float, int]] = []
    paths = draw(pipeline, pictures, tmp_path, callback=lambda *at: done.append(at))
    assert encoded == ["dog"]
    assert done == [(4, 5), (4.5, 5), (5, 5)]
    assert set(tmp_path.iterdir()) == set(paths)
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    # any other recipe is another picture
    encoded.clear()
    draw(pipeline, some(pipeline, steps=3)[:1], tmp_path)
    draw(pipeline, pictures[:1], tmp_path, note={"model": "a note decides nothing"})
    assert encoded == ["a cat"]


def test_other_weights_draw_again(tmp_path: Path) -> None:
    pipeline = small_pipeline()
    picture = some(pipeline)[:1]
    (before,) = draw(pipeline, picture, tmp_path)
    with torch.no_grad():
        pipeline.model.final_layer.linear.bias.add_(0.01)
    (after,) = draw(pipeline, picture, tmp_path)
    assert before != after and before.exists()


def test_equal_pictures_are_one(pipeline: PixArtPipeline, tmp_path: Path) -> None:
    done: list[tuple[float, int]] = []
    a, b = draw(pipeline, some(pipeline)[:1] * 2, tmp_path, callback=lambda *at: done.append(at))
    assert a == b
    assert done[-1] == (1, 1)
    assert draw(pipeline, [], tmp_path) == []


def test_a_source_is_part_of_the_recipe(
    pipeline: PixArtPipeline, tmp_path: Path, photo: Image.Image
) -> None:
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 8, 12))
    flipped = photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    a, b, white = (tmp_path / name for name in ("a.png", "b.png", "mask.png"))
    for path, image in ((a, photo), (b, flipped), (white, mask)):
        image.save(path)
    sources = [None, Source(a), Source(a, strength=0.5), Source(b), Source(a, white), Source(a, b)]
    pictures = [
        resolve([Request(prompt="a cat", height=12, width=20)], pipeline, steps=2, source=source)[0]
        for source in sources
    ]
    paths = draw(pipeline, pictures, tmp_path / "out", note={"model": "here"})
    assert len(set(paths)) == len(sources)
    strengths = [recipe_of(path).get("strength") for path in paths]
    assert strengths == [None, 0.6, 0.5, 0.6, 1.0, 1.0]
    assert [recipe_of(path).get("image_file") for path in paths[:2]] == [None, "a.png"]
    kept = to_pixels(Image.open(paths[4]))[..., 8:]
    assert torch.equal(kept, to_pixels(photo)[..., 8:])
    # what counts is the pixels, not where they are stored
    moved = a.rename(tmp_path / "moved.png")
    again = resolve([Request(prompt="a cat", image=moved)], pipeline, steps=2)
    assert draw(pipeline, again, tmp_path / "out") == [paths[1]]


def test_equal_bytes_may_be_other_pixels(tmp_path: Path) -> None:
    file, digests = tmp_path / "a.png", []
    plain = Image.frombytes("P", (4, 2), bytes(range(8)))
    for size, palette in (((4, 2), [1, 2, 3]), ((2, 4), [1, 2, 3]), ((4, 2), [3, 2, 1])):
        image = Image.frombytes("P", size, plain.tobytes())
        image.putpalette([*palette] * 8)
        image.save(file)
        digests.append(Source(file).recipe()["image"])
    assert len(set(digests)) == 3
    # as do the same pixels in another mode
    Image.open(file).convert("RGB").save(tmp_path / "b.png")
    assert Source(tmp_path / "b.png").recipe()["image"] == digests[2]


def test_images_of_16_bits(tmp_path: Path) -> None:
    deep = Image.new("I;16", (4, 4), 0x8080)
    deep.save(tmp_path / "deep.png")
    image, mask = Source(tmp_path / "deep.png", tmp_path / "deep.png").open()
    assert (image.getpixel((0, 0)), mask.getpixel((0, 0))) == ((128, 128, 128), 128)


def test_images_that_cannot_be_read_are_named(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, data in (("text", b"text"), ("half", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(data)
    for name in ("text", "half", "gone"):
        with pytest.raises(ValueError, match=f"{name}: "):
            Source(tmp_path / name).open()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole\.png: .*decompression bomb"):
        Source(tmp_path / "whole.png").open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "best"}, "`sampler` is 'best'; accepted: dpm-solver"),
        ({"steps": 0}, "`steps` is 0; accepted: 1 to 1000"),
        ({"steps": 1000}, "below 1000"),
        ({"sampler": "dmd", "steps": 3}, '"dmd" takes 1 step'),
        ({"guidance_scale": 0.5}, "`guidance_scale` is 0.5; accepted: 1 or more"),
        ({"guidance_mask": "other", "negative_prompt": "b"}, "`guidance_mask` is 'other'"),
        ({"seed": 2**63}, "`seed` is 9223372036854775808; accepted: 0 to"),
        ({"seed": -1}, "`seed` is -1; accepted: 0 to"),
        ({"source": {"strength": 1.5}}, "`strength` is 1.5; accepted: above 0, to 1"),
        ({"source": {"mask": "m.png"}}, r"m\.png is 4x4 for an image of 20x12"),
        ({"source": {}, "sampler": "pndm"}, "'pndm' cannot begin with an image"),
    ],
    ids=str,
)
def test_no_setting_is_refused_when_others_are_drawn(
    pipeline: PixArtPipeline, photo: Image.Image, tmp_path: Path, settings: dict, message: str
) -> None:
    if (source := settings.get("source")) is not None:
        photo.save(tmp_path / "a.png")
        photo.resize((4, 4)).save(tmp_path / "m.png")
        mask = tmp_path / source["mask"] if "mask" in source else None
        settings = settings | {"source": Source(tmp_path / "a.png", mask, source.get("strength"))}
    with pytest.raises(ValueError, match=message):
        resolve([Request(prompt="a")], pipeline, **settings)


def test_a_model_without_variance_has_no_iddpm() -> None:
    pipeline = small_pipeline()
    config = dataclasses.replace(CONFIG, learn_sigma=False)
    plain = PixArtPipeline(PixArt(config), pipeline.vae, None)
    with pytest.raises(ValueError, match='`sampler` is "iddpm"; accepted'):
        resolve([Request(prompt="a")], plain, sampler="iddpm")


def test_a_request_may_have_its_own_image(
    pipeline: PixArtPipeline, tmp_path: Path, photo: Image.Image
) -> None:
    for name in ("a.png", "b.png", "m.png"):
        photo.save(tmp_path / name)
    photo.rotate(90, expand=True).save(tmp_path / "tall.png")
    lines = [
        {"prompt": "of the run"},
        {"prompt": "stronger", "strength": 0.9},
        {"prompt": "masked", "mask": "m.png"},
        {"prompt": "its own", "image": "tall.png"},
        {"prompt": "all its own", "image": "b.png", "mask": "m.png", "strength": 0.2, "width": 8},
        {"prompt": "shaped", "image": "tall.png", "aspect_ratio": "16:9"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    run = Source(tmp_path / "a.png", strength=0.3)
    pictures = resolve(read_requests(file), pipeline, source=run)
    here, mask = tmp_path.joinpath, tmp_path / "m.png"
    assert [picture.source for picture in pictures] == [
        run,
        Source(here("a.png"), strength=0.9),
        Source(here("a.png"), mask, 0.3),
        Source(here("tall.png")),
        Source(here("b.png"), mask, 0.2),
        Source(here("tall.png")),
    ]
    sizes = [(picture.height, picture.width) for picture in pictures]
    assert sizes == [(12, 20), (12, 20), (12, 20), (20, 12), (12, 8), (12, 20)]
    with pytest.raises(ValueError, match="'x': a `mask` or `strength` is named, and no `image`"):
        resolve([Request(prompt="x", strength=0.5)], pipeline)
    file.write_text('{"prompt": "x", "image": "gone.png"}\n{"prompt": "x", "strength": 0}')
    with pytest.raises(ValueError) as error:
        read_requests(file)
    assert f"prompts.jsonl:1: image is '{here('gone.png')}': no such file" in str(error.value)
    assert "prompts.jsonl:2: strength is 0" in str(error.value)


def test_images_are_turned_as_viewers_turn_them(tmp_path: Path, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    image, mask = Source(tmp_path / "turned.png").open()
    assert (image.size, mask) == ((12, 20), None)


def test_a_sheet_of_files(tmp_path: Path) -> None:
    colours = ["red", "green", "blue"]
    paths = [tmp_path / f"{colour}.png" for colour in colours]
    for path, colour, size in zip(paths, colours, [(8, 16), (600, 300), (300, 600)], strict=True):
        Image.new("RGB", size, colour).save(path)
    sheet = sheet_of(paths, colours, side=64)
    assert sheet.width < 3 * 64
    found = {colour: count for count, colour in sheet.getcolors(100_000)}
    # each 64 pixels wide, in its own proportions
    assert found[255, 0, 0] == found[0, 0, 255] == 64 * 128
    assert found[0, 128, 0] == 64 * 32


def generate(*arguments: object) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    return done.exit_code, done.output, done.exception


def test_the_command_draws_a_file_and_its_arguments(
    pipeline: PixArtPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    monkeypatch.setattr(PixArtPipeline, "from_pretrained", lambda *_, **__: pipeline)
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "dog", "aspect_ratio": "9:16"}')
    photo.save(tmp_path / "photo.png")
    code, said, error = generate(
        tmp_path / "folder", "a cat", "--prompts", file, "-o", out, "--steps", 2, "--seed", 4,
        "--image", tmp_path / "photo.png", "--strength", 0.5, "--sampler", "ddim",
        "--device", "cpu",
    )  # fmt: skip
    assert (code, error) == (0, None)
    paths = [Path(line) for line in said.splitlines() if line.endswith(".png")]
    assert paths[-1] == out / "contact-sheet.png" and paths[-1].is_file()
    cat, dog = map(recipe_of, paths[:-1])
    assert (cat["prompt"], cat["seed"], cat["height"], cat["width"]) == ("a cat", 4, 12, 20)
    assert (dog["prompt"], dog["seed"], dog["height"], dog["width"]) == ("dog", 5, 20, 12)
    assert (cat["sampler"], cat["strength"], cat["model"]) == ("ddim", 0.5, "folder")
    assert cat["image_file"] == "photo.png"
    # nothing tells where on this machine they were drawn
    assert str(tmp_path) not in json.dumps([cat, dog])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt is given"),
        (["x", "--mask", "m.png"], "--mask and --strength need --image"),
        (["x", "--strength", "0.5"], "--mask and --strength need --image"),
        (["x", "--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs a GPU"),
        (["x", "--sampler", "best"], "`sampler` is 'best'"),
        (["x", "--seed", "-1"], "`seed` is -1"),
        (["x", "--steps", "0"], "`steps` is 0"),
        (["x", "--image", "gone.png"], "gone.png: No such file or directory"),
        (["x", "--controlnet", "c", "--control", "gone.png"], "gone.png: No such file"),
        (["x", "--output", __file__], "File exists"),
        (["x", "--dtype", "int8"], "--dtype is 'int8'; accepted: float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, _, error = generate(tmp_path, *arguments)
    assert code == 1
    assert message in str(error)
