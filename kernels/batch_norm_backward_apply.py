"""BatchNorm's backward, its apply pass: the gradient of the input, and the shortcut's where it is wanted.

    g  = dout * (out > 0)
    dx = scale * (g - sum_g / M - xhat * sum_gx / M) with the batch's statistics, scale * g with frozen ones

dout, x, out and dx are dense NHWC, read as matrices of M = N*H*W rows and C columns. Grid (row tiles, column tiles).
Moves 3 activations, 4 with `out`, one more where g is stored as the shortcut's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.batch_norm import center_grad, load_center, load_masked_grad
from .host.launch import SIZES, check_nhwc, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import ELEMENTS, tiling


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
    """dx = scale * (g - sum_g / M - xhat * sum_gx / M), or scale * g with frozen statistics; dshortcut = g.

    Grid (row tiles, column tiles).
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


def batch_norm_backward_apply(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    stats: Tensor,
    sums: Tensor | None,
    relu: bool = True,
    dshortcut: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor:
    """dx, the gradient of BatchNorm's input. g is also written to `dshortcut` where that is given.

    Args:
        dout, x, out, dshortcut, dx: (N, C, H, W) channels_last, of one type. Without `out` the ReLU mask is recomputed
            from x. dx is where the result goes. It may be dout itself: every program reads its elements before it
            writes them.
        stats: (4, C); sums: (2, C) of `batch_norm_backward_reduce`, None for frozen statistics.
        relu: whether a ReLU followed.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    M, C = nhwc_shape(x)
    check_nhwc("dout", dout, x, x.shape)
    if out is not None:
        check_nhwc("out", out, x, x.shape)
    check_vectors("stats", stats, (4, C), x)
    if sums is not None:
        check_vectors("sums", sums, (2, C), x)
    if dshortcut is not None:
        check_nhwc("dshortcut", dshortcut, x, x.shape)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
    elif dx is not dout:
        check_nhwc("dx", dx, x, x.shape)
    t = tiling(M, C, ELEMENTS // 2)  # with more, the five vectors per channel would spill registers
    launch(
        backward_apply_kernel,
        (triton.cdiv(M, t.BLOCK_M), triton.cdiv(C, t.BLOCK_C)),
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
