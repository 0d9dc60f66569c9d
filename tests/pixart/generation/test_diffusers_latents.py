"""After every step, our latents are those of a stock diffusers pipeline with the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

from pixart import PixArt, PixArtConfig
from pixart.checkpoints import diffusers_config, to_diffusers
from pixart.conditioning import VAE
from pixart.diffusion import sample
from pixart.generation import PixArtPipeline, Prompts
from pixart.generation import pipeline as pipeline_module

SMALL = {"hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 10}
MODELS: dict[str, tuple[type, PixArtConfig]] = {
    # a model of 128 x 128 latents alone is told the picture's size by diffusers
    "alpha": (PixArtAlphaPipeline, PixArtConfig(**SMALL, input_size=128, micro_conditioning=True)),
    "alpha-512": (PixArtAlphaPipeline, PixArtConfig(**SMALL, input_size=64)),
    "sigma": (PixArtSigmaPipeline, PixArtConfig(**SMALL, input_size=16, pe_interpolation=2.0)),
}
EVERY_STEP = {"timestep_spacing": "trailing"}
SCHEDULERS: dict[str, Any] = {
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler,
    "sde-dpm-solver++": partial(
        diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"
    ),
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "ddim": partial(diffusers.DDIMScheduler, **EVERY_STEP, clip_sample=False),
    "euler": partial(diffusers.EulerDiscreteScheduler, **EVERY_STEP),
    "euler-ancestral": partial(diffusers.EulerAncestralDiscreteScheduler, **EVERY_STEP),
}
HEIGHT, WIDTH, STEPS, SEEDS = 12, 20, 5, (3, 8)


@pytest.fixture(scope="module", params=MODELS)
def both(request) -> tuple[PixArtPipeline, Any]:
    """Ours, and the stock one without a scheduler."""
    kind, config = MODELS[request.param]
    torch.manual_seed(0)
    ours = PixArt(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    stock = PixArtTransformer2DModel.from_config(diffusers_config(config))
    state = to_diffusers(ours)
    del state["caption_projection.y_embedding"]
    stock.load_state_dict(state)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    pipeline = kind(None, None, vae, stock.eval(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return PixArtPipeline(ours, VAE(vae), None), pipeline


def prompts(negative_prompt: str) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    caption, null_caption = torch.randn(3, 6, 10, generator=generator).split([2, 1])
    mask = torch.arange(6) < torch.tensor([4, 6])[:, None]
    length = 3 if negative_prompt else 1
    return Prompts(
        ["a", "b"],
        caption,
        mask,
        negative_prompt,
        null_caption[0],
        mask[1] & (torch.arange(6) < length),
    )


def our_steps(pipeline: PixArtPipeline, monkeypatch, prompts: Prompts, **settings) -> list[Tensor]:
    steps: list[Tensor] = []

    def recording(*arguments, callback, **more) -> Tensor:
        def record(index: int, total: int, latents: Tensor) -> None:
            steps.append(latents.clone())

        return sample(*arguments, callback=record, **more)

    monkeypatch.setattr(pipeline_module, "sample", recording)
    list(
        pipeline.draw_latents(
            prompts, (HEIGHT, WIDTH), seeds=SEEDS, steps=STEPS, guidance_mask="diffusers",
            batch_size=len(SEEDS), **settings,
        )
    )  # fmt: skip
    return steps


def stock_steps(pipeline: Any, prompts: Prompts, scheduler: Any, guidance_scale: float) -> list:
    steps: list[Tensor] = []
    pipeline.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    noise = torch.cat([torch.randn(1, 4, HEIGHT, WIDTH, generator=g) for g in generators])
    B = len(prompts)
    pipeline(
        None, None, num_inference_steps=STEPS, guidance_scale=guidance_scale, height=2 * HEIGHT,
        width=2 * WIDTH, generator=generators, latents=noise, prompt_embeds=prompts.caption,
        prompt_attention_mask=prompts.mask.long(), use_resolution_binning=False,
        negative_prompt_embeds=prompts.null_caption.expand(B, -1, -1), output_type="latent",
        negative_prompt_attention_mask=prompts.null_mask.long().expand(B, -1),
        callback=lambda i, t, latents: steps.append(latents.clone()),
    )  # fmt: skip
    return steps


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_after_every_step(both, sampler: str, guidance_scale: float, monkeypatch) -> None:
    ours, stock = both
    encoded = prompts("bad art" if sampler == "unipc" else "")
    expected = stock_steps(stock, encoded, SCHEDULERS[sampler](), guidance_scale)
    settings = {"sampler": sampler, "guidance_scale": guidance_scale}
    actual = our_steps(ours, monkeypatch, encoded, **settings)
    assert len(actual) == len(expected) == STEPS
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
    # and the model has something to say at every step
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected[1].abs().max()
