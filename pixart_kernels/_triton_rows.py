"""Rows of D columns in Triton kernels, and the sums that programs leave: for all op families.

A row is a head and a tail, each a power of two wide (:func:`split`). Partial sums are added in a
fixed order by a kernel of their own, so that the same bits come out of every run.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels import _triton

# enough to hide the latency of one by the work of others; each program costs a row of sums
BACKWARD_WARPS_PER_PROCESSOR = 16

# rows of partial sums that the fold adds at a time, and over how many columns
FOLD_ROWS, FOLD_COLUMNS = 64, 16


@lru_cache
def split(D: int) -> tuple[int, int]:
    """Widths of the two powers of two that hold D columns: 1152 = 1024 + 128.

    The second is rounded up where D is no such sum (its last columns are then masked), and there
    is always a second: 1024 = 512 + 512.
    """
    head = 1 << max((D - 1).bit_length() - 1, 0)
    return head, 1 << max(D - head - 1, 0).bit_length()


def backward_splits(B: int, tiles: int, num_warps: int, processors: int) -> int:
    """How many programs share one sample's tiles; each leaves one row of partial sums."""
    programs = max(BACKWARD_WARPS_PER_PROCESSOR // num_warps, 1) * processors
    return min(-(-programs // B), tiles)


@lru_cache
def fold_tile(splits: int) -> tuple[int, int]:
    """(samples, splits) of one step of the fold: powers of two whose product is FOLD_ROWS."""
    split_tile = min(1 << max(splits - 1, 0).bit_length(), FOLD_ROWS)
    return FOLD_ROWS // split_tile, split_tile


@triton.jit
def load_row(p_row, m_row, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """A row in fp32, [HEAD] and [TAIL]; zeros where masked and past D."""
    o_head, o_tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    b_head = tl.load(p_row + o_head, mask=m_row, other=0.0).to(tl.float32)
    b_tail = tl.load(p_row + o_tail, mask=m_row & (o_tail < D), other=0.0).to(tl.float32)
    return b_head, b_tail


@triton.jit
def store_row(
    p_row, b_head, b_tail, m_row, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    o_head, o_tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    tl.store(p_row + o_head, b_head, mask=m_row)
    tl.store(p_row + o_tail, b_tail, mask=m_row & (o_tail < D))


@triton.jit
def row_mean(b_head, b_tail, D: tl.constexpr):
    return (tl.sum(b_head, 0) + tl.sum(b_tail, 0)) / D


@_triton.kernel
def fold_kernel(
    partial,  # [B, splits, VECTORS, D]
    dtable,  # [R, D] or None
    dt,  # [B, R, D]
    first_vector: tl.int64,
    first_row: tl.int64,
    second_vector: tl.int64,
    second_row: tl.int64,
    B: tl.int64,
    R: tl.int64,
    splits: tl.int64,
    D: tl.constexpr,
    VECTORS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for COLUMNS columns of one row of table and t, which may get two vectors."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program % R
    o_d = i_program // R * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    b_dtable = tl.zeros((COLUMNS,), tl.float32)
    i_b = tl.zeros((), tl.int64)
    while i_b < B:
        o_b = i_b + tl.arange(0, SAMPLES)
        b_dt = tl.zeros((SAMPLES, COLUMNS), tl.float32)
        i_split = tl.zeros((), tl.int64)
        while i_split < splits:
            o_split = i_split + tl.arange(0, SPLITS)
            o_sum = o_b[:, None] * splits + o_split[None, :]
            p_sum = partial + o_sum[:, :, None] * VECTORS * D + o_d
            m_sum = ((o_b < B)[:, None] & (o_split < splits)[None, :])[:, :, None] & m_d
            # a row that nothing used reads nothing and sums zeros
            m_first, m_second = m_sum & (i_row == first_row), m_sum & (i_row == second_row)
            b_first = tl.load(p_sum + first_vector * D, mask=m_first, other=0.0)
            b_second = tl.load(p_sum + second_vector * D, mask=m_second, other=0.0)
            b_dt += tl.sum(b_first + b_second, 1)
            i_split += SPLITS
        p_dt = dt + (o_b[:, None] * R + i_row) * D + o_d
        tl.store(p_dt, b_dt, mask=(o_b < B)[:, None] & m_d)
        b_dtable += tl.sum(b_dt, 0)
        i_b += SAMPLES
    if dtable is not None:
        tl.store(dtable + i_row * D + o_d, b_dtable, mask=m_d)


def fold(
    partial: Tensor,
    table: Tensor | None,
    t: Tensor,
    first: tuple[int, int],
    second: tuple[int, int] = (0, -1),
) -> tuple[Any, Tensor]:
    """(dtable, dt), added up from ``partial`` (B, splits, vectors, D) in a fixed order.

    ``first`` and ``second`` are (vector, row): which vector of the partial sums is a row's
    gradient. Other rows get zeros. Without a table, t is that one row and dtable is None.
    """
    B, splits, vectors, D = partial.shape
    R = 1 if table is None else table.shape[0]
    dtable = None if table is None else table.new_empty(table.shape)
    dt = t.new_empty(t.shape)
    with torch.cuda.device_of(t):
        fold_kernel[(R * -(-D // FOLD_COLUMNS),)](
            *(partial, dtable, dt, *first, *second, B, R, splits),
            *(D, vectors, *fold_tile(splits), FOLD_COLUMNS),
        )
    return dtable, dt
