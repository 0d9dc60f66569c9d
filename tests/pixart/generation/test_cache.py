"""What is computed once is what would be computed at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pixart import PixArt, PixArtConfig
from pixart.diffusion import sample
from pixart.generation import cache
from pixart.generation.cache import Cached, CudaGraphs

PLAIN = PixArtConfig(
    input_size=8, hidden_size=24, depth=2, num_heads=2, caption_channels=6, max_caption_tokens=5
)
CONFIGS = {
    "adaln_single": PLAIN,
    "micro": dataclasses.replace(PLAIN, micro_conditioning=True),
    "adaln": dataclasses.replace(PLAIN, conditioning="adaln"),
    "gated": dataclasses.replace(PLAIN, gated_cross_attention=True),
}
TIMESTEPS = torch.tensor([999.0, 512.25, 3.0])


def randomized(config: PixArtConfig) -> PixArt:
    torch.manual_seed(0)
    model = PixArt(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def conditions(config: PixArtConfig, B: int = 3, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    found = {
        "caption": torch.randn(B, 5, 6, generator=generator),
        "caption_mask": torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).roll(
            seed, 0
        )[:B],
    }
    if config.micro_conditioning:
        found["image_size"] = torch.tensor([[512.0, 640.0], [900.0, 33.0], [8.0, 9.0]])[:B]
        found["aspect_ratio"] = torch.tensor([[0.8], [2.1], [1.0]])[:B]
    return found


def close(a: Tensor, b: Tensor) -> None:
    # timesteps embedded in one batch: a matrix product of another shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_equals_the_model(config: PixArtConfig) -> None:
    model, latents = randomized(config), torch.randn(3, 4, 10, 6)
    cached, prepared = Cached(model), Cached(model)
    prepared.prepare(TIMESTEPS)
    for seed in (1, 2):
        prompt = conditions(config, seed=seed)
        for t in TIMESTEPS:
            expected = model(latents, t.expand(3), **prompt)
            assert torch.equal(cached(latents, t.expand(3), **prompt), expected)
            close(prepared(latents, t.expand(3), **prompt), expected)


@torch.no_grad()
def test_embeds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = randomized(PLAIN), []

    def count(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda *_: calls.append(name))

    count("text", model.y_embedder)
    count("time", model.t_embedder)
    count("t0", model.t_block)
    for block in model.blocks:
        count("kv", block.cross_attn.kv_linear)
    cached, latents, prompt = Cached(model), torch.randn(2, 4, 4, 4), conditions(PLAIN, 2)
    cached.prepare(TIMESTEPS)
    for t in TIMESTEPS:
        cached(latents, t.expand(2), **prompt)
    once = ["text", "kv", "kv", "time", "t0"]
    assert calls == once
    cached(latents, TIMESTEPS[:1].expand(2), **{**prompt, "caption": prompt["caption"].clone()})
    assert calls == once * 2


@torch.no_grad()
def test_a_timestep_that_was_not_named_is_nan() -> None:
    model, latents, prompt = randomized(PLAIN), torch.randn(2, 4, 4, 4), conditions(PLAIN, 2)
    cached = Cached(model)
    cached.prepare(TIMESTEPS)
    assert cached(latents, torch.tensor([5.0, 5.0]), **prompt).isnan().all()
    assert cached(latents, torch.tensor([999.0, 3.0]), **prompt).isnan().all()
    assert cached(latents, torch.tensor([3.0, 3.0]), **prompt).isfinite().all()


@pytest.mark.parametrize("sampler", ["dpm-solver++", "heun", "pndm", "iddpm"])
def test_samplers_name_every_timestep(sampler: str) -> None:
    model, prompt = randomized(PLAIN), conditions(PLAIN, 2)
    noise = torch.randn(2, 4, 4, 4)
    options = {"null_caption": torch.randn(5, 6), "sampler": sampler, "steps": 4}

    def draw(model: Callable, prepare: Callable | None) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return sample(model, noise, **prompt, **options, generators=generators, prepare=prepare)

    cached = Cached(model)
    expected = draw(model, None)
    found = draw(cached, cached.prepare)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


class Captures:
    """Stands in for CUDA graphs: a replay runs what was captured again, into the same output."""

    count = 0

    def __call__(self, run: Callable[[], Tensor], pool: object) -> tuple[Callable, Tensor]:
        self.count += 1
        output = run()
        return lambda: output.copy_(run()), output


@torch.no_grad()
def test_graphs_read_what_each_call_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = Captures()
    monkeypatch.setattr(cache, "capture", captures)
    model = randomized(PLAIN)
    graphs = CudaGraphs(model)
    outputs, expected = [], []
    for seed, size in ((1, (4, 4)), (2, (4, 4)), (3, (4, 6)), (4, (4, 4))):
        latents, prompt = torch.randn(3, 4, *size), conditions(PLAIN, seed=seed)
        cached = Cached(model, graphs)
        for t in TIMESTEPS:
            outputs.append(cached(latents, t.expand(3), **prompt))
            expected.append(model(latents, t.expand(3), **prompt))
    assert captures.count == 2
    # compared at the end: a later replay must not write into an earlier result
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))

    model.blocks[0].mlp.fc1.weight.data = model.blocks[0].mlp.fc1.weight * 2
    cached = Cached(model, graphs)
    found = cached(latents, TIMESTEPS[:1].expand(3), **prompt)
    assert captures.count == 3
    assert torch.equal(found, model(latents, TIMESTEPS[:1].expand(3), **prompt))


def test_graphs_made_in_inference_mode_serve_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "capture", Captures())
    model, latents, prompt = randomized(PLAIN), torch.randn(3, 4, 4, 4), conditions(PLAIN)
    graphs = CudaGraphs(model)
    t = TIMESTEPS[:1].expand(3)
    with torch.inference_mode():
        expected = Cached(model, graphs)(latents, t, **prompt)
    with torch.no_grad():
        assert torch.equal(Cached(model, graphs)(latents, t, **prompt), expected)


@torch.no_grad()
def test_graphs_share_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "capture", Captures())
    model, t = randomized(PLAIN), TIMESTEPS[:1].expand(3)
    graphs = CudaGraphs(model)
    cached = Cached(model, graphs)
    for seed in (1, 2):
        prompt = conditions(PLAIN, seed=seed)
        for size in ((4, 4), (4, 6)):
            latents = torch.randn(3, 4, *size)
            assert torch.equal(cached(latents, t, **prompt), model(latents, t, **prompt))
    assert len(graphs._graphs) == 2 and len(graphs._texts) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_graphs_equal_the_model_on_a_gpu() -> None:
    model = randomized(PLAIN).cuda()
    prompt = {name: value.cuda() for name, value in conditions(PLAIN).items()}
    graphs, latents = CudaGraphs(model), torch.randn(3, 4, 8, 6, device="cuda")
    for _ in range(2):
        cached = Cached(model, graphs)
        for t in TIMESTEPS.cuda():
            expected = model(latents, t.expand(3), **prompt)
            assert torch.equal(cached(latents, t.expand(3), **prompt), expected)
