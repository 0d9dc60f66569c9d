"""KV token compression in plain PyTorch: the definition of the op (PixArt-Sigma, section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pixart_kernels._checks import compute_dtype

# the official model leaves this LayerNorm at PyTorch's default, unlike the block's 1e-6
EPS = 1e-5


def compress_kv(
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
    B, _, _, *rest = kv.shape
    D = weight.shape[0]
    dtype = compute_dtype(kv)
    # k and v pass through the same convolution and norm: the pair becomes part of the batch
    images = kv.to(dtype).reshape(B, height, width, 2, D).permute(0, 3, 4, 1, 2).flatten(0, 1)
    tokens = F.conv2d(images, weight.to(dtype), bias.to(dtype), stride=ratio, groups=D)
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = F.layer_norm(tokens, (D,), norm_weight.to(dtype), norm_bias.to(dtype), EPS)
    tokens = tokens.unflatten(0, (B, 2)).transpose(1, 2)
    return tokens.reshape(B, tokens.shape[1], 2, *rest).to(kv.dtype)
