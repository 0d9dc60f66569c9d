"""ControlNet: nothing at first, then what the official code computes; and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pixart import PixArt, PixArtConfig
from pixart.controlnet import ControlledPixArt

CONFIG = PixArtConfig(
    input_size=4, hidden_size=24, depth=4, num_heads=2, caption_channels=6, max_caption_tokens=5
)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@pytest.fixture
def base() -> PixArt:
    model = randomized(PixArt(CONFIG)).eval()
    assert isinstance(model, PixArt)
    return model


def inputs(height: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    return {
        "latents": torch.randn(3, 4, height, width),
        "timestep": torch.tensor([0, 400, 999]),
        "caption": torch.randn(3, 5, 6),
        "caption_mask": mask,
    }


def control(height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(3, 4, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, "selective", True])
def test_at_first_it_is_the_base_model_bit_for_bit(
    base: PixArt, dtype: torch.dtype, recompute: object
) -> None:
    base.to(dtype).gradient_checkpointing = recompute
    model = ControlledPixArt(base, 2)
    assert torch.equal(model(**inputs(), control=control()), base(**inputs()))


def test_blocks_are_wired_as_in_the_official_code(base: PixArt) -> None:
    """Its forward once more: base blocks and copies in turn, each output whole."""
    model = randomized(ControlledPixArt(base, 2), seed=3).eval()
    given, picture = inputs(), control()

    def whole(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x, (mlp, (table, t0)) = block(x, None, (2, 3), text, lengths, t.t_BD, t.t0)
        return x + (table[5] + t0.view(3, 6, -1)[:, 5])[:, None] * mlp

    with torch.no_grad():
        t = base.embed_time(given["timestep"])
        (text, *_), lengths = base.embed_text(given["caption"], given["caption_mask"])
        positions = base.position_embedding((2, 3), torch.device("cpu"))
        x = base.x_embedder(given["latents"]) + positions
        c = base.x_embedder(picture) + positions
        x = whole(base.blocks[0], x)
        first, second = model.controlnet
        c = whole(first.copied_block, x + first.before_proj(c))
        x = whole(base.blocks[1], x + first.after_proj(c))
        c = whole(second.copied_block, c)
        x = whole(base.blocks[2], x + second.after_proj(c))
        x = whole(base.blocks[3], x)
        table = base.final_layer.scale_shift_table + t.t_BD[:, None]
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + table[:, 1:]) + table[:, :1]
        expected = base._unpatchify(base.final_layer.linear(x), (2, 3))
        got = model(**given, control=picture)
        one_for_all = model(**given, control=picture[:1])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one_for_all[0], got[0])
        assert (one_for_all[1] - got[1]).abs().max() > 1e-3
        plain = base(**given)
    # a call leaves nothing behind
    assert (got - plain).abs().max() > 0.1
    assert not any(block._forward_hooks for block in base.blocks)


@pytest.mark.parametrize("recompute", [False, "selective", True])
def test_gradients_reach_the_copies_alone(base: PixArt, recompute: object) -> None:
    base.gradient_checkpointing = recompute
    model = ControlledPixArt(base, 3)
    randomized(model.controlnet)
    model(**inputs(), control=control()).square().mean().backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.controlnet.parameters() if p.numel() > 1)


def test_files_have_the_official_names(base: PixArt, tmp_path: Path) -> None:
    model = ControlledPixArt(base, 2)
    randomized(model.controlnet)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "controlnet.safetensors")
    assert {
        "controlnet.0.before_proj.weight",
        "controlnet.1.after_proj.bias",
        "controlnet.1.copied_block.scale_shift_table",
        "controlnet.0.copied_block.attn.qkv.weight",
    } <= state.keys()
    assert all(name.startswith("controlnet.") for name in state)
    # the official training saves the base model beside
    torch.save({"state_dict": model.state_dict()}, tmp_path / "official.pth")
    for path in (tmp_path, tmp_path / "official.pth"):
        read = ControlledPixArt.from_pretrained(base, path)
        assert len(read.controlnet) == 2
        for name, tensor in read.controlnet.state_dict().items():
            assert torch.equal(tensor, state[f"controlnet.{name}"])


def test_wrong_input_is_named(base: PixArt, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`copies` is 4; accepted: 1 to 3"):
        ControlledPixArt(base, 4)
    model = ControlledPixArt(base, 1)
    with pytest.raises(ValueError, match=r"`control` is \(3, 4, 4, 4\)"):
        model(**inputs(), control=control(4, 4))
    with pytest.raises(ValueError, match=r"`control` is \(2, 4, 4, 6\)"):
        model(**inputs(), control=control()[:2])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no ControlNet"):
        ControlledPixArt.from_pretrained(base, tmp_path / "other.safetensors")
    save_file({"controlnet.0.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no ControlNet of this model"):
        ControlledPixArt.from_pretrained(base, tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        ControlledPixArt.from_pretrained(base, tmp_path / "missing")
