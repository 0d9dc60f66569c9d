"""What a step takes, held to what torch counts of real ones and to what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import RESULTS
from benchmarks.floor import _attention_flops
from benchmarks.memory import _allocations
from pixart import PixArt, PixArtConfig
from pixart.conditioning import CacheMetadata, CacheWriter
from pixart.floor import block_sites
from pixart.training import TrainRecipe
from pixart.training.control import ControlledTextToImage
from pixart.training.cost import memory, passes, weights, work
from pixart.training.distill import Distillation
from pixart.training.recipe import check_recipe
from pixart.training.text_to_image import TextToImage

SMALL = {"hidden_size": 96, "depth": 3, "num_heads": 4, "caption_channels": 64,
         "max_caption_tokens": 20}  # fmt: skip
BATCH = 2
KINDS: dict[str, dict] = {
    "whole": {},
    "lora": {"lora": {"rank": 4}},
    "lora of some": {"lora": {"rank": 5, "layers": ["attn.qkv", "blocks.1.mlp.fc2"]}},
    "lora beside 16 bits": {"lora": {"rank": 4, "base_dtype": "bfloat16"}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "distill": {"distill": {}, "ema_decay": 0.9},
    "distill without guidance": {"distill": {"guidance_scale": 1}, "ema_decay": 0.9},
    "distill to lora": {"distill": {}, "lora": {"rank": 4}, "ema_decay": 0.9},
    "control": {"control": {"features": "features", "copies": 2}},
}


def recipe(**changes: object) -> TrainRecipe:
    values = {
        "output": "run",
        "steps": 1000,
        "batch_size": BATCH,
        "mixed_precision": "bf16",
        "model": {},
        "data": {"features": "features"},
        **changes,
    }
    return check_recipe(TrainRecipe, values, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to begin with, and samples of 256 tokens that are their own control images."""
    folder = tmp_path_factory.mktemp("cost")
    model = PixArt(PixArtConfig(**SMALL))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)  # DoRA's layers must not be zero
    model.save_pretrained(folder / "init")
    metadata = CacheMetadata("text", "vae", "float16", 20, 64, 4)
    with CacheWriter(folder / "features", metadata, torch.randn(20, 64), 1) as writer:
        for i in range(BATCH):
            latents = {"latent_mean": torch.randn(4, 32, 32), "latent_std": torch.ones(4, 32, 32)}
            caption = torch.randn(20, 64)
            writer.add(key=f"{i}", text="", caption=caption, image_size=(256, 256), **latents)
    return folder


def of_kind(kind: str, folder: Path, **changes: object) -> TrainRecipe:
    settings = dict(KINDS[kind])
    if "control" in settings:
        settings["control"] = {**settings["control"], "features": folder / "features"}
    model = {**SMALL, "init": str(folder / "init")}
    data = {"features": folder / "features"}
    return recipe(**{"model": model, "data": data, "ema_decay": None, **settings, **changes})


def a_step(made: TrainRecipe) -> tuple[torch.nn.Module, Callable[[], None]]:
    """What a recipe trains, and a forward and backward as the training loop's."""
    kind = TextToImage
    if made.distill is not None or made.control is not None:
        kind = Distillation if made.control is None else ControlledTextToImage
    task = kind(made, torch.device("cpu"))
    module = task.module.train()
    if made.mixed_precision == "bf16":
        # as accelerate does
        module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)
    if made.ema_decay is not None:
        task.averages = {n: p.detach().clone() for n, p in module.named_parameters()
                         if p.requires_grad}  # fmt: skip
    batch = task.collate([task.dataset[i] for i in range(BATCH)])
    return module, lambda: task.loss(module, batch)["loss"].backward()


def check_memory(made: TrainRecipe, module: torch.nn.Module, step: Callable[[], None]) -> None:
    """The peak beyond weights and gradients, which the first step leaves."""
    step()
    module.zero_grad(set_to_none=False)
    found = memory(made)
    predicted = sum(found.get(name, 0) for name in ("activations", "working", "weights in 16 bits"))
    assert predicted == pytest.approx(max(_allocations(step)), rel=0.2)


@pytest.mark.parametrize("checkpointing", [False, "selective", True], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_flops_are_those_that_torch_counts(
    folder: Path, kind: str, checkpointing: bool | str
) -> None:
    made = of_kind(kind, folder, gradient_checkpointing=checkpointing)
    module, step = a_step(made)
    counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
    with counter:
        step()
    found = sum(flops for _, flops, _ in work(made))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.004)
    size, parameters = weights(made), list(module.parameters())
    assert size.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert size.frozen == sum(p.numel() for p in parameters if not p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "precision", "checkpointing"),
    [
        ("lora", "no", False),
        ("lora", "bf16", "selective"),
        ("lora", "bf16", True),
        ("lora beside 16 bits", "bf16", False),
        ("dora", "no", "selective"),
        ("dora", "bf16", False),
        ("distill", "no", False),
        ("distill", "bf16", True),
        ("distill to lora", "bf16", False),
        ("control", "no", False),
        ("control", "bf16", "selective"),
        ("control", "bf16", True),
    ],
)
def test_memory_of_each_kind_is_what_a_step_takes(
    folder: Path, kind: str, precision: str, checkpointing: bool | str
) -> None:
    """The peak of a step beyond weights and gradients, of a model that computes on a CPU."""
    made = of_kind(kind, folder, mixed_precision=precision, gradient_checkpointing=checkpointing)
    check_memory(made, *a_step(made))


