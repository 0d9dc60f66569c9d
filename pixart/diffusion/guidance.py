"""Classifier-free guidance around a text-conditioned model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GUIDANCE_MASKS = ("official", "diffusers")


class GuidedModel:
    """``model`` with its captions bound and classifier-free guidance applied (arXiv:2207.12598).

    Every call runs the model once on 2B samples, [unconditional, conditional], and combines::

        eps = eps_uncond + guidance_scale * (eps_cond - eps_uncond)

    on all C latent channels. (The official IDDPM sampler guides 3 of the 4, a leftover of the RGB
    models that DiT grew from; its DPM-Solver guides all, as does this.) A learned-variance half is
    taken from the conditional output. ``guidance_scale == 1`` runs the B conditional samples alone.

    The batched caption and mask are built once, so a model may cache by identity what it derives
    from them.

    Args:
        model: ``model(latents, timestep, caption, caption_mask=, image_size=, aspect_ratio=)``
            -> (B, C or 2C, H, W).
        caption: (B, L, D) text features.
        caption_mask: (B, L), non-zero where a token is real; None: all are.
        null_caption: (Ln, D) or (B, Ln, D) features of the empty caption. Needed to guide.
        null_mask: (Ln,) or (B, Ln); None: all tokens are real. Unused with "official".
        guidance_scale: 1 is no guidance.
        guidance_mask: which tokens of the null caption are attended. "official": as many as the
            sample's own caption has, which is what the original code does in sampling, and in
            training where a dropped caption keeps its mask. "diffusers": those of ``null_mask``,
            typically the one real token of "".
        image_size: (B, 2) micro-condition, or None.
        aspect_ratio: (B, ...) micro-condition, or None.

    Raises:
        ValueError: a shape does not fit, the null caption is missing, ``guidance_mask`` is
            unknown, or with "official" the null caption is shorter than a caption's real tokens.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        caption: Tensor,
        caption_mask: Tensor | None = None,
        *,
        null_caption: Tensor | None = None,
        null_mask: Tensor | None = None,
        guidance_scale: float = 4.5,
        guidance_mask: str = "official",
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> None:
        if guidance_mask not in GUIDANCE_MASKS:
            raise ValueError(
                f"guidance_mask must be one of {GUIDANCE_MASKS}, got {guidance_mask!r}"
            )
        if caption.ndim != 3:
            raise ValueError(f"caption must have shape (B, L, D), got {tuple(caption.shape)}")
        if caption_mask is not None and caption_mask.shape != caption.shape[:2]:
            raise ValueError(
                f"caption_mask must have shape {tuple(caption.shape[:2])}, "
                f"got {tuple(caption_mask.shape)}"
            )
        for name, value in (("image_size", image_size), ("aspect_ratio", aspect_ratio)):
            if value is not None and len(value) != len(caption):
                raise ValueError(f"{name} must have {len(caption)} rows, got {len(value)}")
        self.model = model
        self.batch_size = len(caption)
        self.guidance_scale = guidance_scale
        self.caption, self.caption_mask = caption, caption_mask
        self.micro = {"image_size": image_size, "aspect_ratio": aspect_ratio}
        if guidance_scale == 1:
            return

        if null_caption is None:
            raise ValueError(
                f"null_caption is needed for guidance_scale {guidance_scale}; only 1 goes without"
            )
        null = _per_sample("null_caption", null_caption, caption, ndim=3)
        if null.shape[2] != caption.shape[2]:
            raise ValueError(
                f"null_caption must have {caption.shape[2]} features as caption has, "
                f"got shape {tuple(null_caption.shape)}"
            )
        cond_mask = _ones_if_none(caption_mask, caption)
        if guidance_mask == "official":
            # One look at the values per picture, and only where a shortage is possible at all.
            if null.shape[1] < caption.shape[1] and cond_mask[:, null.shape[1] :].any():
                raise ValueError(
                    f"null_caption has {null.shape[1]} tokens, fewer than a caption: "
                    'guidance_mask="official" attends to as many of its tokens as the caption has. '
                    'Pass its padded features, or guidance_mask="diffusers".'
                )
            uncond_mask = cond_mask
        elif null_mask is None:
            uncond_mask = _ones_if_none(None, null)
        else:
            uncond_mask = _per_sample("null_mask", null_mask, caption, ndim=2) != 0
            if uncond_mask.shape != null.shape[:2]:
                raise ValueError(
                    f"null_mask must cover the {null.shape[1]} tokens of null_caption, "
                    f"got shape {tuple(null_mask.shape)}"
                )

        length = max(caption.shape[1], null.shape[1])
        self.caption = torch.cat([_pad_tokens(x, length) for x in (null, caption)])
        self.caption_mask = torch.cat([_pad_tokens(x, length) for x in (uncond_mask, cond_mask)])
        self.micro = {k: None if v is None else torch.cat([v, v]) for k, v in self.micro.items()}

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Guided output for ``latents`` (B, C, H, W) at ``timestep`` (B,): (B, C or 2C, H, W) fp32.

        Raises:
            ValueError: the batch is not the captions', or the model's output is misshapen.
        """
        if latents.ndim != 4 or len(latents) != self.batch_size:
            raise ValueError(
                f"latents must have shape ({self.batch_size}, C, H, W) as caption has "
                f"{self.batch_size} rows, got {tuple(latents.shape)}"
            )
        guide = self.guidance_scale != 1
        if guide:
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
        output = self.model(
            latents, timestep, self.caption, caption_mask=self.caption_mask, **self.micro
        )
        b, c, h, w = latents.shape
        if output.shape not in ((b, c, h, w), (b, 2 * c, h, w)):
            raise ValueError(
                f"model must return shape ({b}, {c} or {2 * c}, {h}, {w}), "
                f"got {tuple(output.shape)}"
            )
        # The difference below is a small one of large numbers, scaled up.
        output = output.float()
        if not guide:
            return output
        uncond, cond = output.chunk(2)
        eps = uncond[:, :c] + self.guidance_scale * (cond[:, :c] - uncond[:, :c])
        return torch.cat([eps, cond[:, c:]], dim=1)


def _per_sample(name: str, x: Tensor, caption: Tensor, *, ndim: int) -> Tensor:
    """``x`` on the caption's device, with a batch axis of its size."""
    x = x.to(caption.device, caption.dtype if x.is_floating_point() else x.dtype)
    if x.ndim == ndim - 1:
        x = x[None]
    if x.ndim != ndim or len(x) not in (1, len(caption)):
        raise ValueError(
            f"{name} must have {ndim - 1} axes, or {ndim} with 1 or {len(caption)} rows, "
            f"got shape {tuple(x.shape)}"
        )
    return x.expand(len(caption), *x.shape[1:])


def _ones_if_none(mask: Tensor | None, caption: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(caption.shape[:2], dtype=torch.bool, device=caption.device)
    return mask.to(caption.device) != 0


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """Zeros after the tokens of (B, L, ...) up to ``length``."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), 0, length - x.shape[1]))
