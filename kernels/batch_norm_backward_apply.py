"""BatchNorm's backward, its apply pass: the gradient of the input, and the shortcut's where it is wanted.

    g  = dout * (out > 0)
    dx = scale * (g - sum_g / M - xhat * sum_gx / M) with the batch's statistics, scale * g with frozen ones

The shortcut's gradient is g, or where it has a norm of its own the same as dx, of its convolution's output z.

dout, x, out and dx are dense NHWC, read as matrices of M = N*H*W rows and C columns. Grid (row tiles, column tiles).
Moves 3 activations, 4 with `out`, one more where the shortcut's gradient is stored, and one for z.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_backward_reduce import NormedShortcut, check_shortcut
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
    dshortcut,  # (M, C) or None: the shortcut's gradient is not stored
    shortcut,  # (M, C) or None: the shortcut's gradient is g
    shortcut_stats,  # (4, C) of the shortcut's norm
    shortcut_sums,  # (3, C): sum g and, last, sum g * zhat; None: frozen statistics
    M,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = scale * (g - sum_g / M - xhat * sum_gx / M), or scale * g with frozen statistics; dshortcut likewise.

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
        grad = g
        if shortcut is not None:
            if shortcut_sums is not None:
                z = tl.load(shortcut + row0 * C + offsets, mask=mask, other=0.0).to(ACC)
                grad = center_grad(g, z, load_center(shortcut_stats, shortcut_sums, 2, cols, M, C, ACC))
            grad = tl.load(shortcut_stats + 2 * C + cols, mask=live)[None, :] * grad
        tl.store(dshortcut + row0 * C + offsets, grad, mask=mask)
    if sums is not None:
        g = center_grad(g, value, load_center(stats, sums, 1, cols, M, C, ACC))
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
    shortcut: NormedShortcut | None = None,
    shortcut_sums: Tensor | None = None,
) -> Tensor:
    """dx, the gradient of BatchNorm's input. The shortcut's is written to `dshortcut` where that is given.

    Args:
        dout, x, out, dshortcut, dx: (N, C, H, W) channels_last, of one type. Without `out` the ReLU mask is recomputed
            from x. dx is where the result goes. It may be dout itself: every program reads its elements before it
            writes them.
        stats: (4, C); sums: (2 or 3, C) of `batch_norm_backward_reduce`, None for frozen statistics.
        relu: whether a ReLU followed.
        shortcut: what was added, after a norm of its own. `dshortcut` is then the gradient of that norm's input, else
            that of what was added, g.
        shortcut_sums: (3, C) of `batch_norm_backward_reduce`, None where the shortcut's statistics are frozen.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    M, C = nhwc_shape(x)
    check_nhwc("dout", dout, x, x.shape)
    if out is not None:
        check_nhwc("out", out, x, x.shape)
    check_vectors("stats", stats, (4, C), x)
    for name, given, rows in (("sums", sums, 2 if shortcut is None else 3), ("shortcut_sums", shortcut_sums, 3)):
        if given is not None:
            check_vectors(name, given, (rows, C), x)
    if shortcut is not None:
        check_shortcut(shortcut, x)
    if dshortcut is not None:
        check_nhwc("dshortcut", dshortcut, x, x.shape)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
    elif dx is not dout:
        check_nhwc("dx", dx, x, x.shape)
    # With more elements the five vectors per channel would spill registers; a shortcut's norm has as many.
    t = tiling(M, C, ELEMENTS // (2 if shortcut is None else 4))
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
        shortcut and shortcut.y,
        shortcut and shortcut.stats,
        shortcut_sums,
        M,
        RELU=relu,
        **t.options(x),
    )
    return dx
