"""The papers' stages as recipes: their numbers, and each path walked by small twins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_vae import small_vae

import pixart
from pixart import PixArt
from pixart.checkpoints import grow
from pixart.training import TrainRecipe, load_recipe, train
from pixart.training.class_to_image import ClassToImage
from pixart.training.recipe import builtin_recipes
from pixart.training.text_to_image import TextToImage

CONFIGS = Path(pixart.__file__).parent / "configs"


@dataclass(frozen=True)
class Stage:
    pixels: int
    positions: float  # pe_interpolation, lewei_scale in alpha
    tokens: int | None
    batch: int  # per GPU
    warmup: int
    buckets: bool
    steps: int | None = None  # in thousands, where the paper has them
    micro: bool = False
    kv: bool = False


# PixArt-alpha: table 4 of the paper, and the official configs; PixArt-Sigma: the official configs
STAGES = {
    "alpha-256-pixels": Stage(256, 1, None, 128, 1000, False, 300),
    "alpha-256-alignment": Stage(256, 1, 120, 178, 1000, False, 150),
    "alpha-256-aesthetics": Stage(256, 1, 120, 178, 1000, False, 90),
    "alpha-512-aesthetics": Stage(512, 1, 120, 40, 1000, True, 100),
    "alpha-1024-aesthetics": Stage(1024, 2, 120, 12, 1000, True, 16, micro=True),
    "sigma-256-adaptation": Stage(256, 0.5, 300, 64, 100, False, 2),
    "sigma-256": Stage(256, 0.5, 300, 64, 1000, False),
    "sigma-512": Stage(512, 1, 300, 48, 1000, True),
    "sigma-1024": Stage(1024, 2, 300, 12, 1000, True),
    "sigma-1024-kv": Stage(1024, 2, 300, 16, 500, True, kv=True),
    "sigma-2k": Stage(2048, 4, 300, 4, 100, True, 4),
    "sigma-4k": Stage(2880, 5.625, 300, 1, 100, True, kv=True),
}


def test_every_stage_has_its_recipe() -> None:
    found = [name for name in builtin_recipes() if name.startswith(("alpha", "sigma"))]
    assert found == sorted(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_numbers_are_the_papers(name: str) -> None:
    stage, recipe = STAGES[name], load_recipe(TrainRecipe, name)
    config, optimizer = recipe.config, recipe.optimizer
    assert config.input_size * 8 == recipe.data.size == stage.pixels
    assert config.pe_interpolation == stage.positions
    assert config.micro_conditioning == stage.micro
    kv = {"sampling": "conv", "scale_factor": 2, "layers": list(range(14, 28))}
    assert config.kv_compression == (kv if stage.kv else None)
    assert recipe.data.buckets == stage.buckets
    assert (recipe.batch_size, recipe.schedule.warmup_steps) == (stage.batch, stage.warmup)
    if stage.steps is not None:
        assert recipe.steps == 1000 * stage.steps
    if stage.tokens is None:
        assert config.conditioning == "class"
    else:
        assert config.max_caption_tokens == stage.tokens
    assert (optimizer.lr, optimizer.base_batch_size) == (2e-5, 256)
    if name.startswith("alpha"):
        assert (optimizer.name, optimizer.weight_decay, optimizer.eps) == ("adamw", 0.03, 1e-10)
    else:
        assert (optimizer.name, optimizer.weight_decay) == ("came", 0)
        assert optimizer.betas == (0.9, 0.999, 0.9999)
    assert (recipe.gradient_clip, recipe.ema_decay, config.caption_dropout) == (0.01, 0.9999, 0.1)
    assert recipe.schedule.name == "constant" and recipe.gradient_checkpointing is True
    vae = "sd-vae-ft-ema" if name.startswith("alpha") else "sdxl-vae"
    assert recipe.data.vae == f"models/{vae}"


@pytest.mark.parametrize("name", STAGES)
def test_model_is_buildable(name: str) -> None:
    with torch.device("meta"):
        model = PixArt(load_recipe(TrainRecipe, name).config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 6.1e8 < count < 6.8e8


def before(name: str) -> tuple[str, bool] | None:
    """What a recipe says to grow its model from, and whether to another autoencoder."""
    said = re.sub(r"\n# ", " ", (CONFIGS / f"{name}.yaml").read_text().split("\noutput:")[0])
    found = re.search(r"Before: pixart grow (\S+) (\S+) --preset (\S+)( --vae-swap)?", said)
    if found is None:
        return None
    source, target, preset, vae_swap = found.groups()
    recipe = load_recipe(TrainRecipe, name)
    assert recipe.init == target and recipe.model["preset"] == preset
    return source, vae_swap is not None


@pytest.mark.parametrize("name", STAGES)
def test_what_comes_before_is_a_stage_and_grows_into_this_one(name: str) -> None:
    found = before(name)
    if found is None:
        init = load_recipe(TrainRecipe, name).init
        assert init is None or re.fullmatch(r"runs/(.+)/pipeline/transformer", init)[1] in STAGES
        return
    source, _ = found
    stage = re.fullmatch(r"runs/(.+)/pipeline", source)
    assert source == "PixArt-XL-2-256x256.pth" or (stage is not None and stage[1] in STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, captioned; and a VAE of factor 2."""
    folder, rng = tmp_path_factory.mktemp("stages"), np.random.default_rng(0)
    for i in range(4):
        path = folder / "images" / ("fox" if i % 2 else "owl") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (64 + 16 * i, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"animal number {i}")
    small_vae(4, 4, norm_num_groups=2).save_pretrained(folder / "vae")
    return folder


