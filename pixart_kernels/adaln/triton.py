"""The adaLN family in Triton, for CUDA devices of compute capability 8.0 and up.

Dtypes, layouts and results are those of ``native.py``: fp32, bf16 or fp16 in any mix, fp32
statistics and sums, one rounding at the store, operands read in place through their strides,
and the same bits in every run. Formulas: README.md. Tile sizes: config.py.

In kernels: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` values in
registers. A row of D columns is a head and a tail, each a power of two wide (``split``).
Rows are one-dimensional and taken one by one: their statistics are then scalars, while in a
tile of rows they would tie the layouts of head and tail together, at the price of moving whole
tiles through shared memory. Strides and offsets come in multiples of UNIT elements: Triton
reads 16 bytes at once only where it can prove that every row starts at such a multiple. ``None``
in place of an operand leaves out, when the kernel is compiled, whatever it would take part in.
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
    backward_splits,
    fold,
    load_row,
    row_mean,
    split,
    store_row,
)
from pixart_kernels.adaln import config
from pixart_kernels.adaln.autograd import KERNELS, Kernels, register_fakes
from pixart_kernels.adaln.reference import activation_dtype


@triton.jit
def _compose(
    table,
    t,
    table_offset,
    t_offset,
    t_stride,
    i_b,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """table[row] + t[i_b, row], or t[i_b, row] alone."""
    b_head, b_tail = load_row(t + (i_b * t_stride + t_offset) * UNIT, True, D, HEAD, TAIL)
    if table is not None:
        b_table_head, b_table_tail = load_row(table + table_offset * UNIT, True, D, HEAD, TAIL)
        b_head += b_table_head
        b_tail += b_table_tail
    return b_head, b_tail


@_triton.kernel
def _fwd_kernel(
    x,  # [B, N, D]
    x_stride_b: tl.int64,
    x_stride_n: tl.int64,
    branch,  # [B, N, D]; None: x stays as it is
    branch_stride_b: tl.int64,
    branch_stride_n: tl.int64,
    gate_table,
    gate_t,  # None: a plain residual
    gate_table_offset: tl.int64,
    gate_t_offset: tl.int64,
    gate_t_stride: tl.int64,
    shift_table,
    shift_t,
    shift_table_offset: tl.int64,
    shift_t_offset: tl.int64,
    shift_t_stride: tl.int64,
    scale_table,
    scale_t,
    scale_table_offset: tl.int64,
    scale_t_offset: tl.int64,
    scale_t_stride: tl.int64,
    x_new,  # [B, N, D], with a branch
    h,  # [B, N, D]; None: nothing is normalised
    stats,  # [2, B, N], with h
    B: tl.int64,
    N: tl.int64,
    tiles: tl.int64,
    eps: tl.float32,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for ROWS tokens of a sample."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // tiles
    if gate_t is not None:
        b_gate_head, b_gate_tail = _compose(
            gate_table, gate_t, gate_table_offset, gate_t_offset, gate_t_stride,
            i_b, D, HEAD, TAIL, UNIT,
        )  # fmt: skip
    if h is not None:
        b_shift_head, b_shift_tail = _compose(
            shift_table, shift_t, shift_table_offset, shift_t_offset, shift_t_stride,
            i_b, D, HEAD, TAIL, UNIT,
        )  # fmt: skip
        b_scale_head, b_scale_tail = _compose(
            scale_table, scale_t, scale_table_offset, scale_t_offset, scale_t_stride,
            i_b, D, HEAD, TAIL, UNIT,
        )  # fmt: skip
    for i_row in tl.static_range(ROWS):
        i_n = i_program % tiles * ROWS + i_row
        m_n = i_n < N
        i_token = i_b * N + i_n
        p_x = x + (i_b * x_stride_b + i_n * x_stride_n) * UNIT
        b_head, b_tail = load_row(p_x, m_n, D, HEAD, TAIL)
        if branch is not None:
            p_branch = branch + (i_b * branch_stride_b + i_n * branch_stride_n) * UNIT
            b_branch_head, b_branch_tail = load_row(p_branch, m_n, D, HEAD, TAIL)
            if gate_t is not None:
                b_branch_head *= b_gate_head
                b_branch_tail *= b_gate_tail
            # normalised as it was stored, because that is what the backward reads again
            b_new_head = (b_head + b_branch_head).to(x_new.dtype.element_ty)
            b_new_tail = (b_tail + b_branch_tail).to(x_new.dtype.element_ty)
            store_row(x_new + i_token * D, b_new_head, b_new_tail, m_n, D, HEAD, TAIL)
            b_head = b_new_head.to(tl.float32)
            b_tail = b_new_tail.to(tl.float32)
        if h is not None:
            b_mean = row_mean(b_head, b_tail, D)
            b_head -= b_mean
            b_tail = tl.where(HEAD + tl.arange(0, TAIL) < D, b_tail - b_mean, 0.0)
            b_variance = row_mean(b_head * b_head, b_tail * b_tail, D)
            b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))
            tl.store(stats + i_token, b_mean, mask=m_n)
            tl.store(stats + B * N + i_token, b_rstd, mask=m_n)
            b_head = b_head * b_rstd * (1 + b_scale_head) + b_shift_head
            b_tail = b_tail * b_rstd * (1 + b_scale_tail) + b_shift_tail
            store_row(h + i_token * D, b_head, b_tail, m_n, D, HEAD, TAIL)


@_triton.kernel
def _bwd_kernel(
    dx_new,  # [B, N, D] or None
    dx_new_stride_b: tl.int64,
    dx_new_stride_n: tl.int64,
    dh,  # [B, N, D]; None: nothing was normalised
    dh_stride_b: tl.int64,
    dh_stride_n: tl.int64,
    x,  # [B, N, D], what was normalised, with dh
    x_stride_b: tl.int64,
    x_stride_n: tl.int64,
    branch,  # [B, N, D], with a gate
    branch_stride_b: tl.int64,
    branch_stride_n: tl.int64,
    gate_table,
    gate_t,
    gate_table_offset: tl.int64,
    gate_t_offset: tl.int64,
    gate_t_stride: tl.int64,
    scale_table,
    scale_t,
    scale_table_offset: tl.int64,
    scale_t_offset: tl.int64,
    scale_t_stride: tl.int64,
    stats,  # [2, B, N], with dh
    dx,  # [B, N, D], with dh
    dbranch,  # [B, N, D] or None
    partial,  # [B, splits, VECTORS, D]: shift and scale with dh, then gate
    B: tl.int64,
    N: tl.int64,
    tiles: tl.int64,
    splits: tl.int64,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Program (i_b, i_split) takes every splits-th tile of its sample and sums as it goes."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // splits
    if dh is not None:
        b_scale_head, b_scale_tail = _compose(
            scale_table, scale_t, scale_table_offset, scale_t_offset, scale_t_stride,
            i_b, D, HEAD, TAIL, UNIT,
        )  # fmt: skip
        b_dshift_head, b_dshift_tail = tl.zeros_like(b_scale_head), tl.zeros_like(b_scale_tail)
        b_dscale_head, b_dscale_tail = tl.zeros_like(b_scale_head), tl.zeros_like(b_scale_tail)
    if gate_t is not None:
        b_gate_head, b_gate_tail = _compose(
            gate_table, gate_t, gate_table_offset, gate_t_offset, gate_t_stride,
            i_b, D, HEAD, TAIL, UNIT,
        )  # fmt: skip
        b_dgate_head, b_dgate_tail = tl.zeros_like(b_gate_head), tl.zeros_like(b_gate_tail)

    i_tile = i_program % splits
    while i_tile < tiles:
        for i_row in tl.static_range(ROWS):
            i_n = i_tile * ROWS + i_row
            m_n = i_n < N
            i_token = i_b * N + i_n
            # every read before the first sum, which all threads wait for
            if dx_new is not None:
                p_dx_new = dx_new + (i_b * dx_new_stride_b + i_n * dx_new_stride_n) * UNIT
                b_d_head, b_d_tail = load_row(p_dx_new, m_n, D, HEAD, TAIL)
            if gate_t is not None:
                p_branch = branch + (i_b * branch_stride_b + i_n * branch_stride_n) * UNIT
                b_branch_head, b_branch_tail = load_row(p_branch, m_n, D, HEAD, TAIL)
            if dh is not None:
                p_dh = dh + (i_b * dh_stride_b + i_n * dh_stride_n) * UNIT
                p_x = x + (i_b * x_stride_b + i_n * x_stride_n) * UNIT
                b_dh_head, b_dh_tail = load_row(p_dh, m_n, D, HEAD, TAIL)
                b_x_head, b_x_tail = load_row(p_x, m_n, D, HEAD, TAIL)
                b_mean = tl.load(stats + i_token, mask=m_n, other=0.0)
                b_rstd = tl.load(stats + B * N + i_token, mask=m_n, other=0.0)
                b_x_head = (b_x_head - b_mean) * b_rstd
                b_x_tail = (b_x_tail - b_mean) * b_rstd
                b_dshift_head += b_dh_head
                b_dshift_tail += b_dh_tail
                b_dscale_head += b_dh_head * b_x_head
                b_dscale_tail += b_dh_tail * b_x_tail
                # past D, u is zero because dh is
                b_u_head = b_dh_head * (1 + b_scale_head)
                b_u_tail = b_dh_tail * (1 + b_scale_tail)
                b_mean_u = row_mean(b_u_head, b_u_tail, D)
                b_mean_ux = row_mean(b_u_head * b_x_head, b_u_tail * b_x_tail, D)
                b_dx_head = b_rstd * (b_u_head - b_mean_u - b_x_head * b_mean_ux)
                b_dx_tail = b_rstd * (b_u_tail - b_mean_u - b_x_tail * b_mean_ux)
                if dx_new is not None:
                    b_dx_head += b_d_head
                    b_dx_tail += b_d_tail
                b_d_head = b_dx_head
                b_d_tail = b_dx_tail
                store_row(dx + i_token * D, b_d_head, b_d_tail, m_n, D, HEAD, TAIL)
            if gate_t is not None:
                b_dgate_head += b_d_head * b_branch_head
                b_dgate_tail += b_d_tail * b_branch_tail
                b_d_head *= b_gate_head
                b_d_tail *= b_gate_tail
            if dbranch is not None:
                store_row(dbranch + i_token * D, b_d_head, b_d_tail, m_n, D, HEAD, TAIL)
        i_tile += splits

    p_partial = partial + i_program * VECTORS * D
    if dh is not None:
        store_row(p_partial, b_dshift_head, b_dshift_tail, True, D, HEAD, TAIL)
        store_row(p_partial + D, b_dscale_head, b_dscale_tail, True, D, HEAD, TAIL)
        p_partial += 2 * D
    if gate_t is not None:
        store_row(p_partial, b_dgate_head, b_dgate_tail, True, D, HEAD, TAIL)


# what _compose takes: table, t, the row's offsets in both, and the batch stride of t
Vector = tuple[Tensor | None, Tensor | None, int, int, int]
NO_VECTOR: Vector = (None, None, 0, 0, 0)


def _vector(table: Tensor | None, t: Tensor, row: int, D: int) -> Vector:
    t = dense_rows(t)
    t_offset = row * (D if t.dim() == 2 else t.stride(1))
    if table is None:
        return None, t, 0, t_offset, t.stride(0)
    table = dense_rows(table)
    return table, t, row * table.stride(0), t_offset, t.stride(0)


def _tokens(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    if x is None:
        return None, 0, 0
    x = dense_rows(x)
    return x, x.stride(0), x.stride(1)


def _in_units(*operands: Tensor | int | None) -> tuple[list[Tensor | int | None], int]:
    """The operands with strides and offsets divided by UNIT, and UNIT, of which 16 is enough."""
    unit = gcd(16, *(operand for operand in operands if isinstance(operand, int)))
    return [operand // unit if isinstance(operand, int) else operand for operand in operands], unit


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Vector,
    shift: Vector,
    scale: Vector,
    x_new: Tensor | None,
    h: Tensor | None,
    stats: Tensor | None,
    eps: float,
) -> None:
    B, N, D = x.shape
    if x.numel() == 0:
        return
    tile, _ = config.tiles(D)
    tiles = -(-N // tile.rows)
    operands, unit = _in_units(*_tokens(x), *_tokens(branch), *gate, *shift, *scale)
    with torch.cuda.device_of(x):
        _fwd_kernel[(B * tiles,)](
            *(*operands, x_new, h, stats, B, N, tiles, eps),
            *(D, *split(D), unit, tile.rows),
            num_warps=tile.num_warps,
        )


def _backward(
    dx_new: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Vector,
    scale: Vector,
    stats: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
) -> Tensor:
    """Fills dx and dbranch; returns the partial sums, fp32 (B, splits, vectors, D)."""
    given = dx_new if dh is None else dh
    assert given is not None
    B, N, D = given.shape
    vectors = (0 if dh is None else 2) + (gate is not NO_VECTOR)
    if given.numel() == 0:
        return given.new_empty((B, 0, vectors, D), dtype=torch.float32)
    _, tile = config.tiles(D)
    tiles = -(-N // tile.rows)
    splits = backward_splits(B, tiles, tile.num_warps, _triton.processors(given.device))
    partial = given.new_empty((B, splits, vectors, D), dtype=torch.float32)
    operands, unit = _in_units(
        *_tokens(dx_new), *_tokens(dh), *_tokens(x), *_tokens(branch), *gate, *scale
    )
    with torch.cuda.device_of(given):
        _bwd_kernel[(B * splits,)](
            *(*operands, stats, dx, dbranch, partial, B, N, tiles, splits),
            *(D, *split(D), unit, tile.rows, vectors),
            num_warps=tile.num_warps,
        )
    return partial


def _normalise(
    x: Tensor, shift: Vector, scale: Vector, activation: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape, dtype=activation_dtype(x, activation))
    stats = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    _forward(x, None, NO_VECTOR, shift, scale, None, h, stats, eps)
    return h, stats


def adaln_single_fwd(
    x: Tensor, table: Tensor, t: Tensor, shift_row: int, scale_row: int, eps: float
) -> tuple[Tensor, Tensor]:
    D = x.shape[2]
    shift, scale = _vector(table, t, shift_row, D), _vector(table, t, scale_row, D)
    return _normalise(x, shift, scale, t, eps)


def adaln_single_bwd(
    dh: Tensor,
    x: Tensor,
    table: Tensor,
    t: Tensor,
    stats: Tensor,
    shift_row: int,
    scale_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    scale = _vector(table, t, scale_row, x.shape[2])
    partial = _backward(None, dh, x, None, NO_VECTOR, scale, stats, dx, None)
    return dx, *fold(partial, table, t, (0, shift_row), (1, scale_row))


def adaln_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    D = x.shape[2]
    return _normalise(x, _vector(None, shift, 0, D), _vector(None, scale, 0, D), shift, eps)


def adaln_modulate_bwd(
    dh: Tensor, x: Tensor, shift: Tensor, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    vector = _vector(None, scale, 0, x.shape[2])
    partial = _backward(None, dh, x, None, NO_VECTOR, vector, stats, dx, None)
    return dx, fold(partial, None, shift, (0, 0))[1], fold(partial, None, scale, (1, 0))[1]


def gated_residual_fwd(
    x: Tensor, branch: Tensor, table: Tensor, t: Tensor, gate_row: int
) -> Tensor:
    x_new = x.new_empty(x.shape)
    gate = _vector(table, t, gate_row, x.shape[2])
    _forward(x, branch, gate, NO_VECTOR, NO_VECTOR, x_new, None, None, 0.0)
    return x_new


def gated_residual_bwd(
    dx_new: Tensor, branch: Tensor, table: Tensor, t: Tensor, gate_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    dbranch = branch.new_empty(branch.shape)
    gate = _vector(table, t, gate_row, branch.shape[2])
    partial = _backward(dx_new, None, None, branch, gate, NO_VECTOR, None, None, dbranch)
    return dbranch, *fold(partial, table, t, (0, gate_row))


def gated_residual_adaln_fwd(
    x: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_t: Tensor | None,
    gate_row: int,
    table: Tensor,
    t: Tensor,
    shift_row: int,
    scale_row: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[2]
    x_new = x.new_empty(x.shape)
    h = x.new_empty(x.shape, dtype=activation_dtype(x, branch))
    stats = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    gate = NO_VECTOR if gate_t is None else _vector(gate_table, gate_t, gate_row, D)
    shift, scale = _vector(table, t, shift_row, D), _vector(table, t, scale_row, D)
    _forward(x, branch, gate, shift, scale, x_new, h, stats, eps)
    return x_new, h, stats


def gated_residual_adaln_bwd(
    dx_new: Tensor | None,
    dh: Tensor,
    x_new: Tensor,
    branch: Tensor,
    gate_table: Tensor | None,
    gate_t: Tensor | None,
    gate_row: int,
    table: Tensor,
    t: Tensor,
    stats: Tensor,
    shift_row: int,
    scale_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    D = x_new.shape[2]
    dx = x_new.new_empty(x_new.shape)
    scale = _vector(table, t, scale_row, D)
    if gate_t is None:
        dbranch = None if branch.dtype == x_new.dtype else branch.new_empty(branch.shape)
        partial = _backward(dx_new, dh, x_new, None, NO_VECTOR, scale, stats, dx, dbranch)
        gate_grads = tuple(x_new.new_empty((0,), dtype=torch.float32) for _ in range(2))
    else:
        dbranch = branch.new_empty(branch.shape)
        gate = _vector(gate_table, gate_t, gate_row, D)
        partial = _backward(dx_new, dh, x_new, branch, gate, scale, stats, dx, dbranch)
        gate_grads = fold(partial, gate_table, gate_t, (2, gate_row))
    if dbranch is None:
        dbranch = branch.new_empty((0,))
    return dx, dbranch, *gate_grads, *fold(partial, table, t, (0, shift_row), (1, scale_row))


_library = torch.library.Library("pixart_kernels_triton", "FRAGMENT")
KERNELS["triton"] = Kernels(*(_triton.op(_library, globals()[name]) for name in Kernels._fields))
register_fakes(_library.ns)
