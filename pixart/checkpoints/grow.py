"""From one stage's model to the next one's (PixArt-alpha, section 2.2; PixArt-Sigma, 3.3)."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from pixart.checkpoints.dit import (
    COPIED,
    Change,
    how_initialised,
    reparameterise,
    silence_micro_conditions,
    summarise,
)
from pixart.checkpoints.official import NULL_CAPTION
from pixart.config import PixArtConfig
from pixart.model import PixArt

# fields that a trained model cannot change, and why
_FIXED = {
    "hidden_size": "every layer has this width",
    "num_heads": "the same weights would be read as other heads",
    "patch_size": "tokens would be other pieces of the picture",
    "mlp_ratio": "the MLPs have this width",
    "learn_sigma": "the last layer's outputs would mean something else",
}
# layers that see the autoencoder's latents
_LATENT_LAYERS = ("x_embedder.proj.", "final_layer.linear.")


def grow(
    model: PixArt, config: PixArtConfig, *, vae_swap: bool = False, timestep: float = 500
) -> tuple[PixArt, list[Change]]:
    """A model of ``config`` that goes on from what ``model`` has learned.

    ============================  ==============================================================
    new in ``config``             what the grown model starts with
    ============================  ==============================================================
    input_size                    the same weights; with pe_interpolation raised alike, a finer
                                  grid over the coordinates that are known already
    micro_conditioning            embeddings that add zero: the same outputs
    kv_compression "conv"         the average of each window of keys and values, normalised
    longer captions               the null caption repeated to the new length
    more blocks                   blocks at the end that add zero: the same outputs
    qk_norm                       LayerNorms of weight 1, to be trained
    a text model from a "class"   :func:`pixart.checkpoints.from_dit`, equal at ``timestep``
    ============================  ==============================================================

    Args:
        model: what was trained; left as it is.
        config: of the next stage.
        vae_swap: the next stage has another autoencoder. With as many latent channels all weights
            are kept, as in PixArt-Sigma; otherwise the layers at both ends are fresh.
        timestep: where a model made from a "class" model draws the same, 0 to 999.

    Returns:
        The grown model in fp32, ready to train, and what became of its parts.

    Raises:
        ValueError: something learned would be lost or read as something else; lists the fields.
    """
    old = model.config
    problems = _problems(old, config, vae_swap)
    if problems:
        raise ValueError("\n  ".join(["grow: the model cannot become this one:", *problems]))
    state = model.state_dict()
    origins: dict[str, tuple[str, str]] = {}
    if old.conditioning != config.conditioning:
        grown, origins = reparameterise(state, config, "the class model", timestep)
    else:
        grown = PixArt(config)
        _silence(grown, old)
        with torch.no_grad():
            for key, tensor in grown.state_dict().items():
                origins[key] = _fill(key, tensor, state, old, config)
    changes = summarise(origins, grown)
    changes += _positions(old, config)
    if vae_swap and old.in_channels == config.in_channels:
        parts = ", ".join(name.rstrip(".") for name in _LATENT_LAYERS)
        how = "of the old autoencoder, copied with the rest: training adapts them"
        changes.append(Change("kept", parts, 0, how))
    return grown, changes


def _problems(old: PixArtConfig, new: PixArtConfig, vae_swap: bool) -> list[str]:
    problems = []
    from_class = old.conditioning == "class" != new.conditioning

    def refuse(when: bool, name: str, reason: str) -> None:
        if when:
            problems.append(f"{name} {getattr(old, name)} -> {getattr(new, name)}: {reason}")

    def changed(name: str) -> bool:
        return getattr(old, name) != getattr(new, name)

    for name, reason in _FIXED.items():
        refuse(changed(name), name, reason)
    if not from_class:
        refuse(changed("conditioning"), "conditioning", "only a class model becomes another kind")
        text = "the projection of captions is that of one text encoder"
        refuse(changed("caption_channels"), "caption_channels", text)
        shorter = new.max_caption_tokens < old.max_caption_tokens
        refuse(shorter, "max_caption_tokens", "the end of long captions would be lost")
        gated = new.gated_cross_attention and not old.gated_cross_attention
        silent = "gates are zero at first and would silence the cross-attention that was learned"
        refuse(gated, "gated_cross_attention", silent)
    both = old.conditioning == new.conditioning == "class"
    refuse(both and changed("num_classes"), "num_classes", "labels are learned by number")
    if changed("in_channels"):
        refuse(not vae_swap, "in_channels", "another autoencoder, which vae_swap is to allow")
        refuse(vae_swap and from_class, "in_channels", "becomes a text model first, then this")
    refuse(new.depth < old.depth, "depth", "blocks would be lost")
    refuse(from_class and new.depth > old.depth, "depth", "becomes a text model first, then deeper")
    for name in ("micro_conditioning", "qk_norm", "gated_cross_attention"):
        refuse(getattr(old, name) and not getattr(new, name), name, "its weights would be lost")
    windows = [
        (_convolution(old, i), _convolution(new, i)) for i in range(min(old.depth, new.depth))
    ]
    if any(before not in (1, after) for before, after in windows):
        lost = "a block's convolution was learned for its window"
        refuse(True, "kv_compression", lost)
    return problems


def _convolution(config: PixArtConfig, layer: int) -> int:
    """Window of a block's learned compression; 1 without one."""
    kv = config.kv_compression
    return config.compression_ratio(layer) if kv and kv["sampling"] == "conv" else 1


