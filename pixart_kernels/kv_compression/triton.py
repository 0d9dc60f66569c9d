"""KV compression in Triton, for CUDA devices of compute capability 8.0 and up.

kv, weight, bias and the norm's vectors are fp32, bf16 or fp16 in any mix; the convolution, the
statistics and sums are fp32, with one rounding at the store. kv and dout are read in place through
their strides, and the same bits come out of every run. Formulas: README.md. Names in kernels, and
why a row is a head and a tail: ``pixart_kernels/adaln/triton.py``.

A tap is one of the R * R tokens of a window. The window is not held in registers between the
convolution and its derivative: it is read again, from the cache. Nor would the sums for the weights
of many taps fit there, so that a program of the backward has TAPS of them, which is all for R = 2.
"""

# no `annotations` import: torch.library reads the launchers' annotations as objects
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._triton import dense_rows
from pixart_kernels._triton_rows import (
    FOLD_COLUMNS,
    FOLD_ROWS,
    backward_splits,
    load_row,
    row_mean,
    split,
    store_row,
)
from pixart_kernels.kv_compression.autograd import KERNELS, Kernels, register_fakes

# Not measured. With so many columns of a row for a thread, and so many sums, nothing spills.
COLUMNS_PER_THREAD, MAX_TAPS = 12, 4


