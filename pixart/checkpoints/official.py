"""The official checkpoints: their names are ours, and what their tensors say of the config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixart.config import PixArtConfig
from pixart.model import PixArt

# 72 in every published model; a state dict does not show it
HEAD_WIDTH = 72
POSITIONS = "pos_embed"
NULL_CAPTION = "y_embedder.y_embedding"


def to_official(model: PixArt) -> dict[str, Tensor]:
    """The state dict of the official ``PixArt`` and ``PixArtMS``, for a strict load.

    It is ``model.state_dict()``, whose tensors are the model's own, and ``pos_embed``
    (1, (input_size / patch_size)^2, D) in fp32, a buffer of the official models. DiT's names are
    the same, so a "class" model is written as a DiT.
    """
    state = dict(model.state_dict())
    side = model.config.input_size // model.config.patch_size
    device = next(model.parameters()).device
    # a copy: what position_embedding returns is what the next forward adds
    return {POSITIONS: model.position_embedding((side, side), device).clone(), **state}


def infer_config(state: Mapping[str, Tensor], source: object) -> PixArtConfig:
    """The config that an official state dict tells of.

    The heads are taken to be 72 wide, the grid and its interpolation are read off ``pos_embed``.
    Two things cannot be seen: a KV compression that learns nothing (every sampling but "conv"),
    and caption_dropout, which gets its default.

    Raises:
        ValueError: listing what is not there to be seen.
    """
    fields = visible_fields(state)
    if "hidden_size" not in fields or "depth" not in fields:
        some = ", ".join(list(state)[:4])
        raise ValueError(
            f"{source}: no PixArt checkpoint, x_embedder.proj.weight or blocks.* is amiss; "
            f"it holds {len(state)} tensors: {some}, ..."
        )
    unclear = []
    if fields["hidden_size"] % HEAD_WIDTH:
        unclear.append(f"num_heads (hidden_size is {fields['hidden_size']}, no multiple of 72)")
    if POSITIONS in state:
        positions = _position_fields(state[POSITIONS], fields.get("patch_size", 1))
        if positions is None:
            unclear.append("input_size and pe_interpolation (pos_embed is no square sinusoid grid)")
    else:
        positions = None
        unclear.append("input_size and pe_interpolation (there is no pos_embed)")
    if unclear:
        raise ValueError(
            f"{source}: the tensors do not show {' nor '.join(unclear)}; pass a config, "
            'for example pixart.presets["sigma-1024"]'
        )
    fields |= {"num_heads": fields["hidden_size"] // HEAD_WIDTH, **(positions or {})}
    try:
        return PixArtConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: its tensors fit no config: {error}; pass a config") from error


def visible_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config's fields that names and shapes show; those that do not show are left out."""

    def shape(key: str, rank: int) -> tuple[Any, ...]:
        known = key in state and state[key].dim() == rank
        return tuple(state[key].shape) if known else (None,) * rank

    def blocks_with(name: str) -> list[int]:
        found = (re.fullmatch(rf"blocks\.(\d+)\.{name}", key) for key in state)
        return sorted({int(match[1]) for match in found if match})

    D, C, p, _ = shape("x_embedder.proj.weight", 4)
    mlp, mlp_in = shape("blocks.0.mlp.fc1.weight", 2)
    tokens, _ = shape(NULL_CAPTION, 2)
    labels, _ = shape("y_embedder.embedding_table.weight", 2)
    blocks = blocks_with(".+")
    micro = any(key.startswith(("csize_embedder.", "ar_embedder.")) for key in state)
    conditioning = "adaln_single"
    if not blocks_with(r"cross_attn\..+"):
        conditioning = "class"
    elif blocks_with(r"adaLN_modulation\..+"):
        conditioning = "adaln"
    fields: dict[str, Any] = {
        "patch_size": p,
        "in_channels": C,
        "hidden_size": D,
        "depth": blocks[-1] + 1 if blocks else None,
        "mlp_ratio": mlp / mlp_in if mlp and mlp_in else None,
        "caption_channels": shape("y_embedder.y_proj.fc1.weight", 2)[1],
        # without a null caption: PixArt-alpha's length if it must be alpha, else the longer one
        "max_caption_tokens": 120 if micro and tokens is None else tokens,
        "micro_conditioning": micro,
        "qk_norm": bool(blocks_with(r"attn\.[qk]_norm\..+")),
        "conditioning": conditioning,
        "gated_cross_attention": bool(blocks_with(r"cross_attn\.gate")),
        "num_classes": None if labels is None else labels - 1,
    }
    if p and C:
        fields["learn_sigma"] = shape("final_layer.linear.weight", 2)[0] != p * p * C
    convolved = blocks_with(r"attn\.(sr|norm)\..+")
    if convolved:
        scales = (shape(f"blocks.{layer}.attn.sr.weight", 4)[3] for layer in convolved)
        # of no convolution at all the check of the keys will tell
        scale = next((scale for scale in scales if scale), 2)
        kv = {"sampling": "conv", "scale_factor": scale, "layers": convolved}
        fields["kv_compression"] = kv
    return {name: value for name, value in fields.items() if value is not None}


