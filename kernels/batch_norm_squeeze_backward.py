"""The gradient through BatchNorm where an excitation and a squeeze follow it.

    dh   = gate * g + dpooled / (H * W)          where the inner ReLU lets it pass
    sums = sum dh, sum dh * xhat                 the gradients of bias and weight
    dy   = scale * (dh - sums[0] / M - xhat * sums[1] / M) with the batch's statistics, scale * dh with frozen ones

The sums follow from those of each image that `batch_norm_excite_backward` has taken: their launch moves no activation.
Its grid is (column tiles,). The apply pass is on a grid (images * row tiles, column tiles), reads g and y and writes
dy: dense NHWC, N images of H*W rows and C columns. gate and dpooled are (N, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_excite import check_gate
from .batch_norm_squeeze import LINK
from .device.batch_norm import center_grad, load_center
from .device.pointwise import recomputed_relu_passes
from .host.arguments import FLAGS, SIZES, accumulator, check_images, check_nhwc, check_vectors
from .host.launcher import launch
from .host.tiling import elements_of, merge_blocks, tiling


@triton.jit(do_not_specialize=SIZES)
def squeeze_backward_reduce_kernel(
    dlink,  # (3, N, C): sum g and sum g * xhat of each image, and its gates
    link,  # (3, N, C): means over an image of 1 and of xhat
    dpooled,  # (N, C)
    sums,  # (2, C)
    dweight,  # (C,) or None
    dbias,  # (C,) or None
    dconv_bias,  # (C,) or None: zeros
    N,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum dh and sum dh * xhat over all images, in a fixed order. Grid (column tiles,)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    plane = N.to(tl.int64) * C
    total_g = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    total_gx = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for first in range(0, N, BLOCK_T):
        images = first + tl.arange(0, BLOCK_T)
        mask = (images < N)[:, None] & live[None, :]
        offsets = images.to(tl.int64)[:, None] * C + cols[None, :]
        # A map that the ReLU stops in full adds nothing, even where its gate or its gradient is infinite.
        passed = tl.load(link + offsets, mask=mask, other=0.0)
        factor = tl.load(dlink + 2 * plane + offsets, mask=mask, other=0.0)
        factor = tl.where(passed > 0, factor, 0.0)
        total_g = tl.fma(factor, tl.load(dlink + offsets, mask=mask, other=0.0), total_g)
        total_gx = tl.fma(factor, tl.load(dlink + plane + offsets, mask=mask, other=0.0), total_gx)
        added = tl.load(dpooled + offsets, mask=mask, other=0.0).to(ACC)
        added = tl.where(passed > 0, added, 0.0)
        total_g = tl.fma(added, passed, total_g)
        total_gx = tl.fma(added, tl.load(link + plane + offsets, mask=mask, other=0.0), total_gx)
    sum_g = tl.sum(total_g, 0)
    sum_gx = tl.sum(total_gx, 0)
    tl.store(sums + cols, sum_g, mask=live)
    tl.store(sums + C + cols, sum_gx, mask=live)
    if dweight is not None:
        tl.store(dweight + cols, sum_gx, mask=live)
    if dbias is not None:
        tl.store(dbias + cols, sum_g, mask=live)
    if dconv_bias is not None:
        tl.store(dconv_bias + cols, tl.zeros([BLOCK_C], ACC), mask=live)


@triton.jit(do_not_specialize=SIZES)
def squeeze_backward_apply_kernel(
    g,  # (N, ROWS, C)
    y,  # (N, ROWS, C)
    stats,  # (4, C)
    dlink,  # (3, N, C), of which the gates are read
    dpooled,  # (N, C)
    sums,  # (2, C); None: frozen statistics
    dy,  # (N, ROWS, C)
    N,
    M,  # N * ROWS
    ROWS,  # pixels of an image
    TILES,  # BLOCK_M-row tiles of an image
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy = scale * (dh - sums[0] / M - xhat * sums[1] / M), or scale * dh. Grid (N * TILES, column tiles)."""
    n = (tl.program_id(0) // TILES).to(tl.int64)
    rows = (tl.program_id(0) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mask = (rows < ROWS)[:, None] & live[None, :]
    offsets = n * ROWS * C + rows[:, None] * C + cols[None, :]
    scale = tl.load(stats + 2 * C + cols, mask=live)
    factor = tl.load(dlink + 2 * N.to(tl.int64) * C + n * C + cols, mask=live)[None, :]
    value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
    dh = tl.load(g + offsets, mask=mask, other=0.0).to(ACC)
    share = 1.0 / (ROWS + tl.zeros([1], tl.int64)).to(ACC)
    dh = tl.fma(dh, factor, (tl.load(dpooled + n * C + cols, mask=live).to(ACC) * share)[None, :])
    if RELU:
        shift = tl.load(stats + 3 * C + cols, mask=live)
        passes = recomputed_relu_passes(value, scale[None, :], shift[None, :], y.dtype.element_ty)
        dh = tl.where(passes, dh, 0.0)
    if sums is not None:
        dh = center_grad(dh, value, load_center(stats, sums, 1, cols, M, C, ACC))
    tl.store(dy + offsets, scale[None, :] * dh, mask=mask)


def _check_images_of(dlink: Tensor, dpooled: Tensor, y: Tensor) -> None:
    """ValueError or TypeError where what belongs to images and channels does not fit y (N, C, H, W)."""
    check_images(y)
    check_vectors("dlink", dlink, (LINK, *y.shape[:2]), y)
    check_gate(dpooled, y, "dpooled")


def batch_norm_squeeze_backward_reduce(
    dlink: Tensor,
    link: Tensor,
    dpooled: Tensor,
    y: Tensor,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dconv_bias: Tensor | None = None,
) -> Tensor:
    """sums (2, C) = sum dh, sum dh * xhat; also written to `dbias` and `dweight` (C,), rounded to their types.

    `dconv_bias` (C,) is zeroed: the gradient of a bias of the convolution that made y, under batch statistics.

    Args:
        dlink: (3, N, C) of `batch_norm_excite_backward`; link: (3, N, C) of `batch_norm_squeeze`.
        dpooled: (N, C) of y's type.
        y: (N, C, H, W) channels_last, for its shape and type.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    _check_images_of(dlink, dpooled, y)
    N, C = y.shape[:2]
    check_vectors("link", link, (LINK, N, C), y)
    dtype, ACC = accumulator(y)
    sums = torch.empty((2, C), dtype=dtype, device=y.device)
    merge = merge_blocks(N, C, sums.element_size())
    launch(
        squeeze_backward_reduce_kernel,
        (triton.cdiv(C, merge["BLOCK_C"]),),
        dlink,
        link,
        dpooled,
        sums,
        dweight,
        dbias,
        dconv_bias,
        N,
        C=C,
        ACC=ACC,
        **merge,
        **FLAGS,
    )
    return sums


def batch_norm_squeeze_backward_apply(
    g: Tensor,
    y: Tensor,
    stats: Tensor,
    dlink: Tensor,
    dpooled: Tensor,
    sums: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """dy (N, C, H, W), the gradient of BatchNorm's input y.

    Args:
        g, y: (N, C, H, W) channels_last, of one type.
        stats: (4, C); sums: (2, C) of `batch_norm_squeeze_backward_reduce`, None for frozen statistics.
        dlink: (3, N, C) of `batch_norm_excite_backward`.
        dpooled: (N, C) of y's type.
        relu: whether a ReLU followed the norm, before gate and squeeze.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    _check_images_of(dlink, dpooled, y)
    N, C, H, W = y.shape
    check_nhwc("g", g, y, y.shape)
    check_vectors("stats", stats, (4, C), y)
    if sums is not None:
        check_vectors("sums", sums, (2, C), y)
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    t = tiling(H * W, C, elements_of(C))
    tiles = triton.cdiv(H * W, t.BLOCK_M)
    launch(
        squeeze_backward_apply_kernel,
        (N * tiles, triton.cdiv(C, t.BLOCK_C)),
        g,
        y,
        stats,
        dlink,
        dpooled,
        sums,
        dy,
        N,
        N * H * W,
        H * W,
        tiles,
        RELU=relu,
        **t.options(y),
    )
    return dy
