"""How the Triton kernels of attention cut their work: by shape and device, never by timing a call.

None of these values has been measured. Each compiles without spilled registers for compute
capability 8.0, 9.0 and 10.0, where many of the next size do not. A run on a GPU should compare, at
d = 72 in bf16: 64 and 128 rows, 32 to 128 columns, 4 and 8 warps, 2 to 4 stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Tile:
    """``rows`` that a program owns, and ``columns`` that it meets in each step of its loop.

    Rows are queries and columns keys in the forward and for dq, the other way round for dk and dv.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    forward: Tile
    dq: Tile
    dkdv: Tile


# (widest padded head, tiles); 16-bit operands, with the matrix instructions of 9.x and 10.x
_ASYNCHRONOUS = (
    (80, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2))),
    (128, Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2))),
)
# those of 8.x, which 12.x has as well; within 99 KB of shared memory
_SYNCHRONOUS = (
    (80, Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2))),
    (128, Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2))),
)
# without tensor cores, every operand of a product passes through registers
_FP32 = (
    (80, Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))),
    (128, Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(32, 16, 8, 1))),
)

# a program of this many rows at the least, whatever the device could take at once
FEWEST_ROWS = 64

# Queries that a program adds up for dk and dv of cross-attention. By arithmetic: at d = 72 and 128
# keys, their fp32 sums are a quarter of the bytes that it reads, and 4 samples of 4096 tokens with
# 16 heads give 128 programs even to texts of one tile.
QUERIES = 2048
# elements that a program folds out of such sums
FOLDED = 1024


@lru_cache
def split(d: int) -> tuple[int, int]:
    """Widths of the two powers of two, at least 16, that hold a head: 72 in 64 + 16, 96 in 64 + 32.

    The second is 0 where the first alone does: 64 in 64, and 104 in 128, as 64 + 64 would be.
    """
    head = max(1 << (d.bit_length() - 1), 16)
    if d <= head:
        return head, 0
    tail = max(1 << (d - head - 1).bit_length(), 16)
    return (head, tail) if tail < head else (2 * head, 0)


@lru_cache
def tiles(d: int, itemsize: int, major: int) -> Tiles:
    """The tiles for heads of d elements of ``itemsize`` bytes on compute capability ``major``."""
    table = _FP32 if itemsize == 4 else _ASYNCHRONOUS if major in (9, 10) else _SYNCHRONOUS
    return next(found for widest, found in table if sum(split(d)) <= widest)


def filling(tile: Tile, heads: int, N: int, processors: int) -> Tile:
    """``tile``, or one of half its rows and warps where whole ones leave processors idle.

    Its columns stay, and with them the order of every sum: a sample does not depend on its batch.
    """
    if tile.rows <= FEWEST_ROWS or heads * -(-N // tile.rows) >= processors:
        return tile
    return Tile(tile.rows // 2, tile.columns, max(tile.num_warps // 2, 4), tile.num_stages)


def splits(N: int) -> int:
    """Programs that share a sample's queries: by their number alone, as the order of sums does."""
    return max(-(-N // QUERIES), 1)
