"""BatchNorm and the squeeze: the mean over each image's pixels, from which squeeze-and-excitation makes its gates.

    h      = [relu](y * scale + shift)
    pooled = mean of h over an image

y is dense NHWC, N images of H*W rows and C columns; pooled is (N, C). Grid (images, column tiles). Reads y once; h is
never written. Beside it the means over an image of 1 and of xhat = (y - mean) * invstd, where the ReLU lets both pass,
are kept for backward: pooled's gradient adds them to BatchNorm's two sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import affine, relu_passes
from .device.reductions import column_sums
from .host.launch import SIZES, accumulator, check_span, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import elements_of, image_tiling

LINK = 3  # planes of what an image hands over between the squeeze and the excitation


@triton.jit(do_not_specialize=SIZES)
def squeeze_kernel(
    y,  # (N, ROWS, C)
    stats,  # (4, C)
    pooled,  # (N, C)
    link,  # (3, N, C): means of 1 and of xhat where the ReLU lets them pass, and zeros
    N,
    ROWS,  # pixels of an image
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The means over image n of h, 1 and xhat. Grid (N, column tiles)."""
    n = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mean = tl.load(stats + cols, mask=live)[None, :]
    invstd = tl.load(stats + C + cols, mask=live)
    scale = tl.load(stats + 2 * C + cols, mask=live)[None, :]
    shift = tl.load(stats + 3 * C + cols, mask=live)[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    y += n * ROWS * C
    sum_h = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_x = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    passed = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for i in range(tl.cdiv(ROWS, BLOCK_M)):
        mask = (rows < ROWS - i * BLOCK_M)[:, None] & live[None, :]
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
    index = n * C + cols
    plane = N.to(tl.int64) * C
    tl.store(pooled + index, column_sums(sum_h) * share, mask=live)
    if RELU:
        tl.store(link + index, column_sums(passed) * share, mask=live)
    else:
        tl.store(link + index, tl.full([BLOCK_C], 1.0, ACC), mask=live)
    tl.store(link + plane + index, column_sums(sum_x) * share * invstd, mask=live)
    tl.store(link + 2 * plane + index, tl.zeros([BLOCK_C], ACC), mask=live)


def check_images(y: Tensor) -> None:
    """TypeError or ValueError where y (N, C, H, W) is no activation, or has images of 2^31 elements or more."""
    nhwc_shape(y)
    check_span(y.shape[1:].numel(), 1, 1, 1)


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
    launch(
        squeeze_kernel,
        (N, triton.cdiv(C, t.BLOCK_C)),
        y,
        stats,
        pooled,
        link,
        N,
        H * W,
        RELU=relu,
        **t.options(y),
    )
    return pooled, link
