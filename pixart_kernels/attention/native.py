"""Attention in CUDA C++ for sm_90a (csrc/attention): heads of 72, bf16 and fp16.

Views are read in place through their strides where these and the address are multiples of 16
bytes and no stride is 0, as in slices of a packed projection; other operands are copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixart_kernels import _extension
from pixart_kernels.attention.autograd import KERNELS, Kernels, register_fakes

HEAD_DIM = 72

if _extension.problem is None:
    register_fakes("pixart_kernels")
    # overloads, resolved once: an attribute look-up for each call costs as much as a small kernel
    KERNELS["cuda"] = Kernels(
        *(getattr(torch.ops.pixart_kernels, name).default for name in Kernels._fields)
    )


def why_not_cuda(x: Tensor, head_dim: int | None = None) -> str | None:
    """Why these kernels cannot run on ``x`` with heads of ``head_dim``, or None."""
    reason = _extension.why_not_cuda(x, only="sm_90a")
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; attention's cuda kernels take bfloat16 and float16"
    if head_dim not in (None, HEAD_DIM):
        return f"heads have {head_dim} elements; attention's cuda kernels take {HEAD_DIM}"
    return None
