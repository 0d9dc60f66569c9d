"""Official files: what they hold, what is inferred from them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import NAMES, load_golden
from safetensors.torch import save_file
from small_models import CONFIGS, PLAIN, assert_equal_states, assert_same, randomized

from pixart import PixArt, PixArtConfig, presets
from pixart.checkpoints import load, official, save_official, to_official


def write(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 1e-4}}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_official_file_gives_the_official_output(name: str, suffix: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    model = load(write(golden.state, tmp_path / f"file{suffix}"), golden.config)
    output = model(**golden.inputs)
    torch.testing.assert_close(output, golden.output, rtol=0, atol=2e-6 * golden.output.abs().max())
    assert_equal_states(to_official(model), golden.state)


@pytest.mark.parametrize("name", NAMES)
def test_infers_the_config_of_the_official_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden(name)
    config = replace(golden.config, caption_dropout=0.1)  # not to be seen, so the default
    if "uniform" in name:
        config = replace(config, kv_compression=None)  # nor is a compression that learns nothing
    monkeypatch.setattr(official, "HEAD_WIDTH", config.hidden_size // config.num_heads)
    assert load(write(golden.state, tmp_path / "file.pth")).config == config


@pytest.mark.parametrize("name", presets)
def test_infers_every_preset(name: str) -> None:
    config = replace(presets[name], hidden_size=72, num_heads=1, caption_channels=8)
    inferred = official.infer_config(to_official(PixArt(config)), name)
    if config.conditioning == "class":  # nothing tells of captions, so their defaults
        inferred = replace(inferred, caption_channels=8, max_caption_tokens=120)
    assert inferred == config


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"kv_uniform"}))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    model = randomized(CONFIGS[name])
    save_official(model, tmp_path / f"file{suffix}")
    loaded = load(tmp_path / f"file{suffix}")
    expected = CONFIGS[name]
    if name == "everything":
        expected = replace(expected, caption_dropout=0.1, num_classes=1000)
    if name == "class":
        expected = replace(expected, caption_channels=4096, max_caption_tokens=300)
    assert loaded.config == expected
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_config_is_needed_for_a_compression_that_learns_nothing(tmp_path: Path) -> None:
    model = randomized(CONFIGS["kv_uniform"])
    save_official(model, tmp_path / "file.pth")
    assert_same(load(tmp_path / "file.pth", model.config), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interpolation", [0.25, 0.5, 1.0, 1.5, 2.0, 5.625, 0.77, 4.0])
def test_reads_positions_of_any_dtype(dtype: torch.dtype, interpolation: float) -> None:
    model = PixArt(replace(PLAIN, input_size=64, pe_interpolation=interpolation))
    state = to_official(model)
    state["pos_embed"] = state["pos_embed"].to(dtype)
    config = official.infer_config(state, "")
    assert config.pe_interpolation == pytest.approx(interpolation, rel=1e-3)
    if dtype == torch.float32 or interpolation != 0.77:  # low precision has simpler neighbours
        assert config == model.config
    assert official.positions_fit(PixArt(config), state["pos_embed"])


def test_official_positions_are_a_copy() -> None:
    model = PixArt(PLAIN)
    to_official(model)["pos_embed"].zero_()
    assert to_official(model)["pos_embed"].abs().max() == 1


def test_dtype_is_the_files(tmp_path: Path) -> None:
    model = randomized(PLAIN).bfloat16()
    save_official(model, tmp_path / "half.safetensors")
    assert_same(load(tmp_path / "half.safetensors"), model)


@pytest.mark.parametrize(
    ("containers", "read"),
    [
        (("state_dict_ema", "state_dict"), "state_dict"),
        (("state_dict_ema",), "state_dict_ema"),
        (("model", "ema"), "ema"),
        ((), None),
    ],
)
def test_container_that_the_official_inference_reads(
    containers: tuple, read: str | None, tmp_path: Path
) -> None:
    states = {name: to_official(randomized(PLAIN, seed)) for seed, name in enumerate(containers)}
    bare = to_official(randomized(PLAIN, seed=9))
    torch.save(states or bare, tmp_path / "file.pth")
    expected = states[read] if read else bare
    assert_equal_states(to_official(load(tmp_path / "file.pth")), expected)


def test_file_from_before_torch_1_6(tmp_path: Path) -> None:
    model = randomized(PLAIN)
    path = tmp_path / "file.pth"
    torch.save({"state_dict": to_official(model)}, path, _use_new_zipfile_serialization=False)
    assert_same(load(path), model)


def test_one_message_lists_every_wrong_key(tmp_path: Path) -> None:
    state = to_official(randomized(PLAIN))
    del state["blocks.2.attn.qkv.bias"], state["t_block.1.weight"]
    state["blocks.0.extra"] = torch.zeros(1)
    state["stranger.weight"] = torch.zeros(2)
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(5)
    state["t_embedder.mlp.0.bias"] = torch.zeros(144, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit") as error:
        load(write(state, tmp_path / "file.pth"))
    assert str(error.value).split("\n")[1:] == [
        "  missing (2): blocks.2.attn.qkv.bias, t_block.1.weight",
        "  unexpected (2): blocks.0.extra, stranger.weight",
        "  misshapen (2): t_embedder.mlp.0.bias: got (144,) torch.int8, expected (144,), "
        "blocks.1.mlp.fc2.bias: got (5,), expected (144,)",
    ]


# one of the layers that differ, and one of those that do not
SMALLEST = replace(CONFIGS["everything"], hidden_size=72, num_heads=1, depth=2)
KEYS = [key for key in to_official(PixArt(SMALLEST)) if not key.startswith("blocks.1.")]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_any_damaged_key_is_named(key: str, damage: str, tmp_path: Path) -> None:
    model = PixArt(SMALLEST)
    state = to_official(model)
    if damage == "misshapen":
        state[key] = state[key].flatten()[:1].view(1, 1, 1, 1, 1)
    else:
        del state[key]
    path = write(state, tmp_path / "file.safetensors")
    if key == "pos_embed":
        with pytest.raises(ValueError, match="input_size and pe_interpolation .*pos_embed"):
            load(path)
    elif key == "y_embedder.y_embedding" and damage == "missing":
        with pytest.warns(UserWarning, match="no null caption"):
            assert not load(path).y_embedder.y_embedding.any()
    else:
        with pytest.raises(ValueError, match="do not fit|no PixArt checkpoint") as error:
            load(path)
        assert key in str(error.value)
        with pytest.raises(ValueError, match="do not fit") as error:
            load(path, model.config)
        assert key in str(error.value)


def test_says_all_that_the_tensors_do_not_show(tmp_path: Path) -> None:
    state = to_official(PixArt(replace(PLAIN, hidden_size=48)))
    del state["pos_embed"]
    with pytest.raises(ValueError, match="num_heads .*48.* nor input_size and pe_interpolation"):
        load(write(state, tmp_path / "file.pth"))
    assert load(tmp_path / "file.pth", replace(PLAIN, hidden_size=48)).config.hidden_size == 48


def test_foreign_positions(tmp_path: Path) -> None:
    state = to_official(PixArt(PLAIN))
    state["pos_embed"] = torch.randn_like(state["pos_embed"]).abs()
    path = write(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="not the sinusoids"):
        load(path)
    with pytest.warns(UserWarning, match="pos_embed"):
        load(path, PLAIN)


@pytest.mark.parametrize("change", [{"pe_interpolation": 1.0}, {"input_size": 32}])
def test_warns_of_a_config_whose_positions_are_not_the_files(
    change: dict, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(to_official(PixArt(PLAIN)), tmp_path / "file.pth")
    load(path, PLAIN)
    assert not recwarn
    with pytest.warns(UserWarning, match="input_size 16, pe_interpolation 0.5; the config's"):
        assert load(path, replace(PLAIN, **change)).config == replace(PLAIN, **change)


def test_not_a_pixart(tmp_path: Path) -> None:
    path = write({"conv_in.weight": torch.zeros(3)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="no PixArt checkpoint.*conv_in.weight"):
        load(path)


def test_dit_loads_as_a_class_model(tmp_path: Path) -> None:
    # DiT's positions are the official ones at interpolation 1
    config = PixArtConfig(
        input_size=8, hidden_size=72, depth=2, num_heads=1, conditioning="class", num_classes=10,
        max_caption_tokens=300,
    )  # fmt: skip
    model = randomized(config)
    torch.save(to_official(model), tmp_path / "DiT.pt")
    loaded = load(tmp_path / "DiT.pt")
    assert loaded.config == replace(config, caption_channels=loaded.config.caption_channels)
    assert_equal_states(loaded.state_dict(), model.state_dict())
