"""A patched diffusers model against the stock one: each call, whole pipelines, and the way back."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import product
from unittest import mock

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_stock_for_any_mask(variant: str, backend: str, mask: str) -> None:
    model = transformer(variant)
    arguments = inputs(model, encoder_attention_mask=MASKS[mask])
    expected = model(**arguments).sample
    with pk.use_backend(backend), counting() as calls:
        pk.patch(model)
        # without text, the stock code adds -10000 to each score, which rounds it
        rtol = 1e-4 if mask == "empty-row" else 1e-5
        assert_close(assert_no_warning(model, **arguments).sample, expected, rtol)
        for kind in model._pixart_kernels.kinds.values():
            assert kind.compared and not kind.differ
        if backend == "auto":
            assert set(calls) >= {"adaln_single", "gated_residual", "gated_residual_adaln"}
        else:
            cross = {"none": "attention", "soft": None, "soft-bias": None}
            expect = Counter(
                adaln_single=3, gated_residual=6, gated_residual_adaln=3, bias_gelu=3, attention=3
            )
            expect.update(filter(None, [cross.get(mask, "cross_attention")] * 3))
            assert calls == expect


@pytest.mark.parametrize(
    "B, N, L", [pytest.param(*t, id="B{}-N{}-L{}".format(*t)) for t in [(1, 1, 1), (2, 15, 5)]]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_stock_at_awkward_sizes(backend: str, B: int, N: int, L: int) -> None:
    model = transformer()
    size = {1: (2, 2), 15: (10, 6)}[N]
    arguments = inputs(model, B, size, L, encoder_attention_mask=prefix_mask(B, L))
    expected = model(**arguments).sample
    with pk.use_backend(backend):
        pk.patch(model)
        assert_close(assert_no_warning(model, **arguments).sample, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_as_near_fp32_as_stock(dtype: torch.dtype, backend: str) -> None:
    reference = transformer()
    model = copy.deepcopy(reference).to(dtype)
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    stock = model(**arguments).sample
    wide = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    # the weights that both have, which are 16-bit numbers
    exact = copy.deepcopy(model).float()(**wide).sample
    with pk.use_backend(backend):
        pk.patch(model)
        ours = assert_no_warning(model, **arguments).sample
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= 2 * (stock - exact).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    exact = model(**arguments).sample
    with torch.autocast("cpu", torch.bfloat16), pk.use_backend(backend):
        stock = model(**arguments).sample
        pk.patch(model)
        ours = assert_no_warning(model, **arguments).sample
    assert ours.dtype == stock.dtype
    assert (ours - exact).norm() <= 2 * (stock - exact).norm()


@pytest.mark.parametrize("patched_first", [True, False], ids=["patch-fuse", "fuse-patch"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_fused_projections(backend: str, patched_first: bool) -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    with pk.use_backend(backend), counting() as calls:
        if patched_first:
            pk.patch(model)
            model(**arguments)
        model.fuse_qkv_projections()
        report = pk.patch(model)
        calls.clear()
        assert_close(assert_no_warning(model, **arguments).sample, expected)
        assert "self_attention" in str(report)
        if backend == "reference":
            assert (calls["self_attention"], calls["attention"], calls["cross_attention"]) == (
                3,
                0,
                3,
            )
        model.unfuse_qkv_projections()
        assert_close(model(**arguments).sample, expected)


def gradients(model: nn.Module, arguments: dict) -> dict[str, Tensor]:
    model.zero_grad()
    text = arguments["encoder_hidden_states"].clone().requires_grad_()
    out = model(**{**arguments, "encoder_hidden_states": text}).sample
    out.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "text": text.grad}


@pytest.mark.parametrize(
    "variant, backend, checkpointing",
    [
        *product(VARIANTS, BACKENDS, (False, "reentrant", "non-reentrant")),
        pytest.param("alpha", "triton", "non-reentrant", marks=INTERPRETED),
    ],
)
def test_training_gradients(variant: str, backend: str, checkpointing: bool | str) -> None:
    model = transformer(variant).train()
    arguments = inputs(model, encoder_attention_mask=MASKS["scattered"])
    expected = gradients(model, arguments)
    if checkpointing:
        model.enable_gradient_checkpointing()
        function = torch.utils.checkpoint.checkpoint
        reentrant = checkpointing == "reentrant"
        model._gradient_checkpointing_func = lambda *args: function(*args, use_reentrant=reentrant)
    with pk.use_backend(backend):
        pk.patch(model)
        for _ in range(2):  # while comparing, and after
            actual = gradients(model, arguments)
            assert actual.keys() == expected.keys()
            floor = 1e-6 * max(float(value.abs().max()) for value in expected.values())
            for name, value in expected.items():
                # a key's bias has no gradient but rounding
                atol = 2e-5 * float(value.abs().max()) + floor
                torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("mask", ["scattered", "float"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str, mask: str) -> None:
    model = transformer("alpha")
    arguments = inputs(model, encoder_attention_mask=MASKS[mask])
    expected = model(**arguments).sample
    torch._dynamo.reset()
    with pk.use_backend(backend), counting() as calls:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(**arguments).sample, expected)
        assert not calls
        pk.patch(compiled)
        assert_close(compiled(**arguments).sample, expected)
        assert calls["gated_residual_adaln"] == 3
        pk.unpatch(compiled)
        calls.clear()
        assert_close(compiled(**arguments).sample, expected)
        assert not calls
    torch._dynamo.reset()


def wrong_op(op: str, where: int = 0):
    """The op, wrong in one token of the sample."""
    function = getattr(pk, op)

    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        first, *rest = out if isinstance(out, tuple) else (out,)
        spoilt = first.clone()
        spoilt[0, where] = spoilt[0, where] * 1.5
        return (spoilt, *rest) if rest else spoilt

    return mock.patch.object(integration, op, call)


@pytest.mark.parametrize("op", sorted({*OPS} - {"self_attention"}))
def test_self_check_returns_to_stock(op: str) -> None:
    model = transformer().train()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = gradients(model, arguments)
    output = model(**arguments).sample
    pk.patch(model)
    model.enable_gradient_checkpointing()
    with pk.use_backend("reference"), wrong_op(op):
        with pytest.warns(UserWarning, match="differ from stock code at latents .2, 4, 10, 6."):
            actual = gradients(model, arguments)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=name)
        assert torch.equal(assert_no_warning(model, **arguments).sample, output)
        # another shape is another question
        with pytest.warns(UserWarning, match="differ from stock code"):
            model(**inputs(model, size=(4, 4), encoder_attention_mask=prefix_mask()))


def test_self_check_sees_nan_and_dtype() -> None:
    agree = integration._agree
    x, stock = torch.zeros(2, 2, 4), torch.ones(2, 2, 4)
    assert agree(stock + 1e-5, stock, x, x)
    assert not agree(stock * 1.1, stock, x, x)
    assert not agree(stock * torch.nan, stock, x, x)
    assert not agree(stock.double(), stock, x, x)
    assert not agree(stock[:1], stock, x, x)
    # what the stock code overflows at is no reason against ours
    stock[0, 0, 0] = torch.inf
    assert agree(torch.ones(2, 2, 4), stock, x, x)


def test_dropout_is_not_compared_and_draws_alike() -> None:
    model = transformer(dropout=0.5).train()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    torch.manual_seed(5)
    expected = model(**arguments).sample
    pk.patch(model)
    torch.manual_seed(5)
    assert_close(assert_no_warning(model, **arguments).sample, expected)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
        self.count += function.name().split(".")[0] in names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask, first", [("scattered", 0), ("bool", 0), ("float", 1), ("bias", 1)])
def test_the_host_does_not_wait_for_masks(mask: str, first: int) -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=MASKS[mask].clone())
    with HostReads() as stock:
        model(**arguments)
    pk.patch(model)
    with pk.use_backend("reference"), torch.no_grad():
        model(**arguments)  # compares
        for expected in (0, first):
            with HostReads() as reads:
                model(**arguments)
            assert reads.count - stock.count == expected
            # another mask, in the same tensor
            arguments["encoder_attention_mask"].copy_(arguments["encoder_attention_mask"].flip(0))


@torch.no_grad()
def test_a_processor_of_somebody_else_is_called_as_it_is() -> None:
    class Doubling(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 2 * super().__call__(attn, hidden_states, *args, **kwargs)

    model = transformer()
    model.transformer_blocks[0].attn1.set_processor(Doubling())
    model.transformer_blocks[1].attn2.set_processor(Doubling())
    model.transformer_blocks[2].attn1.set_processor(AttnProcessor())
    arguments = inputs(model, encoder_attention_mask=MASKS["scattered"])
    expected = model(**arguments).sample
    with pk.use_backend("reference"), counting() as calls:
        report = pk.patch(model)
        assert_close(assert_no_warning(model, **arguments).sample, expected)
    assert calls == Counter(
        adaln_single=3, gated_residual=6, gated_residual_adaln=3, bias_gelu=3, attention=2
    )
    assert "1 attention             stock: processor Doubling" in str(report)
    assert "1 cross_attention       stock: processor Doubling" in str(report)


@torch.no_grad()
def test_kwargs_and_chunks_are_left_to_stock_code() -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    pk.patch(model)
    with counting() as calls:
        model(**arguments, cross_attention_kwargs={"scale": 1.0})
        assert not calls
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(3, 1)
        assert_close(model(**arguments).sample, expected)
        # attention does not know of the chunks around it
        assert set(calls) <= {"attention", "self_attention", "cross_attention"}


def test_hooks_on_submodules_see_what_they_saw() -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())

    names = (
        "0.attn1", "0.attn1.to_q", "0.attn2", "0.attn2.to_k", "0.norm1", "1.norm2",
        "1.ff.net.0.proj", "2.ff.net.0.proj",
    )  # fmt: skip

    def seen() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = [
            model.transformer_blocks.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: found.update({name: out})
            )
            for name in names
        ]
        model(**arguments)
        for handle in handles:
            handle.remove()
        return found

    expected = seen()
    with pk.use_backend("reference"):
        pk.patch(model)
        model(**arguments)  # compares, and so calls the stock code as well
        actual = seen()
    assert set(actual) == set(names)
    for name in names:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize("patched_first", [True, False], ids=["patch-hook", "hook-patch"])
@pytest.mark.parametrize("hooks", ["model", "sequential", "group", "layerwise"])
@torch.no_grad()
def test_offloading_hooks(hooks: str, patched_first: bool) -> None:
    """What accelerate and diffusers do to a model they move, with the CPU for a device."""
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    remove = None

    def hook() -> None:
        nonlocal remove
        if hooks == "model":
            _, handle = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
            remove = handle.remove
        elif hooks == "sequential":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            remove = lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True)  # noqa: E731
        elif hooks == "group":
            cpu = torch.device("cpu")
            model.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)
        else:
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

    if hooks == "layerwise":
        stock = copy.deepcopy(model)
        stock.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        expected = stock(**arguments).sample
    else:
        expected = model(**arguments).sample
    with pk.use_backend("reference"), counting() as calls:
        if not patched_first:
            hook()
        pk.patch(model)
        if patched_first:
            hook()
        assert_close(assert_no_warning(model, **arguments).sample, expected)
        # a hook on the MLP's first layer has to see its product
        assert calls["bias_gelu"] == (3 if hooks in ("model", "group") else 0)
        assert (calls["attention"], calls["cross_attention"]) == (3, 3)
        calls.clear()
        pk.unpatch(model)
        assert torch.equal(model(**arguments).sample, expected)
        pk.patch(model)
        if remove is not None:
            remove()
            assert_close(model(**arguments).sample, expected)
            assert calls["attention"] == 3
            pk.unpatch(model)
            calls.clear()
            assert torch.equal(model(**arguments).sample, expected)
            assert not calls


def test_lora_by_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    plain = model(**arguments).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    for patched_first in (True, False):
        model = transformer()
        if patched_first:
            pk.patch(model)
        adapted = peft.get_peft_model(model, config)
        if patched_first:
            pk.unpatch(model)
        expected = adapted(**arguments).sample
        assert not torch.allclose(expected, plain)
        with pk.use_backend("reference"), counting() as calls:
            pk.patch(model)
            with torch.no_grad():
                assert_close(assert_no_warning(adapted, **arguments).sample, expected)
            assert calls["attention"] == 3 and calls["bias_gelu"] == 0
            grads = gradients(adapted, arguments)
        assert sum("lora" in name for name in grads) == 3 * 2 * (4 + 4 + 2)


class Int8Linear(nn.Module):
    """A linear layer as quantisation leaves it: what it holds is nothing to multiply by."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@torch.no_grad()
