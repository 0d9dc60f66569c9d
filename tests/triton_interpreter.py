"""Makes Triton's interpreter tell the truth about bf16, in less time.

The interpreter keeps bf16 as uint16. It truncates where hardware rounds to nearest even, and
does arithmetic on the bit patterns as if they were integers. Here conversions round and dot
products multiply values; any other arithmetic on bf16 raises, because kernels compute in fp32.
Comparisons of scalars give booleans, which Triton 3.9 forgets.

It also replaces all functions of triton.language anew for each call of one kernel function by
another. Here it does so once for a launch.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(handle: TensorHandle) -> TensorHandle:
    values = torch.from_numpy(np.array(handle.data, dtype=np.float32))
    return TensorHandle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _converting(original):
    def convert(self, source, target, *options):
        if source.dtype.scalar == target.scalar:
            return source
        if target.scalar == tl.bfloat16:
            return _rounded(_widened(source))
        return original(self, _widened(source), target, *options)

    return convert


def _multiplying(original):
    def dot(self, a, b, *rest):
        return original(self, _widened(a), _widened(b), *rest)

    return dot


def _refusing(original):
    def compute(self, *arguments):
        if any(map(_is_bf16, arguments)):
            raise TypeError("arithmetic on bfloat16: kernels convert to float32 as they load")
        result = original(self, *arguments)
        if result.data.dtype == np.bool_:
            # a comparison: typed as its operands, it would not be a mask once it is broadcast
            return TensorHandle(result.data, tl.int1)
        return result

    return compute


def _once_for_a_launch(patch_language):
    patched: set[frozenset[int]] = set()

    def patch(function):
        values = function.__globals__.values()
        key = frozenset(id(value) for value in values if value is tl or value is tl.core)
        if key in patched:
            return None
        scope = patch_language(function)
        if not patched:
            # only the launch itself restores what it patched
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        patched.add(key)
        return scope

    return patch


def install() -> None:
    interpreter._patch_lang = _once_for_a_launch(interpreter._patch_lang)
    for name, corrected in {
        "cast_impl": _converting,
        "create_fp_to_fp": _converting,
        "create_dot": _multiplying,
        "binary_op": _refusing,
        "unary_op": _refusing,
    }.items():
        setattr(InterpreterBuilder, name, corrected(getattr(InterpreterBuilder, name)))
