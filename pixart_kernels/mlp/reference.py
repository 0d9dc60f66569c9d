"""The MLP's bias and activation in plain PyTorch: what every other backend is tested against.

Computed in fp32 (fp64 for fp64 inputs) and rounded once, when the result is stored.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pixart_kernels._checks import compute_dtype


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    return F.gelu(x.to(dtype) + bias.to(dtype), approximate="tanh").to(x.dtype)
