"""CAME's step in Triton, for CUDA devices of compute capability 8.0 and up.

Each pass (``reference.py``) is one launch for all weights, which a kernel finds by their addresses.
Weights and gradients are fp32, bf16 or fp16; arithmetic is fp32. Gradients that are not contiguous
are copied first. A program has a tile of one matrix and leaves its sums over rows and columns;
those of several tiles are added in a fixed order, so that the same bits come out of every run.
Formulas: README.md. Names in kernels: ``pixart_kernels/adaln/triton.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels.came.reference import Settings, State, step

# Not measured. A thread holds 32 elements of a tile, 4 and 4 of a row in fp32, and nothing spills.
TILE, MAX_COLUMNS, NUM_WARPS = 4096, 128, 4
VECTOR_BLOCK = 1024

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _at(table, i_weight, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a weight, or what belongs to it, begins."""
    p_weight = tl.load(table + i_weight).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p_weight = tl.multiple_of(p_weight, 16)
    return p_weight


@triton.jit
def _load(table, i_weight, o_x, m_x, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements o_x in fp32, zeros where masked."""
    return tl.load(_at(table, i_weight, TYPE, ALIGNED) + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _tile(count, R, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which matrix and tile a program has: its weight, elements, rows and columns, and masks."""
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    i_program = tl.program_id(0).to(tl.int64)
    row_blocks = (R + ROWS - 1) // ROWS
    i_column, i_row = i_program % BLOCKS, i_program // BLOCKS % row_blocks
    i_matrix = i_program // BLOCKS // row_blocks
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    o_d = i_column * COLUMNS + tl.arange(0, COLUMNS)
    o_x = (i_matrix % count * R + o_r[:, None]) * C + o_d
    return i_matrix, i_row, i_column, o_r, o_d, o_x, o_r < R, o_d < C


@triton.jit
def _store_sums(
    b_square, rows, columns, matrices, R, C, i_matrix, i_row, i_column, o_r, o_d, m_r, m_d
):
    tl.store(rows + (i_column * matrices + i_matrix) * R + o_r, tl.sum(b_square, 1), mask=m_r)
    tl.store(columns + (i_row * matrices + i_matrix) * C + o_d, tl.sum(b_square, 0), mask=m_d)


@_triton.kernel
def _squares_kernel(
    gradients,  # [n], addresses
    rows,  # [column blocks, matrices, R]
    columns,  # [row blocks, matrices, C]
    matrices: tl.int64,
    count: tl.int64,
    R: tl.int64,
    C: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of g^2."""
    i_matrix, i_row, i_column, o_r, o_d, o_x, m_r, m_d = _tile(count, R, C, ROWS, COLUMNS)
    m_x = m_r[:, None] & m_d
    b_gradient = _load(gradients, i_matrix // count, o_x, m_x, GRADIENT, ALIGNED)
    b_square = b_gradient * b_gradient
    _store_sums(
        b_square, rows, columns, matrices, R, C, i_matrix, i_row, i_column, o_r, o_d, m_r, m_d
    )


@_triton.kernel
def _scaled_squares_kernel(
    gradients,  # [n], addresses
    column,  # [matrices, C]
    rows,  # [column blocks, matrices, R]
    matrices: tl.int64,
    count: tl.int64,
    R: tl.int64,
    C: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of (g c)^2 over columns."""
    i_matrix, _, i_column, o_r, o_d, o_x, m_r, m_d = _tile(count, R, C, ROWS, COLUMNS)
    m_x = m_r[:, None] & m_d
    b_gradient = _load(gradients, i_matrix // count, o_x, m_x, GRADIENT, ALIGNED)
    b_scaled = b_gradient * tl.load(column + i_matrix * C + o_d, mask=m_d, other=0.0)
    b_sum = tl.sum(b_scaled * b_scaled, 1)
    tl.store(rows + (i_column * matrices + i_matrix) * R + o_r, b_sum, mask=m_r)


@_triton.kernel
def _move_kernel(
    gradients,  # [n], addresses
    moments,  # [n], addresses
    row,  # [matrices, R]
    column,  # [matrices, C]
    rows,  # [column blocks, matrices, R]
    columns,  # [row blocks, matrices, C]
    matrices: tl.int64,
    count: tl.int64,
    R: tl.int64,
    beta: tl.float32,
    share: tl.float32,
    C: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The moment, and sums of (u - m')^2 = beta^2 (u - m)^2."""
    i_matrix, i_row, i_column, o_r, o_d, o_x, m_r, m_d = _tile(count, R, C, ROWS, COLUMNS)
    m_x = m_r[:, None] & m_d
    p_moment = _at(moments, i_matrix // count, tl.float32, ALIGNED)
    b_gradient = _load(gradients, i_matrix // count, o_x, m_x, GRADIENT, ALIGNED)
    b_moment = tl.load(p_moment + o_x, mask=m_x, other=0.0)
    b_row = tl.load(row + i_matrix * R + o_r, mask=m_r, other=0.0)
    b_column = tl.load(column + i_matrix * C + o_d, mask=m_d, other=0.0)
    b_ahead = b_gradient * (b_row[:, None] * b_column) - b_moment
    tl.store(p_moment + o_x, b_moment + share * b_ahead, mask=m_x)
    b_deviation = tl.where(m_x, beta * b_ahead, 0.0)
    b_square = b_deviation * b_deviation
    _store_sums(
        b_square, rows, columns, matrices, R, C, i_matrix, i_row, i_column, o_r, o_d, m_r, m_d
    )


@_triton.kernel
def _update_kernel(
    moments,  # [n], addresses
    weights,  # [n], addresses
    row,  # [matrices, R]
    column,  # [matrices, C]
    count: tl.int64,
    R: tl.int64,
    decay: tl.float32,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The weight, rounded after its decay as came-pytorch does."""
    i_matrix, _, _, o_r, o_d, o_x, m_r, m_d = _tile(count, R, C, ROWS, COLUMNS)
    m_x = m_r[:, None] & m_d
    p_weight = _at(weights, i_matrix // count, WEIGHT, ALIGNED)
    b_moment = _load(moments, i_matrix // count, o_x, m_x, tl.float32, ALIGNED)
    b_weight = tl.load(p_weight + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_row = tl.load(row + i_matrix * R + o_r, mask=m_r, other=0.0)
    b_column = tl.load(column + i_matrix * C + o_d, mask=m_d, other=0.0)
    b_weight = (b_weight - decay * b_weight).to(WEIGHT).to(tl.float32)
    tl.store(p_weight + o_x, b_weight - b_moment * (b_row[:, None] * b_column), mask=m_x)


@_triton.kernel
def _vector_squares_kernel(
    gradients,  # [n], addresses
    averages,  # [n], addresses
    partial,  # [n, blocks]
    share: tl.float32,
    eps: tl.float32,
    N: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The average of g^2, and a sum of their ratios."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    i_program = tl.program_id(0).to(tl.int64)
    o_d = i_program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < N
    p_average = _at(averages, i_program // BLOCKS, tl.float32, ALIGNED)
    b_gradient = _load(gradients, i_program // BLOCKS, o_d, m_d, GRADIENT, ALIGNED)
    b_average = tl.load(p_average + o_d, mask=m_d, other=0.0)
    b_square = b_gradient * b_gradient
    b_average += share * (b_square + eps - b_average)
    tl.store(p_average + o_d, b_average, mask=m_d)
    b_ratio = tl.where(m_d, tl.div_rn(b_square, b_average), 0.0)
    tl.store(partial + i_program, tl.sum(b_ratio, 0))


@_triton.kernel
def _vector_update_kernel(
    gradients,  # [n], addresses
    averages,  # [n], addresses
    moments,  # [n], addresses
    weights,  # [n], addresses
    clip,  # [n]
    share: tl.float32,
    lr: tl.float32,
    decay: tl.float32,
    N: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moment, and the weight."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    i_program = tl.program_id(0).to(tl.int64)
    i_weight = i_program // BLOCKS
    o_d = i_program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < N
    p_moment = _at(moments, i_weight, tl.float32, ALIGNED)
    p_weight = _at(weights, i_weight, WEIGHT, ALIGNED)
    b_gradient = _load(gradients, i_weight, o_d, m_d, GRADIENT, ALIGNED)
    b_average = tl.load(_at(averages, i_weight, tl.float32, ALIGNED) + o_d, mask=m_d, other=1.0)
    b_moment = tl.load(p_moment + o_d, mask=m_d, other=0.0)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_update = tl.div_rn(b_gradient, tl.sqrt_rn(b_average) * tl.load(clip + i_weight))
    b_moment += share * (b_update - b_moment)
    tl.store(p_moment + o_d, b_moment, mask=m_d)
    b_weight = (b_weight - decay * b_weight).to(WEIGHT).to(tl.float32)
    tl.store(p_weight + o_d, b_weight - lr * b_moment, mask=m_d)


class _Addresses:
    """Where weights, gradients and averages are, on the device: one row for each list."""

    def __init__(self, *lists: list[Tensor]) -> None:
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
        self.aligned = not any(address % 16 for row in addresses for address in row)
        device = lists[0][0].device
        # rows of an even length begin at multiples of 16 bytes: kernels are compiled for that once
        padded = [[*row, *[0] * (len(row) % 2)] for row in addresses]
        # pinned, so that the host need not wait for the copy
        table = torch.tensor(padded, pin_memory=device.type == "cuda")
        self.rows = table.to(device, non_blocking=True).unbind()


class _Matrices:
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], state: State) -> None:
        self.shape = weights[0].shape
        *_, self.R, self.C = self.shape
        self.count = math.prod(self.shape[:-2])
        self.n, self.matrices = len(weights), len(weights) * self.count
        self.moment = state["exp_avg"][0]
        self.gradients = [g.contiguous() for g in gradients]  # held while kernels read them
        table = _Addresses(self.gradients, state["exp_avg"], weights)
        self.gradient_at, self.moment_at, self.weight_at = table.rows
        self.aligned = table.aligned
        self.gradient, self.weight = TYPES[gradients[0].dtype], TYPES[weights[0].dtype]
        columns = min(triton.next_power_of_2(self.C), MAX_COLUMNS)
        rows = min(triton.next_power_of_2(max(1, self.R)), TILE // columns)
        self.tile = rows, columns
        self.blocks = triton.cdiv(self.R, rows), triton.cdiv(self.C, columns)
        self.programs = self.matrices * self.blocks[0] * self.blocks[1]

    def launch(self, kernel, *arguments) -> None:
        if self.programs > 0:
            with torch.cuda.device_of(self.moment):
                settings = self.aligned, *self.tile
                kernel[(self.programs,)](*arguments, *settings, num_warps=NUM_WARPS)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Room for what tiles sum, of rows and of columns."""
        row_blocks, column_blocks = self.blocks
        rows = self.moment.new_empty(column_blocks, self.matrices * self.R)
        return rows, self.moment.new_empty(row_blocks, self.matrices * self.C)

    def folded(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        *further, R, C = self.shape
        return rows.sum(0).view(self.n, *further, R), columns.sum(0).view(self.n, *further, C)

    def squares(self) -> tuple[Tensor, Tensor]:
        sums = self.sums()
        sizes = self.matrices, self.count, self.R, self.C
        self.launch(_squares_kernel, self.gradient_at, *sums, *sizes, self.gradient)
        return self.folded(*sums)

    def scaled_squares(self, column: Tensor) -> Tensor:
        rows, _ = self.sums()
        sizes = self.matrices, self.count, self.R, self.C
        self.launch(_scaled_squares_kernel, self.gradient_at, column, rows, *sizes, self.gradient)
        return rows.sum(0).view(self.n, *self.shape[:-1])

    def move(self, row: Tensor, column: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        sums = self.sums()
        # 1 - beta would lose digits in fp32
        sizes = self.matrices, self.count, self.R, beta, 1 - beta, self.C
        where = self.gradient_at, self.moment_at
        self.launch(_move_kernel, *where, row, column, *sums, *sizes, self.gradient)
        return self.folded(*sums)

    def update(self, row: Tensor, column: Tensor, decay: float) -> None:
        sizes = self.count, self.R, decay, self.C
        self.launch(
            _update_kernel, self.moment_at, self.weight_at, row, column, *sizes, self.weight
        )


class _Vectors:
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], state: State) -> None:
        self.n, self.N = len(weights), weights[0].numel()
        self.moment = state["exp_avg"][0]
        self.gradients = [g.contiguous() for g in gradients]  # held while kernels read them
        table = _Addresses(self.gradients, state["exp_avg_sq"], state["exp_avg"], weights)
        self.at, self.aligned = table.rows, table.aligned
        self.gradient, self.weight = TYPES[gradients[0].dtype], TYPES[weights[0].dtype]
        self.blocks = triton.cdiv(self.N, VECTOR_BLOCK)

    def launch(self, kernel, *arguments) -> None:
        if self.N > 0:
            with torch.cuda.device_of(self.moment):
                kernel[(self.n * self.blocks,)](*arguments, self.aligned, VECTOR_BLOCK)

    def squares(self, beta: float, eps: float) -> Tensor:
        partial = self.moment.new_empty(self.n, self.blocks)
        at = self.at[:2]
        self.launch(_vector_squares_kernel, *at, partial, 1 - beta, eps, self.N, self.gradient)
        return partial.sum(1)

    def update(self, clip: Tensor, beta: float, lr: float, decay: float) -> None:
        settings = 1 - beta, lr, decay, self.N, self.gradient, self.weight
        self.launch(_vector_update_kernel, *self.at, clip, *settings)


def came_step(
    weights: list[Tensor], gradients: list[Tensor], state: State, **settings: Any
) -> None:
    step((_Matrices, _Vectors), weights, gradients, state, Settings(**settings))
