import pytest
import torch

from pixart.diffusion import GuidedModel

B, C, L, D = 2, 4, 5, 3
CAPTION = torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
NULL = torch.randn(L, D, generator=torch.Generator().manual_seed(1))
NULL_MASK = torch.tensor([1, 1, 0, 0, 0])
LATENTS = torch.randn(B, C, 2, 2, generator=torch.Generator().manual_seed(2))
T = torch.tensor([10.0, 700.0])


class Spy:
    """Elementwise in the latents, linear in the masked sum of caption features."""

    def __init__(self, channels=2 * C):
        self.calls, self.channels = [], channels

    def __call__(
        self, latents, timestep, caption, caption_mask=None, image_size=None, aspect_ratio=None
    ):
        self.calls.append(
            {
                "latents": latents,
                "timestep": timestep,
                "caption": caption,
                "caption_mask": caption_mask,
                "image_size": image_size,
                "aspect_ratio": aspect_ratio,
            }
        )
        if caption_mask is not None:
            caption = caption * caption_mask[..., None]
        text = caption.sum((1, 2)).view(-1, 1, 1, 1)
        eps = latents * text + timestep.view(-1, 1, 1, 1) / 1000
        return torch.cat([eps, eps - 7], 1)[:, : self.channels]


def manual(null_mask, scale, caption=CAPTION, mask=MASK, null=NULL, channels=2 * C):
    """The formula, from two separate calls."""
    model = Spy(channels)
    uncond = model(LATENTS, T, null.expand(B, -1, -1), null_mask)
    cond = model(LATENTS, T, caption, mask)
    eps = uncond[:, :C] + scale * (cond[:, :C] - uncond[:, :C])
    return torch.cat([eps, cond[:, C:]], 1)


@pytest.mark.parametrize("channels", [C, 2 * C])
def test_official_attends_to_as_much_null_as_caption(channels):
    model = Spy(channels)
    guided = GuidedModel(model, CAPTION, MASK, null_caption=NULL, null_mask=NULL_MASK)
    got = guided(LATENTS, T)
    assert len(model.calls) == 1
    call = model.calls[0]
    assert torch.equal(call["caption_mask"].int(), torch.cat([MASK, MASK]).int())
    assert torch.equal(call["caption"], torch.cat([NULL.expand(B, L, D), CAPTION]))
    assert torch.equal(call["latents"], torch.cat([LATENTS, LATENTS]))
    assert torch.equal(call["timestep"], torch.cat([T, T]))
    torch.testing.assert_close(got, manual(MASK, 4.5, channels=channels))
    # what the fourth channel would be without guidance is far from what it is
    assert (got[:, 3] - Spy()(LATENTS, T, CAPTION, MASK)[:, 3]).abs().max() > 0.1


def test_diffusers_attends_to_the_null_captions_own_tokens():
    model = Spy()
    guided = GuidedModel(
        model,
        CAPTION,
        MASK,
        null_caption=NULL,
        null_mask=NULL_MASK,
        guidance_scale=3.0,
        guidance_mask="diffusers",
    )
    got = guided(LATENTS, T)
    own = NULL_MASK.expand(B, L)
    assert torch.equal(model.calls[0]["caption_mask"].int(), torch.cat([own, MASK]).int())
    torch.testing.assert_close(got, manual(own, 3.0))
    assert not torch.allclose(got, manual(MASK, 3.0))


def test_no_null_mask_means_all_of_it():
    guided = GuidedModel(Spy(), CAPTION, MASK, null_caption=NULL, guidance_mask="diffusers")
    torch.testing.assert_close(guided(LATENTS, T), manual(torch.ones(B, L), 4.5))


def test_per_sample_null():
    nulls, masks = torch.stack([NULL, -NULL]), torch.stack([NULL_MASK, 1 - NULL_MASK])
    guided = GuidedModel(
        Spy(), CAPTION, MASK, null_caption=nulls, null_mask=masks, guidance_mask="diffusers"
    )
    torch.testing.assert_close(guided(LATENTS, T), manual(masks, 4.5, null=nulls))


@pytest.mark.parametrize("guidance_mask", ["official", "diffusers"])
def test_null_longer_than_the_caption(guidance_mask):
    model = Spy()
    guided = GuidedModel(
        model, CAPTION[:, :3], None, null_caption=NULL, guidance_mask=guidance_mask
    )
    got = guided(LATENTS, T)
    own = [1, 1, 1, 0, 0] if guidance_mask == "official" else [1] * 5
    assert model.calls[0]["caption"].shape == (2 * B, L, D)
    expected_mask = torch.tensor([own] * B + [[1, 1, 1, 0, 0]] * B)
    assert torch.equal(model.calls[0]["caption_mask"].int(), expected_mask.int())
    expected = manual(torch.tensor([own] * B), 4.5, caption=CAPTION[:, :3], mask=None)
    torch.testing.assert_close(got, expected)


