"""What `pixart train` does before and after its loop: encoding, previews, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_apart
from small_runs import log, run, train_apart
from small_vae import small_vae

from pixart.cli import encode
from pixart.conditioning import CorruptCacheError, FeatureCache, TextEncoder
from pixart.generation import PixArtPipeline
from pixart.training import TrainRecipe, train
from pixart.training.recipe import check_recipe
from pixart.training.text_to_image import TextToImage

CAPTIONS = ["a red square", "a blue square", "a picture of a dark green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    images = folder / "images"
    images.mkdir()
    for i, caption in enumerate(CAPTIONS):
        picture = np.full((20, 30, 3), 80 * i, dtype=np.uint8)
        Image.fromarray(picture).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(caption)
    small_vae(8, 8).save_pretrained(folder / "vae")
    return folder


def recipe(folder: Path, name: str, **changes: object) -> TrainRecipe:
    values = {
        "output": str(folder / name),
        "steps": 2,
        "batch_size": 2,
        "model": {
            "input_size": 8,
            "hidden_size": 24,
            "depth": 1,
            "num_heads": 2,
            "caption_channels": 384,
            "max_caption_tokens": 12,
            "micro_conditioning": True,
        },
        "data": {
            "images": str(folder / "images"),
            "features": str(folder / "features"),
            "size": 16,
            "vae": str(folder / "vae"),
            "text_encoder": "minilm",
        },
        "samples": {"prompts": CAPTIONS[:2], "every": 1, "steps": 2, "guidance_scale": 3.5},
        **changes,
    }
    return check_recipe(TrainRecipe, values, "test")


def test_from_images_to_a_pipeline(folder: Path) -> None:
    made = recipe(folder, "run")
    train(made, lambda device: TextToImage(made, device))
    cache = FeatureCache(folder / "features")
    assert sorted(cache[i]["text"] for i in range(3)) == sorted(CAPTIONS)
    assert [p.name for p in sorted((folder / "run" / "samples").iterdir())] == [
        "step-0000001.png",
        "step-0000002.png",
    ]
    pipeline = PixArtPipeline.from_pretrained(folder / "run" / "pipeline")
    assert pipeline.model.config == made.config
    assert pipeline.guidance_scale == made.samples.guidance_scale == 3.5
    (picture,) = pipeline(["a red square"], steps=2)
    assert picture.size == (16, 16)
    # the features are there now: no image is looked at again
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "features").iterdir()}
    again = recipe(folder, "again")
    TextToImage(again, torch.device("cpu"))
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "features").iterdir()} == before


def test_micro_conditions_are_the_originals_size_and_the_crops_ratio(folder: Path) -> None:
    task = TextToImage(recipe(folder, "micro"), torch.device("cpu"))
    seen: dict[str, torch.Tensor] = {}

    class Spy(torch.nn.Module):
        def forward(self, latents, t, caption, mask, image_size, aspect_ratio):
            seen.update(image_size=image_size, aspect_ratio=aspect_ratio, caption=caption)
            return torch.cat([latents, latents], dim=1)

    batch = task.collate([task.dataset[0], task.dataset[1]])
    task.loss(Spy(), batch)
    assert seen["image_size"].tolist() == [[20, 30]] * 2
    assert seen["aspect_ratio"].tolist() == [[1.0]] * 2
    assert seen["caption"].dtype == torch.float32
    wide = {**batch, **{k: batch[k][:, :, :4] for k in ("latent_mean", "latent_std")}}
    task.loss(Spy(), wide)
    assert seen["aspect_ratio"].tolist() == [[0.5]] * 2


def test_images_of_many_shapes_train_alike_on_any_number_of_processes(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    images = folder / "many"
    images.mkdir()
    sizes = [(40, 40)] * 3 + [(64, 32)] * 5 + [(30, 64), (21, 77), (66, 24), (24, 66), (101, 20)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (20 * i, 99, 9)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    data = recipe(folder, "x").data.model_dump(mode="json")
    data |= {"images": str(images), "features": str(folder / "many-features"), "buckets": True}
    data |= {"size": 32, "max_bad_fraction": 0.1}

    def of(name: str, accumulation: int) -> TrainRecipe:
        changes = {"steps": 4, "log_every": 1, "gradient_accumulation": accumulation, "samples": {}}
        return recipe(folder, name, data=data, **changes)

    (folder / "many.yaml").write_text(of("one", 4).model_dump_json())
    encode(str(folder / "many.yaml"))
    said = capsys.readouterr().out
    assert "32 x 32" in said and "41.7%" in said and "1 more were skipped" in said
    (row,) = (folder / "many-features" / "skipped.jsonl").read_text().splitlines()
    assert "101x20 is longer than 4.5 to 1" in row
    shapes = FeatureCache(folder / "many-features").latent_shapes()
    assert len(shapes) == 12 and len(set(shapes)) == 6
    assert all(h * w <= 256 and h % 2 == w % 2 == 0 for _, h, w in shapes)

    run(of("one", 4))
    train_apart(of("two", 2), processes=2)
    one, two = log(folder / "one"), log(folder / "two")
    assert len(one) == 4
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)

    changed = of("one", 4).data.model_dump(mode="json") | {"buckets": ["1:1", "2:1"]}
    with pytest.raises(ValueError, match=r"data.buckets: True -> \['1:1', '2:1'\]"):
        TextToImage(recipe(folder, "changed", data=changed), torch.device("cpu"))


def test_processes_share_the_encoding_and_what_is_bad_is_tried_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = folder / "five"
    images.mkdir()
    for i in range(5):
        Image.new("RGB", (20, 30), (50 * i, 99, 9)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    (images / "broken.png").write_bytes(b"no image")

    def of(features: str) -> TrainRecipe:
        data = recipe(folder, "x").data.model_dump(mode="json")
        data |= {"images": str(images), "features": str(folder / features)}
        return recipe(folder, "x", data=data | {"max_bad_fraction": 0.2}, samples={})

    (folder / "five.yaml").write_text(of("together").model_dump_json())
    text = run_apart(encode, str(folder / "five.yaml"), output=folder / "out", processes=2)
    assert text.count("1 more were skipped") == 1
    TextToImage(of("alone"), torch.device("cpu"))
    alone, together = FeatureCache(folder / "alone"), FeatureCache(folder / "together")
    assert alone.keys() == [f"{i}.png" for i in range(5)] == sorted(together.keys())
    for i, key in enumerate(together.keys()):
        expected = alone[int(key[0])]
        for name in ("caption", "latent_mean", "latent_std", "image_size"):
            torch.testing.assert_close(together[i][name], expected[name], rtol=2e-3, atol=2e-3)

    monkeypatch.setattr(TextEncoder, "from_pretrained", lambda *_, **__: pytest.fail("encodes"))
    TextToImage(of("together"), torch.device("cpu"))
    (images / "broken.png").write_bytes(b"no image either")
    with pytest.raises(pytest.fail.Exception, match="encodes"):
        TextToImage(of("together"), torch.device("cpu"))


def test_features_of_two_folders_are_told_apart(folder: Path, tmp_path: Path) -> None:
    def task(name: str, **changes: object) -> TextToImage:
        data = recipe(folder, "x").data.model_dump(mode="json")
        data |= {"images": str(tmp_path / name), "features": str(tmp_path / "features")}
        return TextToImage(
            recipe(folder, "x", data=data | changes, samples={}), torch.device("cpu")
        )

    for name, count in (("cats", 5), ("dogs", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{i}.bmp")
            (tmp_path / name / f"{i}.txt").write_text(name)
        made = task(name)
        assert made.keys == [f"{i}.bmp" for i in range(count)] and len(made.buckets) == count
        assert [made.dataset[i]["text"] for i in range(count)] == [name] * count
    assert task("cats").dataset[2]["text"] == "cats"
    with pytest.raises(ValueError, match=r"3 pictures in several versions, as 0.bmp.*data\.images"):
        task("cats", images=None)


@pytest.mark.parametrize("file", ["shard-000000.safetensors", "null-caption.safetensors"])
def test_what_is_damaged_comes_back_as_its_message_says(
    folder: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    data = recipe(folder, "x").data.model_dump(mode="json")
    data |= {"images": str(tmp_path / "images"), "features": str(tmp_path / "features")}
    (tmp_path / "x.yaml").write_text(recipe(folder, "x", data=data, samples={}).model_dump_json())
    encode(str(tmp_path / "x.yaml"))
    path = tmp_path / "features" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptCacheError, match=f"{file} is damaged.*Delete it and rerun"):
        encode(str(tmp_path / "x.yaml"))
    path.unlink()
    # without the pictures there is nothing to make it from
    with pytest.raises(CorruptCacheError, match=f"{file} is missing.*with data.images"):
        alone = recipe(folder, "x", data=data | {"images": None}, samples={})
        TextToImage(alone, torch.device("cpu")).dataset[0]
    encode(str(tmp_path / "x.yaml"))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [None, "00000.tar"], ids=["empty", "archives"])
def test_a_folder_without_pictures_is_named(
    folder: Path, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / content).write_bytes(b"x")
    data = recipe(folder, "x").data.model_dump(mode="json") | {"images": str(tmp_path)}
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no pictures. Read are .*unpack them"):
        TextToImage(recipe(folder, "x", data=data), torch.device("cpu"))


def test_latents_are_sampled(folder: Path) -> None:
    task = TextToImage(recipe(folder, "sampled"), torch.device("cpu"))
    batch = task.collate([task.dataset[0]] * 2)
    batch["latent_mean"], batch["latent_std"] = (
        torch.full((2, 4, 64, 64), 7.0),
        torch.full((2, 4, 64, 64), 3.0),
    )
    seen: list[torch.Tensor] = []
    objective = task.objective

    def spy(output, latents, noise, t):
        seen.append(latents)
        return objective(output, latents, noise, t)

    task.objective = spy  # type: ignore[assignment]
    task.loss(lambda x, *rest, **micro: torch.cat([x, x], dim=1), batch)
    assert seen[0].mean() == pytest.approx(7, abs=0.1)
    assert seen[0].std() == pytest.approx(3, abs=0.1)


def test_features_made_otherwise_are_refused(folder: Path) -> None:
    data = recipe(folder, "x").data.model_dump(mode="json")
    with pytest.raises(ValueError, match=r"encoded differently \(data.size: 16 -> 8\)"):
        TextToImage(recipe(folder, "x", data={**data, "size": 8}), torch.device("cpu"))


def test_what_is_missing_is_said_before_anything_is_loaded(folder: Path) -> None:
    data = {"images": str(folder / "images"), "features": str(folder / "none")}
    with pytest.raises(ValueError, match=r"data\.vae and data\.text_encoder are needed"):
        TextToImage(recipe(folder, "x", data=data), torch.device("cpu"))
    data = {"features": str(folder / "features")}
    with pytest.raises(ValueError, match=r"samples\.prompts are given: data\.vae"):
        TextToImage(recipe(folder, "x", data=data), torch.device("cpu"))
    model = {**recipe(folder, "x").model, "conditioning": "class", "micro_conditioning": False}
    with pytest.raises(ValueError, match="a class model has no captions"):
        TextToImage(recipe(folder, "x", model=model), torch.device("cpu"))


def test_export_without_encoders_is_a_transformer_alone(folder: Path) -> None:
    data = {"features": str(folder / "features")}
    made = recipe(folder, "bare", data=data, samples={})
    train(made, lambda device: TextToImage(made, device))
    names = sorted(p.name for p in (folder / "bare" / "pipeline").iterdir())
    assert names == ["transformer"]


def test_pipeline_file_names_its_parts(folder: Path) -> None:
    made = recipe(folder, "named")
    TextToImage(made, torch.device("cpu")).export(
        TextToImage(made, torch.device("cpu")).module, folder / "named"
    )
    parts = json.loads((folder / "named" / "pipeline" / "pipeline.json").read_text())
    assert parts["text_encoder"] == "minilm"
    # beside the run, with which it moves
    assert parts["vae"] == "../../vae"
