"""A patched diffusers model against the stock one, call by call: masks, sizes, precisions."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from diffusers_cases import (
    BACKENDS,
    MASKS,
    VARIANTS,
    assert_close,
    assert_no_warning,
    counting,
    inputs,
    prefix_mask,
    transformer,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pixart_kernels as pk


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
