"""Recipes: what is accepted, and what is said about the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pixart import presets
from pixart.data.aspect_ratios import bucket_sizes
from pixart.training import TrainRecipe, VAERecipe, load_recipe
from pixart.training.recipe import builtin_recipes, check_recipe, read_yaml

MINIMAL = {
    "output": "runs/x",
    "steps": 10,
    "batch_size": 4,
    "model": {"preset": "sigma-256"},
    "data": {"features": "features"},
}


def problems(changes: dict) -> str:
    with pytest.raises(ValueError) as error:
        check_recipe(TrainRecipe, {**MINIMAL, **changes}, "my.yaml")
    return str(error.value)


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    kind = VAERecipe if name.endswith("vae") else TrainRecipe
    recipe = load_recipe(kind, name)
    if isinstance(recipe, TrainRecipe):
        assert recipe.config.depth > 0


def test_model_is_a_preset_with_changes() -> None:
    recipe = check_recipe(TrainRecipe, MINIMAL, "x")
    assert recipe.config == presets["sigma-256"]
    changed = {**MINIMAL, "model": {"preset": "sigma-256", "depth": 3, "init": "a.pth"}}
    recipe = check_recipe(TrainRecipe, changed, "x")
    assert recipe.config.depth == 3 and recipe.config.hidden_size == 1152
    assert recipe.init == "a.pth"


def test_unknown_keys_are_named_with_the_nearest_valid_one_all_at_once() -> None:
    said = problems({"batchsize": 4, "optimizer": {"learning_rate": 1, "beta": 3}, "stepz": 1})
    assert said.startswith("my.yaml:\n")
    assert "batchsize: unknown key (did you mean batch_size?)" in said
    assert "optimizer.beta: unknown key (did you mean betas?)" in said
    assert "optimizer.learning_rate: unknown key" in said
    assert "stepz: unknown key (did you mean steps?)" in said


def test_bad_values_are_named() -> None:
    said = problems(
        {
            "output": None,
            "steps": 0,
            "mixed_precision": "bf32",
            "schedule": {"name": "cosin"},
            "samples": {"sampler": "dpm"},
            "optimizer": {"lr": "fast"},
            "gradient_checkpointing": "selectiv",
        }
    )
    assert "output: got None; should be a path" in said
    assert "steps: got 0; input should be greater than 0" in said
    assert "mixed_precision: got 'bf32'" in said and "did you mean bf16?" in said
    assert "schedule.name: got 'cosin'" in said and "did you mean cosine?" in said
    assert "samples.sampler: got 'dpm'" in said and "dpm-solver++" in said
    assert "optimizer.lr: got 'fast'" in said
    assert "gradient_checkpointing: got 'selectiv'" in said and "did you mean selective?" in said


def test_buckets_are_the_papers_or_ones_own() -> None:
    def sizes(**data: object) -> object:
        values = {**MINIMAL, "data": {"features": "features", **data}}
        return check_recipe(TrainRecipe, values, "x").data.sizes(16)

    assert sizes() is None and sizes(size=512) == sizes(size=512, buckets=False) == 512
    assert sizes(size=512, buckets=True) == bucket_sizes(512, 16)
    assert sizes(size=960, buckets=["16:9", "1:1"]) == [(720, 1280), (960, 960)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"buckets": True}, "got True; needs data.size"),
        ({"size": 512, "buckets": [969]}, "got [969]; should be true, false or ratios in quotes"),
        ({"size": 512, "buckets": []}, "got []; should be true"),
        ({"size": 512, "buckets": "16:9"}, "got '16:9'; should be true"),
        ({"size": 512, "buckets": ["16/9"]}, "got ['16/9']; aspect ratio is '16/9'; accepted: wid"),
    ],
    ids=str,
)
def test_bad_buckets_are_named(data: dict, said: str) -> None:
    assert f"data.buckets: {said}" in problems({"data": {"features": "x", **data}})


def test_bad_models_are_named() -> None:
    assert "unknown hiden_size (did you mean hidden_size?)" in problems(
        {"model": {"hiden_size": 2}}
    )
    said = problems({"model": {"preset": "sigma-513"}})
    assert "preset should be" in said and "did you mean sigma-512?" in said
    assert "`num_heads` is 0" in problems({"model": {"num_heads": 0}})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.depth=four", "`depth` is 'four'"),
        ("model.preset=[a]", "preset should be"),
        ("model.init=5", "init should be a path"),
        ("model=[1", "not valid YAML"),
        ("steps.x=1", "steps holds a value, not a section"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("seed=-1", "seed"),
    ],
)
def test_odd_overrides_are_named(tmp_path: Path, override: str, said: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ValueError, match=re.escape(said)):
        load_recipe(TrainRecipe, file, [override])


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL) + "optimizer:\n  lr: 1e-4\n")
    assert load_recipe(TrainRecipe, file).optimizer.lr == 1e-4


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"data: required") as error:
        check_recipe(TrainRecipe, {"output": "x", "steps": 1, "batch_size": 1, "model": {}}, "x")
    assert "model" not in str(error.value)


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    overrides = ["steps=7", "optimizer.lr=1e-4", "ema_decay=null", "samples.prompts=[a cat, a dog]"]
    recipe = load_recipe(TrainRecipe, file, overrides)
    assert (recipe.steps, recipe.optimizer.lr, recipe.ema_decay) == (7, 1e-4, None)
    assert recipe.samples.prompts == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="'steps' is not of the form key=value"):
        load_recipe(TrainRecipe, file, ["steps"])
    with pytest.raises(ValueError, match=r"optimizer\.lrr: unknown key \(did you mean lr\?\)"):
        load_recipe(TrainRecipe, file, ["optimizer.lrr=1"])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe 'sigma-13'.*sigma-512"):
        read_yaml("sigma-13")
    for text, said in (("a: [", "not valid YAML"), ("- a", "holds a list")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_yaml(tmp_path / "x.yaml")