def _silence(grown: PixArt, old: PixArtConfig) -> None:
    """What is new adds zero to the residual stream, or to the timestep's embedding."""
    silence_micro_conditions(grown)
    if grown.config.conditioning != "adaln_single":
        return  # fresh modulation layers are zero, and every gate with them
    # cross-attention, or its gate, is zero from the start
    for layer in range(old.depth, grown.config.depth):
        for branch in ("attn.proj", "mlp.fc2"):
            torch.nn.init.zeros_(grown.get_parameter(f"blocks.{layer}.{branch}.weight"))


def _fill(
    key: str, tensor: Tensor, state: dict[str, Tensor], old: PixArtConfig, new: PixArtConfig
) -> tuple[str, str]:
    """Copies what the old model has of a tensor; what became of it."""
    before = state.get(key)
    if before is not None and before.shape == tensor.shape:
        tensor.copy_(before)
        return COPIED
    if key == NULL_CAPTION and before is not None:
        # to attention, tokens that come twice are the same text
        repeats = math.ceil(len(tensor) / len(before))
        tensor.copy_(before.repeat(repeats, 1)[: len(tensor)])
        return "extended", f"{len(before)} tokens, repeated to {len(tensor)}"
    block = re.match(r"blocks\.(\d+)\.", key)
    if block and int(block[1]) >= old.depth:
        return "initialised", "blocks without effect at first"
    if key.startswith(_LATENT_LAYERS):
        return "initialised", "for the new autoencoder"
    return "initialised", how_initialised(key, new)


def _positions(old: PixArtConfig, new: PixArtConfig) -> list[Change]:
    """What became of the positions, which have no weights."""

    def grid(config: PixArtConfig) -> tuple[int, float]:
        side = config.input_size // config.patch_size
        return side, side / config.pe_interpolation

    (before, span), (after, new_span) = grid(old), grid(new)
    if (before, span) == (after, new_span):
        return []
    tokens = f"{before} x {before} -> {after} x {after} tokens"
    if math.isclose(span, new_span):
        return [Change("interpolated", "positions", 0, f"{tokens}, over 0 to {span:g} as before")]
    as_before = after / span
    how = (
        f"{tokens}, 0 to {span:g} -> 0 to {new_span:g}: unlike what was trained; "
        f"pe_interpolation {as_before:g} would keep the range"
    )
    return [Change("extrapolated" if new_span > span else "contracted", "positions", 0, how)]
