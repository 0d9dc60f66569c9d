"""Adapters made by peft on a stock diffusers model, and saved as each trainer saves them."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from pixart import PixArt, checkpoints
from pixart.cli import app
from tests.pixart.checkpoints.small_models import CONFIGS, PLAIN, assert_same, inputs, randomized

CONFIG = replace(CONFIGS["micro"], depth=2, hidden_size=72, num_heads=1)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# what the official script trains: every linear layer, and the patches' convolution
ALL = [
    *ATTENTION,
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "proj",
    "linear",
    "linear_1",
    "linear_2",
]
ADAPTERS = {
    "attention": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION),
    "all_layers": LoraConfig(r=3, lora_alpha=5, target_modules=ALL),
    "rslora": LoraConfig(r=5, lora_alpha=4, target_modules=ALL, use_rslora=True),
    "dora": LoraConfig(r=2, lora_alpha=3, target_modules=ALL, use_dora=True),
    "patterns": LoraConfig(
        r=4, lora_alpha=3, target_modules=ATTENTION,
        rank_pattern={"attn2.to_k": 2, "transformer_blocks.1.attn1.to_q": 6},
        alpha_pattern={"attn2.to_k": 5, r"^transformer_blocks\.1\.attn2\.to_out\.0": 9},
    ),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=ALL),
    "lokr": LoKrConfig(r=2, alpha=5, target_modules=ALL, decompose_both=True),
    "lokr_of_full_matrices": LoKrConfig(r=99, alpha=40, target_modules=ATTENTION),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[PixArt, PixArtTransformer2DModel]:
    """One model twice: ours and diffusers'."""
    model = randomized(CONFIG)
    folder = tmp_path_factory.mktemp("base")
    checkpoints.save_diffusers(model, folder)
    return model, PixArtTransformer2DModel.from_pretrained(folder).eval()


def adapted(model: torch.nn.Module, config, seed: int = 0) -> PeftModel:
    """A copy of the model with an adapter whose every weight counts."""
    peft = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            std = 0.05 if "magnitude" in name else 0.2
            parameter.data += std * torch.randn_like(parameter)
    return peft.eval()


def drawn_by_diffusers(model: torch.nn.Module) -> Tensor:
    given = inputs(CONFIG)
    sizes = {"resolution": given["image_size"], "aspect_ratio": given["aspect_ratio"]}
    with torch.no_grad():
        return model(
            given["latents"], given["caption"], given["timestep"], added_cond_kwargs=sizes
        ).sample


@torch.no_grad()
def drawn(model: PixArt) -> Tensor:
    return model(**inputs(model.config))


def assert_loads(base: tuple, path: Path, expected: Tensor, scale: float = 1.0) -> None:
    """Ours, with the file merged, computes what the stock model computes with it active."""
    model = copy.deepcopy(base[0])
    changed = checkpoints.load_lora(model, path, scale)
    before, after = base[0].state_dict(), model.state_dict()
    assert changed == sorted(key for key in after if not torch.equal(before[key], after[key]))
    got, plain = drawn(model), drawn(base[0])
    error = (got - expected).norm() / (plain - expected).norm()
    assert error < 1e-5
    assert (plain - expected).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_folder_of_peft(kind: str, base: tuple, tmp_path: Path) -> None:
    peft = adapted(base[1], ADAPTERS[kind])
    peft.save_pretrained(str(tmp_path))
    expected = drawn_by_diffusers(peft)
    assert_loads(base, tmp_path, expected)
    assert_loads(base, tmp_path / "adapter_model.safetensors", expected)


def test_a_file_without_the_settings_of_peft(base: tuple, tmp_path: Path) -> None:
    peft = adapted(base[1], LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    peft.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="adapter_config.json, which tells alpha, is not beside"):
        assert_loads(base, tmp_path, drawn_by_diffusers(peft))


