"""The names and config of diffusers' ``PixArtTransformer2DModel``, both ways."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoints.official import visible_fields
from pixart.config import PixArtConfig
from pixart.model import PixArt

CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
# diffusers passes over config fields that begin with an underscore, and keeps them
EXTRA = "_pixart"

_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
# several names: our layer is theirs, one below the other
_BLOCK_NAMES = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    # stock diffusers has none of these; its attention class has the first two, for other models
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "attn.sr": ("attn1.sr",),
    "attn.norm": ("attn1.norm",),
    "cross_attn.gate": ("attn2.gate",),
}
_OUR_NAMES = {theirs: ours for ours, theirs in _NAMES.items()}
_OUR_BLOCK_NAMES = {
    theirs: (ours, part)
    for ours, names in _BLOCK_NAMES.items()
    for part, theirs in enumerate(names)
}


def to_diffusers(model: PixArt) -> dict[str, Tensor]:
    """The state dict of diffusers' ``PixArtTransformer2DModel``; the tensors are the model's own.

    The stock model finds every tensor it has. It has no place for the null caption,
    ``caption_projection.y_embedding``, a name that early diffusers files used: pop that key, or
    load with ``strict=False``. (``from_pretrained`` skips it with a warning.) Nor has it layers
    for qk_norm (``attn1.norm_q``, ``attn1.norm_k``), KV compression (``attn1.sr``,
    ``attn1.norm``) and gated cross-attention (``attn2.gate``): these are here so that nothing is
    lost on the way back, but a stock model without them computes something else.

    Raises:
        ValueError: the model's conditioning is not "adaln_single", diffusers' only one.
    """
    require_adaln_single(model.config)
    return to_diffusers_names(model.state_dict())


def to_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block, name, parameter = _parse(key, "blocks")
        if block is None:
            renamed[_NAMES[name] + parameter] = tensor
            continue
        names = _BLOCK_NAMES[name]
        for theirs, part in zip(names, tensor.chunk(len(names)), strict=True):
            renamed[f"transformer_blocks.{block}.{theirs}{parameter}"] = part
    return renamed


def from_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unknown names stay as they are, and layers of which a part is missing are left out."""
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        block, name, parameter = _parse(key, "transformer_blocks")
        if block is None:
            renamed[_OUR_NAMES.get(name, name) + parameter] = tensor
        elif name not in _OUR_BLOCK_NAMES:
            renamed[key] = tensor
        else:
            ours, part = _OUR_BLOCK_NAMES[name]
            split[f"blocks.{block}.{ours}{parameter}"][part] = tensor
    for key, parts in split.items():
        name = _parse(key, "blocks")[1]
        whole = len(parts) == len(_BLOCK_NAMES[name])
        if whole and len({tensor.shape[1:] for tensor in parts.values()}) == 1:
            tensors = [parts[part] for part in sorted(parts)]
            renamed[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return renamed


def uses_diffusers_names(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("transformer_blocks.", "adaln_single.")) for key in state)


def _parse(key: str, blocks: str) -> tuple[str | None, str, str]:
    """``blocks.3.attn.qkv.weight`` -> (3, attn.qkv, .weight)."""
    match = re.fullmatch(rf"(?:{blocks}\.(\d+)\.)?(.+?)(\.weight|\.bias)?", key)
    assert match is not None
    return match[1], match[2], match[3] or ""


def diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """``config.json`` of a diffusers folder; ``_pixart`` keeps what diffusers has no field for.

    Raises:
        ValueError: the conditioning is not "adaln_single".
    """
    require_adaln_single(config)
    return {
        "_class_name": CLASSES[0],
        **_FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "cross_attention_dim": config.hidden_size,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
        # both have defaults that hang on sample_size, and suit the published sizes alone
        "interpolation_scale": config.pe_interpolation,
        "use_additional_conditions": config.micro_conditioning,
        "caption_channels": config.caption_channels,
        EXTRA: {name: v for name, v in config.to_dict().items() if name not in _STOCK_FIELDS},
    }


# what makes a diffusers transformer a PixArt
_FIXED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_STOCK_FIELDS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "caption_channels",
    "pe_interpolation",
    "micro_conditioning",
    "learn_sigma",
)


def config_from_diffusers(
    values: Mapping[str, Any], state: Mapping[str, Tensor], source: object
) -> PixArtConfig:
    """From ``config.json``, with diffusers' defaults for absent fields, and the tensors.

    Args:
        state: the folder's tensors under our names; they show what diffusers has no field for.

    Raises:
        ValueError: listing the fields in which the folder is no PixArt.
    """
    heads, width = values.get("num_attention_heads", 16), values.get("attention_head_dim", 72)
    C, D, side = values.get("in_channels", 4), heads * width, values.get("sample_size", 128)
    out = values.get("out_channels", 2 * C)
    out = C if out is None else out
    wrong = {name: values[name] for name, v in _FIXED.items() if values.get(name, v) != v}
    if values.get("_class_name") not in CLASSES:
        wrong["_class_name"] = values.get("_class_name")
    if values.get("cross_attention_dim", D) != D:
        wrong["cross_attention_dim"] = values["cross_attention_dim"]
    if values.get("caption_channels") is None:
        wrong["caption_channels"] = None
    if out not in (C, 2 * C):
        wrong["out_channels"] = out
    if wrong:
        listed = ", ".join(f"{name} {value!r}" for name, value in wrong.items())
        raise ValueError(
            f"{source}: not a PixArt transformer: {listed}; accepted: _class_name "
            f"{' or '.join(CLASSES)}, {', '.join(f'{k} {v!r}' for k, v in _FIXED.items())}, "
            f"cross_attention_dim {D}, caption_channels an integer, out_channels {C} or {2 * C}"
        )
    scale, micro = values.get("interpolation_scale"), values.get("use_additional_conditions")
    stock = {
        "input_size": side,
        "patch_size": values.get("patch_size", 2),
        "in_channels": C,
        "hidden_size": D,
        "depth": values.get("num_layers", 28),
        "num_heads": heads,
        "caption_channels": values["caption_channels"],
        "pe_interpolation": float(max(side // 64, 1) if scale is None else scale),
        "micro_conditioning": side == 128 if micro is None else micro,
        "learn_sigma": out == 2 * C,
        "conditioning": "adaln_single",
    }
    try:
        return PixArtConfig.from_dict({**visible_fields(state), **values.get(EXTRA, {}), **stock})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def beyond_stock(config: PixArtConfig) -> list[str]:
    """The features of a model that stock diffusers would load without, and compute wrongly."""
    differs = {
        "qk_norm": config.qk_norm,
        "kv_compression": config.kv_compression is not None,
        "gated_cross_attention": config.gated_cross_attention,
        "mlp_ratio": config.mlp_ratio != 4,
    }
    return [name for name, is_so in differs.items() if is_so]


def require_adaln_single(config: PixArtConfig) -> None:
    if config.conditioning != "adaln_single":
        raise ValueError(
            f"diffusers: `conditioning` is {config.conditioning!r}; accepted: 'adaln_single', as "
            "diffusers' PixArt has no other. save and save_official write this model"
        )
