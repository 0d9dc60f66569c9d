"""Public attention ops: argument checks, then whichever backend `dispatch` selects."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._checks import check_floating, check_integer, shape, wrong
from pixart_kernels.attention import autograd, cross_native, native, reference
from pixart_kernels.dispatch import register, select

if _triton.problem is None:
    from pixart_kernels.attention import cross_triton, triton  # noqa: F401  (fill KERNELS)


def self_attention(qkv: Tensor, num_heads: int, *, backend: str | None = None) -> Tensor:
    """Self-attention on the packed projection, read in place.

    Args:
        qkv: (B, N, 3*D) as one linear layer wrote it: q, k and v are its thirds, each split
            into ``num_heads`` heads of d = D / num_heads.
        num_heads: H.
        backend: see :func:`pixart_kernels.use_backend`.

    Returns:
        (B, N, D) in qkv's dtype; scores are scaled by 1/sqrt(d), softmax is fp32.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what is accepted.
        RuntimeError: ``backend`` was named and cannot run, with every reason.
    """
    check_floating("self_attention", qkv=qkv)
    check_integer("self_attention", "num_heads", num_heads)
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads) != 0:
        accepted = f"(B, N, 3*D) with D a multiple of num_heads = {num_heads}"
        raise wrong("self_attention", "qkv", shape(qkv), accepted)
    head_dim = qkv.shape[2] // (3 * num_heads)
    return select("self_attention", qkv, backend, head_dim=head_dim)(qkv, num_heads)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Attention with queries and keys of different lengths, as in KV-compressed layers.

    q is (B, Nq, H, d), k and v (B, Nk, H, d), any strides. Returns (B, Nq, H, d) in q's dtype.
    Raises like :func:`self_attention`.
    """
    check_floating("attention", q=q, k=k, v=v)
    if q.dim() != 4:
        raise wrong("attention", "q", shape(q), "(B, Nq, H, d)")
    B, _, H, d = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, H, d):
        raise wrong("attention", "k", shape(k), f"({B}, Nk, {H}, {d})")
    if v.shape != k.shape:
        raise wrong("attention", "v", shape(v), f"the shape of k, {shape(k)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; "
                        "accepted: one dtype")  # fmt: skip
    return select("attention", q, backend, head_dim=d)(q, k, v)


def cross_attention(
    q: Tensor, kv: Tensor, kv_lengths: Tensor, *, backend: str | None = None
) -> Tensor:
    """Attention of image tokens to the real text tokens of each sample, without a host sync.

    Args:
        q: (B, N, H, d).
        kv: (B, L, 2, H, d), keys then values, as one linear layer wrote them. Tokens past a
            sample's length are never read into the result, whatever they hold.
        kv_lengths: (B,) int32 on the same device, real tokens of each sample, 0 to L.
        backend: see :func:`pixart_kernels.use_backend`.

    Returns:
        (B, N, H, d) in q's dtype. A sample without text gets 0, and zero gradients.

    Raises like :func:`self_attention`.
    """
    check_floating("cross_attention", q=q, kv=kv)
    if q.dim() != 4:
        raise wrong("cross_attention", "q", shape(q), "(B, N, H, d)")
    B, _, H, d = q.shape
    if kv.dim() != 5 or (kv.shape[0], *kv.shape[2:]) != (B, 2, H, d):
        raise wrong("cross_attention", "kv", shape(kv), f"({B}, L, 2, {H}, {d})")
    if q.dtype != kv.dtype:
        raise TypeError(f"cross_attention: q is {q.dtype}, kv {kv.dtype}; accepted: one dtype")
    if not isinstance(kv_lengths, Tensor):
        got = type(kv_lengths).__name__
        raise TypeError(f"cross_attention: `kv_lengths` is a {got}; accepted: an int32 tensor")
    if kv_lengths.shape != (B,):
        raise wrong("cross_attention", "kv_lengths", shape(kv_lengths), f"({B},)")
    if kv_lengths.dtype != torch.int32:
        raise TypeError(f"cross_attention: `kv_lengths` is {kv_lengths.dtype}; accepted: int32")
    if kv_lengths.device != q.device:
        got = f"on {kv_lengths.device}"
        raise wrong("cross_attention", "kv_lengths", got, f"a tensor on {q.device}, like q")
    return select("cross_attention", q, backend, head_dim=d)(q, kv, kv_lengths)


WIDEST_HEAD = 128


def _why_not_triton(x: Tensor, head_dim: int | None = None) -> str | None:
    reason = _triton.why_not_triton(x)
    if reason is None and head_dim is not None and not 1 <= head_dim <= WIDEST_HEAD:
        reason = f"heads have {head_dim} elements; triton kernels take 1 to {WIDEST_HEAD}"
    return reason


for _op in ("self_attention", "attention", "cross_attention"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "triton", partial(getattr(autograd, _op), "triton"), _why_not_triton)
for _op in ("self_attention", "attention"):
    register(_op, "cuda", partial(getattr(autograd, _op), "cuda"), native.why_not_cuda)
_cross_native = partial(autograd.cross_attention, "native")
register("cross_attention", "native", _cross_native, cross_native.why_not_native)
