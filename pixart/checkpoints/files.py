"""Tensors from files without running their code, and files that are complete or absent."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
# a file has at most one of PixArt's two or of DiT's two; the first one found is what the
# official inference of each loads
CONTAINERS = ("state_dict", "state_dict_ema", "ema", "model")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one ``.safetensors`` or torch file, on the CPU, possibly mapped to the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds more than tensors, or is of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or truncated: {error}") from error
    if path.suffix not in TORCH_SUFFIXES:
        accepted = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ValueError(
            f"{path}: cannot be read as a checkpoint; accepted: {accepted}, or a folder"
        )
    return _unpack(_read_torch(path), path)


def _read_torch(path: Path) -> Any:
    try:
        # a namespace of options, which DiT's training script puts beside the weights, is harmless
        with torch.serialization.safe_globals([argparse.Namespace]):
            with path.open("rb") as file:
                # only a zip archive can be mapped; torch wrote none before 1.6
                archive = file.read(2) == b"PK"
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: refused by torch.load(weights_only=True), which reads tensors and plain "
            f"containers and runs no code; the file holds something else or is damaged ({reason})"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: damaged or truncated: {reason}") from error


def _unpack(loaded: Any, path: Path) -> dict[str, Tensor]:
    state = loaded
    if isinstance(loaded, dict):
        state = next((loaded[name] for name in CONTAINERS if name in loaded), loaded)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dict of tensors")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise ValueError(
            f"{path}: holds no state dict: {', '.join(others) or 'nothing'} instead of tensors; "
            f"accepted: tensors by name, or a dict with one of {', '.join(CONTAINERS)}"
        )
    return dict(state)


def read_folder(folder: Path, name: str) -> dict[str, Tensor]:
    """``name.safetensors`` of a folder, or the shards that its index lists."""
    index = folder / f"{name}.safetensors.index.json"
    if not index.is_file():
        return read_tensors(folder / f"{name}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: lists no shards, it has no weight_map")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} lists shards that are missing: {', '.join(absent)}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors.update(read_tensors(folder / shard))
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; accepted: names and values")
    return values


def json_writer(values: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(values, indent=2) + "\n")


def safetensors_writer(state: Mapping[str, Tensor]) -> Callable[[Path], object]:
    contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
    # other libraries refuse a file that does not say whose tensors these are
    return lambda path: save_file(contiguous, path, metadata={"format": "pt"})
