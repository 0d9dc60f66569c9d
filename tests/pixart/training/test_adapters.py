"""Adapters train beside frozen weights, resume exactly, and are drawn with everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import MODEL, log, recipe, train_apart, write_features

from pixart import PixArt, PixArtConfig, checkpoints
from pixart.training import TrainRecipe, train
from pixart.training.adapters import add_lora
from pixart.training.recipe import Lora
from pixart.training.text_to_image import TextToImage

EVERY_LAYER = [*Lora().layers, "x_embedder.proj", "t_block.1", "y_proj.fc1", "final_layer.linear"]
KINDS = {
    "lora": {"rank": 3, "alpha": 5},
    "dora": {"rank": 2, "dora": True},
    "every_layer": {"rank": 2, "layers": EVERY_LAYER},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_features(folder / "features")
    torch.manual_seed(0)
    base = PixArt(PixArtConfig(**MODEL))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    base.save_pretrained(folder / "base")
    checkpoints.save_diffusers(base, folder / "diffusers")
    return folder


def adapting(folder: Path, name: str, settings: dict, **changes: object) -> TrainRecipe:
    model = {**MODEL, "init": str(folder / "base")}
    return recipe(
        folder / name, folder / "features", **{"model": model, "lora": settings, **changes}
    )


def trained(made: TrainRecipe) -> PixArt:
    tasks = []

    def make(device: torch.device) -> TextToImage:
        tasks.append(TextToImage(made, device))
        return tasks[0]

    train(made, make)
    return tasks[0].module.eval()


def adapter_file(made: TrainRecipe) -> dict[str, torch.Tensor]:
    return load_file(made.output / "lora" / "adapter_model.safetensors")


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(3, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([1, 400, 999]),
        "caption": torch.randn(3, 5, 6, generator=generator),
    }


@torch.no_grad()
def output(model: PixArt) -> torch.Tensor:
    return model.eval()(**inputs()).float()


@torch.no_grad()
def output_of_stock(model: torch.nn.Module) -> torch.Tensor:
    given = inputs()
    return model.eval()(
        given["latents"],
        encoder_hidden_states=given["caption"],
        timestep=given["timestep"],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_draws_what_its_run_trained(folder: Path, kind: str) -> None:
    made = adapting(folder, kind, KINDS[kind], steps=4, ema_decay=None)
    model, base = trained(made), PixArt.from_pretrained(folder / "base")
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    for name, parameter in base.named_parameters():
        assert torch.equal(frozen[name], parameter), name
    expected = output(model)
    assert (expected - output(base)).abs().max() > 0.01

    checkpoints.load_lora(base, made.output / "lora")
    torch.testing.assert_close(output(base), expected, atol=1e-5, rtol=1e-5)
    stock = PixArtTransformer2DModel.from_pretrained(folder / "diffusers")
    stock = PeftModel.from_pretrained(stock, str(made.output / "lora"))
    torch.testing.assert_close(output_of_stock(stock), expected, atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_from_adapters_alone(folder: Path) -> None:
    settings = {**KINDS["dora"], "base_dtype": "bfloat16"}
    rates = {"name": "constant", "warmup_steps": 3}
    whole = adapting(folder, "whole", settings, steps=7, schedule=rates)
    trained(whole)
    broken = adapting(folder, "broken", settings, steps=5, schedule=rates)
    trained(broken)
    trained(broken.model_copy(update={"steps": 7}))
    assert log(broken.output) == log(whole.output)
    for name, tensor in adapter_file(whole).items():
        assert torch.equal(adapter_file(broken)[name], tensor), name
    (file,) = (broken.output / "checkpoints").glob("*7/*.safetensors")
    weights = {name for name in load_file(file) if name.startswith("model.")}
    adapters = {name for name in weights if ".lora_" in name}
    assert adapters
    assert weights - adapters == {"model.y_embedder.y_embedding"}


@pytest.mark.parametrize("recompute", ["selective", True])
def test_recomputing_changes_nothing(folder: Path, recompute: object) -> None:
    gradients = []
    for changes in ({}, {"gradient_checkpointing": recompute}):
        torch.manual_seed(1)
        made = adapting(folder, "recomputing", KINDS["lora"], **changes)
        task = TextToImage(made, torch.device("cpu"))
        for parameter in task.module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        task.loss(task.module, task.collate([task.dataset[i] for i in (0, 4)]))["loss"].backward()
        gradients.append([p.grad for p in task.module.parameters() if p.requires_grad])
    for less, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(less, plain, atol=1e-6, rtol=1e-4)


def test_dora_of_a_fresh_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.dora: blocks.0.*zeros.*model.init"):
        add_lora(PixArt(PixArtConfig(**MODEL)), Lora(dora=True))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fresh_adapters_change_nothing_but_the_type(folder: Path, dora: bool) -> None:
    base = PixArt.from_pretrained(folder / "base").bfloat16()
    model = PixArt.from_pretrained(folder / "base")
    add_lora(model, Lora(rank=2, dora=dora, base_dtype="bfloat16"))
    types = {p.requires_grad: p.dtype for p in model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    layer = model.blocks[0].attn.qkv
    if dora:
        norms = base.blocks[0].attn.qkv.weight.float().norm(dim=1)
        magnitudes = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitudes.detach(), norms, atol=1e-6, rtol=1e-6)
    error = (output(model) - output(base)).norm() / output(base).norm()
    # without fused kernels, as adapters' inputs and outputs are to be seen
    assert error < 0.01


def test_two_processes_share_rounded_weights_and_adapters(folder: Path) -> None:
    settings = {**KINDS["dora"], "base_dtype": "bfloat16"}
    one = adapting(folder, "one", settings, steps=3, gradient_accumulation=2)
    two = adapting(folder, "two", settings, steps=3, parallel={"strategy": "fsdp"})
    trained(one)
    train_apart(two, processes=2)
    for name, tensor in adapter_file(one).items():
        torch.testing.assert_close(adapter_file(two)[name], tensor, atol=1e-3, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"layers": ["attn.qvk"]}}, "lora.layers: .*attn.qvk.* not found"),
        ({"lora": {"layers": ["adaLN_modulation.1"]}}, "used by its weights"),
        ({"lora": {"rnk": 4}}, "lora.rnk: unknown key .did you mean rank"),
        ({"lora": {"base_dtype": "bf16"}}, "lora.base_dtype: .*bfloat16"),
        (
            {"lora": {}, "model": {**MODEL, "conditioning": "class", "num_classes": 3}},
            "a class model has none",
        ),
    ],
    ids=["no_layer", "modulation", "unknown_key", "type", "class_model"],
)
def test_wrong_settings_are_named(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextToImage(adapting(folder, "wrong", {}, **changes), torch.device("cpu"))
