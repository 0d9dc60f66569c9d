"""KV compression in C++ (csrc/kv_compression): ``native``, on the CPU.

kv, weight, bias and the norm's vectors are fp32, bf16 or fp16 in any mix; the convolution, the
statistics and sums are fp32, with one rounding at the store. kv is read in place through its
strides; one whose last dimension is itself strided is copied first. Results do not depend on the
number of threads.
"""

from __future__ import annotations

import torch

from pixart_kernels import _extension
from pixart_kernels.kv_compression.autograd import KERNELS, Kernels, register_fakes

if _extension.problem is None:
    register_fakes("pixart_kernels")
    # overloads, resolved once: an attribute look-up for each call costs as much as a small kernel
    KERNELS["native"] = Kernels(
        *(getattr(torch.ops.pixart_kernels, name).default for name in Kernels._fields)
    )