@triton.jit
def _tap(tokens, i_row, i_tap, stride_b, stride_n, stride_s, height, width, UNIT, R: tl.constexpr):
    """Where a token lies of the window that gives row i_row of the output."""
    # 32 bits can count what a grid has programs for, and divide in a fraction of the time
    i_window, columns = (i_row // 2).to(tl.int32), (width // R).to(tl.int32)
    each = (height // R).to(tl.int32) * columns
    i_b, i_n = (i_window // each).to(tl.int64), i_window % each
    i_y, i_x = (i_n // columns).to(tl.int64) * R + i_tap // R, i_n % columns * R + i_tap % R
    i_token = i_y * width + i_x
    return tokens + (i_b * stride_b + i_token * stride_n + i_row % 2 * stride_s) * UNIT


@triton.jit
def _convolved(
    kv,
    i_row,
    stride_b,
    stride_n,
    stride_s,
    height,
    width,
    weight,
    bias,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    R: tl.constexpr,
):
    """Row i_row before the norm, zeros past D."""
    b_head, b_tail = load_row(bias, True, D, HEAD, TAIL)
    for i_tap in tl.static_range(R * R):
        p_tap = _tap(kv, i_row, i_tap, stride_b, stride_n, stride_s, height, width, UNIT, R)
        b_tap_head, b_tap_tail = load_row(p_tap, True, D, HEAD, TAIL)
        b_weight_head, b_weight_tail = load_row(weight + i_tap * D, True, D, HEAD, TAIL)
        b_head += b_weight_head * b_tap_head
        b_tail += b_weight_tail * b_tap_tail
    return b_head, b_tail


@_triton.kernel
def _fwd_kernel(
    kv,  # [B, N, 2, D]
    kv_stride_b: tl.int64,
    kv_stride_n: tl.int64,
    kv_stride_s: tl.int64,
    weight,  # [R * R, D]
    bias,  # [D]
    norm_weight,  # [D]
    norm_bias,  # [D]
    out,  # [rows, D]
    stats,  # [2, rows]
    height: tl.int64,
    width: tl.int64,
    rows: tl.int64,
    eps: tl.float32,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    R: tl.constexpr,
):
    """One program for a row of the output."""
    i_row = tl.program_id(0).to(tl.int64)
    # every read before the first sum, which all threads wait for
    b_norm_weight_head, b_norm_weight_tail = load_row(norm_weight, True, D, HEAD, TAIL)
    b_norm_bias_head, b_norm_bias_tail = load_row(norm_bias, True, D, HEAD, TAIL)
    b_head, b_tail = _convolved(
        kv, i_row, kv_stride_b, kv_stride_n, kv_stride_s, height, width, weight, bias,
        D, HEAD, TAIL, UNIT, R,
    )  # fmt: skip
    b_mean = row_mean(b_head, b_tail, D)
    b_head -= b_mean
    b_tail = tl.where(HEAD + tl.arange(0, TAIL) < D, b_tail - b_mean, 0.0)
    b_variance = row_mean(b_head * b_head, b_tail * b_tail, D)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))
    tl.store(stats + i_row, b_mean)
    tl.store(stats + rows + i_row, b_rstd)
    b_head = b_head * b_rstd * b_norm_weight_head + b_norm_bias_head
    b_tail = b_tail * b_rstd * b_norm_weight_tail + b_norm_bias_tail
    store_row(out + i_row * D, b_head, b_tail, True, D, HEAD, TAIL)


@_triton.kernel
def _bwd_kernel(
    dout,  # [B, windows, 2, D]
    dout_stride_b: tl.int64,
    dout_stride_n: tl.int64,
    dout_stride_s: tl.int64,
    kv,  # [B, N, 2, D]
    kv_stride_b: tl.int64,
    kv_stride_n: tl.int64,
    kv_stride_s: tl.int64,
    weight,  # [R * R, D]
    bias,  # [D]
    norm_weight,  # [D]
    stats,  # [2, rows]
    dkv,  # [B, N, 2, D]
    partial,  # [splits, R * R + 3, D]: weight, bias, norm_weight, norm_bias
    height: tl.int64,
    width: tl.int64,
    rows: tl.int64,
    splits: tl.int64,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    R: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Program (i_split, group) takes every splits-th row, and TAPS taps of its window.

    The first group also sums for the bias and the norm.
    """
    GROUPS: tl.constexpr = (R * R + TAPS - 1) // TAPS
    i_program = tl.program_id(0).to(tl.int64)
    i_split, i_first = i_program // GROUPS, i_program % GROUPS * TAPS
    b_norm_weight_head, b_norm_weight_tail = load_row(norm_weight, True, D, HEAD, TAIL)
    b_dbias_head, b_dbias_tail = tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL,), tl.float32)
    b_dnorm_weight_head, b_dnorm_weight_tail = b_dbias_head, b_dbias_tail
    b_dnorm_bias_head, b_dnorm_bias_tail = b_dbias_head, b_dbias_tail
    # queues, which each row of the output goes through once
    dweight_heads, dweight_tails = (b_dbias_head,) * TAPS, (b_dbias_tail,) * TAPS

    i_row = i_split
    while i_row < rows:
        # rows of dout are windows of one token
        p_dout = _tap(
            dout, i_row, 0, dout_stride_b, dout_stride_n, dout_stride_s,
            height // R, width // R, UNIT, 1,
        )  # fmt: skip
        b_dout_head, b_dout_tail = load_row(p_dout, True, D, HEAD, TAIL)
        b_mean, b_rstd = tl.load(stats + i_row), tl.load(stats + rows + i_row)
        b_head, b_tail = _convolved(
            kv, i_row, kv_stride_b, kv_stride_n, kv_stride_s, height, width, weight, bias,
            D, HEAD, TAIL, UNIT, R,
        )  # fmt: skip
        b_head = (b_head - b_mean) * b_rstd
        b_tail = (b_tail - b_mean) * b_rstd
        b_dnorm_bias_head += b_dout_head
        b_dnorm_bias_tail += b_dout_tail
        b_dnorm_weight_head += b_dout_head * b_head
        b_dnorm_weight_tail += b_dout_tail * b_tail
        # past D, u is zero because dout is
        b_u_head = b_dout_head * b_norm_weight_head
        b_u_tail = b_dout_tail * b_norm_weight_tail
        b_mean_u = row_mean(b_u_head, b_u_tail, D)
        b_mean_ux = row_mean(b_u_head * b_head, b_u_tail * b_tail, D)
        b_d_head = b_rstd * (b_u_head - b_mean_u - b_head * b_mean_ux)
        b_d_tail = b_rstd * (b_u_tail - b_mean_u - b_tail * b_mean_ux)
        b_dbias_head += b_d_head
        b_dbias_tail += b_d_tail
        for i in tl.static_range(TAPS):
            i_tap = i_first + i
            m_tap = i_tap < R * R
            p_tap = _tap(
                kv, i_row, i_tap, kv_stride_b, kv_stride_n, kv_stride_s, height, width, UNIT, R
            )
            p_dtap = _tap(dkv, i_row, i_tap, height * width * 2 * D, 2 * D, D, height, width, 1, R)
            b_weight_head, b_weight_tail = load_row(weight + i_tap * D, m_tap, D, HEAD, TAIL)
            b_tap_head, b_tap_tail = load_row(p_tap, m_tap, D, HEAD, TAIL)
            dweight_heads += (dweight_heads[0] + b_d_head * b_tap_head,)
            dweight_tails += (dweight_tails[0] + b_d_tail * b_tap_tail,)
            dweight_heads, dweight_tails = dweight_heads[1:], dweight_tails[1:]
            b_dtap_head, b_dtap_tail = b_d_head * b_weight_head, b_d_tail * b_weight_tail
            store_row(p_dtap, b_dtap_head, b_dtap_tail, m_tap, D, HEAD, TAIL)
        i_row += splits

    p_partial = partial + i_split * (R * R + 3) * D
    for i in tl.static_range(TAPS):
        p_tap, m_tap = p_partial + (i_first + i) * D, i_first + i < R * R
        store_row(p_tap, dweight_heads[i], dweight_tails[i], m_tap, D, HEAD, TAIL)
    p_partial += R * R * D
    m_group = i_first == 0
    store_row(p_partial, b_dbias_head, b_dbias_tail, m_group, D, HEAD, TAIL)
    store_row(p_partial + D, b_dnorm_weight_head, b_dnorm_weight_tail, m_group, D, HEAD, TAIL)
    store_row(p_partial + 2 * D, b_dnorm_bias_head, b_dnorm_bias_tail, m_group, D, HEAD, TAIL)


@_triton.kernel
def _fold_kernel(
    partial,  # [splits, TAPS + 3, D]
    dweight,  # [D, TAPS]
    dbias,  # [D]
    dnorm_weight,  # [D]
    dnorm_bias,  # [D]
    splits: tl.int64,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for COLUMNS columns of one vector."""
    VECTORS: tl.constexpr = TAPS + 3
    i_program = tl.program_id(0).to(tl.int64)
    i_vector = i_program % VECTORS
    o_d = i_program // VECTORS * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    b_sum = tl.zeros((COLUMNS,), tl.float32)
    i_split = tl.zeros((), tl.int64)
    while i_split < splits:
        o_split = i_split + tl.arange(0, ROWS)
        p_sum = partial + (o_split[:, None] * VECTORS + i_vector) * D + o_d
        b_sum += tl.sum(tl.load(p_sum, mask=(o_split < splits)[:, None] & m_d, other=0.0), 0)
        i_split += ROWS
    tl.store(dweight + o_d * TAPS + i_vector, b_sum, mask=m_d & (i_vector < TAPS))
    tl.store(dbias + o_d, b_sum, mask=m_d & (i_vector == TAPS))
    tl.store(dnorm_weight + o_d, b_sum, mask=m_d & (i_vector == TAPS + 1))
    tl.store(dnorm_bias + o_d, b_sum, mask=m_d & (i_vector == TAPS + 2))


def num_warps(D: int) -> int:
    return min(triton.next_power_of_2(triton.cdiv(D, 32 * COLUMNS_PER_THREAD)), 16)


def _tokens(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    tensor = dense_rows(tensor)
    return tensor, tensor.stride()[:3]


def _taps_first(weight: Tensor) -> Tensor:
    """(D, 1, R, R) as [R * R, D], so that neighbouring threads read neighbouring columns."""
    return weight.flatten(1).t().contiguous()


def compress_kv_fwd(
    kv: Tensor,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    B, _, _, D = kv.shape
    R = weight.shape[2]
    windows = (height // R) * (width // R)
    rows = B * windows * 2
    out = kv.new_empty((B, windows, 2, D))
    stats = kv.new_empty((2, B, windows, 2), dtype=torch.float32)
    if out.numel() == 0:
        return out, stats
    kv, strides = _tokens(kv)
    unit = gcd(16, *strides)
    vectors = (dense_rows(vector) for vector in (bias, norm_weight, norm_bias))
    with torch.cuda.device_of(kv):
        _fwd_kernel[(rows,)](
            *(kv, *(stride // unit for stride in strides), _taps_first(weight), *vectors),
            *(out, stats, height, width, rows, eps, D, *split(D), unit, R),
            num_warps=num_warps(D),
        )
    return out, stats


def compress_kv_bwd(
    dout: Tensor,
    kv: Tensor,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, _, _, D = kv.shape
    R = weight.shape[2]
    rows = B * (height // R) * (width // R) * 2
    # tokens that fill no window have no gradient
    whole = height % R == 0 and width % R == 0
    dkv = kv.new_empty(kv.shape) if whole else kv.new_zeros(kv.shape)
    grads = [x.new_empty(x.shape) for x in (weight, bias, norm_weight, norm_bias)]
    taps = min(R * R, MAX_TAPS)
    groups, processors = triton.cdiv(R * R, taps), _triton.processors(kv.device)
    splits = backward_splits(groups, rows, num_warps(D), processors)
    partial = kv.new_empty((splits, R * R + 3, D), dtype=torch.float32)
    dout, dout_strides = _tokens(dout)
    kv, kv_strides = _tokens(kv)
    unit = gcd(16, *dout_strides, *kv_strides)
    dout_strides, kv_strides = (
        tuple(stride // unit for stride in strides) for strides in (dout_strides, kv_strides)
    )
    with torch.cuda.device_of(kv):
        if splits > 0:
            _bwd_kernel[(splits * groups,)](
                *(dout, *dout_strides, kv, *kv_strides, _taps_first(weight), dense_rows(bias)),
                *(dense_rows(norm_weight), stats, dkv, partial, height, width, rows, splits),
                *(D, *split(D), unit, R, taps),
                num_warps=num_warps(D),
            )
        _fold_kernel[((R * R + 3) * triton.cdiv(D, FOLD_COLUMNS),)](
            *(partial, *grads, splits, D, R * R, FOLD_ROWS, FOLD_COLUMNS)
        )
    dweight, dbias, dnorm_weight, dnorm_bias = grads
    return dkv, dweight, dbias, dnorm_weight, dnorm_bias


_library = torch.library.Library("pixart_kernels_triton", "FRAGMENT")
KERNELS["triton"] = Kernels(*(_triton.op(_library, globals()[name]) for name in Kernels._fields))
register_fakes(_library.ns)
