"""A grown model goes on from what the model before it has learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import CONFIGS, PLAIN, inputs, randomized
from torch import Tensor

from pixart import PixArt, PixArtConfig, presets
from pixart.checkpoints import from_dit, grow

KV = {"sampling": "conv", "scale_factor": 2, "layers": [1, 2]}
FINER = replace(PLAIN, input_size=32, pe_interpolation=1.0)


def output(model: PixArt, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**{**inputs(model.config), **changes})


@pytest.mark.parametrize(
    "config",
    [
        FINER,
        replace(PLAIN, micro_conditioning=True),
        replace(PLAIN, max_caption_tokens=16),
        replace(PLAIN, depth=5),
        replace(FINER, micro_conditioning=True, depth=4, max_caption_tokens=8),
    ],
    ids=["size", "micro-conditioning", "caption", "depth", "all"],
)
def test_draws_the_same_as_before(config: PixArtConfig) -> None:
    model = randomized(PLAIN)
    grown, _ = grow(model, config)
    assert grown.config == config and grown.training
    assert torch.equal(output(grown), output(model))


@pytest.mark.parametrize("conditioning", ["adaln", "class"])
def test_other_conditionings_grow_too(conditioning: str) -> None:
    config = CONFIGS[conditioning]
    model = randomized(config)
    grown, _ = grow(model, replace(config, depth=4, input_size=32, pe_interpolation=1.0))
    assert torch.equal(output(grown), output(model))


@pytest.mark.parametrize("conditioning", ["adaln_single", "adaln", "class"])
def test_new_blocks_learn(conditioning: str) -> None:
    config = replace(PLAIN, conditioning=conditioning)
    grown, _ = grow(randomized(config), replace(config, depth=4))
    grown(**inputs(grown.config)).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in grown.blocks[3].parameters())


def test_new_micro_conditions_learn() -> None:
    grown, _ = grow(randomized(PLAIN), replace(PLAIN, micro_conditioning=True))
    grown(**inputs(grown.config)).square().sum().backward()
    for embedder in (grown.csize_embedder, grown.ar_embedder):
        assert embedder.mlp[2].weight.grad.any()


def test_the_old_positions_are_among_the_finer_ones() -> None:
    grown, changes = grow(randomized(PLAIN), FINER)
    fine = grown.position_embedding((16, 16), torch.device("cpu")).view(16, 16, -1)
    coarse = PixArt(PLAIN).position_embedding((8, 8), torch.device("cpu")).view(8, 8, -1)
    assert torch.equal(fine[::2, ::2], coarse)
    assert changes[-1].kind == "interpolated"
    assert changes[-1].how == "8 x 8 -> 16 x 16 tokens, over 0 to 16 as before"


def test_positions_beyond_the_known_ones_are_named() -> None:
    *_, far = grow(randomized(PLAIN), replace(FINER, pe_interpolation=0.5))[1]
    assert far.kind == "extrapolated" and "0 to 16 -> 0 to 32" in far.how
    assert "pe_interpolation 1 would keep" in far.how
    *_, near = grow(randomized(PLAIN), replace(PLAIN, pe_interpolation=1.0))[1]
    assert near.kind == "contracted"


def test_compression_starts_as_an_average() -> None:
    model = randomized(PLAIN)
    grown, changes = grow(model, replace(PLAIN, kv_compression=KV))
    kv = torch.randn(2, 6 * 4, 2, 144)
    grown.requires_grad_(False)
    averaged = kv.view(2, 3, 2, 2, 2, 2, 144).mean((2, 4)).flatten(1, 2)
    expected = torch.nn.functional.layer_norm(averaged, (144,))
    torch.testing.assert_close(grown.blocks[2].attn.compress(kv, (6, 4)), expected)
    said = {change.parts: change.how for change in changes if change.kind == "initialised"}
    assert said == {
        "blocks.1-2.attn.sr": "the average of 2 x 2 tokens",
        "blocks.1-2.attn.norm": "LayerNorm of weight 1",
    }


@pytest.mark.parametrize("sampling", ["uniform", "ave"])
def test_compression_changes_nothing_where_tokens_are_alike(sampling: str) -> None:
    kv = {"sampling": sampling, "scale_factor": 2, "layers": [0]}
    model = randomized(PLAIN)
    grown, _ = grow(model, replace(PLAIN, kv_compression=kv))
    x = torch.randn(2, 3, 1, 2, 1, 144).expand(-1, -1, 2, -1, 2, -1).reshape(2, 24, 144)
    with torch.no_grad():
        expected = model.blocks[0].attn(x, (6, 4))
        torch.testing.assert_close(grown.blocks[0].attn(x, (6, 4)), expected)


def test_compression_spreads_to_more_blocks() -> None:
    model = randomized(replace(PLAIN, kv_compression={**KV, "layers": [2]}))
    grown, _ = grow(model, replace(PLAIN, kv_compression=KV))
    assert torch.equal(grown.blocks[2].attn.sr.weight, model.blocks[2].attn.sr.weight)
    assert torch.equal(grown.blocks[1].attn.sr.weight, torch.full((144, 1, 2, 2), 0.25))


def test_null_caption_is_the_same_text_when_longer() -> None:
    model = randomized(PLAIN)
    grown, changes = grow(model, replace(PLAIN, max_caption_tokens=14))
    assert "7 tokens, repeated to 14" in [c.how for c in changes if c.kind == "extended"]
    short, long = (m.y_embedder.y_embedding.expand(2, -1, -1) for m in (model, grown))
    torch.testing.assert_close(output(grown, caption=long), output(model, caption=short))


def test_class_model_becomes_a_text_model() -> None:
    model = randomized(CONFIGS["class"])
    expected = from_dit(model, PLAIN, 321)
    grown, changes = grow(model, PLAIN, timestep=321)
    fresh = [c for c in changes if c.kind == "initialised"]
    assert {c.how for c in fresh} == {"text is ignored at first"}
    others = grown.state_dict()
    for key, tensor in expected.state_dict().items():
        if ".cross_attn." not in key and not key.startswith("y_embedder."):
            assert torch.equal(others[key], tensor), key
    assert [c.parts for c in changes if c.kind == "re-parameterised"] == [
        "blocks.*.scale_shift_table, final_layer.scale_shift_table, t_block.1"
    ]


def test_another_autoencoder_keeps_or_renews_both_ends() -> None:
    model = randomized(PLAIN)
    kept, changes = grow(model, PLAIN, vae_swap=True)
    assert torch.equal(output(kept), output(model))
    assert changes[-1].kind == "kept" and "x_embedder.proj" in changes[-1].parts
    wide, changes = grow(model, replace(PLAIN, in_channels=6), vae_swap=True)
    assert torch.equal(wide.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert not output(wide).any()
    (fresh,) = [c for c in changes if c.kind == "initialised"]
    assert fresh.parts == "final_layer.linear, x_embedder.proj"


def test_report_counts_every_parameter() -> None:
    grown, changes = grow(randomized(PLAIN), replace(FINER, kv_compression=KV, qk_norm=True))
    assert sum(change.parameters for change in changes) == sum(
        tensor.numel() for tensor in grown.state_dict().values()
    )


def test_source_is_left_alone_and_any_dtype() -> None:
    model = randomized(PLAIN).to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    grown, _ = grow(model, FINER)
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float32}
    for tensor in grown.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "width": ({}, {"hidden_size": 288}, "hidden_size 144 -> 288: every layer"),
    "heads": ({}, {"num_heads": 4}, "num_heads 2 -> 4"),
    "patch": ({}, {"patch_size": 4}, "patch_size 2 -> 4"),
    "sigma": ({}, {"learn_sigma": False}, "learn_sigma True -> False"),
    "text": ({}, {"caption_channels": 11}, "caption_channels 10 -> 11"),
    "latents": ({}, {"in_channels": 16}, "in_channels 4 -> 16: .* vae_swap"),
    "shallower": ({}, {"depth": 2}, "depth 3 -> 2"),
    "shorter": ({}, {"max_caption_tokens": 6}, "max_caption_tokens 7 -> 6"),
    "micro": ({"micro_conditioning": True}, {}, "micro_conditioning True -> False"),
    "gate": ({}, {"gated_cross_attention": True}, "would silence"),
    "conv": ({"kv_compression": KV}, {}, "kv_compression .* -> None: a block's convolution"),
    "window": (
        {"kv_compression": KV},
        {"kv_compression": {**KV, "scale_factor": 4}},
        "'scale_factor': 4.*learned for its window",
    ),
    "to class": ({}, {"conditioning": "class"}, "conditioning adaln_single -> class"),
    "ablation": ({"conditioning": "adaln"}, {}, "conditioning adaln -> adaln_single"),
    "labels": ({"conditioning": "class"}, {"conditioning": "class", "num_classes": 7}, "labels"),
    "twice": ({"conditioning": "class"}, {"depth": 4}, "text model first"),
}


@pytest.mark.parametrize(("old", "new", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_would_lose_or_garble(
    old: dict[str, Any], new: dict[str, Any], message: str
) -> None:
    with torch.device("meta"):
        model = PixArt(replace(PLAIN, **old))
    with pytest.raises(ValueError, match=message):
        grow(model, replace(PLAIN, **new))


PATHS = [
    ("dit-256", "alpha-256", False),
    ("alpha-256", "alpha-512", False),
    ("alpha-512", "alpha-1024", False),
    ("alpha-256", "sigma-256", True),
    ("sigma-256", "sigma-512", False),
    ("sigma-512", "sigma-1024", False),
    ("sigma-1024", "sigma-1024-kv", False),
    ("sigma-1024", "sigma-2k", False),
    ("sigma-1024-kv", "sigma-2k-kv", False),
    ("sigma-2k", "sigma-4k", False),
    ("sigma-2k-kv", "sigma-4k-kv", False),
    ("sigma-1024", "900m-1024", False),
]


@pytest.mark.parametrize(("source", "target", "vae_swap"), PATHS)
def test_the_papers_path(source: str, target: str, vae_swap: bool) -> None:
    def small(name: str) -> PixArtConfig:
        config = presets[name]
        kv = None if config.kv_compression is None else {**KV, "layers": [1]}
        depth = 3 if config.depth > 28 else 2
        width = {"hidden_size": 24, "num_heads": 2, "caption_channels": 6}
        return replace(config, **width, depth=depth, kv_compression=kv)

    _, changes = grow(PixArt(small(source)), small(target), vae_swap=vae_swap)
    kinds = {change.kind for change in changes}
    # alpha doubles the coordinates at 512px, and Sigma trains 256px at half steps
    new_range = target in ("alpha-512", "sigma-256")
    assert ("extrapolated" in kinds) == new_range
    assert ("interpolated" in kinds) == (
        presets[source].input_size != presets[target].input_size and not new_range
    )