def test_quantised_layers_are_called() -> None:
    model = transformer()
    for block in model.transformer_blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, Int8Linear(module))
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    with pk.use_backend("reference"), counting() as calls:
        report = pk.patch(model)
        assert_close(assert_no_warning(model, **arguments).sample, expected)
    assert calls["attention"] == calls["cross_attention"] == 3 and calls["bias_gelu"] == 0
    assert "3 bias_gelu             stock: not a plain linear layer with a bias" in str(report)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@torch.no_grad()
def test_cuda_graph_replays_a_step(backend: str) -> None:
    model = transformer("alpha").cuda()
    arguments = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in inputs(model, encoder_attention_mask=MASKS["scattered"]).items()
    }
    arguments["added_cond_kwargs"] = {
        k: v.cuda() for k, v in arguments["added_cond_kwargs"].items()
    }
    expected = model(**arguments).sample
    with pk.use_backend(backend):
        pk.patch(model)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            assert_no_warning(model, **arguments)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**arguments).sample
        output.zero_()
        graph.replay()
        # TF32 in either
        assert_close(output, expected, rtol=5e-3)


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


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


@pytest.mark.parametrize(
    "name, backend",
    [
        *product(PIPELINES, BACKENDS),
        pytest.param("sigma-pag", "triton", marks=INTERPRETED),
    ],
)
def test_pipelines_draw_the_same_at_each_step(name: str, backend: str) -> None:
    kind, variant, arguments = PIPELINES[name]
    layers = {"pag_applied_layers": "blocks.1"} if kind is PixArtSigmaPAGPipeline else {}
    scheduler = DPMSolverMultistepScheduler() if variant == "alpha" else DDIMScheduler()
    parts = {"vae": vae(), "transformer": transformer(variant), "scheduler": scheduler}
    pipeline = kind(tokenizer=None, text_encoder=None, **parts, **layers)
    pipeline.set_progress_bar_config(disable=True)
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
        assert calls["attention"] == (8 if layers else 12)
        assert calls["cross_attention"] == 12
    pk.unpatch(pipeline)
    for step, value in draw(pipeline, **arguments).items():
        assert torch.equal(value, expected[step]), step


