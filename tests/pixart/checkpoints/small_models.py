"""One small model for each feature that a checkpoint can have."""

from __future__ import annotations

from dataclasses import replace

import torch

from pixart import PixArt, PixArtConfig

# heads 72 wide, as a state dict is taken to have; every size differs from every other
PLAIN = PixArtConfig(
    input_size=16,
    hidden_size=144,
    depth=3,
    num_heads=2,
    caption_channels=10,
    max_caption_tokens=7,
    pe_interpolation=0.5,
)
KV_CONV = {"sampling": "conv", "scale_factor": 2, "layers": [1, 2]}
KV_UNIFORM = {"sampling": "uniform", "scale_factor": 2, "layers": [0]}
CONFIGS = {
    "plain": PLAIN,
    "micro": replace(PLAIN, micro_conditioning=True, pe_interpolation=2.0),
    "qk_norm": replace(PLAIN, qk_norm=True),
    "kv_conv": replace(PLAIN, kv_compression=KV_CONV),
    "kv_uniform": replace(PLAIN, kv_compression=KV_UNIFORM),
    "gated": replace(PLAIN, gated_cross_attention=True),
    "everything": replace(
        PLAIN,
        micro_conditioning=True,
        qk_norm=True,
        kv_compression={"sampling": "conv", "scale_factor": 3, "layers": [0]},
        gated_cross_attention=True,
        mlp_ratio=2.5,
        caption_dropout=0.25,
        num_classes=12,
    ),
    "noise_only": replace(PLAIN, learn_sigma=False, in_channels=3, patch_size=4),
    "42_layers": replace(PLAIN, depth=42, hidden_size=72, num_heads=1),
    "adaln": replace(PLAIN, conditioning="adaln"),
    "class": replace(PLAIN, conditioning="class", num_classes=5),
}
IN_DIFFUSERS = [name for name, c in CONFIGS.items() if c.conditioning == "adaln_single"]
IN_STOCK_DIFFUSERS = ["plain", "micro", "noise_only", "42_layers"]


def randomized(config: PixArtConfig, seed: int = 0) -> PixArt:
    """A model in which no layer is left at zero."""
    torch.manual_seed(seed)
    model = PixArt(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(config: PixArtConfig, size: tuple[int, int] = (16, 16)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "latents": torch.randn(2, config.in_channels, *size, generator=generator),
        "timestep": torch.tensor([3.0, 871.0]),
    }
    if config.conditioning == "class":
        return {**arguments, "caption": torch.tensor([4, 0])}
    arguments["caption"] = torch.randn(2, 6, config.caption_channels, generator=generator)
    if config.micro_conditioning:
        arguments["image_size"] = torch.tensor([[512.0, 640.0], [900.0, 33.0]])
        arguments["aspect_ratio"] = torch.tensor([[0.8], [2.1]])
    return arguments


def assert_same(model: PixArt, other: PixArt) -> None:
    """Equal configs, and equal tensors bit for bit, among them the null caption."""
    assert model.config == other.config
    assert_equal_states(model.state_dict(), other.state_dict())


def assert_equal_states(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key