def test_null_shorter_than_the_caption():
    # three tokens are enough for the longest caption; the fourth and fifth are padding
    model = Spy()
    got = GuidedModel(model, CAPTION, MASK, null_caption=NULL[:3])(LATENTS, T)
    assert model.calls[0]["caption"].shape == (2 * B, L, D)
    torch.testing.assert_close(got, manual(MASK[:, :3], 4.5, null=NULL[:3]))
    with pytest.raises(ValueError, match="null_caption has 2 tokens, fewer than a caption"):
        GuidedModel(model, CAPTION, MASK, null_caption=NULL[:2])
    one = GuidedModel(model, CAPTION, MASK, null_caption=NULL[:1], guidance_mask="diffusers")
    torch.testing.assert_close(one(LATENTS, T), manual(torch.ones(B, 1), 4.5, null=NULL[:1]))


def test_scale_one_is_a_single_call_without_null():
    model = Spy()
    got = GuidedModel(model, CAPTION, MASK, guidance_scale=1)(LATENTS, T)
    assert len(model.calls) == 1 and model.calls[0]["latents"] is LATENTS
    assert model.calls[0]["caption"] is CAPTION and model.calls[0]["caption_mask"] is MASK
    assert torch.equal(got, Spy()(LATENTS, T, CAPTION, MASK))


def test_micro_conditions_go_to_both_halves():
    model = Spy()
    size, ratio = torch.tensor([[512.0, 256.0], [256.0, 512.0]]), torch.tensor([[2.0], [0.5]])
    GuidedModel(model, CAPTION, MASK, null_caption=NULL, image_size=size, aspect_ratio=ratio)(
        LATENTS, T
    )
    assert torch.equal(model.calls[0]["image_size"], torch.cat([size, size]))
    assert torch.equal(model.calls[0]["aspect_ratio"], torch.cat([ratio, ratio]))


def test_text_tensors_are_the_same_objects_at_every_step():
    model = Spy()
    guided = GuidedModel(model, CAPTION, MASK, null_caption=NULL)
    guided(LATENTS, T)
    guided(LATENTS, T)
    first, second = model.calls
    assert first["caption"] is second["caption"]
    assert first["caption_mask"] is second["caption_mask"]


def test_half_precision_output_is_combined_in_float32():
    def half(*args, **kwargs):
        return Spy()(*args, **kwargs).bfloat16()

    got = GuidedModel(half, CAPTION, MASK, null_caption=NULL)(LATENTS, T)
    uncond = half(LATENTS, T, NULL.expand(B, L, D), MASK).float()[:, :C]
    cond = half(LATENTS, T, CAPTION, MASK).float()[:, :C]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, :C], uncond + 4.5 * (cond - uncond))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": CAPTION[0]}, r"caption must have shape \(B, L, D\), got \(5, 3\)"),
        ({"caption_mask": MASK[:, :4]}, r"caption_mask .* \(2, 5\), got \(2, 4\)"),
        ({"null_caption": None}, "null_caption is needed for guidance_scale 4.5"),
        ({"null_caption": NULL[:, :2]}, r"null_caption must have 3 features.*\(5, 2\)"),
        ({"null_caption": NULL.expand(3, L, D)}, r"null_caption .* 1 or 2 rows.*\(3, 5, 3\)"),
        (
            {"null_mask": NULL_MASK[:4], "guidance_mask": "diffusers"},
            r"null_mask must cover the 5 tokens .*\(4,\)",
        ),
        ({"guidance_mask": "both"}, r"guidance_mask must be one of .*official.* got 'both'"),
        ({"image_size": torch.ones(3, 2)}, "image_size must have 2 rows, got 3"),
        ({"aspect_ratio": torch.ones(1, 1)}, "aspect_ratio must have 2 rows, got 1"),
    ],
)
def test_wrong_input_is_named(change, message):
    args = {"caption": CAPTION, "caption_mask": MASK, "null_caption": NULL} | change
    with pytest.raises(ValueError, match=message):
        GuidedModel(Spy(), **args)


def test_wrong_shapes_in_a_call_are_named():
    guided = GuidedModel(Spy(), CAPTION, MASK, null_caption=NULL)
    with pytest.raises(ValueError, match=r"latents .* \(2, C, H, W\).* got \(1, 4, 2, 2\)"):
        guided(LATENTS[:1], T[:1])
    guided = GuidedModel(Spy(channels=6), CAPTION, MASK, null_caption=NULL)
    with pytest.raises(ValueError, match=r"model must return .* 4 or 8, .*got \(4, 6, 2, 2\)"):
        guided(LATENTS, T)
