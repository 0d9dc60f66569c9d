"""What PyTorch must know of the KV-compression kernels, whatever backend: derivatives and shapes.

The Function saves its inputs and fp32 mean and 1/std of every convolved token; the convolution is
computed again. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixart_kernels._autograd import differentiated, distinct, narrow
from pixart_kernels.kv_compression.reference import EPS


class Kernels(NamedTuple):
    """One backend's forward and backward, called like the ops of csrc/registration.cpp."""

    compress_kv_fwd: Callable
    compress_kv_bwd: Callable


# looked up by name: a string passes through a Function under torch.compile, callables do not
KERNELS: dict[str, Kernels] = {}


class CompressKvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, kv, height, width, *parameters):
        out, stats = KERNELS[kernels].compress_kv_fwd(kv, height, width, *parameters, EPS)
        ctx.save_for_backward(kv, *parameters, stats)
        ctx.options = kernels, height, width
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        kernels, height, width = ctx.options
        kv, *saved = ctx.saved_tensors
        dkv, *grads = KERNELS[kernels].compress_kv_bwd(dout, kv, height, width, *saved)
        return None, dkv, None, None, *grads


def compress_kv(
    kernels: str,
    kv: Tensor,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    ratio: int,
) -> Tensor:
    # flat outside the Function, so that its ranks never change; a view unless heads are strided
    tokens = kv.flatten(3)
    tensors = (tokens, *narrow(weight, bias, norm_weight, norm_bias))
    if differentiated(*tensors):
        tokens, *parameters = distinct(*tensors)
        out = CompressKvFunction.apply(kernels, tokens, height, width, *parameters)
    else:
        tokens, *parameters = tensors
        out = KERNELS[kernels].compress_kv_fwd(tokens, height, width, *parameters, EPS)[0]
    return out.view(*out.shape[:3], *kv.shape[3:])


def register_fakes(namespace: str) -> None:
    """Output shapes and dtypes of the ops, for torch.compile."""

    @torch.library.register_fake(f"{namespace}::compress_kv_fwd")
    def _(kv, height, width, weight, bias, norm_weight, norm_bias, eps):
        B, _, _, D = kv.shape
        R = weight.shape[2]
        windows = (height // R) * (width // R)
        stats = kv.new_empty((2, B, windows, 2), dtype=torch.float32)
        return kv.new_empty((B, windows, 2, D)), stats

    @torch.library.register_fake(f"{namespace}::compress_kv_bwd")
    def _(dout, kv, height, width, weight, bias, norm_weight, norm_bias, stats):
        return tuple(x.new_empty(x.shape) for x in (kv, weight, bias, norm_weight, norm_bias))
