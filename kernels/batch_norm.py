"""BatchNorm fused with the residual add and ReLU: statistics, apply, backward reduce, backward apply.

    forward   out = relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]])
              scale = weight * invstd, shift = bias - mean * scale, invstd = 1 / sqrt(var + eps)
    backward  g = dout * (out > 0);  xhat = (x - mean) * invstd;  dbias = sum g;  dweight = sum g * xhat
              dx = scale * (g - dbias / M - xhat * dweight / M)  in training, scale * g with frozen statistics

Activations are dense NHWC (`torch.channels_last`), read as a matrix of M = N*H*W rows and C columns, in float16,
bfloat16, float32 or float64. Per-channel maths is float32 (float64 for float64). Per-channel results of the forward
travel as one tensor `stats` (4, C): mean, invstd, scale, shift.

A pass over x runs on a grid (row tiles, column tiles); what has to be summed over rows is left as one partial per
row tile and merged by a small second kernel, in a fixed order and without atomics: bit-identical from run to run,
and, since the tiling depends on the shape alone, from device to device.

Passes over an activation: statistics 1, apply 2 (3 with a shortcut), backward reduce 2 (3 when the ReLU mask is read
from `out`), backward apply 3 (4 with `out`, one more to write the shortcut's gradient).
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import affine, inverse_std, recomputed_relu_passes, relu, relu_passes
from .device.reductions import column_sums
from .geometry import SIZES

# ---- the kernels -----------------------------------------------------------------------------------------------


@triton.jit
def two_sum(a, b):
    """a + b rounded, and what the rounding left: together a + b exactly (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def merge_lanes(pivot, offset, m2, count, total_count):
    """Chan's formula along axis 0, of lanes with mean pivot + offset, M2 and count: (mean, rest, M2), (BLOCK_C,) each.

    mean + rest is the mean in twice the precision, and only differences of means are squared: however large the mean
    against the spread, its rounding is no part of M2. Of a mean below the spread, rest would be no more than the
    rounding of its own sum: it is 0.
    """
    high, low = two_sum(pivot, offset)
    near = column_sums(high * count) / total_count
    delta = (high - near[None, :]) + low
    rest = column_sums(delta * count) / total_count
    m2 = column_sums(tl.fma(delta * delta, count, m2))
    large = near * near * total_count > m2  # not of a NaN, which maximum would drop
    m2 = tl.where(large, tl.maximum(tl.fma(-rest * rest, total_count, m2), 0.0), m2)
    mean, rest = two_sum(near, tl.where(large, rest, 0.0))
    return mean, rest, m2


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
    """Per row tile: mean = sum x / n, M2 = sum (x - mean)^2. Grid (T, column tiles). Reads x once.

    Every (row of the block, column) pair is a lane with a Welford mean and M2 of its own, so the loop has no barrier;
    Chan's formula merges the lanes at the end. A lane's mean is carried as an offset from its first value: what it is
    rounded to is then an ulp of the spread, not of the mean.
    """
    row0 = tl.program_id(0).to(tl.int64) * TILES * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = tl.minimum(M - row0, TILES * BLOCK_M).to(tl.int32)
    x += row0 * C
    offsets = rows[:, None] * C + cols[None, :]
    first = tl.load(x + offsets, mask=(rows < valid)[:, None] & (cols < C)[None, :], other=0.0).to(ACC)
    pivot = finite_or_zero(first)
    mean = first - pivot  # less pivot
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


@triton.jit
def finite_or_zero(x):
    """x, but 0 in place of NaN and Inf: of an infinite mean nothing is subtracted, so it stays infinite as eager's."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def merge_partials(
    partial,  # (2 or 3, T, C): see `finalize`
    first,
    last,
    M,
    T,
    ROWS,
    cols,
    PLANES: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(mean, rest, M2, count) of the partials first to last - 1, as `statistics_kernel` has it of rows."""
    tiles = first + tl.arange(0, BLOCK_T)
    live = cols < C
    pivot = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    mean = tl.zeros([BLOCK_T, BLOCK_C], ACC)  # less pivot
    m2 = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    count = tl.zeros([BLOCK_T, 1], ACC)
    for t in range(first, last, BLOCK_T):
        here = tiles < last
        mask = here[:, None] & live[None, :]
        offsets = tiles[:, None] * C + cols[None, :]
        value = tl.load(partial + offsets, mask=mask, other=0.0)
        pivot = tl.where(t == first, finite_or_zero(value), pivot)
        value -= pivot
        if PLANES == 3:
            value += finite_or_zero(tl.load(partial + 2 * T * C + offsets, mask=mask, other=0.0))
        n = tl.where(here, tl.minimum(M - tiles.to(tl.int64) * ROWS, ROWS), 0).to(ACC)[:, None]
        count += n
        delta = tl.where(mask, value - mean, 0.0)
        mean = tl.fma(delta, n / tl.maximum(count, 1.0), mean)
        m2 += tl.fma(delta * n, value - mean, tl.load(partial + T * C + offsets, mask=mask, other=0.0))
        tiles += BLOCK_T
    total = tl.sum(count, 0)
    mean, rest, m2 = merge_lanes(pivot, mean, m2, count, total)
    return mean, rest, m2, total


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial,  # (2 or 3, T, C): see `finalize`
    merged,  # (3, G, C)
    M,
    T,
    G,
    ROWS,  # rows per partial
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,  # partials per group
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of every GROUP partials one. Grid (column tiles, G)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, T)
    mean, rest, m2, _ = merge_partials(partial, first, last, M, T, ROWS, cols, PLANES, C, ACC, BLOCK_T, BLOCK_C)
    out = tl.program_id(1) * C + cols
    tl.store(merged + out, mean, mask=cols < C)
    tl.store(merged + G * C + out, m2, mask=cols < C)
    tl.store(merged + 2 * G * C + out, rest, mask=cols < C)


