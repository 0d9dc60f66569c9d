"""A PixArt that starts from a class-conditional DiT (PixArt-alpha, section 2.3)."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.checkpoints.files import read_tensors
from pixart.checkpoints.official import POSITIONS, positions_differ, positions_fit, to_official
from pixart.checkpoints.storage import check_keys, load
from pixart.config import PixArtConfig
from pixart.model import PixArt

log = logging.getLogger(__name__)

LABELS = "y_embedder.embedding_table.weight"
# what a DiT has not, or has in another form
_NEW = re.compile(
    r"y_embedder\..+|t_block\..+|(csize|ar)_embedder\..+|.+\.cross_attn\..+|.+\.scale_shift_table"
)
# what a DiT may have: ours can, the published ones do not
_OPTIONAL = re.compile(r".+\.attn\.(q_norm|k_norm|sr|norm)\..+")


class Change(NamedTuple):
    """What became of a part of a model that was made from another."""

    kind: str  # copied, re-parameterised, initialised, ...
    parts: str  # layers, those of many blocks as one
    parameters: int
    how: str


def summarise(origins: Mapping[str, tuple[str, str]], model: PixArt) -> list[Change]:
    """The parts of a model by what became of them.

    Args:
        origins: for each key of the state dict a kind and how it was done.
    """
    state, groups = model.state_dict(), dict.fromkeys(origins.values())
    found = []
    for kind, how in sorted(groups, key=lambda group: _KINDS.index(group[0])):
        keys = [key for key, origin in origins.items() if origin == (kind, how)]
        count = sum(state[key].numel() for key in keys)
        found.append(Change(kind, _layers(keys, model.config.depth), count, how))
    return found


_KINDS = ("copied", "re-parameterised", "extended", "initialised")
COPIED = "copied", ""


def _layers(keys: list[str], depth: int) -> str:
    """Names of layers, those of several blocks as one: ``blocks.2-5.attn.norm``."""
    blocks: dict[str, list[int]] = {}
    for key in keys:
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.weight|\.bias)?", key)
        assert match is not None
        numbers = blocks.setdefault(match[2] if match[1] is None else f"blocks.*.{match[2]}", [])
        if match[1] is not None:
            numbers.append(int(match[1]))
    names = []
    for name, numbers in blocks.items():
        which = _ranges(sorted(set(numbers)))
        names.append(name if which == _ranges(list(range(depth))) else name.replace("*", which))
    return ", ".join(sorted(names))


def _ranges(numbers: list[int]) -> str:
    """[0, 2, 3, 4] -> 0,2-4."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[i:j] for i, j in pairwise([0, *breaks, len(numbers)])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if run)


def from_dit(
    source: str | Path | Mapping[str, Tensor] | PixArt,
    config: PixArtConfig,
    timestep: float = 500,
) -> PixArt:
    """A PixArt that draws, at ``timestep`` and without a class, what the DiT draws.

    Everything the two share is copied. DiT has a modulation layer W_i SiLU(c) + b_i in each block
    i, where c is the timestep's embedding plus the class's; PixArt has one, W SiLU(t) + b, and a
    table T_i per block. W and b are the means of W_i and b_i, the least-squares choice over
    timesteps for any tables; T_i = W_i SiLU(t) + b_i - (W SiLU(t) + b) at t of ``timestep``, so
    that there every block is modulated as in the DiT. The final layer's table likewise makes up
    for t itself, which PixArt adds there. Cross-attention and the embeddings of size and aspect
    ratio contribute zero at first; class labels are left behind. With conditioning "adaln" the
    modulation layers are copied, and the two models agree at every timestep.

    What was copied, re-parameterised and initialised is logged at level INFO.

    Args:
        source: a DiT checkpoint, or its tensors by name, or a ``PixArt`` of conditioning "class"
            or its folder.
        config: of the PixArt.
        timestep: where the two agree, 0 to 999.

    Returns:
        The model in fp32, ready to train.

    Warns:
        UserWarning: the DiT's positions are not the config's.

    Raises:
        ValueError: the config is a "class" model's, or the DiT's missing, unexpected or misshapen
            keys, all in one message.
    """
    if config.conditioning == "class":
        raise ValueError(
            "from_dit: `config.conditioning` is 'class'; accepted: 'adaln_single' or 'adaln' "
            "(PixArt.from_pretrained reads a DiT as it is)"
        )
    state, name = _tensors(source)
    model, origins = reparameterise(state, config, name, timestep)
    if POSITIONS in state and not positions_fit(model, state[POSITIONS]):
        warnings.warn(positions_differ(model, state[POSITIONS], name), stacklevel=2)
    for change in summarise(origins, model):
        how = f" ({change.how})" if change.how else ""
        log.info("%s: %s%s: %s", name, change.kind, how, change.parts)
    return model


