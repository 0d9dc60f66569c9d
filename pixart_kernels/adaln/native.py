"""The adaLN family in C++ (csrc/adaln): ``native`` on the CPU, ``cuda`` on a GPU.

Residual, activation and modulation dtypes are fp32, bf16 or fp16 in any mix; statistics and sums
are fp32, with one rounding at the store. Operands are read in place through their strides; one
whose last dimension is itself strided is copied first. Results do not depend on the number of
threads.
"""

from __future__ import annotations

import torch

from pixart_kernels import _extension
from pixart_kernels.adaln.autograd import KERNELS, Kernels, register_fakes

if _extension.problem is None:
    register_fakes("pixart_kernels")
    # overloads, resolved once: an attribute look-up for each call costs as much as a small kernel
    KERNELS["native"] = KERNELS["cuda"] = Kernels(
        *(getattr(torch.ops.pixart_kernels, name).default for name in Kernels._fields)
    )
