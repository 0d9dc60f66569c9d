"""Prompt retrieval: do generated pictures look like the training pictures of their caption?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# shuffles averaged over in the control, so that its error is small beside 1 / captions
SHUFFLES = 200


@dataclass(frozen=True)
class Retrieval:
    """Shares of pictures, 0 to 1.

    retrieval: the nearest training picture carries the prompt's caption.
    control: the same after shuffling the prompts among the pictures; near ``chance`` when the
        pictures depend on the prompts, and when the measure is sound.
    chance: what pictures unrelated to their prompts would get, 1 / captions.
    wrong: for each picture that failed, its prompt and the caption it was nearest to.
    """

    retrieval: float
    control: float
    chance: float
    captions: int
    pictures: int
    wrong: list[tuple[str, str]]


def prompt_retrieval(
    drawn: Tensor, prompts: Sequence[str], training: Tensor, captions: Sequence[str], seed: int = 0
) -> Retrieval:
    """Compares drawn pictures with all training pictures, in the autoencoder's latent space.

    Args:
        drawn: latents (M, C, h, w) of the drawn pictures.
        prompts: the M prompts they were drawn for.
        training: latents (N, C, h, w) of the training pictures.
        captions: their N captions.
        seed: of the control's shuffles.
    """
    distances = torch.cdist(drawn.flatten(1).double(), training.flatten(1).double())
    nearest = [captions[i] for i in distances.argmin(1).tolist()]

    def share(asked: Sequence[str]) -> float:
        return sum(a == b for a, b in zip(asked, nearest, strict=True)) / len(nearest)

    generator = torch.Generator().manual_seed(seed)
    shuffles = (torch.randperm(len(prompts), generator=generator) for _ in range(SHUFFLES))
    control = sum(share([prompts[i] for i in order.tolist()]) for order in shuffles) / SHUFFLES
    return Retrieval(
        retrieval=share(prompts),
        control=control,
        chance=1 / len(set(captions)),
        captions=len(set(prompts)),
        pictures=len(prompts),
        wrong=[(p, n) for p, n in zip(prompts, nearest, strict=True) if p != n],
    )
