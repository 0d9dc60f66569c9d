"""From prompts to pictures, with small random parts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from PIL import Image
from small_pipeline import CONFIG, Encoder, small_pipeline
from torch import Tensor

import pixart.generation.pipeline as generation
from pixart import PixArt, presets
from pixart.checkpoints import save_diffusers
from pixart.diffusion import NoiseSchedule
from pixart.generation import PixArtPipeline, Prompts, contact_sheet
from pixart.generation.pipeline import to_image, to_pixels


@pytest.fixture(scope="module")
def pipeline() -> PixArtPipeline:
    return small_pipeline()


def latents(pipeline: PixArtPipeline, prompts: Prompts, **changes) -> Tensor:
    settings = {
        "seeds": range(3, 3 + len(prompts)), "steps": 3, "sampler": "ddim", "guidance_scale": 3.0,
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
    alone = latents(pipeline, pipeline.encode(PROMPTS[1:2]), sampler=sampler, seeds=[4])
    close(alone, together[1:2])
    assert not torch.allclose(
        together, latents(pipeline, prompts, sampler=sampler, seeds=range(5, 8))
    )


def test_guidance_uses_the_right_null_caption(
    pipeline: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    embed_text = pipeline.model.embed_text

    def spy(caption, caption_mask=None):
        seen.append((caption[:3], caption_mask[:3].sum(1)))
        return embed_text(caption, caption_mask)

    monkeypatch.setattr(pipeline.model, "embed_text", spy)
    prompts = pipeline.encode(PROMPTS)
    latents(pipeline, prompts, steps=1)
    latents(pipeline, prompts, steps=1, guidance_mask="diffusers")
    latents(pipeline, pipeline.encode(PROMPTS, "bad art"), steps=1)
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


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return to_image(torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(8)) * 2 - 1)


def test_an_image_is_where_pictures_begin(pipeline: PixArtPipeline, photo: Image.Image) -> None:
    calls: list[tuple[int, int]] = []

    def draw(**changes) -> list[Image.Image]:
        settings = {"image": photo, "steps": 10, "callback": lambda *c: calls.append(c)}
        return pipeline(PROMPTS[:2], **{**settings, **changes})

    a, b = draw()
    assert a.size == b.size == photo.size
    assert a.tobytes() != b.tobytes()
    assert calls[-1] == (6, 6)
    draw(strength=0.1)
    assert calls[-1] == (1, 1)
    mirrored, _ = draw(image=photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert mirrored.tobytes() != a.tobytes()
    # another size: scaled to cover it, and cropped
    assert draw(height=16, width=16)[0].size == (16, 16)
    # nor is any other image's size refused
    assert draw(image=photo.resize((19, 12)))[0].size == (20, 12)
    with pytest.raises(ValueError, match="'pndm' cannot begin with an image"):
        draw(sampler="pndm")
    with pytest.raises(ValueError, match="strength must be in"):
        draw(strength=1.5)


def test_a_mask_keeps_black_pixels_as_they_were(
    pipeline: PixArtPipeline, photo: Image.Image
) -> None:
    mask = Image.new("L", photo.size)
    # from the middle of one latent pixel to the middle of another
    mask.paste(255, (5, 3, 14, 9))
    seen: list[Tensor] = []
    forward, pipeline.model.forward = pipeline.model.forward, lambda x, *a: (
        seen.append(x), forward(x, *a))[1]  # fmt: skip
    try:
        drawn, other = pipeline(PROMPTS[:2], image=photo, mask=mask, steps=4, guidance_scale=1)
    finally:
        pipeline.model.forward = forward
    white, black = to_pixels(mask)[0] > 0, to_pixels(mask)[0] < 0
    for picture in (drawn, other):
        assert torch.equal(to_pixels(picture)[:, black], to_pixels(photo)[:, black])
        assert (to_pixels(picture) != to_pixels(photo)).any(0)[white].float().mean() > 0.9
    assert drawn.tobytes() != other.tobytes()
    # every latent pixel that a white one lies in is drawn, no other: they are alike in all steps
    schedule = NoiseSchedule()
    start = pipeline.vae.encode(to_pixels(photo)[None])
    abar = schedule.alphas_cumprod[250].float()
    noise = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    kept = (seen[-1][0] - abar.sqrt() * start - (1 - abar).sqrt() * noise)[0].abs().amax(0) < 1e-3
    expected = torch.ones(6, 10, dtype=torch.bool)
    expected[1:5, 2:7] = False
    assert torch.equal(kept, expected)


def test_the_black_of_a_jpeg_is_black(
    pipeline: PixArtPipeline, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    sample = generation.sample

    def spy(*arguments, mask: Tensor, **settings) -> Tensor:
        seen.append(mask.float().mean().item())
        return sample(*arguments, mask=mask, **settings)

    monkeypatch.setattr(generation, "sample", spy)
    for dark in (0, 9, 127, 128):
        mask = Image.new("L", photo.size, dark)
        mask.paste(255, (0, 0, 10, 12))
        pipeline(["a"], image=photo, mask=mask, steps=1)
    assert seen == [0.5, 0.5, 0.5, 1.0]


def test_sizes_for_an_image(pipeline: PixArtPipeline) -> None:
    def size(width: int, height: int) -> tuple[int, int]:
        return pipeline.size_for(Image.new("L", (width, height)))

    assert size(32, 8) == (8, 32)
    assert size(1920, 1080) == (12, 20)
    # a multiple, and far beyond what the model was trained at
    assert size(36, 36) == (16, 16)
    assert size(17, 31) == pipeline.size(aspect_ratio="17:31")


def test_no_picture_is_drawn_of_nan(photo: Image.Image) -> None:
    pipeline = small_pipeline()
    with torch.no_grad():
        pipeline.vae.model.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="came out as NaN.*float16"):
        pipeline(["a"], steps=1)


def test_what_did_not_fit_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small_pipeline()
    pipeline.memory = "low"
    moves: list[object] = []

    def to(where: object) -> None:
        moves.append(where)
        if len(moves) == 1:
            raise torch.OutOfMemoryError("half of it is there")

    monkeypatch.setattr(pipeline.model, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline(["a"], steps=1)
    assert moves == [torch.device("cpu"), "cpu"]


def test_a_mask_fits_its_image(pipeline: PixArtPipeline, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="`mask` is 4x4 for an image of 20x12"):
        pipeline(["a"], image=photo, mask=photo.resize((4, 4)))
    with pytest.raises(ValueError, match="`mask` is 20x12 for an image of none"):
        pipeline(["a"], mask=photo)


def test_seeds_may_be_each_pictures_own(pipeline: PixArtPipeline) -> None:
    a, b = pipeline(["a", "a"], seed=[7, 7], steps=1)
    assert a.tobytes() == b.tobytes()
    with pytest.raises(ValueError, match="`seed` has 1 numbers; accepted: one, or 2"):
        pipeline(["a", "b"], seed=[7])


def test_sizes_by_aspect_ratio(pipeline: PixArtPipeline) -> None:
    assert pipeline.size() == (16, 16)
    assert pipeline.size(aspect_ratio="16:9") == (12, 20)
    assert pipeline.size(height=8) == (8, 16)
    with pytest.raises(ValueError, match="give one of them"):
        pipeline.size(height=8, aspect_ratio="1:1")


def test_micro_conditions_are_the_pictures_own(
    pipeline: PixArtPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PixArt(dataclasses.replace(CONFIG, micro_conditioning=True))
    seen: list[tuple[Tensor, Tensor]] = []
    embed_time = model.embed_time

    def spy(timestep, image_size, aspect_ratio):
        seen.append((image_size, aspect_ratio))
        return embed_time(timestep, image_size, aspect_ratio)

    monkeypatch.setattr(model, "embed_time", spy)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", r"holds \[1\]; accepted: an object"),
        ("{}", "'vae' is None; accepted: a folder or a name"),
        ('{"vae": "../gone"}', r"has its vae at .*gone, which is no folder"),
        ('{"vae": "/gone/vae"}', "has its vae at /gone/vae, which is no folder"),
        ('{"vae": ".", "text_encoder": 3}', "'text_encoder' is 3; accepted"),
    ],
    ids=["broken", "list", "empty", "relative", "absolute", "number"],
)
def test_a_broken_pipeline_file_is_named(tmp_path, text: str, message: str) -> None:
    (tmp_path / "pipeline.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"pipeline\.json:? {message}"):
        PixArtPipeline.from_pretrained(tmp_path)


def test_pixels_round_trip() -> None:
    image = to_image(torch.rand(3, 5, 7) * 2 - 1)
    assert image.size == (7, 5)
    assert to_image(to_pixels(image)).tobytes() == image.tobytes()


def test_contact_sheet_holds_every_picture() -> None:
    colours = ["red", "green", "blue", "black", "purple"]
    images = [Image.new("RGB", (16, 8), colour) for colour in colours]
    sheet = contact_sheet(
        images, ["a rather long caption that needs lines"] * 5, columns=3, side=32
    )
    found = {colour for _, colour in sheet.getcolors(100_000)}
    assert {image.getpixel((0, 0)) for image in images} <= found


def large(**changes) -> PixArt:
    """A model of 2048 pixels with PixArt-Sigma's coordinates and little else."""
    small = {"hidden_size": 24, "depth": 1, "num_heads": 2, "caption_channels": 6}
    torch.manual_seed(0)
    model = PixArt(dataclasses.replace(presets["sigma-2k"], **small, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


# 2048 and 4096 pixels, square and as far from it as the papers' tables go
@pytest.mark.parametrize("grid", [(128, 128), (64, 256), (256, 256), (512, 128)], ids=str)
def test_coordinates_of_large_pictures_are_those_of_small_ones(grid: tuple[int, int]) -> None:
    positions = large().position_embedding(grid, torch.device("cpu")).view(*grid, 24)
    # every size spans 32 positions, as the models of 512 pixels do; columns come first
    frequencies = 10_000 ** -(torch.arange(6, dtype=torch.float64) / 6)
    for row, column in [(0, 0), (1, 2), (grid[0] - 1, 5), (grid[0] // 2, grid[1] - 1)]:
        x = 32 * torch.tensor([column / grid[1], row / grid[0]], dtype=torch.float64)
        angles = x[:, None] * frequencies
        expected = torch.cat([angles.sin(), angles.cos()], dim=1).flatten()
        torch.testing.assert_close(positions[row, column].double(), expected, rtol=0, atol=1e-5)


def test_draws_2048_pixels_in_one_pass_as_diffusers(pipeline: PixArtPipeline, tmp_path) -> None:
    model = large()
    save_diffusers(model, tmp_path / "stock")
    stock = PixArtTransformer2DModel.from_pretrained(tmp_path / "stock").eval()
    latents = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(0))
    caption, time = torch.randn(1, 5, 6), torch.tensor([500])
    with torch.no_grad():
        ours = model(latents, time, caption)
        theirs = stock(
            latents, caption, time, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ).sample
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("sampling", ["conv", "ave"])
def test_kv_compression_draws_4096_pixels_in_one_pass(
    pipeline: PixArtPipeline, sampling: str
) -> None:
    compressed = {"sampling": sampling, "scale_factor": 4, "layers": [0]}
    model = large(kv_compression=compressed)
    drawing = PixArtPipeline(model, pipeline.vae, Encoder())
    prompts = pipeline.encode(PROMPTS[:1])
    settings = {"seeds": [0], "steps": 1, "sampler": "ddim", "guidance_scale": 1.0,
                "guidance_mask": "official", "batch_size": 1}  # fmt: skip
    (z,) = drawing.draw_latents(prompts, (512, 512), **settings)
    assert z.shape == (1, 4, 512, 512) and z.isfinite().all() and z.std() > 0.1
