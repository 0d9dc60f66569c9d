"""A PixArt that starts from DiT draws what the DiT draws."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, PLAIN, inputs, randomized

from pixart import PixArt, PixArtConfig
from pixart.checkpoints import from_dit, save, to_official

CLASS = CONFIGS["class"]
GATED = replace(PLAIN, gated_cross_attention=True)
MICRO = replace(PLAIN, micro_conditioning=True)


def dit() -> PixArt:
    model = randomized(CLASS)
    model.y_embedder.embedding_table.weight.data.zero_()
    return model


def outputs(model: PixArt, source: PixArt, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = inputs(model.config, (8, 24))
    arguments["timestep"] = torch.full((2,), timestep)
    of_dit = {**inputs(CLASS, (8, 24)), "timestep": arguments["timestep"]}
    with torch.no_grad():
        return model.eval()(**arguments), source(**of_dit)


@pytest.mark.parametrize("config", [PLAIN, GATED, MICRO], ids=["plain", "gated", "micro"])
@pytest.mark.parametrize("timestep", [500, 37.5])
def test_equals_dit_at_the_timestep(config: PixArtConfig, timestep: float) -> None:
    source = dit()
    model = from_dit(source, config, timestep)
    assert model.training and model.config == config
    output, expected = outputs(model, source, timestep)
    scale = float(expected.abs().max())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * scale)
    elsewhere, expected = outputs(model, source, 900.0)
    assert (elsewhere - expected).abs().max() > 1e-3 * scale


def test_adaln_equals_dit_everywhere() -> None:
    source = dit()
    model = from_dit(source, CONFIGS["adaln"])
    for timestep in (0.0, 500.0, 900.0):
        output, expected = outputs(model, source, timestep)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_shared_layer_is_the_best_for_other_timesteps() -> None:
    source = dit()
    model = from_dit(source, PLAIN)
    source.requires_grad_(False)
    t = source.t_embedder(torch.arange(0.0, 1000.0, 100.0))

    def error(weight: torch.Tensor) -> float:
        # with the best table for this weight, the mean over timesteps
        s = torch.nn.functional.silu(t)
        gaps = [s @ (block.adaLN_modulation[1].weight - weight).T for block in source.blocks]
        return sum(float((gap - gap.mean(0)).square().sum()) for gap in gaps)

    best = model.t_block[1].weight.detach()
    for block in source.blocks:
        step = 0.01 * (block.adaLN_modulation[1].weight - best)
        assert error(best + step) > error(best) < error(best - step)


def test_every_source(tmp_path: Path) -> None:
    source = dit()
    state = to_official(source)
    torch.save(state, tmp_path / "bare.pt")
    other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({"model": other, "ema": state, "opt": {}}, tmp_path / "training.pt")
    save(source, tmp_path / "folder")
    half = {key: tensor.half() for key, tensor in state.items()}
    for given in (source, state, tmp_path / "bare.pt", str(tmp_path / "training.pt"),
                  tmp_path / "folder"):  # fmt: skip
        output, expected = outputs(from_dit(given, PLAIN), source, 500.0)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert {p.dtype for p in from_dit(half, PLAIN).parameters()} == {torch.float32}


def test_source_is_left_alone() -> None:
    source = dit()
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    model = from_dit(source, PLAIN)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())


def test_norms_and_compression_are_copied_or_fresh() -> None:
    extras = {"qk_norm": True, "kv_compression": CONFIGS["kv_conv"].kv_compression}
    source = randomized(replace(CLASS, **extras))
    model = from_dit(source, replace(PLAIN, **extras))
    for key in ("blocks.0.attn.q_norm.weight", "blocks.1.attn.sr.weight"):
        assert torch.equal(model.state_dict()[key], source.state_dict()[key])
    fresh = from_dit(dit(), replace(PLAIN, **extras))
    assert torch.equal(fresh.blocks[0].attn.q_norm.weight, torch.ones(144))
    with pytest.raises(ValueError, match=r"unexpected.*blocks\.0\.attn\.q_norm\.weight"):
        from_dit(source, PLAIN)


def test_text_can_be_learned() -> None:
    model = from_dit(dit(), PLAIN).train()
    model(**inputs(PLAIN)).square().sum().backward()
    assert model.blocks[0].cross_attn.proj.weight.grad.abs().max() > 0


def test_report(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pixart.checkpoints"):
        from_dit(dit(), MICRO, 321)
    copied, derived, micro, text = caplog.messages
    assert "copied" in copied and "blocks.*.attn.qkv" in copied and "t_embedder.mlp.2" in copied
    assert derived.endswith(
        "re-parameterised (equal at timestep 321): "
        "blocks.*.scale_shift_table, final_layer.scale_shift_table, t_block.1"
    )
    assert "initialised (without effect at first)" in micro and "csize_embedder.mlp.0" in micro
    assert "blocks.*.cross_attn.proj" in text and "y_embedder.y_embedding" in text


def test_one_message_lists_every_wrong_key() -> None:
    state = to_official(dit())
    del state["blocks.1.adaLN_modulation.1.bias"], state["x_embedder.proj.bias"]
    state["final_layer.adaLN_modulation.1.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="do not fit") as error:
        from_dit(state, replace(PLAIN, depth=2, mlp_ratio=2.0))
    message = str(error.value)
    assert "missing (2): blocks.1.adaLN_modulation.1.bias, x_embedder.proj.bias" in message
    assert "unexpected (10)" in message and "blocks.2.attn.qkv.weight" in message
    assert "blocks.0.mlp.fc1.weight: got (576, 144), expected (288, 144)" in message
    assert "final_layer.adaLN_modulation.1.weight: got (2, 2), expected (288, 144)" in message


def test_other_positions_and_class_targets() -> None:
    with pytest.warns(UserWarning, match="pe_interpolation 0.5; the config's.* 1.0 are used"):
        from_dit(dit(), replace(PLAIN, pe_interpolation=1.0))
    with pytest.raises(ValueError, match="'class'; accepted"):
        from_dit(dit(), CLASS)
