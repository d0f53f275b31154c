"""How the passes over an activation cut its (M, C) matrix, and how a merge cuts the partials that they leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import triton
from torch import Tensor

from .arguments import FLAGS, accumulator

ELEMENTS = 2048  # elements of a tile with 4 warps: 16 for each thread, two 16-byte loads where the type has 16 bits
_PROGRAMS = 1024  # programs that a reduction should have: several for each SM of the largest GPU
MAX_PARTIALS = 512  # partials that one program of a merge reads in a few steps; more of them take two merges
_GROUP = 256  # partials that the first of these two merges into one
_MOST_GROUPS = 65535  # programs along a grid's second axis, at most
SPLIT_PROGRAMS = 256  # programs that a product over pixels should have: two for each SM of a large GPU
POOLED_PROGRAMS = 512  # the same where each step first computes what it multiplies, and nothing is pipelined
MIN_STEPS = 4  # steps of a split of its reduction, at least
_MIN_IMAGE_STEPS = 8  # tiles of a split of an image, at least: with fewer, what is done once weighs as much
_MIN_ROWS = 256  # rows of a partial, at least: its 8 bytes per channel are below 2% of the 16-bit values that were read


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
    """Elements of a tile for C channels.

    They are fewer where a row is not whole vectors: each element then has an address of its own, and a thread would
    spill the addresses of 16.
    """
    return ELEMENTS if C % 8 == 0 else ELEMENTS // 2


@cache
def tiling(M: int, C: int, elements: int = ELEMENTS) -> Tiling:
    """Tiles for M rows and C columns, of `elements` for 4 warps.

    A function of the shape alone, so that results do not depend on the device.
    """
    # A row of a tile should fill 32-byte sectors. Where C does so in every type, the column tile is the widest among
    # those that waste the fewest columns. Elsewhere it is the whole row, whose end shares a sector with the next row.
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


def reached(t: Tiling, M: int, C: int) -> Tiling:
    """The tiling with as many tiles per program as 32-bit offsets from its first row reach, at most."""
    tiles = min(t.tiles, max(1, (2**31 - 1) // (t.BLOCK_M * C)))
    return t if tiles == t.tiles else replace(t, tiles=tiles, partials=triton.cdiv(M, tiles * t.BLOCK_M))


@cache
def image_tiling(N: int, pixels: int, C: int, elements: int) -> Tiling:
    """Tiles of a reduction over each of N images of `pixels` rows and C columns; the partials are those of an image.

    Where the images are few, more programs share each: column tiles are narrower, and rows are split. Below 32 columns
    the sums over a tile's rows would have bank conflicts.
    """
    BLOCK_C = tiling(pixels, C, elements).BLOCK_C
    while BLOCK_C > 32 and C % 16 == 0 and N * triton.cdiv(C, BLOCK_C) < SPLIT_PROGRAMS:
        BLOCK_C //= 2
    BLOCK_M = min(elements // BLOCK_C, triton.next_power_of_2(pixels))
    steps, programs = triton.cdiv(pixels, BLOCK_M), max(1, N) * triton.cdiv(C, BLOCK_C)
    splits = min(triton.cdiv(SPLIT_PROGRAMS, programs), max(1, steps // _MIN_IMAGE_STEPS))
    tiles = triton.cdiv(steps, splits)
    return Tiling(
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        tiles=tiles,
        partials=triton.cdiv(steps, tiles),
        num_warps=max(1, 4 * BLOCK_M * BLOCK_C // elements),
    )


def reduction_splits(tiles: int, steps: int, activations: int, partial: int) -> int:
    """Splits that the reduction of a product over pixels should make, of which `tiles` tiles need `steps` steps.

    They are enough for SPLIT_PROGRAMS programs. Where the partials would then have more than a quarter of the
    activations' bytes, they are fewer, though enough for half as many programs.

    Args:
        activations, partial: bytes of the activations, and of the partial results of one split.
    """
    affordable = max(activations // (4 * partial), SPLIT_PROGRAMS // 2 // tiles)
    return max(1, min(SPLIT_PROGRAMS // tiles, affordable, steps // MIN_STEPS))


def pooled_steps(tiles: int, steps: int) -> int:
    """Steps of a program of the stem's grad-weight, whose splits share the `steps` steps of each of `tiles` tiles."""
    return triton.cdiv(steps * tiles, POOLED_PROGRAMS)


def merge_group(partials: int) -> int:
    """Partials that the first of two merges makes one of; a function of their number alone."""
    return max(_GROUP, triton.next_power_of_2(triton.cdiv(partials, _MOST_GROUPS)))


def merge_blocks(partials: int, C: int, itemsize: int) -> dict[str, int]:
    """The tile of a merge and its warps, in which a thread holds no more than 32 bytes of each of its tiles."""
    BLOCK_T = min(1024 // itemsize, triton.next_power_of_2(partials))
    BLOCK_C = min(8, triton.next_power_of_2(C))
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": 8 if BLOCK_T * BLOCK_C * itemsize >= 8192 else 4}
