"""The backward of BatchNorm, ReLU and max-pool: a pass for BatchNorm's sums, and one for the gradient of its input.

    g    = sum of dout * (out > 0) over the windows whose tap is this pixel
    xhat = (y - mean) * invstd,  sum_g = sum g,  sum_gx = sum g * xhat
    dy   = scale * (g - sum_g / M - xhat * sum_gx / M) with the batch's statistics, scale * g with frozen ones

y and dy are (N, H, W, C), M = N*H*W; dout, out and tap are (N, P, Q, C), as `batch_norm_max_pool` made them; all are
dense NHWC.

Reduce: grid (programs, column tiles), each program taking several tiles of windows; then a merge of the partials in a
fixed order. It reads y once, and dout, out and tap, each a quarter of y's elements. Apply: grid (images * tiles of
windows, column tiles). It reads the same, y only with the batch's statistics, and writes dy. g is never written.

Each pixel gathers from its windows, so there are no atomics. A program takes windows (p, q), and for each its pixels
(2p, 2q) to (2p + 1, 2q + 1) in turn. These lie in 1, 2, 2 and 4 windows, all among the same four, which are loaded
once. So four pixels compare nine taps; sixteen, if each asked all four windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_backward_reduce import merge_sums
from .batch_norm_max_pool import out_size, window_tiling
from .device.batch_norm import center_grad, load_center
from .device.max_pool import gather_grad, load_windows, locate
from .device.reductions import column_sums
from .host.arguments import SIZES, accumulator, check_images, check_nhwc, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import tiling

# ---- the kernels -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def pool_backward_reduce_kernel(
    dout,  # (N, P, Q, C)
    y,  # (N, H, W, C)
    out,  # (N, P, Q, C)
    tap,  # (N, P, Q, C) uint8
    stats,  # (4, C)
    partial,  # (2, T, C): sum g and sum g * xhat
    N,
    H,
    W,
    P,
    Q,
    T,
    TILES,  # BLOCK_M-window tiles of one image
    STEPS,  # tiles per program
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per program: sum g, sum g * xhat over STEPS tiles. Grid (T, column tiles)."""
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    sum_g = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    first = tl.program_id(0) * STEPS
    for step in range(first, tl.minimum(first + STEPS, N * TILES)):
        n = tl.cast(step // TILES, tl.int64)
        windows = (step % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
        p, q, taps, grads = load_windows(dout, out, tap, n, windows, cols, P, Q, C)
        mean = tl.load(stats + cols, mask=live)  # again in each step: eight registers that the gather needs
        for a in tl.static_range(2):
            for b in tl.static_range(2):
                offsets, mask = locate(n, p, q, a, b, cols, H, W, C)
                value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
                g = gather_grad(taps, grads, a, b, ACC)
                sum_g += g
                sum_gx = tl.fma(g, value - mean[None, :], sum_gx)  # g is 0 beyond the image
    invstd = tl.load(stats + C + cols, mask=live)
    index = tl.program_id(0) * C + cols
    tl.store(partial + index, column_sums(sum_g), mask=live)
    tl.store(partial + T * C + index, column_sums(sum_gx) * invstd, mask=live)


@triton.jit(do_not_specialize=SIZES)
def pool_backward_apply_kernel(
    dout,  # (N, P, Q, C)
    y,  # (N, H, W, C)
    out,  # (N, P, Q, C)
    tap,  # (N, P, Q, C) uint8
    stats,  # (4, C)
    sums,  # (2, C); None: frozen statistics
    dy,  # (N, H, W, C)
    M,  # N * H * W
    H,
    W,
    P,
    Q,
    TILES,  # BLOCK_M-window tiles of one image
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy = scale * (g - sum_g / M - xhat * sum_gx / M), scale * g when frozen. Grid (N * TILES, column tiles)."""
    n = (tl.program_id(0) // TILES).to(tl.int64)
    windows = (tl.program_id(0) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p, q, taps, grads = load_windows(dout, out, tap, n, windows, cols, P, Q, C)
    scale = tl.load(stats + 2 * C + cols, mask=cols < C)
    if sums is not None:
        center = load_center(stats, sums, 1, cols, M, C, ACC)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            offsets, mask = locate(n, p, q, a, b, cols, H, W, C)
            g = gather_grad(taps, grads, a, b, ACC)
            if sums is not None:
                value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
                g = center_grad(g, value, center)
            tl.store(dy + offsets, scale[None, :] * g, mask=mask)


# ---- the launchers ---------------------------------------------------------------------------------------------


def _check(dout: Tensor, y: Tensor, out: Tensor, tap: Tensor, stats: Tensor) -> None:
    check_images(y)
    N, C, H, W = y.shape
    shape = N, C, out_size(H), out_size(W)
    check_nhwc("dout", dout, y, shape)
    check_nhwc("out", out, y, shape)
    check_nhwc("tap", tap, y, shape, torch.uint8)
    check_vectors("stats", stats, (4, C), y)


def batch_norm_max_pool_backward_reduce(
    dout: Tensor,
    y: Tensor,
    out: Tensor,
    tap: Tensor,
    stats: Tensor,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dconv_bias: Tensor | None = None,
) -> Tensor:
    """sums (2, C) = sum g, sum g * xhat; also written as `batch_norm_backward_reduce` says."""
    _check(dout, y, out, tap, stats)
    N, C, H, W = y.shape
    P, Q = out.shape[2:]
    t = window_tiling(P * Q, y)
    tiles = triton.cdiv(P * Q, t.BLOCK_M)
    whole = tiling(N * tiles * t.BLOCK_M, C)
    steps = triton.cdiv(whole.rows, t.BLOCK_M)
    T = triton.cdiv(N * tiles, steps)
    partial = torch.empty((2, T, C), dtype=accumulator(y)[0], device=y.device)
    launch(
        pool_backward_reduce_kernel,
        (T, triton.cdiv(C, t.BLOCK_C)),
        dout,
        y,
        out,
        tap,
        stats,
        partial,
        N,
        H,
        W,
        P,
        Q,
        T,
        tiles,
        steps,
        **t.options(y),
    )
    return merge_sums(partial, dweight, dbias, dconv_bias)


def batch_norm_max_pool_backward_apply(
    dout: Tensor, y: Tensor, out: Tensor, tap: Tensor, stats: Tensor, sums: Tensor | None
) -> Tensor:
    """dy (N, C, H, W) channels_last; `sums` None means frozen statistics."""
    _check(dout, y, out, tap, stats)
    M, C = nhwc_shape(y)
    if sums is not None:
        check_vectors("sums", sums, (2, y.shape[1]), y)
    (N, _, H, W), (P, Q) = y.shape, out.shape[2:]
    t = window_tiling(P * Q, y)
    tiles = triton.cdiv(P * Q, t.BLOCK_M)
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    launch(
        pool_backward_apply_kernel,
        (N * tiles, triton.cdiv(C, t.BLOCK_C)),
        dout,
        y,
        out,
        tap,
        stats,
        sums,
        dy,
        M,
        H,
        W,
        P,
        Q,
        tiles,
        **t.options(y),
    )
    return dy
