"""BatchNorm's backward, its reduce pass: the two sums per channel that are the gradients of bias and weight.

    g = dout * (out > 0),  xhat = (x - mean) * invstd,  sum_g = sum g,  sum_gx = sum g * xhat

A shortcut z with a BatchNorm of its own has the same g, so that one sum more serves both: sum_gz = sum g * zhat. All
that follows in backward reads g, the shortcut's gradient, which is written here: one map for dout and out.

dout, x, out, g and z are dense NHWC, read as matrices of M = N*H*W rows and C columns. Grid (row tiles, column tiles),
then a merge of the partials on a grid (column tiles, groups), in a fixed order. Reads 2 activations, 3 where the ReLU
mask is read from `out`, one more with z; without `out` the mask is recomputed from x. Writes g where that is wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.batch_norm import load_masked_grad
from .device.reductions import column_sums
from .host.arguments import FLAGS, SIZES, accumulator, check_nhwc, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import MAX_PARTIALS, elements_of, merge_blocks, merge_group, reached, tiling


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_kernel(
    dout,  # (M, C)
    x,  # (M, C)
    out,  # (M, C) or None: the ReLU mask is recomputed from x
    stats,  # (4, C)
    shortcut,  # (M, C) or None: z
    shortcut_stats,  # (4, C) of z
    g_stored,  # (M, C) or None: g is not stored
    partial,  # (2 or 3, T, C): sum g, sum g * xhat and sum g * zhat of each row tile
    M,
    T,
    TILES,  # BLOCK_M-row tiles per program
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per row tile: sum g, sum g * xhat [, sum g * zhat], with g = dout * (out > 0). Grid (T, column tiles)."""
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
    if g_stored is not None:
        g_stored += row0 * C
    sum_g = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    if shortcut is not None:
        shortcut += row0 * C
        shortcut_mean = tl.load(shortcut_stats + cols, mask=live)
        sum_gz = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for i in range(tl.cdiv(valid, BLOCK_M)):
        mask = (rows < valid - i * BLOCK_M)[:, None] & live[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
        g = load_masked_grad(dout, value, out, scale, shift, offsets, mask, RELU, x.dtype.element_ty, ACC)
        if g_stored is not None:
            tl.store(g_stored + offsets, g, mask=mask)
        sum_g += g
        sum_gx = tl.fma(g, value - mean[None, :], sum_gx)  # g is 0 beyond M
        if shortcut is not None:
            z = tl.load(shortcut + offsets, mask=mask, other=0.0).to(ACC)
            sum_gz = tl.fma(g, z - shortcut_mean[None, :], sum_gz)
        offsets += BLOCK_M * C
    index = tl.program_id(0) * C + cols
    tl.store(partial + index, column_sums(sum_g), mask=live)
    tl.store(partial + T * C + index, column_sums(sum_gx) * invstd, mask=live)
    if shortcut is not None:
        shortcut_invstd = tl.load(shortcut_stats + C + cols, mask=live)
        tl.store(partial + 2 * T * C + index, column_sums(sum_gz) * shortcut_invstd, mask=live)


@triton.jit(do_not_specialize=SIZES)
def backward_finalize_kernel(
    partial,  # (PLANES, T, C)
    sums,  # (PLANES, G, C): sum g, sum g * xhat [, sum g * zhat] of each group of partials
    dweight,  # (C,) or None; this and the other gradients are None where G > 1
    dbias,  # (C,) or None
    dconv_bias,  # (C,) or None: zeros, the gradient of a bias that batch statistics take out again
    shortcut_dweight,  # (C,) or None: the same three of the shortcut's norm
    shortcut_dbias,  # (C,) or None
    shortcut_dconv_bias,  # (C,) or None
    T,
    G,
    GROUP,  # partials per group
    PLANES: tl.constexpr,  # 2, or 3 with a shortcut
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
    partial += first.to(tl.int64) * C
    plane = T.to(tl.int64) * C
    total_g = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    total_gx = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    total_gz = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for t in range(first, last, BLOCK_T):
        tiles = t - first + tl.arange(0, BLOCK_T)
        mask = (tiles < last - first)[:, None] & live[None, :]
        offsets = tiles[:, None] * C + cols[None, :]
        total_g += tl.load(partial + offsets, mask=mask, other=0.0)
        total_gx += tl.load(partial + plane + offsets, mask=mask, other=0.0)
        if PLANES == 3:
            total_gz += tl.load(partial + 2 * plane + offsets, mask=mask, other=0.0)
    sum_g = tl.sum(total_g, 0)
    sum_gx = tl.sum(total_gx, 0)
    index = tl.program_id(1) * C + cols
    tl.store(sums + index, sum_g, mask=live)
    tl.store(sums + G * C + index, sum_gx, mask=live)
    if dweight is not None:
        tl.store(dweight + cols, sum_gx, mask=live)
    if dbias is not None:
        tl.store(dbias + cols, sum_g, mask=live)
    if dconv_bias is not None:
        tl.store(dconv_bias + cols, tl.zeros([BLOCK_C], ACC), mask=live)
    if PLANES == 3:
        sum_gz = tl.sum(total_gz, 0)
        tl.store(sums + 2 * G * C + index, sum_gz, mask=live)
        if shortcut_dweight is not None:
            tl.store(shortcut_dweight + cols, sum_gz, mask=live)
        if shortcut_dbias is not None:
            tl.store(shortcut_dbias + cols, sum_g, mask=live)
        if shortcut_dconv_bias is not None:
            tl.store(shortcut_dconv_bias + cols, tl.zeros([BLOCK_C], ACC), mask=live)


class NormedShortcut(NamedTuple):
    """A shortcut with a BatchNorm of its own, and where the gradients of that go."""

    y: Tensor  # (N, C, H, W): what the norm takes
    stats: Tensor  # (4, C) = mean, invstd, scale, shift
    dweight: Tensor | None = None  # (C,)
    dbias: Tensor | None = None  # (C,)
    dconv_bias: Tensor | None = None  # (C,)


def check_shortcut(shortcut: NormedShortcut, x: Tensor) -> None:
    """ValueError or TypeError where the shortcut does not fit x."""
    check_nhwc("shortcut.y", shortcut.y, x, x.shape)
    check_vectors("shortcut.stats", shortcut.stats, (4, x.shape[1]), x)


def batch_norm_backward_reduce(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    stats: Tensor,
    relu: bool = True,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dconv_bias: Tensor | None = None,
    shortcut: NormedShortcut | None = None,
    g: Tensor | None = None,
) -> Tensor:
    """sums (2, C) = sum g, sum g * xhat; also written to `dbias` and `dweight` (C,), rounded to their types.

    `dconv_bias` (C,) is zeroed: the gradient of a bias of the convolution that made x, under batch statistics. dout
    behind the ReLU, the gradient of what was added to the norm's output, is written to `g`.

    Args:
        dout, x, out, g: (N, C, H, W) channels_last, of one type. Without `out` the ReLU mask is recomputed from x.
        stats: (4, C).
        relu: whether a ReLU followed.
        shortcut: what was added to the norm's output, after a norm of its own. The sums are then (3, C), the last one
            sum g * zhat.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    partial = backward_partials(dout, x, out, stats, shortcut, relu, g)
    return merge_sums(partial, dweight, dbias, dconv_bias, *(shortcut[2:] if shortcut else ()))


def backward_partials(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    stats: Tensor,
    shortcut: NormedShortcut | None,
    relu: bool = True,
    g: Tensor | None = None,
) -> Tensor:
    """The sums of `batch_norm_backward_reduce` of each row tile, (2 or 3, T, C), as `merge_sums` takes them."""
    M, C = nhwc_shape(x)
    check_nhwc("dout", dout, x, x.shape)
    if out is not None:
        check_nhwc("out", out, x, x.shape)
    if g is not None:
        check_nhwc("g", g, x, x.shape)
    check_vectors("stats", stats, (4, C), x)
    if shortcut is not None:
        check_shortcut(shortcut, x)
    planes, elements = (2, elements_of(C)) if shortcut is None else (3, elements_of(C) // 2)  # a sum more per element
    t = reached(tiling(M, C, elements), M, C)
    partial = torch.empty((planes, t.partials, C), dtype=accumulator(x)[0], device=x.device)
    launch(
        backward_reduce_kernel,
        (t.partials, triton.cdiv(C, t.BLOCK_C)),
        dout,
        x,
        out,
        stats,
        shortcut and shortcut.y,
        shortcut and shortcut.stats,
        g,
        partial,
        M,
        t.partials,
        t.tiles,
        RELU=relu,
        **t.options(x),
    )
    return partial


def merge_sums(partial: Tensor, *vectors: Tensor | None) -> Tensor:
    """sums (2, C) or (3, C) of the partials of a backward reduce, of as many planes.

    `vectors` are written as `batch_norm_backward_reduce` says: dweight, dbias and dconv_bias; then those of a shortcut.
    """
    if partial.shape[1] > MAX_PARTIALS:
        partial = _sum_groups(partial, merge_group(partial.shape[1]), ())
    return _sum_groups(partial, partial.shape[1], vectors)[:, 0]


def _sum_groups(partial: Tensor, group: int, vectors: tuple[Tensor | None, ...]) -> Tensor:
    """The sums of each `group` partials in turn: (planes, G, C)."""
    planes, T, C = partial.shape
    G = triton.cdiv(T, group)
    sums = torch.empty((planes, G, C), dtype=partial.dtype, device=partial.device)
    merge = merge_blocks(group, C, partial.element_size())
    launch(
        backward_finalize_kernel,
        (triton.cdiv(C, merge["BLOCK_C"]), G),
        partial,
        sums,
        *vectors,
        *(None,) * (6 - len(vectors)),
        T,
        G,
        group,
        PLANES=planes,
        C=C,
        ACC=accumulator(partial)[1],
        **merge,
        **FLAGS,
    )
    return sums
