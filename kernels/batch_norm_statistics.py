"""BatchNorm's statistics pass: mean and M2 of each row tile of an activation, for `batch_norm_finalize` to merge.

    mean = sum x / n,  M2 = sum (x - mean)^2

x is dense NHWC, read as a matrix of M = N*H*W rows and C columns. Grid (row tiles, column tiles). Reads x once. The
tiling depends on the shape alone, so the partials are the same bits on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.moments import finite_or_zero, merge_lanes
from .host.arguments import SIZES, accumulator, nhwc_shape
from .host.launcher import launch
from .host.tiling import tiling


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x,  # (M, C)
    partial,  # (3, T, C): mean and M2 of each row tile, and what rounding left of the mean
    M,
    T,
    TILES,  # BLOCK_M-row tiles per program
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per row tile: mean = sum x / n, M2 = sum (x - mean)^2. Grid (T, column tiles).

    Every (row of the block, column) pair is a lane with a Welford mean and M2 of its own, so the loop has no barrier;
    Chan's formula merges the lanes at the end. A lane's mean is carried as an offset from its first value, the pivot.
    So it is rounded to an ulp of the spread, not of the mean.
    """
    row0 = tl.program_id(0).to(tl.int64) * TILES * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = tl.minimum(M - row0, TILES * BLOCK_M).to(tl.int32)
    x += row0 * C
    offsets = rows[:, None] * C + cols[None, :]
    first = tl.load(x + offsets, mask=(rows < valid)[:, None] & (cols < C)[None, :], other=0.0).to(ACC)
    pivot = finite_or_zero(first)
    mean = first - pivot  # an offset from the pivot
    m2 = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    steps = tl.full([1, 1], 1.0, ACC)
    for i in range(1, tl.cdiv(valid, BLOCK_M)):
        x += BLOCK_M * C
        mask = (rows < valid - i * BLOCK_M)[:, None] & (cols < C)[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC) - pivot
        delta = tl.where(mask, value - mean, 0.0)
        steps += 1.0
        mean = tl.fma(delta, 1.0 / steps, mean)
        m2 = tl.fma(delta, value - mean, m2)
    count = tl.maximum((valid - rows + BLOCK_M - 1) // BLOCK_M, 0).to(ACC)[:, None]
    mean, rest, m2 = merge_lanes(pivot, mean, m2, count, valid.to(ACC))
    out = tl.program_id(0) * C + cols
    tl.store(partial + out, mean, mask=cols < C)
    tl.store(partial + T * C + out, m2, mask=cols < C)
    tl.store(partial + 2 * T * C + out, rest, mask=cols < C)


class Moments(NamedTuple):
    """Mean and M2 = sum (x - mean)^2 of each `rows` rows of M in turn; `batch_norm_finalize` merges them."""

    partial: Tensor  # (3, T, C) float32 or float64; the third plane is what rounding left of the means
    rows: int  # of a partial; the last one has fewer
    M: int


def batch_norm_statistics(x: Tensor) -> Moments:
    """The moments of x (N, C, H, W)."""
    M, C = nhwc_shape(x)
    t = tiling(M, C)
    partial = torch.empty((3, t.partials, C), dtype=accumulator(x)[0], device=x.device)
    launch(
        statistics_kernel,
        (t.partials, triton.cdiv(C, t.BLOCK_C)),
        x,
        partial,
        M,
        t.partials,
        t.tiles,
        **t.options(x),
    )
    return Moments(partial, t.rows, M)
