"""Self-attention in Triton, for CUDA devices of compute capability 8.0 and up.

fp32, bf16 and fp16, heads of up to 128 elements. Scores, softmax and accumulators are fp32;
P and dS are rounded to the operands' dtype where they enter a product, and results once, at the
store. Operands are read in place through their strides; the same bits in every run. Formulas:
README.md. Tile sizes: config.py. Names in kernels: ``pixart_kernels/adaln/triton.py``.

A head of d columns is a head and a tail, each a power of two wide (``config.split``): 72 takes
64 + 16, where rounding up would take 128. TAIL is 0 where there is none, and a number its place.
"""

# no `annotations` import: torch.library reads the launchers' annotations as objects
from functools import lru_cache
from itertools import chain
from math import gcd, log, prod, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._triton import dense_rows
from pixart_kernels.attention import config
from pixart_kernels.attention.autograd import KERNELS, Kernels, register_fakes

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(
    p_head,
    i_row,
    left,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """ROWS rows of one head from i_row on, [ROWS, HEAD] and [ROWS, TAIL]; zeros beyond left and D.

    i_row, which varies in loops, stays out of the product of 64 bits that each row needs.
    """
    o_row = tl.arange(0, ROWS)
    p_row = p_head + i_row * stride + (o_row * stride)[:, None]
    m_row = (o_row < left)[:, None]
    o_head = tl.arange(0, HEAD)[None, :]
    b_head = tl.load(p_row + o_head, mask=m_row & (o_head < D), other=0.0)
    b_tail = 0.0
    if TAIL > 0:
        o_tail = HEAD + tl.arange(0, TAIL)[None, :]
        b_tail = tl.load(p_row + o_tail, mask=m_row & (o_tail < D), other=0.0)
    return b_head, b_tail


@triton.jit
def _store(
    p_head,
    i_row,
    left,
    stride,
    b_head,
    b_tail,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    o_row = tl.arange(0, ROWS)
    p_row = p_head + i_row * stride + (o_row * stride)[:, None]
    m_row = (o_row < left)[:, None]
    o_head = tl.arange(0, HEAD)[None, :]
    tl.store(p_row + o_head, b_head, mask=m_row & (o_head < D))
    if TAIL > 0:
        o_tail = HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(p_row + o_tail, b_tail, mask=m_row & (o_tail < D))


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    b_tail = 0.0
    if TAIL > 0:
        b_tail = tl.zeros((ROWS, TAIL), tl.float32)
    return tl.zeros((ROWS, HEAD), tl.float32), b_tail


@triton.jit
def _products(b_a_head, b_a_tail, b_b_head, b_b_tail, TAIL: tl.constexpr):
    """Of each row of a with each row of b."""
    b_s = tl.dot(b_a_head, tl.trans(b_b_head), input_precision="ieee")
    if TAIL > 0:
        b_s = tl.dot(b_a_tail, tl.trans(b_b_tail), b_s, input_precision="ieee")
    return b_s


@triton.jit
def _accumulate(b_weights, b_head, b_tail, b_acc_head, b_acc_tail, TAIL: tl.constexpr):
    b_weights = b_weights.to(b_head.dtype)
    b_acc_head = tl.dot(b_weights, b_head, b_acc_head, input_precision="ieee")
    if TAIL > 0:
        b_acc_tail = tl.dot(b_weights, b_tail, b_acc_tail, input_precision="ieee")
    return b_acc_head, b_acc_tail


@triton.jit
def _real_keys(lengths, i_b, Nk):
    """How many of a sample's Nk keys count, none where negative; without lengths, all do."""
    if lengths is not None:
        Nk = tl.minimum(tl.load(lengths + i_b).to(tl.int64), Nk)
    return Nk


@triton.jit
def _fwd_keys(
    b_acc_head,
    b_acc_tail,
    b_max,
    b_sum,
    b_q_head,
    b_q_tail,
    p_k,
    k_stride,
    p_v,
    v_stride,
    begin,
    end,
    scale,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Adds the keys from begin to end. WHOLE: their number is a multiple of COLUMNS."""
    for i_k in range(begin, end, COLUMNS):
        left = COLUMNS if WHOLE else end - i_k
        b_k_head, b_k_tail = _load(p_k, i_k, left, k_stride, COLUMNS, D, HEAD, TAIL)
        b_s = _products(b_q_head, b_q_tail, b_k_head, b_k_tail, TAIL)
        if not WHOLE:
            b_s = tl.where((tl.arange(0, COLUMNS) < left)[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # scaled after the subtraction: exact at the maximum, however large the scores are
        b_p = tl.exp2((b_s - b_new_max[:, None]) * scale)
        b_rescale = tl.exp2((b_max - b_new_max) * scale)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_max = b_new_max
        b_acc_head *= b_rescale[:, None]
        if TAIL > 0:
            b_acc_tail *= b_rescale[:, None]
        b_v_head, b_v_tail = _load(p_v, i_k, left, v_stride, COLUMNS, D, HEAD, TAIL)
        b_acc_head, b_acc_tail = _accumulate(b_p, b_v_head, b_v_tail, b_acc_head, b_acc_tail, TAIL)
    return b_acc_head, b_acc_tail, b_max, b_sum


@_triton.kernel
def _fwd_kernel(
    q,  # [B, Nq, H, D]
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    k,  # [B, Nk, H, D]
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_h: tl.int64,
    v,  # [B, Nk, H, D]
    v_stride_b: tl.int64,
    v_stride_n: tl.int64,
    v_stride_h: tl.int64,
    lengths,  # [B], or None
    out,  # [B, Nq, H, D], dense
    lse,  # [B, H, Nq], base 2
    H: tl.int64,
    Nq: tl.int64,
    Nk: tl.int64,
    tiles: tl.int64,
    scale: tl.float32,  # log2(e) / sqrt(D)
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for ROWS queries of one head; neighbours share its keys."""
    i_program = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_program // tiles, i_program % tiles * ROWS
    i_b, i_h = i_bh // H, i_bh % H
    Nk = _real_keys(lengths, i_b, Nk)
    left = Nq - i_q
    q_stride_n *= UNIT
    k_stride_n *= UNIT
    v_stride_n *= UNIT
    p_q = q + (i_b * q_stride_b + i_h * q_stride_h) * UNIT
    p_k = k + (i_b * k_stride_b + i_h * k_stride_h) * UNIT
    p_v = v + (i_b * v_stride_b + i_h * v_stride_h) * UNIT

    b_q_head, b_q_tail = _load(p_q, i_q, left, q_stride_n, ROWS, D, HEAD, TAIL)
    b_acc_head, b_acc_tail = _zeros(ROWS, HEAD, TAIL)
    b_max = tl.full((ROWS,), float("-inf"), tl.float32)
    b_sum = tl.zeros((ROWS,), tl.float32)
    whole = Nk // COLUMNS * COLUMNS
    b_acc_head, b_acc_tail, b_max, b_sum = _fwd_keys(
        b_acc_head, b_acc_tail, b_max, b_sum, b_q_head, b_q_tail,
        p_k, k_stride_n, p_v, v_stride_n, 0, whole, scale, True, COLUMNS, D, HEAD, TAIL,
    )  # fmt: skip
    b_acc_head, b_acc_tail, b_max, b_sum = _fwd_keys(
        b_acc_head, b_acc_tail, b_max, b_sum, b_q_head, b_q_tail,
        p_k, k_stride_n, p_v, v_stride_n, whole, Nk, scale, False, COLUMNS, D, HEAD, TAIL,
    )  # fmt: skip

    if lengths is not None:
        b_sum = tl.where(Nk > 0, b_sum, 1.0)
    o_q = tl.arange(0, ROWS)
    tl.store(lse + i_bh * Nq + i_q + o_q, b_max * scale + tl.log2(b_sum), mask=o_q < left)
    b_acc_head /= b_sum[:, None]
    if TAIL > 0:
        b_acc_tail /= b_sum[:, None]
    p_out = out + (i_b * Nq * H + i_h) * D
    _store(p_out, i_q, left, H * D, b_acc_head, b_acc_tail, ROWS, D, HEAD, TAIL)


@triton.jit
def _dq_keys(
    b_dq_head,
    b_dq_tail,
    b_q_head,
    b_q_tail,
    b_dout_head,
    b_dout_tail,
    b_lse,
    b_delta,
    p_k,
    k_stride,
    p_v,
    v_stride,
    begin,
    end,
    scale,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    for i_k in range(begin, end, COLUMNS):
        left = COLUMNS if WHOLE else end - i_k
        b_k_head, b_k_tail = _load(p_k, i_k, left, k_stride, COLUMNS, D, HEAD, TAIL)
        b_v_head, b_v_tail = _load(p_v, i_k, left, v_stride, COLUMNS, D, HEAD, TAIL)
        b_s = _products(b_q_head, b_q_tail, b_k_head, b_k_tail, TAIL)
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        b_dp = _products(b_dout_head, b_dout_tail, b_v_head, b_v_tail, TAIL)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if not WHOLE:
            # the score of no key is 0, whose weight may overflow where all others are far below
            b_ds = tl.where((tl.arange(0, COLUMNS) < left)[None, :], b_ds, 0.0)
        b_dq_head, b_dq_tail = _accumulate(b_ds, b_k_head, b_k_tail, b_dq_head, b_dq_tail, TAIL)
    return b_dq_head, b_dq_tail


@_triton.kernel
def _dq_kernel(
    dout,  # [B, Nq, H, D]
    dout_stride_b: tl.int64,
    dout_stride_n: tl.int64,
    dout_stride_h: tl.int64,
    q,  # [B, Nq, H, D]
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    k,  # [B, Nk, H, D]
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_h: tl.int64,
    v,  # [B, Nk, H, D]
    v_stride_b: tl.int64,
    v_stride_n: tl.int64,
    v_stride_h: tl.int64,
    dq,  # [B, Nq, H, D]
    dq_stride_b: tl.int64,
    dq_stride_n: tl.int64,
    dq_stride_h: tl.int64,
    lengths,  # [B], or None
    out,  # [B, Nq, H, D], dense
    lse,  # [B, H, Nq], base 2
    delta,  # [B, H, Nq], written here for dk
    H: tl.int64,
    Nq: tl.int64,
    Nk: tl.int64,
    tiles: tl.int64,
    scale: tl.float32,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for ROWS queries of one head."""
    i_program = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_program // tiles, i_program % tiles * ROWS
    i_b, i_h = i_bh // H, i_bh % H
    Nk = _real_keys(lengths, i_b, Nk)
    left = Nq - i_q
    q_stride_n *= UNIT
    k_stride_n *= UNIT
    v_stride_n *= UNIT
    dout_stride_n *= UNIT
    p_q = q + (i_b * q_stride_b + i_h * q_stride_h) * UNIT
    p_k = k + (i_b * k_stride_b + i_h * k_stride_h) * UNIT
    p_v = v + (i_b * v_stride_b + i_h * v_stride_h) * UNIT
    p_dout = dout + (i_b * dout_stride_b + i_h * dout_stride_h) * UNIT
    p_out = out + (i_b * Nq * H + i_h) * D

    b_q_head, b_q_tail = _load(p_q, i_q, left, q_stride_n, ROWS, D, HEAD, TAIL)
    b_dout_head, b_dout_tail = _load(p_dout, i_q, left, dout_stride_n, ROWS, D, HEAD, TAIL)
    b_out_head, b_out_tail = _load(p_out, i_q, left, H * D, ROWS, D, HEAD, TAIL)
    b_delta = tl.sum(b_dout_head.to(tl.float32) * b_out_head.to(tl.float32), 1)
    if TAIL > 0:
        b_delta += tl.sum(b_dout_tail.to(tl.float32) * b_out_tail.to(tl.float32), 1)
    o_q = tl.arange(0, ROWS)
    b_lse = tl.load(lse + i_bh * Nq + i_q + o_q, mask=o_q < left, other=0.0)
    tl.store(delta + i_bh * Nq + i_q + o_q, b_delta, mask=o_q < left)

    b_dq_head, b_dq_tail = _zeros(ROWS, HEAD, TAIL)
    whole = Nk // COLUMNS * COLUMNS
    b_dq_head, b_dq_tail = _dq_keys(
        b_dq_head, b_dq_tail, b_q_head, b_q_tail, b_dout_head, b_dout_tail, b_lse, b_delta,
        p_k, k_stride_n, p_v, v_stride_n, 0, whole, scale, True, COLUMNS, D, HEAD, TAIL,
    )  # fmt: skip
    b_dq_head, b_dq_tail = _dq_keys(
        b_dq_head, b_dq_tail, b_q_head, b_q_tail, b_dout_head, b_dout_tail, b_lse, b_delta,
        p_k, k_stride_n, p_v, v_stride_n, whole, Nk, scale, False, COLUMNS, D, HEAD, TAIL,
    )  # fmt: skip
    b_dq_head *= scale * LN_2
    if TAIL > 0:
        b_dq_tail *= scale * LN_2
    p_dq = dq + (i_b * dq_stride_b + i_h * dq_stride_h) * UNIT
    _store(p_dq, i_q, left, dq_stride_n * UNIT, b_dq_head, b_dq_tail, ROWS, D, HEAD, TAIL)


@_triton.kernel
def _dkdv_kernel(
    dout,  # [B, Nq, H, D]
    dout_stride_b: tl.int64,
    dout_stride_n: tl.int64,
    dout_stride_h: tl.int64,
    q,  # [B, Nq, H, D]
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    k,  # [B, Nk, H, D]
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_h: tl.int64,
    v,  # [B, Nk, H, D]
    v_stride_b: tl.int64,
    v_stride_n: tl.int64,
    v_stride_h: tl.int64,
    dk,  # [B * splits, Nk, H, D]
    dk_stride_b: tl.int64,
    dk_stride_n: tl.int64,
    dk_stride_h: tl.int64,
    dv,  # [B * splits, Nk, H, D]
    dv_stride_b: tl.int64,
    dv_stride_n: tl.int64,
    dv_stride_h: tl.int64,
    lengths,  # [B], or None
    lse,  # [B, H, Nq], base 2
    delta,  # [B, H, Nq]
    H: tl.int64,
    Nq: tl.int64,
    Nk: tl.int64,
    tiles: tl.int64,
    splits: tl.int64,
    queries: tl.int64,  # of a split; a multiple of COLUMNS
    scale: tl.float32,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for ROWS keys of one head, and a share of its queries.

    Scores stand as [keys, queries].
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_bhs, i_k = i_program // tiles, i_program % tiles * ROWS
    i_bh, i_split = i_bhs // splits, i_bhs % splits
    i_b, i_h = i_bh // H, i_bh % H
    left = _real_keys(lengths, i_b, Nk) - i_k
    begin = i_split * queries
    queries = tl.minimum(queries, Nq - begin)
    if lengths is not None:
        queries = tl.where(left > 0, queries, 0)
    q_stride_n *= UNIT
    k_stride_n *= UNIT
    v_stride_n *= UNIT
    dout_stride_n *= UNIT
    p_q = q + (i_b * q_stride_b + i_h * q_stride_h) * UNIT + begin * q_stride_n
    p_k = k + (i_b * k_stride_b + i_h * k_stride_h) * UNIT
    p_v = v + (i_b * v_stride_b + i_h * v_stride_h) * UNIT
    p_dout = dout + (i_b * dout_stride_b + i_h * dout_stride_h) * UNIT + begin * dout_stride_n
    p_lse = lse + i_bh * Nq + begin
    p_delta = delta + i_bh * Nq + begin

    b_k_head, b_k_tail = _load(p_k, i_k, left, k_stride_n, ROWS, D, HEAD, TAIL)
    b_v_head, b_v_tail = _load(p_v, i_k, left, v_stride_n, ROWS, D, HEAD, TAIL)
    b_dk_head, b_dk_tail = _zeros(ROWS, HEAD, TAIL)
    b_dv_head, b_dv_tail = _zeros(ROWS, HEAD, TAIL)
    o_q = tl.arange(0, COLUMNS)
    # no mask on scores: beyond the last query, q, dout, lse and delta are 0, so p is 1, met by a
    # dout of 0, and ds is 0
    for i_q in range(0, queries, COLUMNS):
        left_q = queries - i_q
        b_q_head, b_q_tail = _load(p_q, i_q, left_q, q_stride_n, COLUMNS, D, HEAD, TAIL)
        b_dout_head, b_dout_tail = _load(p_dout, i_q, left_q, dout_stride_n, COLUMNS, D, HEAD, TAIL)
        b_lse = tl.load(p_lse + i_q + o_q, mask=o_q < left_q, other=0.0)
        b_delta = tl.load(p_delta + i_q + o_q, mask=o_q < left_q, other=0.0)
        b_s = _products(b_k_head, b_k_tail, b_q_head, b_q_tail, TAIL)
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        b_dv_head, b_dv_tail = _accumulate(
            b_p, b_dout_head, b_dout_tail, b_dv_head, b_dv_tail, TAIL
        )
        b_dp = _products(b_v_head, b_v_tail, b_dout_head, b_dout_tail, TAIL)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk_head, b_dk_tail = _accumulate(b_ds, b_q_head, b_q_tail, b_dk_head, b_dk_tail, TAIL)
    b_dk_head *= scale * LN_2
    if TAIL > 0:
        b_dk_tail *= scale * LN_2
    if lengths is not None:
        # the score of a key past the length is 0, and its weight may overflow
        m_k = (tl.arange(0, ROWS) < left.to(tl.int32))[:, None]
        b_dk_head = tl.where(m_k, b_dk_head, 0.0)
        b_dv_head = tl.where(m_k, b_dv_head, 0.0)
        if TAIL > 0:
            b_dk_tail = tl.where(m_k, b_dk_tail, 0.0)
            b_dv_tail = tl.where(m_k, b_dv_tail, 0.0)
        # of several splits, whoever adds them knows the length
        left = tl.where(splits == 1, Nk - i_k, left)
    i_bs = i_b * splits + i_split
    p_dk = dk + (i_bs * dk_stride_b + i_h * dk_stride_h) * UNIT
    p_dv = dv + (i_bs * dv_stride_b + i_h * dv_stride_h) * UNIT
    _store(p_dk, i_k, left, dk_stride_n * UNIT, b_dk_head, b_dk_tail, ROWS, D, HEAD, TAIL)
    _store(p_dv, i_k, left, dv_stride_n * UNIT, b_dv_head, b_dv_tail, ROWS, D, HEAD, TAIL)


@lru_cache
def _major(device: torch.device) -> int:
    """The compute capability whose tiles are taken; interpreted kernels take the newest's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _in_units(*heads: Tensor) -> tuple[list[Tensor | int], int]:
    """Each (B, N, H, d) tensor and its strides, divided by UNIT, of which 16 is enough.

    Triton reads 16 bytes at once only where it can prove that each row starts at a multiple of
    them. The stride of a single element says nothing.
    """
    strides = [
        [s if size > 1 else 0 for size, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
        for x in heads
    ]
    unit = gcd(16, *chain(*strides))
    operands: list[Tensor | int] = []
    for x, steps in zip(heads, strides, strict=True):
        operands += [x, *(step // unit for step in steps)]
    return operands, unit


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Fills out (B, Nq, H, d), which is dense; returns lse, fp32 (B, H, Nq).

    ``lengths``: int32 (B,), how many of each sample's keys count, where not all do.
    """
    B, Nq, H, d = q.shape
    Nk = k.shape[1]
    lse = q.new_empty((B, H, Nq), dtype=torch.float32)
    if out.numel() == 0 or Nk == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return lse
    tile = config.tiles(d, q.itemsize, _major(q.device)).forward
    tile = config.filling(tile, B * H, Nq, _triton.processors(q.device))
    tiles = triton.cdiv(Nq, tile.rows)
    operands, unit = _in_units(q, k, v)
    with torch.cuda.device_of(q):
        _fwd_kernel[(B * H * tiles,)](
            *(*operands, lengths, out, lse, H, Nq, Nk, tiles, 1 / (log(2) * sqrt(d))),
            *(d, *config.split(d), unit, tile.rows, tile.columns),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    lengths: Tensor | None = None,
) -> None:
    """Fills dq, dk and dv; out is dense.

    dk and dv are (B, Nk, H, d), or sums over shares of the queries, (B * splits, Nk, H, d), which
    leaves keys past a sample's length unwritten.
    """
    B, Nq, H, d = q.shape
    Nk = k.shape[1]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    delta = torch.empty_like(lse)
    processors = _triton.processors(q.device)
    tiles = config.tiles(d, q.itemsize, _major(q.device))
    dq_tile = config.filling(tiles.dq, B * H, Nq, processors)
    splits = len(dk) // B
    dkdv_tile = config.filling(tiles.dkdv, B * H * splits, Nk, processors)
    queries = -(-Nq // (splits * dkdv_tile.columns)) * dkdv_tile.columns
    scale, widths = 1 / (log(2) * sqrt(d)), config.split(d)
    with torch.cuda.device_of(q):
        # first, because it leaves delta
        programs = triton.cdiv(Nq, dq_tile.rows)
        operands, unit = _in_units(dout, q, k, v, dq)
        _dq_kernel[(B * H * programs,)](
            *(*operands, lengths, out, lse, delta, H, Nq, Nk, programs, scale),
            *(d, *widths, unit, dq_tile.rows, dq_tile.columns),
            num_warps=dq_tile.num_warps,
            num_stages=dq_tile.num_stages,
        )
        programs = triton.cdiv(Nk, dkdv_tile.rows)
        operands, unit = _in_units(dout, q, k, v, dk, dv)
        _dkdv_kernel[(B * H * splits * programs,)](
            *(*operands, lengths, lse, delta, H, Nq, Nk, programs, splits, queries, scale),
            *(d, *widths, unit, dkdv_tile.rows, dkdv_tile.columns),
            num_warps=dkdv_tile.num_warps,
            num_stages=dkdv_tile.num_stages,
        )


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    return out, forward(dense_rows(q), dense_rows(k), dense_rows(v), out)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dout, q, k, v = map(dense_rows, (dout, q, k, v))
    backward(dout, q, k, v, out, lse, dq, dk, dv)
    return dq, dk, dv


def _heads(x: Tensor, *counts: int) -> Tensor:
    """(B, N, *counts, d), where x lies."""
    return x.unflatten(2, (*counts, x.shape[2] // prod(counts)))


def self_attention_fwd(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    B, N, width = qkv.shape
    out = qkv.new_empty((B, N, width // 3))
    q, k, v = _heads(dense_rows(qkv), 3, num_heads).unbind(2)
    return out, forward(q, k, v, _heads(out, num_heads))


def self_attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    dout, out = _heads(dense_rows(dout), num_heads), _heads(out, num_heads)
    q, k, v = _heads(dense_rows(qkv), 3, num_heads).unbind(2)
    backward(dout, q, k, v, out, lse, *_heads(dqkv, 3, num_heads).unbind(2))
    return dqkv


_library = torch.library.Library("pixart_kernels_triton", "FRAGMENT")
KERNELS["triton"] = Kernels(*(_triton.op(_library, globals()[name]) for name in Kernels._fields))
register_fakes(_library.ns)
