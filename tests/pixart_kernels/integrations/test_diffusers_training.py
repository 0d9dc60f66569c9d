"""Gradients of a patched diffusers model, with and without checkpointing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from diffusers_cases import (
    BACKENDS,
    INTERPRETED,
    MASKS,
    VARIANTS,
    assert_close,
    assert_no_warning,
    counting,
    gradients,
    inputs,
    prefix_mask,
    transformer,
)
from torch import Tensor
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel

import pixart_kernels as pk


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    floor = 1e-6 * max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        # a key's bias has no gradient but rounding
        atol = 2e-5 * float(value.abs().max()) + floor
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=name)


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
            assert_all_close(actual, expected)


def test_dropout_is_not_compared_and_draws_alike() -> None:
    model = transformer(dropout=0.5).train()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    torch.manual_seed(5)
    expected = model(**arguments).sample
    pk.patch(model)
    torch.manual_seed(5)
    assert_close(assert_no_warning(model, **arguments).sample, expected)


def test_distributed_data_parallel() -> None:
    model = transformer().train()
    arguments = inputs(model, encoder_attention_mask=prefix_mask())
    expected = gradients(model, arguments)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        with pk.use_backend("reference"), counting() as calls:
            pk.patch(parallel)
            actual = gradients(parallel, arguments)
        assert calls["attention"] > 0
    finally:
        torch.distributed.destroy_process_group()
    assert_all_close({name.removeprefix("module."): g for name, g in actual.items()}, expected)