@torch.no_grad()
def test_unpatch_leaves_nothing_behind() -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    first = pk.patch(model)
    model(**arguments)
    # a second patch changes nothing, not even what was learnt about shapes
    kinds = model._pixart_kernels.kinds
    assert pk.patch(model) == first and model._pixart_kernels.kinds is kinds
    assert [name for name, _ in model.named_modules()] == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    pk.unpatch(model)
    pk.unpatch(model)
    assert torch.equal(model(**arguments).sample, expected)
    assert {name: vars(module) for name, module in model.named_modules()}.keys() == before.keys()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


@torch.no_grad()
def test_a_patched_model_is_saved_copied_and_pickled(tmp_path) -> None:
    model = transformer()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    pk.patch(model)
    model(**arguments)
    model.save_pretrained(tmp_path)
    stock = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert type(stock) is PixArtTransformer2DModel
    assert {key: stock.config[key] for key in model.config if key[0] != "_"} == {
        key: value for key, value in model.config.items() if key[0] != "_"
    }
    assert torch.equal(stock(**arguments).sample, expected)

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with counting() as calls:
        assert_close(twin(**arguments).sample, expected)
        assert calls["adaln_single"] == 3
        calls.clear()
        pickled = pickle.loads(pickle.dumps(twin))
        assert torch.equal(pickled(**arguments).sample, expected)
        assert not calls


