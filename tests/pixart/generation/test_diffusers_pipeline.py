"""A stock diffusers PixArt-Sigma pipeline, saved by diffusers and drawn by both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from pixart.generation import PixArtPipeline

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
