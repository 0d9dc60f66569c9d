"""Public KV-compression op: argument checks, then whichever backend `dispatch` selects."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pixart_kernels import _extension, _triton
from pixart_kernels._checks import check_floating, check_integer, shape, wrong
from pixart_kernels.dispatch import register, select
from pixart_kernels.kv_compression import autograd, native, reference  # noqa: F401  (fills KERNELS)

if _triton.problem is None:
    from pixart_kernels.kv_compression import triton  # noqa: F401  (fills KERNELS)


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
    backend: str | None = None,
) -> Tensor:
    """Keys and values on a grid coarser by ``ratio`` per axis: depthwise convolution, then norm.

    PixArt-Sigma, section 3.3: k and v share one depthwise ``ratio`` x ``ratio`` convolution with
    stride ``ratio`` and one affine LayerNorm (eps 1e-5). Rows and columns that do not fill a
    window are dropped, as in the official code.

    Args:
        kv: (B, N, 2, D) or (B, N, 2, H, d) with N = height * width tokens in raster order; any
            strides, so the last two thirds of a packed qkv projection will do.
        height, width: the grid of tokens.
        weight, bias: (D, 1, ratio, ratio) and (D,).
        norm_weight, norm_bias: (D,).
        ratio: integer compression per axis, at least 1.
        backend: see :func:`pixart_kernels.use_backend`.

    Returns:
        (B, (height // ratio) * (width // ratio), 2, ...) contiguous, in kv's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what is accepted.
        RuntimeError: ``backend`` was named and cannot run, with every reason.
    """
    op = "compress_kv"
    check_floating(
        op, kv=kv, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias
    )
    for name, size in (("height", height), ("width", width), ("ratio", ratio)):
        check_integer(op, name, size)
    if ratio > min(height, width):
        raise wrong(op, "ratio", ratio, f"1 to {min(height, width)}, the shorter side")
    if weight.dim() != 4:
        raise wrong(op, "weight", shape(weight), f"(D, 1, {ratio}, {ratio})")
    D = weight.shape[0]
    if kv.dim() not in (4, 5) or kv.shape[2] != 2 or kv.shape[3:].numel() != D:
        raise wrong(op, "kv", shape(kv), f"(B, N, 2, {D}) or (B, N, 2, H, d) with H*d = {D}")
    if kv.shape[1] != height * width:
        raise wrong(op, "kv", shape(kv), f"{height} x {width} = {height * width} tokens")
    if D == 0 or weight.shape != (D, 1, ratio, ratio):
        raise wrong(op, "weight", shape(weight), f"({D or 'D'}, 1, {ratio}, {ratio})")
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        if vector.shape != (D,):
            raise wrong(op, name, shape(vector), f"({D},)")
    run = select(op, kv, backend)
    return run(kv, height, width, weight, bias, norm_weight, norm_bias, ratio=ratio)


register("compress_kv", "reference", reference.compress_kv)
register(
    "compress_kv", "native", partial(autograd.compress_kv, "native"), _extension.why_not_native
)
register("compress_kv", "triton", partial(autograd.compress_kv, "triton"), _triton.why_not_triton)
