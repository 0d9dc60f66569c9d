"""Against stock diffusers: the same weights compute the same, and folders go both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, Transformer2DModel, configuration_utils
from safetensors.torch import load_file, save_file
from small_models import (
    CONFIGS,
    IN_DIFFUSERS,
    IN_STOCK_DIFFUSERS,
    PLAIN,
    assert_equal_states,
    assert_same,
    inputs,
    randomized,
)

from pixart import PixArt, PixArtConfig, presets
from pixart.checkpoints import diffusers_config, load, save_diffusers, to_diffusers
from pixart.checkpoints.diffusers import from_diffusers_names, to_diffusers_names

NULL = "caption_projection.y_embedding"


def stock_of(model: PixArt) -> PixArtTransformer2DModel:
    stock = PixArtTransformer2DModel.from_config(diffusers_config(model.config))
    state = to_diffusers(model)
    del state[NULL]
    stock.load_state_dict(state)
    return stock.eval()


def run_stock(stock: PixArtTransformer2DModel, arguments: dict) -> torch.Tensor:
    return stock(
        arguments["latents"],
        encoder_hidden_states=arguments["caption"],
        timestep=arguments["timestep"],
        encoder_attention_mask=arguments.get("caption_mask"),
        added_cond_kwargs={
            "resolution": arguments.get("image_size"),
            "aspect_ratio": arguments.get("aspect_ratio"),
        },
    ).sample


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "wide"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", IN_STOCK_DIFFUSERS)
def test_same_output_as_stock(name: str, masked: bool, size: tuple[int, int]) -> None:
    model = randomized(CONFIGS[name])
    arguments = inputs(model.config, size)
    if masked:
        arguments["caption_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        assert_close(model(**arguments), run_stock(stock_of(model), arguments))


def test_same_gradients_as_stock() -> None:
    model = randomized(CONFIGS["micro"])
    stock, arguments = stock_of(model), inputs(model.config)
    arguments["caption_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    output = model(**arguments)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weight).sum().backward()
    (run_stock(stock, arguments) * weight).sum().backward()
    gradients = to_diffusers_names({n: p.grad for n, p in model.named_parameters()})
    expected = {name: p.grad for name, p in stock.named_parameters()}
    assert gradients.keys() == expected.keys()
    floor = 1e-6 * max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        atol = 2e-5 * float(gradient.abs().max()) + floor
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_names_round_trip(name: str) -> None:
    model = randomized(CONFIGS[name])
    renamed = to_diffusers(model)
    assert not renamed.keys() & model.state_dict().keys()
    assert_equal_states(from_diffusers_names(renamed), dict(model.state_dict()))


def test_names_are_those_of_diffusers_attention() -> None:
    names = to_diffusers(PixArt(CONFIGS["everything"])).keys()
    layers = ["attn1.norm_q", "attn1.norm_k", "attn1.sr", "attn1.norm"]
    assert {f"transformer_blocks.0.{layer}.weight" for layer in layers} <= names
    assert "transformer_blocks.2.attn2.gate" in names and NULL in names


@pytest.mark.filterwarnings("ignore:.*stock diffusers has no")
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    model = randomized(CONFIGS[name])
    save_diffusers(model, tmp_path)
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("name", IN_STOCK_DIFFUSERS)
def test_stock_reads_our_folder_and_writes_one_for_us(name: str, tmp_path: Path) -> None:
    model = randomized(CONFIGS[name])
    save_diffusers(model, tmp_path / "ours")
    stock, info = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert info == {
        "missing_keys": [],
        "unexpected_keys": [NULL],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    arguments = inputs(model.config)
    with torch.no_grad():
        assert_close(run_stock(stock, arguments), model(**arguments))

    stock.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="no null caption.*zeros"):
        back = load(tmp_path / "theirs")
    model.y_embedder.y_embedding.zero_()
    assert_same(back, model)


@pytest.mark.parametrize("sample_size", [32, 64, 128, 192])
@pytest.mark.parametrize("layout", ["transformer", "legacy", "pipeline", "sharded"])
def test_reads_a_folder_made_by_diffusers(sample_size: int, layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # interpolation and micro-conditioning are left to diffusers' defaults for the size
    stock = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48,
        sample_size=sample_size, caption_channels=10,
    )  # fmt: skip
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "transformer" if layout == "pipeline" else tmp_path
    stock.save_pretrained(folder, max_shard_size="100KB" if layout == "sharded" else "1GB")
    if layout == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 2
    if layout == "legacy":
        config = json.loads((folder / "config.json").read_text())
        config["_class_name"] = "Transformer2DModel"
        (folder / "config.json").write_text(json.dumps(config))
        assert isinstance(Transformer2DModel.from_pretrained(folder), PixArtTransformer2DModel)
    with pytest.warns(UserWarning, match=r"no null caption.*y_embedding\.copy_"):
        model = load(tmp_path)

    assert model.config == PixArtConfig(
        input_size=sample_size, hidden_size=48, depth=2, num_heads=2, caption_channels=10,
        max_caption_tokens=120 if sample_size == 128 else 300,
        pe_interpolation={32: 1.0, 64: 1.0, 128: 2.0, 192: 3.0}[sample_size],
        micro_conditioning=sample_size == 128,
    )  # fmt: skip
    assert not model.y_embedder.y_embedding.any()
    arguments = inputs(model.config, (8, 12))
    with torch.no_grad():
        assert_close(model(**arguments), run_stock(stock.eval(), arguments))


@pytest.mark.parametrize("name", [n for n, c in presets.items() if c.conditioning[-1] == "e"])
def test_stock_positions_of_every_preset(name: str) -> None:
    config = replace(presets[name], hidden_size=24, num_heads=1, depth=1, kv_compression=None)
    stock = PixArtTransformer2DModel.from_config(diffusers_config(config))
    side = config.input_size // 2
    ours = PixArt(config).position_embedding((side, side), torch.device("cpu"))
    torch.testing.assert_close(ours, stock.pos_embed.pos_embed, rtol=0, atol=1e-6)
    assert stock.use_additional_conditions == config.micro_conditioning


def test_stock_takes_the_config_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning", heard.append)
    PixArtTransformer2DModel.from_config(diffusers_config(PLAIN))
    assert not heard


def test_one_file_with_diffusers_names(tmp_path: Path) -> None:
    model = randomized(CONFIGS["qk_norm"])
    path = tmp_path / "file.safetensors"
    save_file(to_diffusers(model), path)
    assert_same(load(path, model.config), model)
    with pytest.raises(ValueError, match="input_size and pe_interpolation"):
        load(path)
    with pytest.raises(ValueError, match="'adaln'"):
        load(path, CONFIGS["adaln"])


def test_one_message_lists_every_wrong_key(tmp_path: Path) -> None:
    save_diffusers(randomized(PLAIN), tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["transformer_blocks.1.attn1.to_k.weight"], state["proj_out.bias"]
    state["transformer_blocks.0.attn1.to_q.weight"] = torch.zeros(3, 4)
    state["transformer_blocks.0.attn1.add_k_proj.weight"] = torch.zeros(3)
    save_file(state, weights)
    with pytest.raises(ValueError, match="do not fit") as error:
        load(tmp_path)
    assert str(error.value).split("\n")[1:] == [
        "  missing (2): proj_out.bias, transformer_blocks.1.attn1.to_k.weight",
        "  unexpected (1): transformer_blocks.0.attn1.add_k_proj.weight",
        "  misshapen (1): transformer_blocks.0.attn1.to_q.weight: got (3, 4), expected (144, 144)",
    ]


def test_missing_shard(tmp_path: Path) -> None:
    stock_of(randomized(PLAIN)).save_pretrained(tmp_path, max_shard_size="1MB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "DiTTransformer2DModel"},
        {"norm_type": "ada_norm_zero"},
        {"activation_fn": "geglu"},
        {"attention_bias": False},
        {"caption_channels": None},
        {"cross_attention_dim": 77},
        {"out_channels": 9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_folder_of_another_model(change: dict, tmp_path: Path) -> None:
    save_diffusers(PixArt(PLAIN), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"not a PixArt transformer: {name} {value!r}; accepted"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["adaln", "class"])
def test_conditionings_that_diffusers_has_not(name: str, tmp_path: Path) -> None:
    model = PixArt(CONFIGS[name])
    for write in (to_diffusers, lambda model: save_diffusers(model, tmp_path / "folder")):
        with pytest.raises(ValueError, match=f"`conditioning` is '{name}'; accepted"):
            write(model)
    assert not (tmp_path / "folder").exists()


def test_warns_of_what_stock_leaves_out(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save_diffusers(PixArt(PLAIN), tmp_path)
    assert not recwarn
    expected = "no qk_norm, kv_compression, gated_cross_attention, mlp_ratio"
    with pytest.warns(UserWarning, match=expected):
        save_diffusers(PixArt(CONFIGS["everything"]), tmp_path)