def reparameterise(
    state: Mapping[str, Tensor], config: PixArtConfig, name: str, timestep: float
) -> tuple[PixArt, dict[str, tuple[str, str]]]:
    """:func:`from_dit` of tensors, with what became of each key: see :func:`summarise`."""
    model = PixArt(config)
    own = model.state_dict()
    copied = [key for key in own if not _NEW.fullmatch(key)]
    copied = [key for key in copied if key in state or not _OPTIONAL.fullmatch(key)]
    expected = {key: own[key] for key in copied} | _modulation_layers(config)
    check_keys(state, expected, name, ignored=(POSITIONS, LABELS))

    with torch.no_grad():
        for key in copied:
            own[key].copy_(state[key])
        derived = _share_modulation(model, state, timestep) if hasattr(model, "t_block") else []
        silence_micro_conditions(model)
    origins = {key: ("initialised", how_initialised(key, config)) for key in own}
    origins |= dict.fromkeys(copied, COPIED)
    origins |= dict.fromkeys(derived, ("re-parameterised", f"equal at timestep {timestep:g}"))
    return model, origins


def how_initialised(key: str, config: PixArtConfig) -> str:
    """Of a part that the model before has not: what it starts as."""
    if key.startswith(("csize_embedder.", "ar_embedder.")):
        return "without effect at first"
    layer = re.match(r"blocks\.(\d+)\.attn\.sr\.", key)
    if layer:
        r = config.compression_ratio(int(layer[1]))
        return f"the average of {r} x {r} tokens"
    return "LayerNorm of weight 1" if _OPTIONAL.fullmatch(key) else "text is ignored at first"


def silence_micro_conditions(model: PixArt) -> None:
    """Fresh embeddings of size and aspect ratio, where a model has them, add zero."""
    if model.config.micro_conditioning:
        for embedder in ("csize_embedder", "ar_embedder"):
            torch.nn.init.zeros_(model.get_parameter(f"{embedder}.mlp.2.weight"))


def _tensors(
    source: str | Path | Mapping[str, Tensor] | PixArt,
) -> tuple[Mapping[str, Tensor], str]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        return to_official(load(path)) if path.is_dir() else read_tensors(path), str(path)
    if isinstance(source, PixArt):
        return to_official(source), "the given model"
    return source, "the given tensors"


def _modulation_layers(config: PixArtConfig) -> dict[str, Tensor]:
    """The shapes of a DiT's modulation layers."""
    D = config.hidden_size
    rows = {f"blocks.{layer}": 6 for layer in range(config.depth)} | {"final_layer": 2}
    shapes: dict[str, Tensor] = {}
    for layer, R in rows.items():
        shapes[f"{layer}.adaLN_modulation.1.weight"] = torch.empty(R * D, D, device="meta")
        shapes[f"{layer}.adaLN_modulation.1.bias"] = torch.empty(R * D, device="meta")
    return shapes


def _share_modulation(model: PixArt, state: Mapping[str, Tensor], timestep: float) -> list[str]:
    """Sets t_block and all tables; returns their keys. In fp64, rounded once."""

    def of_dit(layer: str, parameter: str) -> Tensor:
        return state[f"{layer}.adaLN_modulation.1.{parameter}"].to(device, torch.float64)

    depth, device = model.config.depth, next(model.parameters()).device
    blocks = [f"blocks.{layer}" for layer in range(depth)]
    derived, shared_layer = [], []
    for parameter in ("weight", "bias"):
        derived.append(f"t_block.1.{parameter}")
        mean = torch.zeros_like(model.get_parameter(derived[-1]), dtype=torch.float64)
        for layer in blocks:
            mean += of_dit(layer, parameter) / depth
        shared_layer.append(model.get_parameter(derived[-1]).copy_(mean).double())

    t = model.t_embedder(torch.tensor([float(timestep)], device=device))[0].double()
    shared = F.linear(F.silu(t), *shared_layer)
    for layer in (*blocks, "final_layer"):
        modulation = F.linear(F.silu(t), of_dit(layer, "weight"), of_dit(layer, "bias"))
        # PixArt's final layer adds t itself to its two rows, the blocks add t_block's output
        added = t.repeat(2) if layer == "final_layer" else shared
        derived.append(f"{layer}.scale_shift_table")
        table = model.get_parameter(derived[-1])
        table.copy_((modulation - added).view_as(table))
    return derived
