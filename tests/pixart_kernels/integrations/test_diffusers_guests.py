"""What others put into a diffusers model works on in a patched one: adapters, hooks, layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers_cases import (
    BACKENDS,
    MASKS,
    assert_close,
    assert_no_warning,
    counting,
    gradients,
    inputs,
    prefix_mask,
    transformer,
)
from packaging.version import Version
from torch import Tensor, nn

import pixart_kernels as pk


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
    oldest = Version(diffusers.__version__) < Version("0.36")
    if hooks == "group" and oldest and not torch.accelerator.is_available():
        pytest.skip("group offloading of diffusers 0.35 needs an accelerator")
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
        # wherever the weights are for the moment
        assert pk.patch(model).device == torch.device("cpu")
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


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_adapters_come_and_go_in_a_patched_model(backend: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["to_q", "to_k", "ff.net.0.proj", "ff.net.2"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)

    def adapt() -> nn.Module:
        torch.manual_seed(3)
        adapted = peft.get_peft_model(transformer(), config)
        adapted.add_adapter("other", config)
        return adapted

    def stages(adapted: nn.Module) -> Iterator[nn.Module]:
        yield adapted
        adapted.set_adapter("other")
        yield adapted
        with adapted.disable_adapter():
            yield adapted
        adapted.merge_adapter()
        yield adapted
        adapted.unmerge_adapter()
        yield adapted
        adapted.delete_adapter("default")
        yield adapted
        yield adapted.merge_and_unload()

    stock, adapted = adapt(), adapt()
    arguments = inputs(stock.get_base_model(), encoder_attention_mask=prefix_mask())
    expected = [stage(**arguments).sample for stage in stages(stock)]
    assert len({float(output.sum()) for output in expected}) >= 3
    with pk.use_backend(backend), counting() as calls:
        # as a pipeline is given them: pipeline.transformer = PeftModel.from_pretrained(...)
        pk.patch(SimpleNamespace(transformer=adapted))
        for stage, output in zip(stages(adapted), expected, strict=True):
            calls.clear()
            assert_close(assert_no_warning(stage, **arguments).sample, output)
            assert calls["gated_residual"] == 6
            # not before the layers are plain ones again
            assert calls["bias_gelu"] == (3 if stage is not adapted else 0)


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


def _by_quanto(blocks: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(blocks, weights=quanto.qint8)
    quanto.freeze(blocks)


def _by_torchao(blocks: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(blocks, torchao.Int8WeightOnlyConfig())


def _by_bitsandbytes(blocks: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name, linear in list(blocks.named_modules()):
        if isinstance(linear, nn.Linear):
            quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features)
            quantised.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
            quantised.bias = linear.bias
            blocks.set_submodule(name, quantised.to("cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantise", [_by_quanto, _by_torchao, _by_bitsandbytes])
@torch.no_grad()
def test_quantised_by_libraries(quantise, backend: str) -> None:
    # their kernels want groups of 32
    model = transformer(attention_head_dim=32, cross_attention_dim=64)
    quantise(model.transformer_blocks)
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    with pk.use_backend(backend), counting() as calls:
        report = pk.patch(model)
        for _ in range(2):
            assert_close(assert_no_warning(model, **arguments).sample, expected)
    assert calls["gated_residual"] == 12 and calls["bias_gelu"] == 0
    assert "3 bias_gelu             stock: not a plain linear layer with a bias" in str(report)
    pk.unpatch(model)
    assert torch.equal(model(**arguments).sample, expected)
