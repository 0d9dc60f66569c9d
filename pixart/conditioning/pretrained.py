"""What loading a text encoder and loading a VAE have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

_VALUES_PER_TENSOR = 256


def find_folder(path: str | Path, component: str) -> Path | None:
    """The local folder of a pipeline's component, or None where `path` is a Hub name.

    Args:
        path: a component's own folder, a diffusers pipeline folder that has `component` as a
            subfolder, or a Hub name such as "org/name".

    Raises:
        FileNotFoundError: `path` reads like a local path but is not a folder.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / component if (folder / component).is_dir() else folder
    name = str(path)
    if name.startswith(("/", ".", "~")) or len(Path(name).parts) > 2:
        raise FileNotFoundError(
            f"path={name!r} is not a folder; pass the folder of a {component} or of a diffusers "
            "pipeline that contains one"
        )
    return None


def require_complete(
    path: str | Path, missing: Iterable[str], unexpected: Iterable[str] = ()
) -> None:
    """Refuse weights that do not fit: both libraries would go on with random values instead."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            f"path={str(path)!r}: the weights do not fit the configuration beside them; missing "
            f"{missing or 'none'}, unexpected {unexpected or 'none'}. Use the weights and the "
            "config.json of the same model"
        )


@torch.no_grad()
def fingerprint(module: nn.Module, *facts: object) -> str:
    """16 hex digits that change with any retraining, the dtype, the architecture or `facts`.

    Hashes the names, shapes, dtypes and up to 256 evenly spaced values of every tensor: enough to
    tell two trainings apart, without reading 19 GB for a T5-XXL. Independent of device and path.
    """
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        step = max(1, tensor.numel() // _VALUES_PER_TENSOR)
        values = tensor.flatten()[::step].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
