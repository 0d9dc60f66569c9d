"""Small diffusers models, inputs for them, and what tests of a patched one ask."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

import pixart_kernels as pk
from pixart_kernels import _triton
from pixart_kernels.integrations import diffusers as integration

BACKENDS = ["auto", "reference"]
INTERPRETED = pytest.mark.skipif(
    not _triton.INTERPRETED, reason="Triton's kernels are not interpreted here"
)
VARIANTS = ["alpha", "sigma"]
OPS = (*integration.ADALN, *integration.ATTENTION, "bias_gelu")


def transformer(variant: str = "sigma", **config) -> PixArtTransformer2DModel:
    """Tiny; alpha's at sample_size 128 are told picture sizes, sigma's have longer texts."""
    torch.manual_seed(0)
    sizes = {"alpha": 128, "sigma": 16}
    model = PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 3,
            "cross_attention_dim": 24,
            "caption_channels": 10,
            "sample_size": sizes[variant],
            "norm_eps": 1e-2,
            **config,
        }
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def prefix_mask(B: int = 2, L: int = 5) -> Tensor:
    return (torch.arange(L) < torch.tensor([3, 5])[:B, None]).long()


MASKS = {
    "none": None,
    "prefix": prefix_mask(),
    "scattered": torch.tensor([[0, 1, 0, 0, 1], [1, 0, 1, 1, 0]]),
    "empty-row": torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]),
    "bool": prefix_mask().bool(),
    "float": prefix_mask().float(),
    "bias": (1 - prefix_mask()[:, None].float()) * -10000.0,
    "soft": prefix_mask() * 0.9999,
    "soft-bias": torch.linspace(-2, 2, 10).view(2, 1, 5),
}


def inputs(model: PixArtTransformer2DModel, B: int = 2, size=(10, 6), L: int = 5, **more) -> dict:
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype
    sizes = {
        "resolution": torch.tensor([[512.0, 640.0], [900.0, 33.0]])[:B].to(dtype),
        "aspect_ratio": torch.tensor([[0.8], [2.1]])[:B].to(dtype),
    }
    return {
        "hidden_states": torch.randn(B, 4, *size, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(B, L, 10, generator=generator).to(dtype),
        "timestep": torch.tensor([3, 871])[:B],
        "added_cond_kwargs": sizes if model.use_additional_conditions else None,
        **more,
    }


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """How often a patched model calls each op."""
    calls: Counter[str] = Counter()

    def counted(op: str):
        function = getattr(pk, op)

        def call(*args, **kwargs):
            calls[op] += 1
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for op in OPS:
            stack.enter_context(mock.patch.object(integration, op, counted(op)))
        yield calls


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    actual, expected = actual.detach(), expected.detach()
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


def assert_no_warning(function, *args, **kwargs):
    """The self-check is silent: nothing differed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pk.patch")
        return function(*args, **kwargs)


def gradients(model: nn.Module, arguments: dict) -> dict[str, Tensor]:
    model.zero_grad()
    text = arguments["encoder_hidden_states"].clone().requires_grad_()
    out = model(**{**arguments, "encoder_hidden_states": text}).sample
    out.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "text": text.grad}
