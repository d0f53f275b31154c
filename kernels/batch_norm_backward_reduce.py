"""BatchNorm's backward, its reduce pass: the two sums per channel that are the gradients of bias and weight.

    g = dout * (out > 0),  xhat = (x - mean) * invstd,  sum_g = sum g,  sum_gx = sum g * xhat

dout, x and out are dense NHWC, read as matrices of M = N*H*W rows and C columns. Grid (row tiles, column tiles), then
a merge of the partials on a grid (column tiles, groups), in a fixed order. Reads 2 activations, 3 where the ReLU mask
is read from `out`; without `out` it is recomputed from x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.batch_norm import load_masked_grad
from .device.reductions import column_sums
from .host.launch import FLAGS, SIZES, accumulator, check_nhwc, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import GROUP, MAX_PARTIALS, elements_of, merge_blocks, tiling


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
    """Per row tile: sum g, sum g * xhat, with g = dout * (out > 0). Grid (T, column tiles)."""
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
    dconv_bias,  # (C,) or None: zeros, the gradient of a bias that batch statistics take out again
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
    if dconv_bias is not None:
        tl.store(dconv_bias + cols, tl.zeros([BLOCK_C], ACC), mask=live)


def batch_norm_backward_reduce(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    stats: Tensor,
    relu: bool = True,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dconv_bias: Tensor | None = None,
) -> Tensor:
    """sums (2, C) = sum g, sum g * xhat; also written to `dbias` and `dweight` (C,), rounded to their types.

    `dconv_bias` (C,) is zeroed: the gradient of a bias of the convolution that made x, under batch statistics.

    Args:
        dout, x, out: (N, C, H, W) channels_last, of one type. Without `out` the ReLU mask is recomputed from x.
        stats: (4, C).
        relu: whether a ReLU followed.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    M, C = nhwc_shape(x)
    check_nhwc("dout", dout, x, x.shape)
    if out is not None:
        check_nhwc("out", out, x, x.shape)
    check_vectors("stats", stats, (4, C), x)
    t = tiling(M, C, elements_of(C))
    partial = torch.empty((2, t.partials, C), dtype=accumulator(x)[0], device=x.device)
    launch(
        backward_reduce_kernel,
        (t.partials, triton.cdiv(C, t.BLOCK_C)),
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
    return merge_sums(partial, dweight, dbias, dconv_bias)


def merge_sums(
    partial: Tensor, dweight: Tensor | None, dbias: Tensor | None, dconv_bias: Tensor | None = None
) -> Tensor:
    """sums (2, C) of the partials (2, T, C) of a backward reduce; also written as `batch_norm_backward_reduce` says."""
    if partial.shape[1] > MAX_PARTIALS:
        partial = _sum_groups(partial, GROUP)
    return _sum_groups(partial, partial.shape[1], dweight, dbias, dconv_bias).view(2, -1)


def _sum_groups(partial: Tensor, group: int, *written: Tensor | None) -> Tensor:
    """The sums of each `group` partials in turn: (2, G, C). `written`: dweight, dbias, dconv_bias."""
    _, T, C = partial.shape
    G = triton.cdiv(T, group)
    sums = torch.empty((2, G, C), dtype=partial.dtype, device=partial.device)
    merge = merge_blocks(group, C, partial.element_size())
    launch(
        backward_finalize_kernel,
        (triton.cdiv(C, merge["BLOCK_C"]), G),
        partial,
        sums,
        *(written or (None,) * 3),
        T,
        G,
        group,
        C=C,
        ACC=accumulator(partial)[1],
        **merge,
        **FLAGS,
    )
    return sums
