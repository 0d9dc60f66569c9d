"""Pictures of a subject and of its class come as often, each with its weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from small_runs import MODEL, recipe

from pixart.conditioning import CacheMetadata, CacheWriter
from pixart.training import TrainRecipe
from pixart.training.dreambooth import balanced, weights
from pixart.training.recipe import Prior
from pixart.training.text_to_image import TextToImage

KEYS = ["class/0.png", "me/0.png", "class/1.png", "class-of-mine.png", "class/2.png"]


def write_features(folder: Path, keys: list[str]) -> None:
    metadata = CacheMetadata("text", "vae", "float16", 5, 6, 4)
    with CacheWriter(folder, metadata, torch.randn(5, 6), 1) as writer:
        for key in keys:
            writer.add(
                key=key,
                text=key,
                caption=torch.randn(3, 6),
                latent_mean=torch.randn(4, 4, 6 if key == KEYS[3] else 4),
                latent_std=torch.zeros(4, 4, 6 if key == KEYS[3] else 4),
                image_size=(32, 32),
            )


def dreaming(folder: Path, weight: float = 1.0) -> TrainRecipe:
    prior = {"folder": "class", "weight": weight}
    return recipe(folder / "run", folder / "features", model=MODEL, prior=prior)


def test_an_epoch_has_as_many_of_both() -> None:
    rows = Counter(balanced(KEYS, Prior(folder="class/")))
    # three of the class, and three times one of two of the subject
    assert rows == {0: 1, 2: 1, 4: 1, 1: 2, 3: 1}
    assert weights(KEYS, Prior(folder="class", weight=0.25)).tolist() == [0.25, 1, 0.25, 1, 0.25]


def test_training_draws_them_in_their_buckets(tmp_path: Path) -> None:
    write_features(tmp_path / "features", KEYS)
    task = TextToImage(dreaming(tmp_path), torch.device("cpu"))
    assert len(task.dataset) == len(task.buckets) == 6
    drawn = [task.dataset[i] for i in range(6)]
    assert sorted({sample["key"] for sample in drawn}) == sorted(KEYS)
    assert [tuple(sample["latent_mean"].shape) for sample in drawn] == task.buckets


def test_the_loss_of_the_class_has_its_weight(tmp_path: Path) -> None:
    write_features(tmp_path / "features", KEYS)

    def loss(weight: float, keys: list[str]) -> torch.Tensor:
        torch.manual_seed(0)
        task = TextToImage(dreaming(tmp_path, weight), torch.device("cpu"))
        of_key = {task.features[i]["key"]: task.features[i] for i in range(5)}
        torch.manual_seed(1)
        return task.loss(task.module, task.collate([of_key[key] for key in keys]))["loss"]

    both = ["me/0.png", "class/0.png"]
    assert loss(1, both[::-1]) > 0
    difference = loss(3, both) - loss(1, both)
    # the other half is the subject's, which stays
    half = loss(2, both) - loss(1, both)
    assert half.item() == pytest.approx(difference.item() / 2, rel=1e-4)
    assert difference > 0
    assert torch.equal(loss(3, ["me/0.png"] * 2), loss(1, ["me/0.png"] * 2))


@pytest.mark.parametrize(
    ("keys", "lacking"),
    [(KEYS[1:2], "of the class"), (KEYS[:1], "of a subject")],
    ids=["no_class", "no_subject"],
)
def test_pictures_of_one_kind_alone_are_refused(
    keys: list[str], lacking: str, tmp_path: Path
) -> None:
    write_features(tmp_path / "features", keys)
    with pytest.raises(ValueError, match=f"prior.folder is 'class', .*no pictures {lacking}"):
        TextToImage(dreaming(tmp_path), torch.device("cpu"))
