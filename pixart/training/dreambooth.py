"""DreamBooth (arXiv:2208.12242): a subject is learned beside pictures of its class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixart.training.recipe import Prior


def balanced(keys: Sequence[str], prior: Prior) -> list[int]:
    """Rows of an epoch: of subject and class as many, the fewer of them several times.

    Raises ValueError where there are pictures of one of them alone.
    """
    kinds: tuple[list[int], list[int]] = ([], [])
    for row, key in enumerate(keys):
        kinds[_is_prior(key, prior)].append(row)
    if not all(kinds):
        lacking = "of the class" if kinds[0] else "of a subject"
        raise ValueError(
            f"prior.folder is {prior.folder!r}, and there are no pictures {lacking}: those in that "
            "folder of data.images are of the class, the others of the subject"
        )
    length = max(map(len, kinds))
    return [rows[i % len(rows)] for rows in kinds for i in range(length)]


def weights(keys: Sequence[str], prior: Prior) -> Tensor:
    """(B,) float32, of each sample's loss."""
    return torch.tensor([prior.weight if _is_prior(key, prior) else 1.0 for key in keys])


def _is_prior(key: str, prior: Prior) -> bool:
    return key.startswith(f"{prior.folder.rstrip('/')}/")
