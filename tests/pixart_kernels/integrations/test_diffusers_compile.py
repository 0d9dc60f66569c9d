"""A patched diffusers model under torch.compile and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from diffusers_cases import (
    BACKENDS,
    MASKS,
    assert_close,
    assert_no_warning,
    counting,
    inputs,
    prefix_mask,
    transformer,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

import pixart_kernels as pk


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


@torch.no_grad()
@pytest.mark.parametrize("patched_first", [True, False], ids=["patch-compile", "compile-patch"])
@pytest.mark.parametrize("how", ["compile()", "torch.compile"])
def test_compiled_blocks(how: str, patched_first: bool) -> None:
    """Each block by itself, which is quick: all of them share the code of one."""

    def compile_blocks(model: nn.Module) -> None:
        blocks = model.transformer_blocks
        for index, block in enumerate(blocks):
            if how == "torch.compile":
                blocks[index] = torch.compile(block, fullgraph=True, backend="eager")
            else:
                block.compile(fullgraph=True, backend="eager")

    def graphs(model: nn.Module) -> int:
        torch._dynamo.reset()
        counters.clear()
        outputs = [assert_no_warning(model, **arguments).sample for _ in range(3)]
        for output in outputs:
            assert_close(output, expected)
        return counters["stats"]["unique_graphs"]

    stock, model = (transformer(num_layers=2) for _ in range(2))
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = model(**arguments).sample
    compile_blocks(stock)
    if patched_first:
        pk.patch(model)
        compile_blocks(model)
    else:
        compile_blocks(model)
        assert pk.patch(model).blocks == 2
    # no more often than the stock blocks, whose second input has other strides than the first
    assert graphs(model) == graphs(stock)
    with counting() as calls:
        assert_close(model(**arguments).sample, expected)
        assert calls["gated_residual_adaln"] > 0
        pk.unpatch(model)
        calls.clear()
        assert_close(model(**arguments).sample, expected)
        assert not calls
    torch._dynamo.reset()


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
