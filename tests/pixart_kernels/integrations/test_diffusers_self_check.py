"""A patched diffusers model compares itself with the stock code, and returns to it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from diffusers_cases import (
    OPS,
    assert_no_warning,
    gradients,
    inputs,
    prefix_mask,
    transformer,
)

import pixart_kernels as pk
from pixart_kernels.integrations import diffusers as integration


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
