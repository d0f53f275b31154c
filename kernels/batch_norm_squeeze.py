"""BatchNorm and the squeeze: the mean over each image's pixels, from which squeeze-and-excitation makes its gates.

    h      = [relu](y * scale + shift)
    pooled = mean of h over an image

y is dense NHWC, N images of H*W rows and C columns; pooled is (N, C). Grid (images * splits, column tiles): where the
images are few, the rows of each are split, and a merge on a grid (values,) adds the partials. Reads y once; h is never
written. Beside it the means over an image of 1 and of xhat = (y - mean) * invstd, where the ReLU lets both pass,
are kept for backward: pooled's gradient adds them to BatchNorm's two sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import affine, relu_passes
from .device.reductions import column_sums
from .host.arguments import FLAGS, SIZES, accumulator, check_images, check_vectors
from .host.launcher import launch
from .host.tiling import elements_of, image_tiling

LINK = 3  # planes of what an image hands over between the squeeze and the excitation


@triton.jit(do_not_specialize=SIZES)
def squeeze_kernel(
    y,  # (N, ROWS, C)
    stats,  # (4, C)
    pooled,  # (N, C)
    link,  # (3, N, C): means of 1 and of xhat where the ReLU lets them pass, and zeros
    partial,  # (3, T, N, C): the shares of each split in the three means; None where an image is not split
    N,
    ROWS,  # pixels of an image
    T,  # splits of an image
    TILES,  # BLOCK_M-row tiles of a split
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The means over image n of h, 1 and xhat. Grid (N * T, column tiles)."""
    n = (tl.program_id(0) // T).to(tl.int64)
    split = tl.program_id(0) % T
    row0 = split * TILES * BLOCK_M
    valid = tl.minimum(ROWS - row0, TILES * BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mean = tl.load(stats + cols, mask=live)[None, :]
    invstd = tl.load(stats + C + cols, mask=live)
    scale = tl.load(stats + 2 * C + cols, mask=live)[None, :]
    shift = tl.load(stats + 3 * C + cols, mask=live)[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    y += (n * ROWS + row0) * C
    sum_h = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_x = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    passed = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for i in range(tl.cdiv(valid, BLOCK_M)):
        mask = (rows < valid - i * BLOCK_M)[:, None] & live[None, :]
        value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
        h = affine(value, scale, shift)
        counted = mask
        if RELU:
            counted = mask & relu_passes(h.to(y.dtype.element_ty))
            passed += counted.to(ACC)
        sum_h += tl.where(counted, h, 0.0)
        sum_x += tl.where(counted, value - mean, 0.0)
        offsets += BLOCK_M * C
    share = 1.0 / (ROWS + tl.zeros([1], tl.int64)).to(ACC)
    if RELU:
        passing = column_sums(passed) * share
    else:
        passing = tl.full([BLOCK_C], 1.0, ACC) * (split == 0).to(ACC)  # the splits' sum is 1, not about 1
    store_of_image(
        column_sums(sum_h) * share,
        passing,
        column_sums(sum_x) * share * invstd,
        pooled,
        link,
        None,
        partial,
        n,
        split,
        cols,
        N,
        T,
        C,
        ACC,
    )


@triton.jit
def store_of_image(
    first, second, third, to, link, gate, partial, n, split, cols, N, T, C: tl.constexpr, ACC: tl.constexpr
):
    """Store an image's three values per channel: the first in `to` (N, C), the others in link (3, N, C).

    The third plane of link becomes the gate (N, C), or zeros. With `partial` (3, T, N, C) the values are a split's, and
    are stored there.
    """
    live = cols < C
    plane = N.to(tl.int64) * C
    index = n * C + cols
    if partial is not None:
        partial += split * plane
        tl.store(partial + index, first, mask=live)
        tl.store(partial + T * plane + index, second, mask=live)
        tl.store(partial + 2 * T * plane + index, third, mask=live)
    else:
        store_values(first, second, third, to, link, gate, index, live, plane, ACC)


@triton.jit
def store_values(first, second, third, to, link, gate, index, live, plane, ACC: tl.constexpr):
    tl.store(to + index, first, mask=live)
    tl.store(link + index, second, mask=live)
    tl.store(link + plane + index, third, mask=live)
    last = tl.zeros_like(third)
    if gate is not None:
        last = tl.load(gate + index, mask=live).to(ACC)
    tl.store(link + 2 * plane + index, last, mask=live)


@triton.jit(do_not_specialize=SIZES)
def merge_images_kernel(
    partial,  # (3, T, N, C)
    to,  # (N, C)
    link,  # (3, N, C)
    gate,  # (N, C) or None
    N,
    T,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum each image's splits in their order, and store as `store_of_image` does. Grid (blocks of N * C,)."""
    plane = N.to(tl.int64) * C
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < plane
    first = tl.zeros([BLOCK], ACC)
    second = tl.zeros([BLOCK], ACC)
    third = tl.zeros([BLOCK], ACC)
    for split in range(T):
        here = partial + split * plane + index
        first += tl.load(here, mask=live, other=0.0)
        second += tl.load(here + T * plane, mask=live, other=0.0)
        third += tl.load(here + 2 * T * plane, mask=live, other=0.0)
    store_values(first, second, third, to, link, gate, index, live, plane, ACC)


def empty_partial(y: Tensor, splits: int) -> Tensor | None:
    """(3, splits, N, C) for the partial values of the images of y (N, C, H, W); None where they are not split."""
    N, C = y.shape[:2]
    return None if splits == 1 else torch.empty((LINK, splits, N, C), dtype=accumulator(y)[0], device=y.device)


def merge_images(partial: Tensor | None, to: Tensor, link: Tensor, gate: Tensor | None = None) -> None:
    """Write `to` (N, C) and link (3, N, C) from the partial values of each image's splits, where there are any."""
    if partial is None:
        return
    BLOCK = 256
    launch(
        merge_images_kernel,
        (triton.cdiv(to.numel(), BLOCK),),
        partial,
        to,
        link,
        gate,
        to.shape[0],
        partial.shape[1],
        C=to.shape[1],
        ACC=accumulator(partial)[1],
        BLOCK=BLOCK,
        num_warps=4,
        **FLAGS,
    )


def batch_norm_squeeze(y: Tensor, stats: Tensor, relu: bool = False) -> tuple[Tensor, Tensor]:
    """(pooled, link) of y (N, C, H, W) channels_last and stats (4, C).

    pooled (N, C), of y's type, has the mean of [relu](y * scale + shift) over each image. link (3, N, C), of the type
    of the statistics, is for `batch_norm_squeeze_backward_reduce`: the means over an image of 1 and of xhat, where the
    ReLU lets them pass, and zeros.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit, or an image of 2^31 elements or more.
    """
    check_images(y)
    N, C, H, W = y.shape
    check_vectors("stats", stats, (4, C), y)
    pooled = torch.empty((N, C), dtype=y.dtype, device=y.device)
    link = torch.empty((LINK, N, C), dtype=accumulator(y)[0], device=y.device)
    t = image_tiling(N, H * W, C, elements_of(C))
    partial = empty_partial(y, t.partials)
    launch(
        squeeze_kernel,
        (N * t.partials, triton.cdiv(C, t.BLOCK_C)),
        y,
        stats,
        pooled,
        link,
        partial,
        N,
        H * W,
        t.partials,
        t.tiles,
        RELU=relu,
        **t.options(y),
    )
    merge_images(partial, pooled, link)
    return pooled, link
