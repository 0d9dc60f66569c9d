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


@lru_cache
def tiles(D: int) -> tuple[Tile, Tile]:
    """The tiles of the forward and the backward."""
    for widest, forward, backward in _TILES:
        if widest >= D:
            return forward, backward
    return _WIDEST