def test_peft_around_our_own_model(base: tuple, tmp_path: Path) -> None:
    targets = ["qkv", "kv_linear", "q_linear", "proj", "fc1", "fc2", "linear", "t_block.1", "mlp.0"]
    peft = adapted(base[0], LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    peft.save_pretrained(str(tmp_path))
    assert_loads(base, tmp_path, drawn(peft.get_base_model()))


@pytest.mark.parametrize("kind", ["attention", "all_layers", "rslora", "dora", "patterns"])
def test_a_file_of_diffusers(kind: str, base: tuple, tmp_path: Path) -> None:
    """Its settings are in the file's metadata."""
    peft = adapted(base[1], ADAPTERS[kind])
    settings = peft.peft_config["default"].to_dict()
    LoraBaseMixin._save_lora_weights(
        tmp_path,
        {"transformer": get_peft_model_state_dict(peft)},
        {"transformer": {name: value for name, value in settings.items() if value is not None}},
    )
    assert_loads(base, tmp_path, drawn_by_diffusers(peft))


def with_alpha(state: Mapping[str, Tensor], alpha: float, rename: Callable[[str], str]):
    """Names as a trainer writes them, given peft's without its prefix."""
    renamed = {}
    for key, tensor in state.items():
        renamed[rename(key)] = tensor
        if ".lora_A" in key:
            layer = re.sub(r"\.lora_(A|down)(\.default)?\.weight", "", rename(key))
            renamed[f"{layer}.alpha"] = torch.tensor(alpha)
    return renamed


def kohya(prefix: str) -> Callable[[str], str]:
    def rename(key: str) -> str:
        layer, part = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key).groups()
        return f"{prefix}{layer.replace('.', '_')}.lora_{'down' if part == 'A' else 'up'}.weight"

    return rename


def down_up(key: str) -> str:
    return key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