def test_refuses_what_is_no_pixart() -> None:
    with pytest.raises(TypeError, match="is a Linear; accepted: a PixArtTransformer2DModel"):
        pk.patch(nn.Linear(2, 2))
    dit = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1)
    with pytest.raises(TypeError, match="is a DiTTransformer2DModel"):
        pk.patch(dit)
    with pytest.raises(ValueError, match="block 0 is one whose norms have weights"):
        pk.patch(transformer(norm_elementwise_affine=True))
    model = transformer()
    model.transformer_blocks[1].attn2 = None
    with pytest.raises(ValueError, match="block 1 is one with Attention and NoneType"):
        pk.patch(model)


def test_refuses_forwards_replaced_by_others_and_changes_nothing() -> None:
    model = transformer()
    block = model.transformer_blocks[2]
    block.forward = lambda *args, **kwargs: args[0]
    with pytest.raises(RuntimeError, match="forward of a BasicTransformerBlock was replaced"):
        pk.patch(model)
    block.forward = block.attn1.forward.__func__.__get__(block)
    with pytest.raises(RuntimeError, match="replaced by .*Attention.forward; accepted: the stock"):
        pk.patch(model)
    assert "forward" not in vars(model) and "_pixart_kernels" not in vars(model)


def test_a_backend_asked_for_by_name_runs_or_raises() -> None:
    model = transformer()
    with pk.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot run"):
        pk.patch(model)
    assert "forward" not in vars(model)


def test_report_says_what_runs_and_why_not() -> None:
    text = str(pk.patch(transformer()))
    assert text.startswith("PixArtTransformer2DModel, 3 blocks, on cpu in float32\n")
    assert "  6 gated_residual        " in text
    assert "attention             stock: cuda: " in text
    with pk.use_backend("reference"):
        assert "  3 cross_attention       reference" in str(pk.patch(transformer()))


def test_diffusers_is_imported_only_when_asked_for() -> None:
    code = "import sys, pixart_kernels as pk; assert 'diffusers' not in sys.modules; pk.patch"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pk.nothing  # noqa: B018
