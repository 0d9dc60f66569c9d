"""From prompts to pictures, with small random parts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixart import PixArt, PixArtConfig
from pixart.conditioning import VAE
from pixart.generation import PixArtPipeline, Prompts, contact_sheet
from pixart.generation.pipeline import to_image, to_pixels

CONFIG = PixArtConfig(
    input_size=8, hidden_size=24, depth=2, num_heads=2, caption_channels=6, max_caption_tokens=5
)


class Encoder:
    """Features that depend on the words; "" is one token, padded by noise as T5's is."""

    max_tokens = 5

    def encode(self, texts) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(text.split()) + 1 for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        features = torch.zeros(*mask.shape, 6)
        for row, text in zip(features, texts, strict=True):
            for i, word in enumerate([*text.split(), "."]):
                row[i] = torch.randn(6, generator=torch.Generator().manual_seed(len(word) * 7 + i))
        return features, mask

    def encode_null(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(99)
        return torch.randn(5, 6, generator=generator), torch.arange(5) < 1


@pytest.fixture(scope="module")
def pipeline() -> PixArtPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                        down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    model = PixArt(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PixArtPipeline(model, VAE(vae), Encoder())


def latents(pipeline: PixArtPipeline, prompts: Prompts, **changes) -> Tensor:
    settings = {
        "seed": 3, "steps": 3, "sampler": "ddim", "guidance_scale": 3.0,
        "guidance_mask": "official", "batch_size": 8,
    }  # fmt: skip
    return torch.cat(list(pipeline.draw_latents(prompts, (8, 8), **{**settings, **changes})))


PROMPTS = ["a cat", "one very long prompt", "dog"]


def close(a: Tensor, b: Tensor) -> None:
    # the same sums in differently shaped matrix products, through several steps
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("sampler", ["dpm-solver++", "euler-ancestral", "iddpm"])
def test_a_picture_does_not_depend_on_its_batch(pipeline: PixArtPipeline, sampler: str) -> None:
    prompts = pipeline.encode(PROMPTS)
    together = latents(pipeline, prompts, sampler=sampler)
    for size in (1, 2):
        apart = latents(pipeline, prompts, sampler=sampler, batch_size=size)
        close(apart, together)
    # the seed belongs to the picture: number 1 of seed 3 is number 0 of seed 4
    alone = latents(pipeline, pipeline.encode(PROMPTS[1:2]), sampler=sampler, seed=4)
    close(alone, together[1:2])
    assert not torch.allclose(together, latents(pipeline, prompts, sampler=sampler, seed=5))


def test_guidance_uses_the_right_null_caption(pipeline: PixArtPipeline) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    embed_text = pipeline.model.embed_text

    def spy(caption, caption_mask=None):
        seen.append((caption[:3], caption_mask[:3].sum(1)))
        return embed_text(caption, caption_mask)

    pipeline.model.embed_text = spy  # type: ignore[method-assign]
    try:
        prompts = pipeline.encode(PROMPTS)
        latents(pipeline, prompts, steps=1)
        latents(pipeline, prompts, steps=1, guidance_mask="diffusers")
        latents(pipeline, pipeline.encode(PROMPTS, "bad art"), steps=1)
    finally:
        del pipeline.model.embed_text
    official, diffusers, negative = seen
    assert torch.equal(official[0][0], pipeline.model.y_embedder.y_embedding)
    assert official[1].tolist() == [3, 5, 2]  # each prompt's own length
    assert torch.equal(diffusers[0][0], Encoder().encode_null()[0])
    assert diffusers[1].tolist() == [1, 1, 1]
    assert torch.equal(negative[0][0, :3], Encoder().encode(["bad art"])[0][0])
    assert negative[1].tolist() == [3, 3, 3]


def test_pictures_of_any_size_and_progress(pipeline: PixArtPipeline) -> None:
    calls: list[tuple[int, int]] = []
    images = pipeline(
        PROMPTS, height=12, width=20, steps=2, batch_size=2, callback=lambda *c: calls.append(c)
    )
    assert [image.size for image in images] == [(20, 12)] * 3
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert pipeline(["a"], steps=1)[0].size == (16, 16)
    with pytest.raises(ValueError, match="`width` is 18; accepted: a multiple of 4"):
        pipeline(["a"], width=18)


def test_micro_conditions_are_the_pictures_own(pipeline: PixArtPipeline) -> None:
    model = PixArt(dataclasses.replace(CONFIG, micro_conditioning=True))
    seen: list[tuple[Tensor, Tensor]] = []
    embed_time = model.embed_time

    def spy(timestep, image_size, aspect_ratio):
        seen.append((image_size, aspect_ratio))
        return embed_time(timestep, image_size, aspect_ratio)

    model.embed_time = spy  # type: ignore[method-assign]
    PixArtPipeline(model, pipeline.vae, Encoder())(["a"], height=12, width=24, steps=1)
    ((image_size, aspect_ratio),) = seen
    assert image_size.tolist() == [[12, 24]] * 2
    assert aspect_ratio.tolist() == [0.5] * 2


def test_cuda_graphs_are_for_cuda(pipeline: PixArtPipeline) -> None:
    with pytest.raises(ValueError, match="`cuda_graphs` is True for a model on cpu"):
        PixArtPipeline(pipeline.model, pipeline.vae, None, cuda_graphs=True)


def test_no_text_encoder_no_texts(pipeline: PixArtPipeline) -> None:
    with pytest.raises(ValueError, match="no text encoder"):
        PixArtPipeline(pipeline.model, pipeline.vae, None)(["a"])


def test_no_pipeline_in_the_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected pipeline\.json"):
        PixArtPipeline.from_pretrained(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps({"vae": "v", "text_encoder": "t"}))
    with pytest.raises((FileNotFoundError, ValueError), match="transformer"):
        PixArtPipeline.from_pretrained(tmp_path)


def test_pixels_round_trip() -> None:
    image = to_image(torch.rand(3, 5, 7) * 2 - 1)
    assert image.size == (7, 5)
    assert to_image(to_pixels(image)).tobytes() == image.tobytes()


def test_contact_sheet_holds_every_picture() -> None:
    colours = ["red", "green", "blue", "black", "purple"]
    from PIL import Image

    images = [Image.new("RGB", (16, 8), colour) for colour in colours]
    sheet = contact_sheet(
        images, ["a rather long caption that needs lines"] * 5, columns=3, side=32
    )
    found = {colour for _, colour in sheet.getcolors(100_000)}
    assert {image.getpixel((0, 0)) for image in images} <= found
