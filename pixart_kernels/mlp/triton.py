"""The MLP's bias and GELU in Triton, for CUDA devices of compute capability 8.0 and up.

Dtypes, layouts and limits are those of ``native.py``. Formulas: README.md. Names in kernels:
``pixart_kernels/adaln/triton.py``.
"""

# no `annotations` import: torch.library reads the launchers' annotations as objects
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._triton import dense_rows
from pixart_kernels._triton_rows import fold
from pixart_kernels.mlp.autograd import KERNELS, Kernels, register_fakes

# Not measured. A thread holds 8 columns (16 bytes of bf16) of each row; 512 divides 4 * 1152.
COLUMNS, NUM_WARPS, FORWARD_ROWS, BACKWARD_ROWS = 512, 2, 4, 2
BACKWARD_PROGRAMS_PER_PROCESSOR = 8

SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.07135481627159893)  # 0.044715 SLOPE
FAR = tl.constexpr(16.0)


@triton.jit
def _sigmoids(b_z):
    """z held within FAR, and the sigmoids of 2u and -2u, of which neither cancels nor overflows."""
    b_z = tl.where(b_z > FAR, FAR, tl.where(b_z < -FAR, -FAR, b_z))
    b_small = tl.exp(-tl.abs(b_z * (SLOPE + CUBIC * b_z * b_z)))
    b_large = 1 / (1 + b_small)
    b_small *= b_large
    return b_z, tl.where(b_z < 0, b_small, b_large), tl.where(b_z < 0, b_large, b_small)


@_triton.kernel
def _fwd_kernel(
    x,  # [rows, D]
    x_stride: tl.int64,
    bias,  # [D]
    y,  # [rows, D]
    rows: tl.int64,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program for COLUMNS columns of ROWS rows."""
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    i_program = tl.program_id(0).to(tl.int64)
    o_d = i_program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_row in tl.static_range(ROWS):
        i_n = i_program // BLOCKS * ROWS + i_row
        m_x = m_d & (i_n < rows)
        b_x = tl.load(x + i_n * x_stride * UNIT + o_d, mask=m_x, other=0.0).to(tl.float32)
        b_z = b_x + b_bias
        b_held, b_sigmoid, _ = _sigmoids(b_z)
        b_y = tl.where(b_z < 0, b_held, b_z) * b_sigmoid
        tl.store(y + i_n * D + o_d, b_y, mask=m_x)


@_triton.kernel
def _bwd_kernel(
    dy,  # [rows, D]
    dy_stride: tl.int64,
    x,  # [rows, D]
    x_stride: tl.int64,
    bias,  # [D]
    dx,  # [rows, D]
    partial,  # [splits, D]
    rows: tl.int64,
    splits: tl.int64,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Program (i_split, block) takes every splits-th tile of ROWS rows and sums as it goes."""
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    i_program = tl.program_id(0).to(tl.int64)
    i_split = i_program // BLOCKS
    o_d = i_program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dbias = tl.zeros_like(b_bias)
    i_tile = i_split
    while i_tile * ROWS < rows:
        for i_row in tl.static_range(ROWS):
            i_n = i_tile * ROWS + i_row
            m_x = m_d & (i_n < rows)
            b_x = tl.load(x + i_n * x_stride * UNIT + o_d, mask=m_x, other=0.0).to(tl.float32)
            b_dy = tl.load(dy + i_n * dy_stride * UNIT + o_d, mask=m_x, other=0.0).to(tl.float32)
            b_z, b_sigmoid, b_rest = _sigmoids(b_x + b_bias)
            b_slope = b_z * (SLOPE + 3 * CUBIC * b_z * b_z)
            b_dx = b_dy * (b_sigmoid * (1 + b_rest * b_slope))
            tl.store(dx + i_n * D + o_d, b_dx, mask=m_x)
            b_dbias += b_dx
        i_tile += splits
    tl.store(partial + i_split * D + o_d, b_dbias, mask=m_d)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    rows, D = x.shape
    x, bias = dense_rows(x), dense_rows(bias)
    y = x.new_empty(x.shape)
    if x.numel() > 0:
        programs = triton.cdiv(rows, FORWARD_ROWS) * triton.cdiv(D, COLUMNS)
        unit = gcd(16, x.stride(0))
        with torch.cuda.device_of(x):
            _fwd_kernel[(programs,)](
                *(x, x.stride(0) // unit, bias, y, rows, D, COLUMNS, FORWARD_ROWS, unit),
                num_warps=NUM_WARPS,
            )
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    rows, D = x.shape
    dy, x, bias = dense_rows(dy), dense_rows(x), dense_rows(bias)
    dx = x.new_empty(x.shape)
    splits = 0
    if x.numel() > 0:
        blocks = triton.cdiv(D, COLUMNS)
        wanted = BACKWARD_PROGRAMS_PER_PROCESSOR * _triton.processors(x.device)
        splits = min(triton.cdiv(wanted, blocks), triton.cdiv(rows, BACKWARD_ROWS))
    partial = x.new_empty((1, splits, 1, D), dtype=torch.float32)
    if splits > 0:
        unit = gcd(16, dy.stride(0), x.stride(0))
        with torch.cuda.device_of(x):
            _bwd_kernel[(splits * blocks,)](
                *(dy, dy.stride(0) // unit, x, x.stride(0) // unit, bias, dx, partial),
                *(rows, splits, D, COLUMNS, BACKWARD_ROWS, unit),
                num_warps=NUM_WARPS,
            )
    _, dbias = fold(partial, None, bias, (0, 0))
    return dx, dbias


_library = torch.library.Library("pixart_kernels_triton", "FRAGMENT")
KERNELS["triton"] = Kernels(
    bias_gelu_fwd=_triton.op(_library, bias_gelu_fwd),
    bias_gelu_bwd=_triton.op(_library, bias_gelu_bwd),
)
register_fakes(_library.ns)
