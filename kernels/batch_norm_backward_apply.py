"""BatchNorm's backward, its apply pass: the gradient of the input, and the shortcut's where it is wanted.

    g  = dout [* (x * scale + shift > 0)]
    dx = scale * (g - sum_g / M - xhat * sum_gx / M) with the batch's statistics, scale * g with frozen ones [+ added]

A shortcut with a norm of its own has the same g, and its convolution's output z a gradient like dx. `added` is what x
receives by another way.

dout, x and dx are dense NHWC, read as matrices of M = N*H*W rows and C columns. Grid (row tiles, column tiles). Moves 3
activations, 5 with z, 4 with `added`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_backward_reduce import NormedShortcut, check_shortcut
from .device.batch_norm import center_grad, load_center, load_masked_grad
from .host.arguments import SIZES, check_nhwc, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import ELEMENTS, tiling


@triton.jit(do_not_specialize=SIZES)
def backward_apply_kernel(
    dout,  # (M, C)
    x,  # (M, C); not read with frozen statistics and without a ReLU
    stats,  # (4, C)
    sums,  # (2, C); None: frozen statistics
    dx,  # (M, C)
    dshortcut,  # (M, C) or None: z's gradient is not stored
    shortcut,  # (M, C) or None: z
    shortcut_stats,  # (4, C) of the shortcut's norm
    shortcut_sums,  # (3, C): sum g and, last, sum g * zhat; None: frozen statistics
    added,  # (M, C) or None
    M,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = scale * (g - sum_g / M - xhat * sum_gx / M), scale * g with frozen statistics; then + added.

    dshortcut is like dx, but for `added`.

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
    scale = tl.load(stats + 2 * C + cols, mask=live)
    shift = tl.load(stats + 3 * C + cols, mask=live)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    g = load_masked_grad(dout, value, None, scale, shift, offsets, mask, RELU, x.dtype.element_ty, ACC)
    if dshortcut is not None:
        grad = g
        if shortcut_sums is not None:
            z = tl.load(shortcut + row0 * C + offsets, mask=mask, other=0.0).to(ACC)
            grad = center_grad(g, z, load_center(shortcut_stats, shortcut_sums, 2, cols, M, C, ACC))
        shortcut_scale = tl.load(shortcut_stats + 2 * C + cols, mask=live)
        tl.store(dshortcut + row0 * C + offsets, shortcut_scale[None, :] * grad, mask=mask)
    if sums is not None:
        g = center_grad(g, value, load_center(stats, sums, 1, cols, M, C, ACC))
    grad = scale[None, :] * g
    if added is not None:
        grad += tl.load(added + row0 * C + offsets, mask=mask, other=0.0).to(ACC)
    tl.store(dx + offsets, grad, mask=mask)


def batch_norm_backward_apply(
    dout: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    relu: bool = True,
    dx: Tensor | None = None,
    shortcut: NormedShortcut | None = None,
    shortcut_sums: Tensor | None = None,
    dshortcut: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """dx, the gradient of BatchNorm's input. That of a shortcut's norm is written to `dshortcut`.

    Args:
        dout, x, dx, dshortcut, added: (N, C, H, W) channels_last, of one type. dx is where the result goes. It may be
            dout itself: every program reads its elements before it writes them.
        stats: (4, C); sums: (2 or 3, C) of `batch_norm_backward_reduce`, None for frozen statistics.
        relu: whether a ReLU followed the norm, and dout is the gradient behind it: the mask is recomputed from x. It
            is not where dout is what `batch_norm_backward_reduce` has written.
        shortcut: what was added, after a norm of its own, with whose sums `sums` was taken.
        shortcut_sums: (3, C) of `batch_norm_backward_reduce`, None where the shortcut's statistics are frozen.
        added: what is added to dx.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    M, C = nhwc_shape(x)
    check_nhwc("dout", dout, x, x.shape)
    check_vectors("stats", stats, (4, C), x)
    for name, given, rows in (("sums", sums, 2 if shortcut is None else 3), ("shortcut_sums", shortcut_sums, 3)):
        if given is not None:
            check_vectors(name, given, (rows, C), x)
    if shortcut is not None:
        check_shortcut(shortcut, x)
    if dshortcut is not None:
        check_nhwc("dshortcut", dshortcut, x, x.shape)
        if shortcut is None:
            raise ValueError("dshortcut: expected None without a shortcut, which has the gradient dout")
    if added is not None:
        check_nhwc("added", added, x, x.shape)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
    elif dx is not dout:
        check_nhwc("dx", dx, x, x.shape)
    t = tiling(M, C, ELEMENTS // 2)  # with more, the vectors per channel would spill registers
    launch(
        backward_apply_kernel,
        (triton.cdiv(M, t.BLOCK_M), triton.cdiv(C, t.BLOCK_C)),
        dout,
        x,
        stats,
        sums,
        dx,
        dshortcut,
        shortcut and shortcut.y,
        shortcut and shortcut.stats,
        shortcut_sums,
        added,
        M,
        RELU=relu,
        **t.options(x),
    )
    return dx
