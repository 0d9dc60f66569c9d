"""Stage 1: a folder of classes is encoded, a class model trained on it, and grown into text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_vae import small_vae

from pixart import PixArt
from pixart.checkpoints import grow
from pixart.conditioning import FeatureCache
from pixart.data import BadSample
from pixart.training import TrainRecipe, train
from pixart.training.class_to_image import ClassFolder, ClassToImage
from pixart.training.recipe import check_recipe
from pixart.training.text_to_image import TextToImage

COLOURS = {"gem": 200, "coin": 120, "a key": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    for name, colour in COLOURS.items():
        for number in range(2):
            path = folder / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 30, 3), colour + number, dtype=np.uint8)).save(path)
    small_vae(8, 8).save_pretrained(folder / "vae")
    return folder


def recipe(folder: Path, name: str, **changes: object) -> TrainRecipe:
    values = {
        "output": str(folder / name),
        "steps": 2,
        "batch_size": 3,
        "model": {
            "conditioning": "class",
            "num_classes": 3,
            "input_size": 8,
            "hidden_size": 24,
            "depth": 1,
            "num_heads": 2,
        },
        "data": {
            "images": str(folder / "images"),
            "features": str(folder / "features"),
            "size": 16,
            "vae": str(folder / "vae"),
        },
        "samples": {"prompts": ["coin", "gem"], "every": 2, "steps": 2},
        **changes,
    }
    return check_recipe(TrainRecipe, values, "test")


def test_from_folders_to_a_text_model(folder: Path) -> None:
    made = recipe(folder, "run")
    train(made, lambda device: ClassToImage(made, device))
    assert json.loads((folder / "features" / "classes.json").read_text()) == sorted(COLOURS)
    sheet = Image.open(folder / "run" / "samples" / "step-0000002.png")
    assert sheet.width > sheet.height
    pipeline = folder / "run" / "pipeline"
    assert json.loads((pipeline / "classes.json").read_text()) == sorted(COLOURS)
    model = PixArt.from_pretrained(pipeline)
    assert model.config == made.config
    text = {"conditioning": "adaln_single", "caption_channels": 5, "max_caption_tokens": 4}
    grown, _ = grow(model, check_recipe(TrainRecipe, {
        **made.model_dump(mode="json"), "model": {**made.model, **text}, "samples": {},
    }, "test").config)  # fmt: skip
    assert torch.equal(grown.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_every_picture_has_the_label_of_its_folder(folder: Path) -> None:
    task = ClassToImage(recipe(folder, "labels"), torch.device("cpu"))
    cache = FeatureCache(folder / "features")
    samples = [cache[i] for i in range(6)]
    labels = task.collate(samples)["label"]
    names = sorted(COLOURS)
    assert [names[label] for label in labels] == [s["key"].split("/")[0] for s in samples]
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_model_is_told_labels(folder: Path) -> None:
    task = ClassToImage(recipe(folder, "told"), torch.device("cpu"))
    batch = task.collate([task.dataset[i] for i in (0, 2, 5)])
    seen: list[tuple[torch.Tensor, None]] = []

    def spy(latents, t, caption, mask):
        seen.append((caption, mask))
        return torch.cat([latents, latents], dim=1)

    task.loss(spy, batch)
    ((labels, mask),) = seen
    assert torch.equal(labels, batch["label"]) and labels.dtype == torch.int64 and mask is None


def test_previews_are_guided_away_from_no_class(folder: Path) -> None:
    task = ClassToImage(recipe(folder, "guided"), torch.device("cpu"))
    seen = []

    class Spy(PixArt):
        def forward(self, latents, t, caption):
            seen.append(caption)
            return super().forward(latents, t, caption)

    with torch.no_grad():
        task.preview(Spy(task.module.config).eval())
    assert seen[0].tolist() == [3, 3, 1, 2]


def test_encoding_is_not_done_twice(folder: Path) -> None:
    ClassToImage(recipe(folder, "first"), torch.device("cpu"))
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "features").iterdir()}
    ClassToImage(recipe(folder, "second"), torch.device("cpu"))
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "features").iterdir()} == before


def test_other_classes_are_other_features(folder: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, "x", data={
        "images": str(tmp_path / "images"), "features": str(tmp_path / "features"), "size": 16,
        "vae": str(folder / "vae"),
    })  # fmt: skip
    for name in sorted(COLOURS):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name / "0.png")
    ClassToImage(made, torch.device("cpu"))
    (tmp_path / "images" / "axe").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "axe" / "0.png")
    with pytest.raises(ValueError, match="text_encoder='classes .* another folder"):
        ClassToImage(made, torch.device("cpu"))


def test_pictures_outside_of_classes_are_bad_samples(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "stray.png")
    (tmp_path / "fox" / "young").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "fox" / "young" / "a.png")
    source = ClassFolder(tmp_path, 16)
    assert source.classes == ["fox"] and source.keys == ["fox/young/a.png", "stray.png"]
    assert source[0].caption == "fox"
    with pytest.raises(BadSample, match="no class's folder"):
        source[1]


def test_what_does_not_fit_is_said(folder: Path, tmp_path: Path) -> None:
    model = {**recipe(folder, "x").model, "num_classes": 1000}
    with pytest.raises(ValueError, match=r"3 classes .* model\.num_classes is 1000"):
        ClassToImage(recipe(folder, "x", model=model), torch.device("cpu"))
    with pytest.raises(ValueError, match="dog are no classes; as a key, coin"):
        samples = {"prompts": ["dog"]}
        ClassToImage(recipe(folder, "x", samples=samples), torch.device("cpu"))
    data = recipe(folder, "x").data.model_dump(mode="json")
    with pytest.raises(ValueError, match="reads no text"):
        given = {**data, "text_encoder": "minilm"}
        ClassToImage(recipe(folder, "x", data=given), torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folders of pictures"):
        given = {**data, "images": str(tmp_path / "empty")}
        ClassToImage(recipe(folder, "x", data=given), torch.device("cpu"))
    with pytest.raises(ValueError, match="a class model has no captions"):
        TextToImage(recipe(folder, "x"), torch.device("cpu"))
