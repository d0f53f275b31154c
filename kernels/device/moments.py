"""Moments of rows (mean, M2) and their merge by Chan's formula, in a fixed order and without cancellation."""

import triton
import triton.language as tl

from .reductions import column_sums


@triton.jit
def two_sum(a, b):
    """a + b rounded, and what the rounding left: together a + b exactly (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def merge_lanes(pivot, offset, m2, count, total_count):
    """(mean, rest, M2), (BLOCK_C,) each, of lanes along axis 0, merged by Chan's formula.

    A lane has the mean pivot + offset, M2 and count. mean + rest is the merged mean in twice the precision, and only
    differences of means are squared: however large the mean is against the spread, its rounding does not enter M2.
    Where the mean is below the spread, rest would be no more than the rounding of its own sum, so there it is 0.

    A lane without a row has no delta: zero may be so far from the mean that the square is Inf.
    """
    high, low = two_sum(pivot, offset)
    near = column_sums(high * count) / total_count
    delta = tl.where(count > 0.0, (high - near[None, :]) + low, 0.0)
    rest = column_sums(delta * count) / total_count
    m2 = column_sums(tl.fma(delta * delta, count, m2))
    large = near * near * total_count > m2  # false for NaN, which the maximum would drop
    m2 = tl.where(large, tl.maximum(tl.fma(-rest * rest, total_count, m2), 0.0), m2)
    mean, rest = two_sum(near, tl.where(large, rest, 0.0))
    return mean, rest, m2


@triton.jit
def finite_or_zero(x):
    """x, but 0 in place of NaN and Inf.

    A pivot is subtracted. An infinite pivot would make NaN of an infinite mean, where eager has Inf.
    """
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def merge_partials(
    partial,  # (3, T, C): see batch_norm_finalize.py
    first,
    last,
    M,
    T,
    ROWS,
    cols,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(mean, rest, M2, count) of the partials first to last - 1, merged as `statistics_kernel` merges rows."""
    tiles = first + tl.arange(0, BLOCK_T)
    live = cols < C
    partial += tl.cast(first, tl.int64) * C
    plane = tl.cast(T, tl.int64) * C
    pivot = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    mean = tl.zeros([BLOCK_T, BLOCK_C], ACC)  # an offset from the pivot
    m2 = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    count = tl.zeros([BLOCK_T, 1], ACC)
    for t in range(first, last, BLOCK_T):
        here = tiles < last
        mask = here[:, None] & live[None, :]
        offsets = (tiles - first)[:, None] * C + cols[None, :]
        value = tl.load(partial + offsets, mask=mask, other=0.0)
        pivot = tl.where(t == first, finite_or_zero(value), pivot)
        value -= pivot
        value += finite_or_zero(tl.load(partial + 2 * plane + offsets, mask=mask, other=0.0))
        n = tl.where(here, tl.minimum(M - tiles.to(tl.int64) * ROWS, ROWS), 0).to(ACC)[:, None]
        count += n
        delta = tl.where(mask, value - mean, 0.0)
        mean = tl.fma(delta, n / tl.maximum(count, 1.0), mean)
        m2 += tl.fma(delta * n, value - mean, tl.load(partial + plane + offsets, mask=mask, other=0.0))
        tiles += BLOCK_T
    total = tl.sum(count, 0)
    mean, rest, m2 = merge_lanes(pivot, mean, m2, count, total)
    return mean, rest, m2, total