def positions_fit(model: PixArt, stored: Tensor) -> bool:
    """Whether (1, N, D) of a file are the positions that the model computes for its own grid."""
    side = model.config.input_size // model.config.patch_size
    half = model.config.hidden_size // 2
    if stored.shape != (1, side * side, 2 * half) or not stored.is_floating_point():
        return False
    grid = stored.float().view(side, side, 2 * half)
    # a row and a column tell it all, and computing them leaves no large embedding in the cache
    cpu = torch.device("cpu")
    by_column = model.position_embedding((1, side), cpu)[..., :half]
    by_row = model.position_embedding((side, 1), cpu)[..., half:].transpose(0, 1)
    tolerance = max(1e-4, 2 * torch.finfo(stored.dtype).eps)
    errors = (grid[..., :half] - by_column).abs().max(), (grid[..., half:] - by_row).abs().max()
    return bool(max(errors) <= tolerance)


def positions_differ(model: PixArt, stored: Tensor, source: object) -> str:
    """What to tell whoever loads a file whose positions are not the config's."""
    config = model.config
    got = _position_fields(stored, config.patch_size) or {"shape": tuple(stored.shape)}
    values = ", ".join(f"{name} {value}" for name, value in got.items())
    return (
        f"{source}: its pos_embed is that of {values}; the config's input_size "
        f"{config.input_size}, pe_interpolation {config.pe_interpolation} are used. This is as it "
        "should be when a model is grown to another size, and otherwise spoils its images"
    )


def _position_fields(stored: Tensor, patch_size: int) -> dict[str, Any] | None:
    """input_size and pe_interpolation of an embedding (1, N, D), None where it shows neither."""
    if (
        not stored.is_floating_point()
        or stored.dim() != 3
        or stored.shape[2] % 4
        or not stored.numel()
    ):
        return None
    side = math.isqrt(stored.shape[1])
    if side * side != stored.shape[1] or side < 2:
        return None
    # the first row's last token lies at (side - 1) / pe_interpolation: the lowest frequency is far
    # from wrapping around, and tells how often the highest and most precise has done so
    quarter = stored.shape[2] // 4
    sines = stored[0, side - 1, :quarter].double()
    cosines = stored[0, side - 1, quarter : 2 * quarter].double()
    angles = torch.atan2(sines, cosines)
    coarse = float(angles[-1]) * 10_000 ** ((quarter - 1) / quarter)
    if not 0 < coarse < math.inf:
        return None
    fine = float(angles[0])
    fine += 2 * math.pi * round((coarse - fine) / (2 * math.pi))
    if fine <= 0:
        return None
    # of a sine in the file, and of the coordinate, which is fp32 before
    rounding = max(torch.finfo(stored.dtype).eps / fine, 4 * torch.finfo(torch.float32).eps)
    interpolation = _simplest((side - 1) / fine, rounding)
    return {"input_size": side * patch_size, "pe_interpolation": interpolation}


def _simplest(value: float, tolerance: float) -> float:
    """The fraction of smallest denominator within a relative tolerance: 2 for 1.9999998."""
    candidates = (round(value * d) / d for d in range(1, 1001))
    return next((c for c in candidates if abs(c - value) <= tolerance * value), value)