SPELLINGS = {
    "kohya": kohya("lora_unet_"),
    "onetrainer_flat": kohya("lora_transformer_"),
    "lycoris": kohya("lycoris_"),
    "onetrainer": lambda key: f"transformer.{down_up(key)}",
    "comfyui": lambda key: f"diffusion_model.{down_up(key)}",
    "old_peft_script": lambda key: f"unet.base_model.model.{key}",
    "state_dict_of_peft": lambda key: (
        f"base_model.model.{key.replace('.weight', '.default.weight')}"
    ),
    "bare": lambda key: key,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_file_as_trainers_spell_it(spelling: str, base: tuple, tmp_path: Path) -> None:
    peft = adapted(base[1], ADAPTERS["all_layers"])
    state = get_peft_model_state_dict(peft)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    spelt = with_alpha(state, 5, SPELLINGS[spelling])
    save_file(spelt, tmp_path / "style.safetensors")
    assert_loads(base, tmp_path / "style.safetensors", drawn_by_diffusers(peft))
    # the same, for the parameters are the same, in torch's own format
    torch.save(spelt, tmp_path / "style.bin")
    assert_loads(base, tmp_path / "style.bin", drawn_by_diffusers(peft))


def test_early_files_of_diffusers(base: tuple, tmp_path: Path) -> None:
    """Without alpha, which then is the rank; attention's layers belong to a processor."""
    peft = adapted(base[1], LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    state = get_peft_model_state_dict(peft)
    expected = drawn_by_diffusers(peft)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    named = {f"transformer.{key}": x for key, x in convert_state_dict_to_diffusers(state).items()}
    assert any(key.endswith("to_out.0.lora.down.weight") for key in named)
    save_file(named, tmp_path / "pytorch_lora_weights.safetensors")
    assert_loads(base, tmp_path, expected)

    def of_processor(key: str) -> str:
        key = re.sub(r"(attn\d)\.(to_\w+)(\.0)?\.lora_A", r"\1.processor.\2_lora.down", key)
        return re.sub(r"(attn\d)\.(to_\w+)(\.0)?\.lora_B", r"\1.processor.\2_lora.up", key)

    older = {of_processor(key): tensor for key, tensor in state.items()}
    assert "transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in older
    save_file(older, tmp_path / "old.safetensors")
    assert_loads(base, tmp_path / "old.safetensors", expected)
    flat = {f"unet.{key}": tensor for key, tensor in state.items()}
    save_file(convert_state_dict_to_kohya(flat), tmp_path / "kohya.safetensors")
    assert_loads(base, tmp_path / "kohya.safetensors", expected)


def test_the_same_of_lycoris(base: tuple, tmp_path: Path) -> None:
    """LoHa and LoKr with alpha as a tensor, under LyCORIS' names."""
    for kind in ("loha", "lokr"):
        peft = adapted(base[1], ADAPTERS[kind])
        named = {}
        for key, tensor in get_peft_model_state_dict(peft).items():
            layer, part = key.removeprefix("base_model.model.").rsplit(".", 1)
            layer = f"lycoris_{layer.replace('.', '_')}"
            named |= {f"{layer}.{part}": tensor, f"{layer}.alpha": torch.tensor(5.0)}
        save_file(named, tmp_path / f"{kind}.safetensors")
        assert_loads(base, tmp_path / f"{kind}.safetensors", drawn_by_diffusers(peft))


def test_kronecker_of_full_matrices_has_no_scale(tmp_path: Path) -> None:
    """LyCORIS writes an alpha all the same."""
    model = PixArt(PLAIN)
    W = model.blocks[0].mlp.fc2.weight.detach().clone()
    w1, w2 = torch.randn(12, 18), torch.randn(12, 32)
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(77.0)}
    layer = "lycoris_transformer_blocks_0_ff_net_2"
    save_file({f"{layer}.{part}": x for part, x in parts.items()}, tmp_path / "a.safetensors")
    assert checkpoints.load_lora(model, tmp_path / "a.safetensors") == ["blocks.0.mlp.fc2.weight"]
    torch.testing.assert_close(model.blocks[0].mlp.fc2.weight, W + torch.kron(w1, w2))


@pytest.mark.parametrize("axis", [0, 1], ids=["by_output", "by_input"])
@pytest.mark.parametrize("layer", ["attn1_to_k", "pos_embed_proj"])
def test_magnitudes_of_lycoris_and_onetrainer(axis: int, layer: str, tmp_path: Path) -> None:
    model = randomized(PLAIN)
    ours, rows = model.blocks[1].attn.qkv, slice(144, 288)
    if layer == "pos_embed_proj":
        ours, rows = model.x_embedder.proj, slice(None)
    W = ours.weight.detach()[rows].clone()
    others = [i for i in range(W.dim()) if i != axis]
    down, up = torch.randn(3, *W.shape[1:]), torch.randn(144, 3, *[1] * (W.dim() - 2))
    dora_scale = torch.rand_like(torch.linalg.vector_norm(W, dim=others, keepdim=True))
    parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": dora_scale}
    parts["alpha"] = torch.tensor(1.5)
    name = "pos_embed_proj" if layer == "pos_embed_proj" else f"transformer_blocks_1_{layer}"
    file = tmp_path / "a.safetensors"
    save_file({f"lora_transformer_{name}.{part}": x for part, x in parts.items()}, file)
    V = W + 0.5 * torch.einsum("or...,ri->oi", up.flatten(1), down.flatten(1)).view_as(W)
    expected = dora_scale * V / torch.linalg.vector_norm(V, dim=others, keepdim=True)

    checkpoints.load_lora(model, file)
    torch.testing.assert_close(ours.weight[rows], expected)
    # a scale is a share of the way there
    again = randomized(PLAIN)
    checkpoints.load_lora(again, file, 0.25)
    half_way = dict(again.named_parameters())["blocks.1.attn.qkv.weight"]
    half_way = again.x_embedder.proj.weight if layer == "pos_embed_proj" else half_way
    torch.testing.assert_close(half_way[rows], 0.75 * W + 0.25 * expected)


def test_several_at_their_scales(base: tuple, tmp_path: Path) -> None:
    peft = adapted(base[1], ADAPTERS["all_layers"])
    peft.add_adapter("other", ADAPTERS["attention"])
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if ".other." in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    peft.save_pretrained(str(tmp_path))
    peft.base_model.set_adapter(["default", "other"])
    for module in peft.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.7)
            module.set_scale("other", -0.3)
    model = copy.deepcopy(base[0])
    checkpoints.load_lora(model, tmp_path, 0.7)
    assert_loads((model, None), tmp_path / "other", drawn_by_diffusers(peft), -0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(dtype: torch.dtype, base: tuple, tmp_path: Path) -> None:
    peft = adapted(base[1], ADAPTERS["dora"])
    peft.save_pretrained(str(tmp_path))
    model = copy.deepcopy(base[0]).to(dtype)
    exact = copy.deepcopy(model).float()
    checkpoints.load_lora(model, tmp_path, 0.8)
    checkpoints.load_lora(exact, tmp_path, 0.8)
    for (name, got), parameter in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, parameter.to(dtype)), name


@pytest.mark.parametrize("name", ["kv_conv", "adaln", "class", "everything"])
def test_layers_of_every_kind_of_model(name: str, tmp_path: Path) -> None:
    """All linear layers and the patches' convolution are found, by our names."""
    config = CONFIGS[name]
    peft = adapted(randomized(config), LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    peft.save_pretrained(str(tmp_path))
    model = randomized(config)
    before = copy.deepcopy(model).state_dict()
    changed = checkpoints.load_lora(model, tmp_path)
    assert len(changed) == len(get_peft_model_state_dict(peft)) // 2 > 10
    merged = peft.merge_and_unload().state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in changed), key
        torch.testing.assert_close(tensor, merged[key])


