"""How the passes over an activation cut its (M, C) matrix, and how a merge cuts the partials that they leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
from torch import Tensor

from .launch import FLAGS, accumulator

ELEMENTS = 2048  # of a tile: 16 a thread at 4 warps, two 16-byte loads each in half precision
_PROGRAMS = 1024  # wanted of a reduction: several per SM of the largest GPU
MAX_PARTIALS = 512  # that one program of the merge can read in a few steps; above, it is two merges in a row
GROUP = 256  # partials that the first of the two makes one
_MIN_ROWS = 256  # of a partial: its 8 bytes per channel then stay below 2% of what was read in half precision


@dataclass(frozen=True)
class Tiling:
    """How an (M, C) matrix is cut: BLOCK_M x BLOCK_C tiles; a reduction takes `tiles` of them per program."""

    BLOCK_M: int
    BLOCK_C: int
    tiles: int
    partials: int  # T, programs along M of a reduction
    num_warps: int

    @property
    def rows(self) -> int:
        return self.tiles * self.BLOCK_M

    def options(self, x: Tensor) -> dict[str, object]:
        """What every kernel that moves x is launched with."""
        return {
            "C": x.shape[1],
            "ACC": accumulator(x)[1],
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_C": self.BLOCK_C,
            "num_warps": self.num_warps,
            **FLAGS,
        }


def elements_of(C: int) -> int:
    """Fewer where rows are no whole vectors: each element has an address to itself, of which a thread would spill."""
    return ELEMENTS if C % 8 == 0 else ELEMENTS // 2


@cache
def tiling(M: int, C: int, elements: int = ELEMENTS) -> Tiling:
    """Tiles for M rows and C columns, of `elements` for 4 warps.

    A function of the shape alone, so that results do not depend on the device.
    """
    # A row of a tile should fill 32-byte sectors. Where C does so in every type, the widest column tile among those
    # that waste the fewest columns; elsewhere the whole row, whose end shares a sector with the next row's beginning.
    wide = triton.next_power_of_2(C)
    if C % 16 == 0:
        fitting = [b for b in (32, 64) if b <= wide] or [wide]
        BLOCK_C = max(fitting, key=lambda b: (-triton.cdiv(C, b) * b, b))
    else:
        BLOCK_C = min(256, wide)
    BLOCK_M = min(elements // BLOCK_C, triton.next_power_of_2(M))
    columns = triton.cdiv(C, BLOCK_C)
    wanted = min(MAX_PARTIALS, max(1, _PROGRAMS // columns))
    tiles = triton.cdiv(max(triton.cdiv(M, wanted), min(M, _MIN_ROWS)), BLOCK_M)
    return Tiling(
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        tiles=tiles,
        partials=triton.cdiv(M, tiles * BLOCK_M),
        num_warps=max(1, 4 * BLOCK_M * BLOCK_C // elements),
    )


def merge_blocks(partials: int, C: int, itemsize: int) -> dict[str, int]:
    """The tile of a merge and its warps, in which a thread holds no more than 32 bytes of each of its tiles."""
    BLOCK_T = min(1024 // itemsize, triton.next_power_of_2(partials))
    BLOCK_C = min(8, triton.next_power_of_2(C))
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": 8 if BLOCK_T * BLOCK_C * itemsize >= 8192 else 4}
