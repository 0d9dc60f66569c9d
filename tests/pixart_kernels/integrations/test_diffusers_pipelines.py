"""Patched stock pipelines draw what they drew, step by step."""

from __future__ import annotations

from itertools import product

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
)
from diffusers_cases import (
    BACKENDS,
    INTERPRETED,
    assert_close,
    assert_no_warning,
    counting,
    prefix_mask,
    transformer,
)
from small_vae import small_vae
from torch import Tensor

import pixart_kernels as pk


def vae() -> AutoencoderKL:
    return small_vae(8, 8, 8, 8, sample_size=32).eval()


PIPELINES = {
    "alpha": (PixArtAlphaPipeline, "alpha", {}),
    "alpha-unguided": (PixArtAlphaPipeline, "alpha", {"guidance_scale": 1.0}),
    "sigma": (PixArtSigmaPipeline, "sigma", {}),
    "sigma-pag": (PixArtSigmaPAGPipeline, "sigma", {"pag_scale": 3.0}),
    "sigma-pag-unguided": (
        PixArtSigmaPAGPipeline,
        "sigma",
        {"pag_scale": 3.0, "guidance_scale": 1.0},
    ),
}


def draw(pipeline, **arguments) -> dict:
    """The latents after each step, and the pictures."""
    generator = torch.Generator().manual_seed(3)
    embeds = {
        "prompt_embeds": torch.randn(2, 5, 10, generator=generator),
        "prompt_attention_mask": prefix_mask(),
        "negative_prompt_embeds": torch.randn(2, 5, 10, generator=generator),
        "negative_prompt_attention_mask": prefix_mask().flip(0),
    }
    steps: list[Tensor] = []
    pictures = pipeline(
        **embeds,
        prompt=None,
        negative_prompt=None,
        height=48,
        width=32,
        use_resolution_binning=False,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(4),
        callback=lambda i, t, latents: steps.append(latents.clone()),
        output_type="pt",
        **arguments,
    ).images
    return {**{f"step {i}": latents for i, latents in enumerate(steps)}, "pictures": pictures}


def pipeline_of(name: str, scheduler: str):
    kind, variant, arguments = PIPELINES[name]
    layers = {"pag_applied_layers": "blocks.1"} if kind is PixArtSigmaPAGPipeline else {}
    parts = {"vae": vae(), "transformer": transformer(variant)}
    parts["scheduler"] = getattr(diffusers, f"{scheduler}Scheduler")()
    pipeline = kind(tokenizer=None, text_encoder=None, **parts, **layers)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments


SCHEDULERS = ["UniPCMultistep", "DEISMultistep", "EulerDiscrete", "SASolver", "LCM"]


@pytest.mark.parametrize(
    "name, scheduler, backend",
    [
        *product([name for name in PIPELINES if "alpha" in name], ["DPMSolverMultistep"], BACKENDS),
        *product([name for name in PIPELINES if "sigma" in name], ["DDIM"], BACKENDS),
        *product(["alpha", "sigma", "sigma-pag"], SCHEDULERS, ["auto"]),
        pytest.param("sigma-pag", "DDIM", "triton", marks=INTERPRETED),
    ],
)
def test_pipelines_draw_the_same_at_each_step(name: str, scheduler: str, backend: str) -> None:
    pipeline, arguments = pipeline_of(name, scheduler)
    expected = draw(pipeline, **arguments)
    assert len(expected) == 5
    with pk.use_backend(backend), counting() as calls:
        report = pk.patch(pipeline)
        assert report.blocks == 3
        actual = assert_no_warning(draw, pipeline, **arguments)
    for step, value in expected.items():
        assert_close(actual[step], value, rtol=1e-4)
    assert calls["gated_residual_adaln"] == 12
    if backend != "auto":
        # guidance by perturbed attention has a processor of its own in one block of three
        assert calls["attention"] == (8 if "pag" in name else 12)
        assert calls["cross_attention"] == 12
    pk.unpatch(pipeline)
    for step, value in draw(pipeline, **arguments).items():
        assert torch.equal(value, expected[step]), step
