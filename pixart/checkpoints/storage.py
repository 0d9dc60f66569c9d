"""Reading a model from any format it is published in, and writing it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoints.diffusers import (
    beyond_stock,
    config_from_diffusers,
    diffusers_config,
    from_diffusers_names,
    require_adaln_single,
    to_diffusers,
    to_diffusers_names,
    uses_diffusers_names,
)
from pixart.checkpoints.files import (
    json_writer,
    read_folder,
    read_json,
    read_tensors,
    safetensors_writer,
)
from pixart.checkpoints.official import (
    NULL_CAPTION,
    POSITIONS,
    infer_config,
    positions_differ,
    positions_fit,
    to_official,
)
from pixart.config import PixArtConfig
from pixart.files import write_complete
from pixart.model import PixArt

CONFIG = "config.json"
WEIGHTS = "model"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


def load(path: str | Path, config: PixArtConfig | None = None) -> PixArt:
    """A model from our folder, an official file, or a diffusers folder.

    - Our folder: ``config.json`` and ``model.safetensors``.
    - An official file, ``.pth`` or ``.safetensors``; also a DiT. Of several containers the first
      of ``state_dict`` (which the official inference loads), ``state_dict_ema``, ``ema`` and
      ``model`` is read. The config is inferred from the tensors, see ``official.infer_config``.
      ``pos_embed`` is compared with the positions that the model computes, and dropped.
    - A diffusers folder, of the transformer or of a pipeline; weights may be sharded. A single
      file with diffusers' names is read as well, given a config.

    No random weights are drawn and nothing in a file is executed.

    Args:
        config: overrides what the path says. Needed where a file does not show everything.

    Returns:
        The model on the CPU, in the file's dtype, in evaluation mode (no caption dropout).

    Warns:
        UserWarning: the null caption is missing and set to zeros; or a config was given whose
            positions are not the file's.

    Raises:
        FileNotFoundError: there is no such path, or the folder lacks its weights.
        ValueError: the file is damaged or holds code, does not show its config, or has missing,
            unexpected or misshapen keys, which one message lists.
    """
    path = Path(path)
    tensors, values = _read(path)
    theirs = uses_diffusers_names(tensors)
    state = from_diffusers_names(tensors) if theirs else dict(tensors)
    given = config is not None
    if config is None:
        config = _config(values, state, path)

    # parameters without storage: the file's take their place
    with torch.device("meta"):
        model = PixArt(config)
    expected = dict(model.state_dict())
    lacks_null = config.conditioning != "class" and NULL_CAPTION not in state
    if lacks_null:
        del expected[NULL_CAPTION]
    if theirs:
        require_adaln_single(config)
        expected = to_diffusers_names(expected)
    check_keys(tensors, expected, path, ignored=(POSITIONS,))
    if lacks_null:
        state[NULL_CAPTION] = _zero_null_caption(config, state, path)
    positions = state.pop(POSITIONS, None)
    # copies, because a mapped tensor may be unaligned and changes with its file
    copies = {key: tensor.detach().clone() for key, tensor in state.items()}
    model.load_state_dict(copies, assign=True)
    if positions is not None and not positions_fit(model, positions):
        _report_positions(model, positions, path, given)
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and the values of config.json where there is one."""
    if not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path}; models on the Hugging Face hub are downloaded first"
        )
    if path.is_file():
        return read_tensors(path), None
    pipeline = not (path / CONFIG).is_file() and (path / "transformer").is_dir()
    folder = path / "transformer" if pipeline else path
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}, so no model's folder")
    values = read_json(folder / CONFIG)
    name = DIFFUSERS_WEIGHTS if "_class_name" in values else WEIGHTS
    return read_folder(folder, name), values


def _config(
    values: dict[str, Any] | None, state: Mapping[str, Tensor], source: Path
) -> PixArtConfig:
    if values is None:
        return infer_config(state, source)
    if "_class_name" in values:
        return config_from_diffusers(values, state, source)
    try:
        return PixArtConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from error


def check_keys(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: object,
    ignored: tuple[str, ...] = (),
) -> None:
    """Raises ValueError listing every missing, unexpected and misshapen key."""

    def described(tensor: Tensor) -> str:
        dtype = "" if tensor.is_floating_point() else f" {tensor.dtype}"
        return f"{tuple(tensor.shape)}{dtype}"

    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys() - set(ignored)),
        "misshapen": [
            f"{key}: got {described(found[key])}, expected {described(tensor)}"
            for key, tensor in expected.items()
            if key in found and described(found[key]) != described(tensor)
        ],
    }
    lines = [
        f"  {kind} ({len(keys)}): {', '.join(keys)}" for kind, keys in problems.items() if keys
    ]
    if lines:
        raise ValueError("\n".join([f"{source}: its tensors do not fit the config:", *lines]))


def _zero_null_caption(config: PixArtConfig, state: Mapping[str, Tensor], source: Path) -> Tensor:
    L, C = config.max_caption_tokens, config.caption_channels
    warnings.warn(
        f"{source}: no null caption; it is set to zeros ({L}, {C}). Models made for diffusers take "
        'the text encoder\'s output for the empty prompt "": set it by '
        "model.y_embedder.y_embedding.copy_(...) before guidance or training with caption dropout",
        stacklevel=3,
    )
    return state["y_embedder.y_proj.fc1.weight"].new_zeros(L, C)


def _report_positions(model: PixArt, stored: Tensor, source: Path, config_given: bool) -> None:
    if not config_given:
        raise ValueError(
            f"{source}: its pos_embed {tuple(stored.shape)} is not the sinusoids of any "
            "input_size and pe_interpolation; pass a config to load the model without it"
        )
    warnings.warn(positions_differ(model, stored, source), stacklevel=3)


def save(model: PixArt, folder: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors`` to a folder, which is made.

    A save that dies leaves the folder's previous checkpoint, or none, never a mixture.
    """
    folder = Path(folder)
    write_complete(
        (folder / CONFIG, json_writer(model.config.to_dict())),
        (folder / f"{WEIGHTS}.safetensors", safetensors_writer(model.state_dict())),
    )


def save_official(model: PixArt, path: str | Path) -> None:
    """Writes the official state dict: ``.pth`` as ``{"state_dict": ...}``, or ``.safetensors``.

    Raises:
        ValueError: the path has another suffix.
    """
    path = Path(path)
    state = to_official(model)
    if path.suffix == ".safetensors":
        write_complete((path, safetensors_writer(state)))
    elif path.suffix == ".pth":
        write_complete((path, lambda partial: torch.save({"state_dict": state}, partial)))
    else:
        raise ValueError(f"save_official: `path` is {path}; accepted: a .pth or .safetensors file")


def save_diffusers(model: PixArt, folder: str | Path) -> None:
    """Writes a folder that diffusers' ``PixArtTransformer2DModel.from_pretrained`` reads.

    ``load`` reads it back to an equal config and equal weights; diffusers skips the null caption.

    Warns:
        UserWarning: the model has features that diffusers would leave out.

    Raises:
        ValueError: the model's conditioning is not "adaln_single".
    """
    folder = Path(folder)
    features = beyond_stock(model.config)
    if features:
        warnings.warn(
            f"{folder}: stock diffusers has no {', '.join(features)} and computes something else "
            "with these weights, or refuses them; PixArt.from_pretrained reads them in full",
            stacklevel=2,
        )
    write_complete(
        (folder / CONFIG, json_writer(diffusers_config(model.config))),
        (folder / f"{DIFFUSERS_WEIGHTS}.safetensors", safetensors_writer(to_diffusers(model))),
    )
