"""The MLP's bias and GELU in C++ (csrc/mlp): ``native`` on the CPU, ``cuda`` on a GPU.

x and bias are fp32, bf16 or fp16 in any mix; arithmetic and sums are fp32, with one rounding at
the store. Rows are read in place through their stride; operands whose last dimension is itself
strided are copied first. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch

from pixart_kernels import _extension
from pixart_kernels.mlp.autograd import KERNELS, Kernels, register_fakes

if _extension.problem is None:
    register_fakes("pixart_kernels")
    # overloads, resolved once: an attribute look-up for each call costs as much as a small kernel
    KERNELS["native"] = KERNELS["cuda"] = Kernels(
        *(getattr(torch.ops.pixart_kernels, name).default for name in Kernels._fields)
    )
