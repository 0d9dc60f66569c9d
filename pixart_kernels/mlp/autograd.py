"""What PyTorch must know of the MLP's kernels, whatever backend they are: derivatives and shapes.

The Function saves x and bias alone. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixart_kernels._autograd import differentiated, narrow


class Kernels(NamedTuple):
    """One backend's forward and backward, called like the ops of csrc/registration.cpp."""

    bias_gelu_fwd: Callable
    bias_gelu_bwd: Callable


# looked up by name: a string passes through a Function under torch.compile, callables do not
KERNELS: dict[str, Kernels] = {}


class BiasGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, bias):
        ctx.save_for_backward(x, bias)
        ctx.kernels = kernels
        return KERNELS[kernels].bias_gelu_fwd(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return None, *KERNELS[ctx.kernels].bias_gelu_bwd(dy, *ctx.saved_tensors)


def bias_gelu(kernels: str, x: Tensor, bias: Tensor) -> Tensor:
    (bias,) = narrow(bias)
    # flat outside the Function, so that its ranks never change
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    if differentiated(x, bias):
        y = BiasGeluFunction.apply(kernels, rows, bias)
    else:
        y = KERNELS[kernels].bias_gelu_fwd(rows, bias)
    return y.view(x.shape)


def register_fakes(namespace: str) -> None:
    """Output shapes and dtypes of the ops, for torch.compile."""

    @torch.library.register_fake(f"{namespace}::bias_gelu_fwd")
    def _(x, bias):
        return x.new_empty(x.shape)

    @torch.library.register_fake(f"{namespace}::bias_gelu_bwd")
    def _(dy, x, bias):
        return x.new_empty(x.shape), bias.new_empty(bias.shape)
