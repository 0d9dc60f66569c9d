"""The MLP's public op: argument checks, then whichever backend `dispatch` selects."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pixart_kernels import _extension, _triton
from pixart_kernels._checks import check_floating, shape, wrong
from pixart_kernels.dispatch import register, select
from pixart_kernels.mlp import autograd, native, reference  # noqa: F401  (native fills KERNELS)

if _triton.problem is None:
    from pixart_kernels.mlp import triton  # noqa: F401  (fills KERNELS)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """``GELU(x + bias)`` with the tanh approximation: what stands between an MLP's two layers.

    ``z = x + bias``, ``0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))``; Hendrycks and Gimpel
    (arXiv 1606.08415), section 2. The backward reads x and the incoming gradient once, for both
    gradients.

    Args:
        x: (..., D), the first layer's product without its bias.
        bias: (D,).
        backend: see :func:`pixart_kernels.use_backend`.

    Returns:
        (..., D) in x's dtype; computed in fp32 with one rounding, at the store.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what is accepted.
        RuntimeError: ``backend`` was named and cannot run, with every reason.
    """
    check_floating("bias_gelu", x=x, bias=bias)
    if x.dim() == 0:
        raise wrong("bias_gelu", "x", shape(x), "(..., D)")
    if bias.shape != x.shape[-1:]:
        raise wrong("bias_gelu", "bias", shape(bias), f"({x.shape[-1]},)")
    return select("bias_gelu", x, backend)(x, bias)


register("bias_gelu", "reference", reference.bias_gelu)
register("bias_gelu", "native", partial(autograd.bias_gelu, "native"), _extension.why_not_native)
register("bias_gelu", "triton", partial(autograd.bias_gelu, "triton"), _triton.why_not_triton)
register("bias_gelu", "cuda", partial(autograd.bias_gelu, "cuda"), _extension.why_not_cuda)