def test_convert_writes_the_merged_model(base: tuple, tmp_path: Path) -> None:
    """Several files, at their scales, from the command line."""
    model = copy.deepcopy(base[0])
    model.save_pretrained(tmp_path / "model")
    for seed, kind in enumerate(("attention", "lokr")):
        adapted(base[1], ADAPTERS[kind], seed).save_pretrained(str(tmp_path / kind))
        checkpoints.load_lora(model, tmp_path / kind, (0.5, 1.0)[seed])
    options = ["--lora", f"{tmp_path / 'attention'}:0.5", "--lora", str(tmp_path / "lokr")]
    command = ["convert", str(tmp_path / "model"), str(tmp_path / "merged"), *options]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert_same(PixArt.from_pretrained(tmp_path / "merged"), model)
    wrong = CliRunner().invoke(app, [*command[:2], str(tmp_path / "x"), "--lora", "a:b"])
    assert "--lora is 'a:b'; accepted: FILE or FILE:SCALE" in str(wrong.exception)


def test_the_text_encoders_share_is_passed_over(base: tuple, tmp_path: Path) -> None:
    q, te = "lora_transformer_transformer_blocks_0_attn1_to_q", "lora_te_encoder_block_0_q"
    parts = {"lora_down.weight": torch.ones(2, 72), "lora_up.weight": torch.ones(72, 2)}
    text = {f"{te}.{part}": x.clone() for part, x in parts.items()}
    save_file({f"{q}.{part}": x for part, x in parts.items()} | text, tmp_path / "a.safetensors")
    model = copy.deepcopy(base[0])
    with pytest.warns(UserWarning, match=r"2 tensors for the text encoder .*lora_te_encoder"):
        assert checkpoints.load_lora(model, tmp_path / "a.safetensors") == [
            "blocks.0.attn.qkv.weight"
        ]
    save_file(text, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA of the transformer"):
        checkpoints.load_lora(model, tmp_path / "b.safetensors")


def test_all_problems_in_one_message_and_nothing_changed(base: tuple, tmp_path: Path) -> None:
    block = "transformer_blocks.1"
    tensors = {
        f"{block}.attn1.to_q.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn1.to_q.lora_B.weight": torch.ones(72, 2),
        f"transformer.{block}.attn1.to_q.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn1.to_k.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn1.to_k.lora_B.weight": torch.ones(72, 3),
        f"{block}.attn1.to_v.lora_A.weight": torch.ones(2, 80),
        f"{block}.attn1.to_v.lora_B.weight": torch.ones(72, 2),
        f"{block}.attn2.to_v.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn2.to_q.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn2.to_q.lora_B.weight": torch.ones(72, 2),
        f"{block}.attn2.to_q.lora_magnitude_vector": torch.ones(71),
        f"{block}.attn2.to_k.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn2.to_k.lora_B.weight": torch.ones(72, 2),
        f"{block}.attn2.to_k.alpha": torch.ones(2),
        f"{block}.ff.net.2.lora_A.weight": torch.ones(2, 288),
        f"{block}.ff.net.2.lora_B.weight": torch.ones(72, 2),
        f"{block}.ff.net.2.dora_scale": torch.ones(()),
        f"{block}.attn2.to_out.0.lora_A.weight": torch.ones(0, 72),
        f"{block}.attn2.to_out.0.lora_B.weight": torch.ones(72, 0),
        f"{block}.attn1.to_out.0.lora_A.weight": torch.full((2, 72), 1e300, dtype=torch.float64),
        f"{block}.attn1.to_out.0.lora_B.weight": torch.ones(72, 2, dtype=torch.int8),
        f"{block}.attn1.to_out.0.alpha": torch.tensor(math.nan),
        "transformer_blocks.7.attn1.to_q.lora_A.weight": torch.ones(2, 72),
        f"{block}.attn1.to_out.0.lora_B.bias": torch.ones(72),
        "proj_out.weight": torch.ones(32, 72),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    model = copy.deepcopy(base[0])
    with pytest.raises(ValueError) as raised:
        checkpoints.load_lora(model, tmp_path / "a.safetensors")
    said = str(raised.value).splitlines()
    assert said[1].endswith(
        f"of no kind that is read (3): proj_out.weight, {block}.attn1.to_out.0.lora_B.bias, "
        "transformer_blocks.7.attn1.to_q.lora_A.weight"
    )
    assert said[2].startswith("  given twice (1): ") and "attn1.to_q.lora_A.weight" in said[2]
    assert f"{block}.attn1.to_k (72, 72): down (2, 72), up (72, 3)" in said[3]
    assert said[3].startswith("  misshapen or incomplete (7): ")
    for layer in (
        "alpha (2,)",
        "dora_scale ()",
        "attn1.to_v",
        "attn2.to_v (72, 72): down (2, 72)",
        "magnitude (71,)",
        "up (72, 0)",
    ):
        assert layer in said[3]
    assert said[4] == (
        f"  not of finite floating-point numbers (3): {block}.attn1.to_out.0.alpha (float32), "
        f"{block}.attn1.to_out.0.lora_A.weight (float64), "
        f"{block}.attn1.to_out.0.lora_B.weight (int8)"
    )
    state = base[0].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_file_for_another_model_is_cut_short(base: tuple, tmp_path: Path) -> None:
    names = [f"lora_unet_down_blocks_{i}.lora_down.weight" for i in range(500)]
    save_file({name: torch.ones(1, 1) for name in names}, tmp_path / "sdxl.safetensors")
    with pytest.raises(ValueError, match=r"for no layer.* \(500\): .*, and 480 more") as raised:
        checkpoints.load_lora(base[0], tmp_path / "sdxl.safetensors")
    assert len(str(raised.value)) < 2000


def test_a_convolution_by_channel_is_no_layer_for_it(tmp_path: Path) -> None:
    """Of the products that peft and others take of its tensors, none is the other's."""
    down, up = torch.ones(3, 1, 2, 2), torch.ones(144, 3, 1, 1)
    name = "blocks.1.attn.sr"
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=r"for no layer.* \(2\): blocks.1.attn.sr.lora_A.weight"):
        checkpoints.load_lora(PixArt(CONFIGS["kv_conv"]), tmp_path / "a.safetensors")


REFUSED = {
    "another_method": ({"peft_type": "OFT"}, "`peft_type` is 'OFT': Input should be 'LORA', "),
    "another_base": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the"),
    "alpha_in_quotes": ({"lora_alpha": "2"}, "`lora_alpha` is '2': Input should be a valid number"),
    "alpha_not_finite": ({"lora_alpha": math.nan}, "`lora_alpha` is nan: Input should be a finite"),
    "rank_0": ({"r": 0}, "`r` is 0: Input should be greater than 0"),
    "list_of_patterns": ({"alpha_pattern": ["x"]}, "`alpha_pattern` is ['x']: Input should be a"),
    "half_a_pattern": ({"alpha_pattern": {"(": 4}}, "`alpha_pattern` is '(': accepted: a layer's"),
    # what peft's own search would never end with
    "endless_pattern": (
        {"alpha_pattern": {r"([\w.]+)+!": 4}},
        "accepted: a layer's name or how it",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("where", ["beside", "in_the_metadata"])
def test_settings_are_refused_by_name(kind: str, where: str, tmp_path: Path) -> None:
    settings, message = REFUSED[kind]
    model, file = PixArt(PLAIN), tmp_path / "adapter_model.safetensors"
    q = {"lora_A.weight": torch.ones(2, 144), "lora_B.weight": torch.ones(144, 2)}
    q = {f"transformer_blocks.0.attn1.to_q.{part}": tensor for part, tensor in q.items()}
    named = {f"transformer.{key}": value for key, value in settings.items()}
    save_file(q, file, {"lora_adapter_metadata": json.dumps(named)})
    told_by = file
    if where == "beside":
        told_by = tmp_path / "adapter_config.json"
        told_by.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        checkpoints.load_lora(model, file)
    assert str(raised.value).startswith(f"{told_by}: ") or kind == "another_base"


@pytest.mark.parametrize("text", ["[1]", "{", ""], ids=["list", "cut_short", "empty"])
def test_settings_that_are_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.ones(1)}, file, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: peft's settings: "):
        checkpoints.load_lora(PixArt(PLAIN), file)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json: peft's settings: "):
        checkpoints.load_lora(PixArt(PLAIN), file)


def test_the_tensors_tell_the_ranks_whatever_the_patterns(base: tuple, tmp_path: Path) -> None:
    ranks = {r"attn[12]\.to_(q|k)": 2, "transformer_blocks.0.*": 3}
    peft = adapted(base[1], LoraConfig(r=4, target_modules=ATTENTION, rank_pattern=ranks))
    peft.save_pretrained(str(tmp_path))
    assert_loads(base, tmp_path, drawn_by_diffusers(peft))


def test_absent_and_absurd(base: tuple, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none of adapter_model.safetensors, .*weights.bin"):
        checkpoints.load_lora(base[0], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such .*absent.safetensors"):
        checkpoints.load_lora(base[0], tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="`scale` is nan"):
        checkpoints.load_lora(base[0], tmp_path, float("nan"))
