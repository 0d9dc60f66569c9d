"""pk.patch and pk.unpatch themselves: what they leave behind, refuse and report."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers_cases import assert_close, counting, inputs, prefix_mask, transformer
from torch import nn

import pixart_kernels as pk


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
