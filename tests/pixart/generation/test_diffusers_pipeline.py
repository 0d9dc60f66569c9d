"""A stock diffusers PixArt-Sigma pipeline, saved by diffusers and drawn by both."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoTokenizer, T5Config, T5EncoderModel
from typer.testing import CliRunner

from pixart.cli import app
from pixart.diffusion import sample
from pixart.generation import PixArtPipeline
from pixart.generation.pipeline import to_image

SENTENCES = ["a red gem", "the blue robot walks over a green hill", "one yellow star at night"]
PROMPTS = ["a red gem", "one blue robot at night"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[PixArtSigmaPipeline, Path]:
    folder = tmp_path_factory.mktemp("stock")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_prefix=str(folder / "spiece"),
        vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.save_pretrained(folder)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=8, patch_size=2, cross_attention_dim=24, caption_channels=16,
        interpolation_scale=0.5, use_additional_conditions=False,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.13,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    pipeline = PixArtSigmaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder),
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),
    )
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder / "pipeline"


@pytest.mark.parametrize("negative_prompt", ["", "a green hill"])
def test_both_draw_the_same_picture(stock, negative_prompt: str) -> None:
    pipeline, folder = stock
    noise = torch.cat(
        [torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(5 + i)) for i in (0, 1)]
    )
    theirs = pipeline(
        PROMPTS, [negative_prompt] * 2, num_inference_steps=6, guidance_scale=3.0, height=24,
        width=40, latents=noise, use_resolution_binning=False, clean_caption=False,
    ).images  # fmt: skip
    with pytest.warns(UserWarning, match="null caption"):
        ours = PixArtPipeline.from_pretrained(folder)
    images = ours(
        ours.encode(PROMPTS, negative_prompt), height=24, width=40, seed=5, steps=6,
        guidance_scale=3.0, guidance_mask="diffusers",
    )  # fmt: skip
    for a, b in zip(images, theirs, strict=True):
        difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
        # the stock schedule sums its betas in fp32
        assert difference.max() <= 2
        assert np.asarray(a).std() > 5


LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
STUDENTS = {
    "lcm": (LCMScheduler(**LINEAR, original_inference_steps=50), {"num_inference_steps": 4}),
    "lcm in 2 steps": (LCMScheduler(**LINEAR), {"num_inference_steps": 2}),
    "dmd": (DDPMScheduler(**LINEAR, clip_sample=False),
            {"num_inference_steps": 1, "timesteps": [400]}),
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["model", "lora"])
@pytest.mark.parametrize("student", STUDENTS)
def test_distilled_models_step_alike(student: str, lora: bool, stock, tmp_path: Path) -> None:
    """A seed gives the noise of both, and each step of a stock PixArt-alpha the same latents."""
    pipeline, folder = stock
    transformer, loras = copy.deepcopy(pipeline.transformer), []
    if lora:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "linear_1", "proj"])
        transformer = get_peft_model(transformer, config)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        transformer.save_pretrained(tmp_path)
        loras = [(tmp_path, 1.0)]
    scheduler, options = STUDENTS[student]
    parts = {**pipeline.components, "transformer": transformer, "scheduler": scheduler}
    theirs, ours = [], []
    alpha = PixArtAlphaPipeline(**parts)
    alpha.set_progress_bar_config(disable=True)
    alpha(
        PROMPTS, **options, guidance_scale=1, height=24, width=40, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        use_resolution_binning=False, clean_caption=False,
        callback=lambda i, t, latents: theirs.append(latents),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="null caption"):
        pixart = PixArtPipeline.from_pretrained(folder, loras=loras)
    prompts = pixart.encode(PROMPTS)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = torch.cat([torch.randn(1, 4, 12, 20, generator=g) for g in generators])
    name, *fewer = student.split(" in ")
    steps = int(fewer[0][0]) if fewer else None
    sample(
        pixart.model, noise, prompts.caption, prompts.mask, sampler=name, steps=steps,
        generators=generators, callback=lambda i, n, latents: ours.append(latents),
    )  # fmt: skip
    assert len(ours) == len(theirs) == options["num_inference_steps"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # what a user calls draws just that
    pictures = pixart(prompts, height=24, width=40, seed=5, steps=steps, sampler=name, batch_size=1)
    for picture, z in zip(pictures, ours[-1], strict=True):
        pixels = to_image(pixart.vae.decode(z[None])[0])
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(pixels, dtype=int))
        assert difference.max() <= 1 and np.asarray(picture).std() > 5


def test_a_picture_tells_what_it_was_drawn_with(stock, tmp_path: Path) -> None:
    pipeline, folder = stock
    lora = get_peft_model(copy.deepcopy(pipeline.transformer), LoraConfig(target_modules=["to_q"]))
    for parameter in lora.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    lora.save_pretrained(tmp_path / "lora")
    command = ["generate", str(folder), "a red gem", "--sampler", "lcm", "--output", str(tmp_path)]
    file = str(tmp_path / "lora" / "adapter_model.safetensors")
    for options in ([], ["--lora", f"{file}:0.5", "--lora", file], ["--steps", "2"]):
        with pytest.warns(UserWarning, match="null caption"):
            CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    recipes = [json.loads(Image.open(path).text["pixart"]) for path in tmp_path.glob("*.png")]
    assert len({recipe["weights"] for recipe in recipes}) == 2
    assert {recipe["guidance_scale"] for recipe in recipes} == {1.0}
    assert sorted((recipe["steps"], recipe.get("loras", [])) for recipe in recipes) == [
        (2, []), (4, []), (4, ["adapter_model.safetensors:0.5", "adapter_model.safetensors:1"])
    ]  # fmt: skip


def test_a_distilled_pipeline_says_so(stock, tmp_path: Path) -> None:
    parts = {**stock[0].components, "scheduler": STUDENTS["lcm"][0]}
    PixArtAlphaPipeline(**parts).save_pretrained(tmp_path)
    totals = []
    with pytest.warns(UserWarning, match="null caption"):
        pixart = PixArtPipeline.from_pretrained(tmp_path)
    pixart(["a red gem"], callback=lambda done, total: totals.append(total))
    assert pixart.sampler == "lcm" and totals == [4] * 4