def test_what_is_frozen_has_no_state() -> None:
    model = {"depth": 3, "init": "weights.pth"}
    whole = memory(recipe(model=model))
    parameters = whole["weights"] // 4
    lora = memory(recipe(model=model, lora={"rank": 8, "base_dtype": "bfloat16"}))
    # of each block, by width: (1 + 3) + 2 (1 + 1) + (1 + 2) + (1 + 1) + 2 (1 + 4)
    trained = 3 * 8 * 1152 * 23
    assert lora["weights"] == 2 * parameters + 4 * trained
    assert lora["gradients"] == lora["average"] == lora["optimizer"] // 2 == 4 * trained
    assert lora["weights in 16 bits"] == 2 * trained and "teacher" not in lora
    distill = memory(recipe(model=model, distill={}))
    assert distill["teacher"] == 2 * parameters and distill["gradients"] == 4 * parameters
    to_lora = recipe(model=model, distill={}, lora={}, mixed_precision="no")
    assert memory(to_lora)["teacher"] == 4 * parameters
    control = memory(recipe(model=model, control={"features": "edges", "copies": 2}), 4)
    copies = control["weights"] // 4 - parameters
    assert control["optimizer"] == 8 * copies and control["buckets of gradients"] == 4 * copies


def test_passes_of_each_kind() -> None:
    model = {"depth": 5, "init": "weights.pth"}

    def found(**section: dict) -> list[tuple]:
        each = passes(recipe(model=model, **section))
        return [(len(x.layers), x.batch, x.backward, x.lora is not None) for x in each]

    assert found() == [(5, BATCH, "all", False)]
    assert found(lora={}) == [(5, BATCH, "inputs", True)]
    assert found(distill={}, lora={}) == [
        (5, BATCH, "inputs", True),
        (5, 2 * BATCH, "none", False),
        (5, BATCH, "none", True),
    ]
    assert found(control={"features": "edges", "copies": 3}) == [
        (1, BATCH, "none", False),
        (4, BATCH, "inputs", False),
        (3, BATCH, "copies", False),
    ]


def test_compressed_keys_and_values_are_attended() -> None:
    model = {"preset": "sigma-1024-kv"}
    config = recipe(model=model).config
    plain, compressed = (
        {site.name: site for site in block_sites(config, 4096, 300, layer=layer)}
        for layer in (13, 14)
    )
    assert 4 * compressed["self-attention"].flops == plain["self-attention"].flops
    image = 2 * 4096 * 1152
    assert compressed["compress k, v"].bytes == 2 * image + image // 2
    assert "compress k, v" not in plain


def test_activations_are_those_that_were_counted() -> None:
    modes = {"default": False, "selective": "selective", "whole blocks": True}
    rows = [json.loads(x) for x in (RESULTS / "cpu" / "memory.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["mode"] in modes]
    assert len(rows) == 6
    for row in rows:
        half = "bf16" if row["precision"] == "bf16 autocast" else "no"
        B, N, D = row["shape"]
        made = recipe(
            model={"depth": 1, "hidden_size": D, "max_caption_tokens": row["text"]},
            data={"features": "features", "size": 16 * int(N**0.5)},
            batch_size=B,
            mixed_precision=half,
            gradient_checkpointing=modes[row["mode"]],
        )
        assert memory(made)["activations"] == pytest.approx(row["bytes"], rel=0.01)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, "selective", True], ids=str)
def test_memory_is_what_a_step_takes(checkpointing: bool | str, precision: str) -> None:
    """The peak of a backward beyond weights and gradients, of a model that computes on a CPU."""
    made = recipe(
        model={"hidden_size": 96, "depth": 3, "num_heads": 4, "caption_channels": 64,
               "max_caption_tokens": 20},
        mixed_precision=precision,
        gradient_checkpointing=checkpointing,
        batch_size=2,
    )  # fmt: skip
    model = PixArt(made.config).train()
    model.gradient_checkpointing = checkpointing
    inputs = torch.randn(2, 4, 32, 32), torch.randint(1000, (2,)), torch.randn(2, 20, 64)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(*inputs, torch.ones(2, 20))
        output.float().square().mean().backward()

    check_memory(made, model, step)


def test_state_is_shared_out_by_fsdp_alone() -> None:
    sharded = {"parallel": {"strategy": "fsdp"}}
    alone, ddp = memory(recipe()), memory(recipe(), 4)
    fsdp = memory(recipe(**sharded), 4)
    parameters = alone["weights"] // 4
    assert alone["optimizer"] == 8 * parameters
    for name in ("weights", "gradients", "optimizer", "average"):
        assert ddp[name] == alone[name] == pytest.approx(4 * fsdp[name], abs=4)
    assert ddp["buckets of gradients"] == alone["weights"]
    came = memory(recipe(optimizer={"name": "came"}, ema_decay=None))
    assert came["optimizer"] == 4 * parameters and came["average"] == 0
