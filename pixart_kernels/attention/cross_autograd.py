"""What PyTorch must know of the cross-attention kernels: derivatives, shapes.

The Function saves its inputs, its output and the fp32 lse (B, H, N), in a base of the backend's
own. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixart_kernels._autograd import differentiated


class CrossKernels(NamedTuple):
    """One backend's forward and backward; ``register_fakes`` has their shapes."""

    cross_attention_fwd: Callable
    cross_attention_bwd: Callable


# looked up by name: a string passes through a Function under torch.compile, callables do not
CROSS_KERNELS: dict[str, CrossKernels] = {}


class CrossAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, q, kv, kv_lengths):
        out, lse = CROSS_KERNELS[kernels].cross_attention_fwd(q, kv, kv_lengths)
        ctx.save_for_backward(q, kv, kv_lengths, out, lse)
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dq, dkv = CROSS_KERNELS[ctx.kernels].cross_attention_bwd(dout, *ctx.saved_tensors)
        return None, dq, dkv, None


def cross_attention(kernels: str, q: Tensor, kv: Tensor, kv_lengths: Tensor) -> Tensor:
    if differentiated(q, kv):
        return CrossAttentionFunction.apply(kernels, q, kv, kv_lengths)
    return CROSS_KERNELS[kernels].cross_attention_fwd(q, kv, kv_lengths)[0]


def register_fakes(namespace: str) -> None:
    """Output shapes and dtypes of the ops, for torch.compile."""

    @torch.library.register_fake(f"{namespace}::cross_attention_fwd")
    def _(q, kv, kv_lengths):
        B, N, H, _ = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::cross_attention_bwd")
    def _(dout, q, kv, kv_lengths, out, lse):
        return q.new_empty(q.shape), kv.new_empty(kv.shape)