@triton.jit(do_not_specialize=SIZES)
def finalize_kernel(
    partial,  # (2 or 3, T, C): see `finalize`
    weight,  # (C,) or None: ones
    bias,  # (C,) or None: zeros
    conv_bias,  # (C,) or None: of the convolution that made x, and was not added to x
    running_mean,  # (C,) or None
    running_var,  # (C,) or None
    stats,  # (4, C)
    M,
    T,
    ROWS,  # rows per partial
    momentum: tl.float64,
    eps: tl.float64,
    PLANES: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge the partials, write stats, update the running statistics in place. Grid (column tiles,).

    A convolution bias shifts the mean and nothing else, so it meets the running mean only.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mean, _, m2, count = merge_partials(partial, 0, T, M, T, ROWS, cols, PLANES, C, ACC, BLOCK_T, BLOCK_C)
    invstd = inverse_std(m2 / count, eps)
    store_stats(stats, weight, bias, mean, invstd, cols, C)
    if running_mean is not None:
        shifted = mean
        if conv_bias is not None:
            shifted += tl.load(conv_bias + cols, mask=live).to(ACC)
        old = tl.load(running_mean + cols, mask=live).to(ACC)
        tl.store(running_mean + cols, old * (1.0 - momentum) + shifted * momentum, mask=live)
    if running_var is not None:
        old = tl.load(running_var + cols, mask=live).to(ACC)
        tl.store(running_var + cols, old * (1.0 - momentum) + m2 / (count - 1.0) * momentum, mask=live)


@triton.jit
def freeze_kernel(
    running_mean,  # (C,)
    running_var,  # (C,)
    weight,  # (C,) or None
    bias,  # (C,) or None
    conv_bias,  # (C,) or None
    stats,  # (4, C)
    eps: tl.float64,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """stats from the running statistics, the convolution's bias folded into the mean. Grid (column tiles,)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, invstd = load_running(running_mean, running_var, conv_bias, eps, cols, C, ACC)
    store_stats(stats, weight, bias, mean, invstd, cols, C)


@triton.jit
def load_running(running_mean, running_var, conv_bias, eps, cols, C: tl.constexpr, ACC: tl.constexpr):
    """mean and invstd of the running statistics, the convolution's bias folded into the mean."""
    mean = tl.load(running_mean + cols, mask=cols < C, other=0.0).to(ACC)
    if conv_bias is not None:
        mean -= tl.load(conv_bias + cols, mask=cols < C, other=0.0).to(ACC)
    return mean, inverse_std(tl.load(running_var + cols, mask=cols < C, other=0.0).to(ACC), eps)


@triton.jit
def load_affine(mean, invstd, weight, bias, cols, C: tl.constexpr):
    """scale and shift: batch_norm(x) = x * scale + shift."""
    scale = invstd
    if weight is not None:
        scale = invstd * tl.load(weight + cols, mask=cols < C, other=0.0).to(invstd.dtype)
    shift = -mean * scale
    if bias is not None:
        shift = tl.fma(-mean, scale, tl.load(bias + cols, mask=cols < C, other=0.0).to(invstd.dtype))
    return scale, shift


@triton.jit
def store_stats(stats, weight, bias, mean, invstd, cols, C: tl.constexpr):
    scale, shift = load_affine(mean, invstd, weight, bias, cols, C)
    tl.store(stats + cols, mean, mask=cols < C)
    tl.store(stats + C + cols, invstd, mask=cols < C)
    tl.store(stats + 2 * C + cols, scale, mask=cols < C)
    tl.store(stats + 3 * C + cols, shift, mask=cols < C)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x,  # (M, C)
    stats,  # (4, C)
    shortcut,  # (M, C) or None
    shortcut_scale,  # (C,) or None: ones
    shortcut_shift,  # (C,) or None: zeros
    out,  # (M, C)
    M,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]]). Grid (row, column tiles).

    Moves 2 activations, 3 with a shortcut. The sum is rounded to the stored type before the ReLU.
    """
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mask = (rows < M - row0)[:, None] & live[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    x += row0 * C
    out += row0 * C
    scale = tl.load(stats + 2 * C + cols, mask=live)
    shift = tl.load(stats + 3 * C + cols, mask=live)
    if shortcut_shift is not None:
        shift += tl.load(shortcut_shift + cols, mask=live).to(ACC)
    z = affine(tl.load(x + offsets, mask=mask).to(ACC), scale[None, :], shift[None, :])
    if shortcut is not None:
        skip = tl.load(shortcut + row0 * C + offsets, mask=mask).to(ACC)
        if shortcut_scale is not None:
            z = tl.fma(skip, tl.load(shortcut_scale + cols, mask=live).to(ACC)[None, :], z)
        else:
            z += skip
    z = z.to(out.dtype.element_ty)
    if RELU:
        z = relu(z)
    tl.store(out + offsets, z, mask=mask)


@triton.jit
def load_masked_grad(
    dout, x_value, out, scale, shift, offsets, mask, RELU: tl.constexpr, STORED: tl.constexpr, ACC: tl.constexpr
):
    """g = dout * (out > 0); where `out` is not given its sign is recomputed from x."""
    g = tl.load(dout + offsets, mask=mask, other=0.0).to(ACC)
    if RELU:
        if out is not None:
            passes = relu_passes(tl.load(out + offsets, mask=mask, other=0.0))
        else:
            passes = recomputed_relu_passes(x_value, scale[None, :], shift[None, :], STORED)
        g = tl.where(passes, g, 0.0)
    return g


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_kernel(
    dout,  # (M, C)
    x,  # (M, C)
    out,  # (M, C) or None: the ReLU mask is recomputed from x
    stats,  # (4, C)
    partial,  # (2, T, C): sum g and sum g * xhat of each row tile
    M,
    T,
    TILES,  # BLOCK_M-row tiles per program
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per row tile: sum g, sum g * xhat, with g = dout * (out > 0). Grid (T, column tiles).

    Reads 2 activations, 3 with `out`.
    """
    row0 = tl.program_id(0).to(tl.int64) * TILES * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    valid = tl.minimum(M - row0, TILES * BLOCK_M).to(tl.int32)
    mean = tl.load(stats + cols, mask=live)
    invstd = tl.load(stats + C + cols, mask=live)
    scale = tl.load(stats + 2 * C + cols, mask=live)
    shift = tl.load(stats + 3 * C + cols, mask=live)
    offsets = rows[:, None] * C + cols[None, :]
    dout += row0 * C
    x += row0 * C
    if out is not None:
        out += row0 * C
    sum_g = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for i in range(tl.cdiv(valid, BLOCK_M)):
        mask = (rows < valid - i * BLOCK_M)[:, None] & live[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
        g = load_masked_grad(dout, value, out, scale, shift, offsets, mask, RELU, x.dtype.element_ty, ACC)
        sum_g += g
        sum_gx = tl.fma(g, value - mean[None, :], sum_gx)  # g is 0 beyond M
        offsets += BLOCK_M * C
    index = tl.program_id(0) * C + cols
    tl.store(partial + index, column_sums(sum_g), mask=live)
    tl.store(partial + T * C + index, column_sums(sum_gx) * invstd, mask=live)


@triton.jit(do_not_specialize=SIZES)
def backward_finalize_kernel(
    partial,  # (2, T, C)
    sums,  # (2, G, C): sum g, sum g * xhat of each group of partials
    dweight,  # (C,) or None; None where G > 1
    dbias,  # (C,) or None; None where G > 1
    T,
    G,
    GROUP,  # partials per group
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge the partials of the backward reduce in a fixed order. Grid (column tiles, G)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, T)
    total_g = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    total_gx = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for t in range(first, last, BLOCK_T):
        tiles = t + tl.arange(0, BLOCK_T)
        mask = (tiles < last)[:, None] & live[None, :]
        offsets = tiles[:, None] * C + cols[None, :]
        total_g += tl.load(partial + offsets, mask=mask, other=0.0)
        total_gx += tl.load(partial + T * C + offsets, mask=mask, other=0.0)
    sum_g = tl.sum(total_g, 0)
    sum_gx = tl.sum(total_gx, 0)
    index = tl.program_id(1) * C + cols
    tl.store(sums + index, sum_g, mask=live)
    tl.store(sums + G * C + index, sum_gx, mask=live)
    if dweight is not None:
        tl.store(dweight + cols, sum_gx, mask=live)
    if dbias is not None:
        tl.store(dbias + cols, sum_g, mask=live)


@triton.jit
def load_center(stats, sums, cols, M, C: tl.constexpr, ACC: tl.constexpr):
    """(mean, sum_g / M, invstd * sum_gx / M) of the channels `cols`: what `center_grad` subtracts by."""
    live = cols < C
    share = 1.0 / (M + tl.zeros([1], tl.int64)).to(ACC)  # one division, not one for each channel
    mean = tl.load(stats + cols, mask=live)
    invstd = tl.load(stats + C + cols, mask=live)
    mean_g = tl.load(sums + cols, mask=live) * share
    slope = tl.load(sums + C + cols, mask=live) * share * invstd
    return mean[None, :], mean_g[None, :], slope[None, :]


@triton.jit
def center_grad(g, x_value, center):
    """g - sum_g / M - xhat * sum_gx / M: the gradient behind the batch's statistics."""
    mean, mean_g, slope = center
    return tl.fma(-slope, x_value - mean, g - mean_g)


@triton.jit(do_not_specialize=SIZES)
def backward_apply_kernel(
    dout,  # (M, C)
    x,  # (M, C); not read with frozen statistics and a given mask
    out,  # (M, C) or None: the ReLU mask is recomputed from x
    stats,  # (4, C)
    sums,  # (2, C); None: frozen statistics
    dx,  # (M, C)
    dshortcut,  # (M, C) or None: g is not stored
    M,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = scale * (g - sum_g / M - xhat * sum_gx / M), or scale * g with frozen statistics. Grid (row, column tiles).

    Moves 3 activations, 4 with `out`, one more with `dshortcut` = g.
    """
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mask = (rows < M - row0)[:, None] & live[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    dout += row0 * C
    x += row0 * C
    dx += row0 * C
    if out is not None:
        out += row0 * C
    scale = tl.load(stats + 2 * C + cols, mask=live)
    shift = tl.load(stats + 3 * C + cols, mask=live)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    g = load_masked_grad(dout, value, out, scale, shift, offsets, mask, RELU, x.dtype.element_ty, ACC)
    if dshortcut is not None:
        tl.store(dshortcut + row0 * C + offsets, g, mask=mask)
    if sums is not None:
        g = center_grad(g, value, load_center(stats, sums, cols, M, C, ACC))
    tl.store(dx + offsets, scale[None, :] * g, mask=mask)


# ---- tiling ----------------------------------------------------------------------------------------------------

_ELEMENTS = 2048  # of a tile: 16 a thread at 4 warps, two 16-byte loads each in half precision
_PROGRAMS = 1024  # wanted of a reduction: several per SM of the largest GPU
_MAX_PARTIALS = 512  # that one program of the merge can read in a few steps; above, it is two merges in a row
_GROUP = 256  # partials that the first of the two makes one
_MIN_ROWS = 256  # of a partial: its 8 bytes per channel then stay below 2% of what was read in half precision
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def _elements(C: int) -> int:
    """Fewer where rows are no whole vectors: each element has an address to itself, of which a thread would spill."""
    return _ELEMENTS if C % 8 == 0 else _ELEMENTS // 2


@cache
def tiling(M: int, C: int, elements: int = _ELEMENTS) -> Tiling:
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
    wanted = min(_MAX_PARTIALS, max(1, _PROGRAMS // columns))
    tiles = triton.cdiv(max(triton.cdiv(M, wanted), min(M, _MIN_ROWS)), BLOCK_M)
    return Tiling(
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        tiles=tiles,
        partials=triton.cdiv(M, tiles * BLOCK_M),
        num_warps=max(1, 4 * BLOCK_M * BLOCK_C // elements),
    )


def _merge_blocks(partials: int, C: int, itemsize: int) -> dict[str, int]:
    """The tile of a merge and its warps, in which a thread holds no more than 32 bytes of each of its tiles."""
    BLOCK_T = min(1024 // itemsize, triton.next_power_of_2(partials))
    BLOCK_C = min(8, triton.next_power_of_2(C))
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": 8 if BLOCK_T * BLOCK_C * itemsize >= 8192 else 4}


# ---- launchers -------------------------------------------------------------------------------------------------


def nhwc_shape(x: Tensor) -> tuple[int, int]:
    """(M, C) of a dense NHWC activation; ValueError for any other layout, TypeError for another dtype."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"expected a dense channels_last tensor (N, C, H, W), got shape {tuple(x.shape)} strides {x.stride()}"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"expected float16, bfloat16, float32 or float64, got {x.dtype}")
    return x.numel() // x.shape[1], x.shape[1]


def check_like(like: tuple[torch.Size, torch.dtype, torch.device], name: str, t: Tensor) -> None:
    """ValueError, TypeError for another dtype, unless t is a dense NHWC activation of this shape, type and device."""
    if (t.shape, t.dtype, t.device) != like or not t.is_contiguous(memory_format=torch.channels_last):
        _refuse("a dense channels_last tensor", like, name, t)


def check_vectors(like: tuple[torch.Size, torch.dtype, torch.device], name: str, t: Tensor, vectors: int) -> None:
    """As `check_like`, of t (vectors, C), contiguous, in the type of the statistics of such an activation."""
    shape, dtype, device = like
    expected = (vectors, shape[1]), torch.float64 if dtype is torch.float64 else torch.float32, device
    if (t.shape, t.dtype, t.device) != expected or not t.is_contiguous():
        _refuse("a contiguous tensor", expected, name, t)


def _refuse(layout: str, expected: tuple, name: str, t: Tensor) -> NoReturn:
    shape, dtype, device = expected
    raise (ValueError if t.dtype is dtype else TypeError)(
        f"{name}: expected {layout}, shape {tuple(shape)}, {dtype} on {device}; "
        f"got shape {tuple(t.shape)} strides {t.stride()}, {t.dtype} on {t.device}"
    )


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


# Contraction is written out as tl.fma where it is wanted; the compiler adds none of its own.
FLAGS = {"enable_fp_fusion": False}


class Moments(NamedTuple):
    """Mean and M2 = sum (x - mean)^2 of each `rows` rows of M in turn; `finalize` merges them."""

    partial: Tensor  # (2 or 3, T, C) float32 or float64; the third plane is what rounding left of the means
    rows: int  # of a partial; the last one has fewer
    M: int


def moments(x: Tensor) -> Moments:
    """The moments of x (N, C, H, W)."""
    M, C = nhwc_shape(x)
    t = tiling(M, C)
    partial = torch.empty((3, t.partials, C), dtype=accumulator(x)[0], device=x.device)
    with torch.cuda.device_of(x):
        statistics_kernel[(t.partials, triton.cdiv(C, t.BLOCK_C))](
            x,
            partial,
            M,
            t.partials,
            t.tiles,
            **t.options(x),
        )
    return Moments(partial, t.rows, M)


def statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """stats (4, C) = mean, invstd, scale, shift of x (N, C, H, W); updates the running statistics in place.

    Semantics of `torch.nn.functional.batch_norm` in training: biased variance in invstd, unbiased in `running_var`.
    `conv_bias` (C,) was left out of x: it is added to the running mean.
    """
    return finalize(*moments(x), weight, bias, running_mean, running_var, momentum, eps, conv_bias)


def finalize(
    partial: Tensor,
    rows: int,
    M: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """stats (4, C), and the running statistics in place, as `statistics`, from the partials of M rows.

    partial is (2, T, C) or (3, T, C), float32 or float64, contiguous: the mean and M2 = sum (x - mean)^2 of each `rows`
    rows in turn, the last of fewer: (T - 1) * rows < M <= T * rows. The third plane is what rounding left of the mean.
    Without it running_var is wrong by some eps * |mean| / sqrt(M) standard deviations. Merged in a fixed order.
    """
    if partial.shape[1] > _MAX_PARTIALS:
        partial, rows = _merge(partial, rows, M), rows * _GROUP
    planes, T, C = partial.shape
    stats = torch.empty((4, C), dtype=partial.dtype, device=partial.device)
    merge = _merge_blocks(T, C, partial.element_size())
    with torch.cuda.device_of(partial):
        finalize_kernel[(triton.cdiv(C, merge["BLOCK_C"]),)](
            partial,
            weight,
            bias,
            conv_bias,
            running_mean,
            running_var,
            stats,
            M,
            T,
            rows,
            momentum,
            eps,
            PLANES=planes,
            C=C,
            ACC=accumulator(partial)[1],
            **merge,
            **FLAGS,
        )
    return stats


def _merge(partial: Tensor, rows: int, M: int) -> Tensor:
    """(3, G, C): the partials of `finalize`, _GROUP merged into one."""
    planes, T, C = partial.shape
    G = triton.cdiv(T, _GROUP)
    merged = torch.empty((3, G, C), dtype=partial.dtype, device=partial.device)
    merge = _merge_blocks(_GROUP, C, partial.element_size())
    with torch.cuda.device_of(partial):
        merge_kernel[(triton.cdiv(C, merge["BLOCK_C"]), G)](
            partial,
            merged,
            M,
            T,
            G,
            rows,
            PLANES=planes,
            GROUP=_GROUP,
            C=C,
            ACC=accumulator(partial)[1],
            **merge,
            **FLAGS,
        )
    return merged


def freeze(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """stats (4, C) of evaluation: BatchNorm's running statistics as scale and shift, `conv_bias` folded in."""
    C = running_mean.numel()
    stats = torch.empty((4, C), dtype=dtype, device=running_mean.device)
    BLOCK_C = min(128, triton.next_power_of_2(C))
    with torch.cuda.device_of(running_mean):
        freeze_kernel[(triton.cdiv(C, BLOCK_C),)](
            running_mean,
            running_var,
            weight,
            bias,
            conv_bias,
            stats,
            eps,
            C=C,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK_C=BLOCK_C,
            num_warps=1,
            **FLAGS,
        )
    return stats


def apply(
    x: Tensor,
    stats: Tensor,
    shortcut: Tensor | None = None,
    shortcut_scale: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]]), written to `out` where given."""
    M, C = nhwc_shape(x)
    like = x.shape, x.dtype, x.device
    check_vectors(like, "stats", stats, 4)
    if shortcut is not None:
        check_like(like, "shortcut", shortcut)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    else:
        check_like(like, "out", out)
    t = tiling(M, C, _elements(C))
    with torch.cuda.device_of(x):
        apply_kernel[(triton.cdiv(M, t.BLOCK_M), triton.cdiv(C, t.BLOCK_C))](
            x,
            stats,
            shortcut,
            shortcut_scale,
            shortcut_shift,
            out,
            M,
            RELU=relu,
            **t.options(x),
        )
    return out


def backward_reduce(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    stats: Tensor,
    relu: bool = True,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Tensor:
    """sums (2, C) = sum g, sum g * xhat; also written to `dbias` and `dweight` (C,), rounded to their types."""
    M, C = nhwc_shape(x)
    like = x.shape, x.dtype, x.device
    check_like(like, "dout", dout)
    if out is not None:
        check_like(like, "out", out)
    check_vectors(like, "stats", stats, 4)
    t = tiling(M, C, _elements(C))
    partial = torch.empty((2, t.partials, C), dtype=accumulator(x)[0], device=x.device)
    with torch.cuda.device_of(x):
        backward_reduce_kernel[(t.partials, triton.cdiv(C, t.BLOCK_C))](
            dout,
            x,
            out,
            stats,
            partial,
            M,
            t.partials,
            t.tiles,
            RELU=relu,
            **t.options(x),
        )
    return merge_sums(partial, dweight, dbias)


def merge_sums(partial: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
    """sums (2, C) of the partials (2, T, C) of a backward reduce; also written to `dbias` and `dweight`."""
    if partial.shape[1] > _MAX_PARTIALS:
        partial = _sum_groups(partial, _GROUP, None, None)
    return _sum_groups(partial, partial.shape[1], dweight, dbias).view(2, -1)


def _sum_groups(partial: Tensor, group: int, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
    """(2, G, C): of every `group` partials one."""
    _, T, C = partial.shape
    G = triton.cdiv(T, group)
    sums = torch.empty((2, G, C), dtype=partial.dtype, device=partial.device)
    merge = _merge_blocks(group, C, partial.element_size())
    with torch.cuda.device_of(partial):
        backward_finalize_kernel[(triton.cdiv(C, merge["BLOCK_C"]), G)](
            partial,
            sums,
            dweight,
            dbias,
            T,
            G,
            group,
            C=C,
            ACC=accumulator(partial)[1],
            **merge,
            **FLAGS,
        )
    return sums


def backward_apply(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    stats: Tensor,
    sums: Tensor | None,
    relu: bool = True,
    dshortcut: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor:
    """dx of BatchNorm; `sums` None means frozen statistics. g is written to `dshortcut`.

    `dx` may be dout itself, which is then overwritten: every program reads its elements before it writes them.
    """
    M, C = nhwc_shape(x)
    like = x.shape, x.dtype, x.device
    check_like(like, "dout", dout)
    if out is not None:
        check_like(like, "out", out)
    check_vectors(like, "stats", stats, 4)
    if sums is not None:
        check_vectors(like, "sums", sums, 2)
    if dshortcut is not None:
        check_like(like, "dshortcut", dshortcut)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
    elif dx is not dout:
        check_like(like, "dx", dx)
    t = tiling(M, C, _ELEMENTS // 2)  # with more, the five vectors per channel would spill registers
    with torch.cuda.device_of(x):
        backward_apply_kernel[(triton.cdiv(M, t.BLOCK_M), triton.cdiv(C, t.BLOCK_C))](
            dout,
            x,
            out,
            stats,
            sums,
            dx,
            dshortcut,
            M,
            RELU=relu,
            **t.options(x),
        )
    return dx
