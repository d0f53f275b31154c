"""The gradient through the tail of a block with squeeze-and-excitation, as far as it is known before the gate's.

    g     = dout * (out > 0)                    the shortcut's gradient, and behind the gate h's
    dgate = sum g * h over an image
    sums  = sum g, sum g * xhat over an image   where the inner ReLU lets g pass: what BatchNorm' needs

dout, out, y and g are dense NHWC, N images of H*W rows and C columns; dgate is (N, C). Grid (images * splits, column
tiles), and a merge as in batch_norm_squeeze.py. Reads dout, out and y, writes g. Without a ReLU at the end g is dout,
and `out` is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_excite import check_gate
from .batch_norm_squeeze import LINK, empty_partial, merge_images, store_of_image
from .device.batch_norm import load_masked_grad
from .device.pointwise import affine, relu_passes
from .device.pointwise import relu as relu_of
from .device.reductions import column_sums
from .host.arguments import SIZES, accumulator, check_images, check_nhwc, check_vectors
from .host.launcher import launch
from .host.tiling import elements_of, image_tiling


@triton.jit(do_not_specialize=SIZES)
def excite_backward_kernel(
    dout,  # (N, ROWS, C)
    y,  # (N, ROWS, C)
    out,  # (N, ROWS, C) or None: no ReLU at the end
    stats,  # (4, C)
    gate,  # (N, C)
    g_stored,  # (N, ROWS, C) or None
    dgate,  # (N, C)
    link,  # (3, N, C): sum g and sum g * xhat of each image, and the gate
    partial,  # (3, T, N, C): the three sums of each split; None where an image is not split
    N,
    ROWS,  # pixels of an image
    T,  # splits of an image
    TILES,  # BLOCK_M-row tiles of a split
    INNER: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g, and over image n dgate and the two sums. Grid (N * T, column tiles)."""
    n = (tl.program_id(0) // T).to(tl.int64)
    split = tl.program_id(0) % T
    row0 = split * TILES * BLOCK_M
    valid = tl.minimum(ROWS - row0, TILES * BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mean = tl.load(stats + cols, mask=live)
    invstd = tl.load(stats + C + cols, mask=live)
    scale = tl.load(stats + 2 * C + cols, mask=live)
    shift = tl.load(stats + 3 * C + cols, mask=live)
    offsets = rows[:, None] * C + cols[None, :]
    start = (n * ROWS + row0) * C
    dout += start
    y += start
    if out is not None:
        out += start
        g_stored += start
    sum_g = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_gh = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for i in range(tl.cdiv(valid, BLOCK_M)):
        mask = (rows < valid - i * BLOCK_M)[:, None] & live[None, :]
        value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
        g = load_masked_grad(dout, value, out, scale, shift, offsets, mask, out is not None, y.dtype.element_ty, ACC)
        if out is not None:
            tl.store(g_stored + offsets, g, mask=mask)
        h = affine(value, scale[None, :], shift[None, :])
        # Before g is masked: as in PyTorch, dgate is NaN where g is infinite, though the inner ReLU stops g.
        sum_gh = tl.fma(g, relu_of(h) if INNER else h, sum_gh)
        if INNER:
            g = tl.where(relu_passes(h.to(y.dtype.element_ty)), g, 0.0)
        sum_g += g
        sum_gx = tl.fma(g, value - mean[None, :], sum_gx)  # g is 0 beyond the last row
        offsets += BLOCK_M * C
    store_of_image(
        column_sums(sum_gh),
        column_sums(sum_g),
        column_sums(sum_gx) * invstd,
        dgate,
        link,
        gate,
        partial,
        n,
        split,
        cols,
        N,
        T,
        C,
        ACC,
    )


def batch_norm_excite_backward(
    dout: Tensor,
    y: Tensor,
    out: Tensor | None,
    stats: Tensor,
    gate: Tensor,
    inner_relu: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(g, dgate, link): dgate (N, C) of gate's type, link (3, N, C) of the type of the statistics.

    link has each image's sum g and sum g * xhat, where the inner ReLU lets g pass, and its gates: what
    `batch_norm_squeeze_backward_reduce` and `batch_norm_squeeze_backward_apply` need to know of the excitation.

    Args:
        dout, y, out: (N, C, H, W) channels_last, of one type. `out` is None where no ReLU followed: g is then dout, and
            None is returned in its place.
        stats: (4, C); gate: (N, C) of y's type.
        inner_relu: whether a ReLU followed the norm, before the gate.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit, or an image of 2^31 elements or more.
    """
    check_images(y)
    N, C, H, W = y.shape
    check_nhwc("dout", dout, y, y.shape)
    if out is not None:
        check_nhwc("out", out, y, y.shape)
    check_vectors("stats", stats, (4, C), y)
    check_gate(gate, y)
    g = None if out is None else torch.empty_like(y, memory_format=torch.channels_last)
    dgate = torch.empty_like(gate)
    link = torch.empty((LINK, N, C), dtype=accumulator(y)[0], device=y.device)
    t = image_tiling(N, H * W, C, elements_of(C))
    partial = empty_partial(y, t.partials)
    launch(
        excite_backward_kernel,
        (N * t.partials, triton.cdiv(C, t.BLOCK_C)),
        dout,
        y,
        out,
        stats,
        gate,
        g,
        dgate,
        link,
        partial,
        N,
        H * W,
        t.partials,
        t.tiles,
        INNER=inner_relu,
        **t.options(y),
    )
    merge_images(partial, dgate, link, gate)
    return g, dgate, link