def twin(name: str, folder: Path, init: Path | None) -> TrainRecipe:
    """A recipe of an eighth of the size, two blocks and one step."""
    recipe = load_recipe(TrainRecipe, name)
    config, root = recipe.config, folder / "runs"
    side = config.input_size // 8 // 2 * 2
    kv = "{sampling: conv, scale_factor: 2, layers: [1]}" if config.kv_compression else "null"
    text = config.conditioning != "class"
    changes = [
        *("steps=1", "batch_size=2", "mixed_precision=no", "workers=0", "samples.prompts=[]"),
        *("model.hidden_size=24", "model.depth=2", "model.num_heads=2"),
        *(f"model.input_size={side}", f"model.kv_compression={kv}", "model.caption_channels=384"),
        *([f"model.max_caption_tokens={20 if name.startswith('sigma') else 12}"] if text else []),
        *([] if text else ["model.num_classes=2"]),
        *([] if init is None else [f"model.init={init}"]),
        f"output={root / name}",
        f"data.images={folder / 'images'}",
        f"data.features={folder / f'features-{name}'}",
        f"data.size={side * 2}",
        f"data.vae={folder / 'vae'}",
        *(["data.text_encoder=minilm"] if text else []),
    ]
    return load_recipe(TrainRecipe, name, changes)


PATHS = {
    "alpha": [name for name in STAGES if name.startswith("alpha")],
    "sigma": [name for name in STAGES if name.startswith("sigma")],
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_small_twins_walk_the_whole_path(path: list[str], folder: Path) -> None:
    trained: Path | None = None
    if path[0].startswith("sigma"):
        trained = folder / "PixArt-XL-2-256x256"
        PixArt(twin("alpha-256-alignment", folder, None).config).save_pretrained(trained)
    for name in path:
        init, found = trained, before(name)
        if found is not None:
            config, (_, vae_swap) = twin(name, folder, None).config, found
            model, _ = grow(PixArt.from_pretrained(init), config, vae_swap=vae_swap)
            init = folder / "grown" / name
            model.save_pretrained(init)
        recipe = twin(name, folder, init)
        task = ClassToImage if recipe.config.conditioning == "class" else TextToImage
        run = train(recipe, lambda device, task=task, recipe=recipe: task(recipe, device))
        assert run.last_checkpoint()[0] == 1
        made = recipe.output / "pipeline" / "transformer"
        assert PixArt.from_pretrained(made).config == recipe.config
        # 2K goes on from the 1024px model without compression
        trained = trained if name == "sigma-1024-kv" else made
