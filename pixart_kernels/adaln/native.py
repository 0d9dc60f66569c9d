"""The adaLN family in C++ (csrc/adaln): ``native`` on the CPU, ``cuda`` on a GPU.

Residual, activation and modulation dtypes are fp32, bf16 or fp16 in any mix; statistics and sums
are fp32, with one rounding at the store. Operands are read in place through their strides; one
whose last dimension is itself strided is copied first. Results do not depend on the number of
threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixart_kernels import _extension
from pixart_kernels.adaln.autograd import KERNELS, Kernels, register_fakes

if _extension.problem is None:
    register_fakes("pixart_kernels")
    # overloads, resolved once: an attribute look-up for each call costs as much as a small kernel
    KERNELS["native"] = KERNELS["cuda"] = Kernels(
        *(getattr(torch.ops.pixart_kernels, name).default for name in Kernels._fields)
    )

# csrc/include/device.cuh: a row is held by one block of threads
CUDA_MAX_WIDTH = 4096

why_not_native = _extension.why_not_native


def why_not_cuda(x: Tensor) -> str | None:
    """Why the compiled CUDA kernels cannot run on ``x``, or None."""
    reason = _extension.why_not_cuda(x)
    if reason is None and x.shape[-1] > CUDA_MAX_WIDTH:
        reason = f"x has rows of {x.shape[-1]}; cuda kernels take at most {CUDA_MAX_WIDTH} elements"
    return reason
