"""Self- and cross-attention in plain PyTorch: the definition of each op.

``softmax(q k^T / sqrt(d)) v`` per head, softmax and accumulation in fp32 (PyTorch's scaled dot
product attention keeps them so for 16-bit inputs). Shapes: B batch, N queries, L text tokens,
H heads, d head dimension, D = H*d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = q.dtype  # autocast would return its own
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).to(dtype)


def self_attention(qkv: Tensor, num_heads: int) -> Tensor:
    B, N, width = qkv.shape
    q, k, v = qkv.view(B, N, 3, num_heads, width // (3 * num_heads)).unbind(2)
    return attention(q, k, v).reshape(B, N, width // 3)


def cross_attention(q: Tensor, kv: Tensor, kv_lengths: Tensor) -> Tensor:
    L = kv.shape[1]
    if L == 0:
        # one masked token stands in for no text at all, so that the graph stays connected
        kv, L = F.pad(kv, (0, 0, 0, 0, 0, 0, 0, 1)), 1
    real = torch.arange(L, device=kv.device) < kv_lengths[:, None]  # (B, L)
    # padding may hold anything, even NaN: it is cleared, not just given zero weight
    kv = torch.where(real[:, :, None, None, None], kv, 0)
    k, v = kv.unbind(2)
    has_text = (kv_lengths > 0)[:, None, None, None]
    # a row without text attends to its (cleared) padding, and its result is dropped below:
    # softmax over no key at all is NaN
    mask = (real[:, None, None, :] | ~has_text).expand(-1, -1, q.shape[1], -1)
    q = torch.where(has_text, q, 0)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return torch.where(has_text, out, 0).to(q.dtype)
