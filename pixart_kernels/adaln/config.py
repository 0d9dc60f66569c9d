"""How the Triton kernels cut their work: by shape and device alone, never by timing a call.

None of these values has been measured. They are where reasoning starts: a thread holds 9 columns
of a row of D = 1152, so that heads are read 16 bytes at a time and nothing spills, and the rows of
a forward tile share one composition of the modulation. Candidates for
D = 1152 that a run on a GPU should compare, as (rows, num_warps): (1, 1), (2, 1), (2, 2), (1, 4),
(2, 4), (4, 4) forward; (1, 2), (2, 2), (1, 4), (2, 4), (1, 8) backward, each with 8, 16 and 32
warps for a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Tile:
    """``rows`` of one sample, taken one by one by ``num_warps`` warps."""

    rows: int
    num_warps: int


# (largest D, forward, backward); the backward holds four rows and three sums at a time
_TILES = (
    (128, Tile(8, 1), Tile(4, 1)),
    (512, Tile(4, 1), Tile(2, 1)),
    (1024, Tile(4, 2), Tile(1, 2)),
    (1280, Tile(4, 4), Tile(1, 4)),
    (2560, Tile(2, 4), Tile(1, 8)),
    (5120, Tile(1, 8), Tile(1, 16)),
)
_WIDEST = (Tile(1, 16), Tile(1, 32))

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


@lru_cache
def tiles(D: int) -> tuple[Tile, Tile]:
    """The tiles of the forward and the backward."""
    for widest, forward, backward in _TILES:
        if widest >= D:
            return forward, backward
    return _WIDEST


def backward_splits(B: int, tiles: int, num_warps: int, processors: int) -> int:
    """How many programs share one sample's tiles; each leaves one row of partial sums."""
    programs = max(BACKWARD_WARPS_PER_PROCESSOR // num_warps, 1) * processors
    return min(-(-programs // B), tiles)


@lru_cache
def fold_tile(splits: int) -> tuple[int, int]:
    """(samples, splits) of one step of the fold: powers of two whose product is FOLD_ROWS."""
    split_tile = min(1 << max(splits - 1, 0).bit_length(), FOLD_ROWS)
    return FOLD_ROWS // split_tile, split_tile
