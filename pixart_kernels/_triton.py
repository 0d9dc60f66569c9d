"""What every Triton backend needs to know: whether Triton is here, and where its kernels can run.

``problem`` is one sentence on why no Triton kernel can be had, or None. Kernels are interpreted
on the CPU, slowly and only to be tested, when ``TRITON_INTERPRET=1`` was set before the import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pixart_kernels._extension import why_not_dtype

problem: str | None = None
INTERPRETED = False
try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    problem = "triton is not installed; install it with `pip install triton`"
except ImportError as error:
    problem = f"triton is installed and cannot be imported: {error}"
else:
    if hasattr(triton, "knobs"):
        INTERPRETED = triton.knobs.runtime.interpret
    else:
        problem = f"triton {triton.__version__} is too old; upgrade it: pip install -U triton"


def why_not_triton(x: Tensor) -> str | None:
    """Why Triton kernels cannot run on ``x``, or None."""
    if problem is not None:
        return problem
    if x.device.type == "cuda":
        major, minor = _capability(x.device)
        if major < 8:
            return f"Triton kernels need compute capability 8.0 and {x.device} has {major}.{minor}"
    elif not INTERPRETED:
        return f"Triton kernels run on a GPU and x is on {x.device}"
    return why_not_dtype("triton", x)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dense_rows(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or a copy where the last dimension is strided: kernels read whole rows."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def kernel(function: Callable) -> Any:
    """``triton.jit``, compiled once for all values of the arguments annotated ``tl.int64``.

    Triton would compile anew for a number that is 1 or a multiple of 16: lengths vary.
    """
    integers = [name for name, kind in function.__annotations__.items() if kind is tl.int64]
    return triton.jit(function, do_not_specialize=integers)


def op(library: torch.library.Library, launch: Callable) -> Callable:
    """Registers ``launch`` as an op of ``library``, with the schema its annotations spell.

    Returns what to call: the op under torch.compile, ``launch`` itself in eager mode, where the
    dispatcher would cost as much as a small kernel.
    """
    name = launch.__name__
    library.define(name + torch.library.infer_schema(launch, mutates_args=()))
    for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        library.impl(name, launch, device)
    overload = getattr(getattr(torch.ops, library.ns), name).default

    def call(*arguments: Any) -> Any:
        return overload(*arguments) if torch.compiler.is_compiling() else launch(*arguments)

    return call
