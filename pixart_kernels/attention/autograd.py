"""What PyTorch must know of the attention kernels, whatever backend they are: derivatives, shapes.

Each Function saves its inputs, its output and the lse (B, H, Nq), in a base of the backend's own;
nothing of size Nq x Nk is kept. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixart_kernels._autograd import differentiated, distinct


class Kernels(NamedTuple):
    """One backend's forwards and backwards; ``register_fakes`` has their shapes."""

    attention_fwd: Callable
    attention_bwd: Callable
    self_attention_fwd: Callable
    self_attention_bwd: Callable


class CrossKernels(NamedTuple):
    """The same for texts; ``register_cross_fakes`` has their shapes."""

    cross_attention_fwd: Callable
    cross_attention_bwd: Callable


# looked up by name: a string passes through a Function under torch.compile, callables do not
KERNELS: dict[str, Kernels] = {}
CROSS_KERNELS: dict[str, CrossKernels] = {}


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, q, k, v):
        out, lse = KERNELS[kernels].attention_fwd(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return None, *KERNELS[ctx.kernels].attention_bwd(dout, *ctx.saved_tensors)


class SelfAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, qkv, num_heads):
        out, lse = KERNELS[kernels].self_attention_fwd(qkv, num_heads)
        ctx.save_for_backward(qkv, out, lse)
        ctx.options = kernels, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        kernels, num_heads = ctx.options
        dqkv = KERNELS[kernels].self_attention_bwd(dout, *ctx.saved_tensors, num_heads)
        return None, dqkv, None


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


def attention(kernels: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = distinct(q, k, v)
    if differentiated(q, k, v):
        return AttentionFunction.apply(kernels, q, k, v)
    return KERNELS[kernels].attention_fwd(q, k, v)[0]


def self_attention(kernels: str, qkv: Tensor, num_heads: int) -> Tensor:
    if differentiated(qkv):
        return SelfAttentionFunction.apply(kernels, qkv, num_heads)
    return KERNELS[kernels].self_attention_fwd(qkv, num_heads)[0]


def cross_attention(kernels: str, q: Tensor, kv: Tensor, kv_lengths: Tensor) -> Tensor:
    if differentiated(q, kv):
        return CrossAttentionFunction.apply(kernels, q, kv, kv_lengths)
    return CROSS_KERNELS[kernels].cross_attention_fwd(q, kv, kv_lengths)[0]


def register_fakes(namespace: str) -> None:
    """Output shapes and dtypes of the ops, for torch.compile."""

    def fake(name):
        return torch.library.register_fake(f"{namespace}::{name}")

    @fake("attention_fwd")
    def _(q, k, v):
        B, Nq, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, Nq), dtype=torch.float32)

    @fake("attention_bwd")
    def _(dout, q, k, v, out, lse):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @fake("self_attention_fwd")
    def _(qkv, num_heads):
        B, N, width = qkv.shape
        lse = qkv.new_empty((B, num_heads, N), dtype=torch.float32)
        return qkv.new_empty((B, N, width // 3)), lse

    @fake("self_attention_bwd")
    def _(dout, qkv, out, lse, num_heads):
        return qkv.new_empty(qkv.shape)


def register_cross_fakes(namespace: str) -> None:
    """As :func:`register_fakes`, for the ops of cross-attention."""

    @torch.library.register_fake(f"{namespace}::cross_attention_fwd")
    def _(q, kv, kv_lengths):
        B, N, H, _ = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::cross_attention_bwd")
    def _(dout, q, kv, kv_lengths, out, lse):
        return q.new_empty(q.shape), kv.new_empty(kv.shape)
