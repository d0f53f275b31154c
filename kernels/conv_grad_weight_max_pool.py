"""Grad-weight of the stem's convolution as implicit GEMM, with max-pool', ReLU' and BatchNorm' before it.

    dW[k, r, s, c] = sum over pixels (n, p, q) of y of dy[n, p, q, k] * x[n, h, w, c]
    h, w = p * stride - padding + r, q * stride - padding + s
    dy = scale * (g - sum_g / M - xhat * sum_gx / M) in training, scale * g with frozen statistics
    g  = sum of dout * (out > 0) over the windows whose tap is this pixel, see batch_norm_max_pool_backward.py

y is (N, P, Q, K), dout, out and tap are (N, OP, OQ, K), x is (N, H, W, C), dW is (K, R, S, C), all dense NHWC. dy, the
largest gradient of the net, is never written. Rows of the GEMM are k. Its columns are (r, s, c) as one axis, since a
stem's input has few channels. The reduction over pixels is split, and the partial results are added in a fixed order.

Grid (column tiles, row tiles, splits), then (columns of dW,). It reads y, dout, out, tap and x once for every BLOCK_M
channels. Column tiles, one for a 7x7 stem of one input channel and three for one of RGB, read the same pixels at the
same time, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .batch_norm_max_pool import out_size
from .conv_grad_weight import empty_weight, merge_splits
from .device.batch_norm import center_grad, load_center
from .device.implicit_gemm import axis_taps, dot
from .device.max_pool import gather_grad, load_windows, locate
from .host.arguments import (
    FLAGS,
    SIZES,
    accumulator,
    check_nhwc,
    check_span,
    check_vectors,
    nhwc_shape,
    product_precision,
)
from .host.launcher import launch
from .host.shapes import ConvShape
from .host.tiling import pooled_steps

MAX_AXIS = 30  # pixels along an axis of the convolution's window: two masks of taps share 64 bits

# ---- the kernel ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def conv_grad_weight_max_pool_kernel(
    dout,  # (N, OP, OQ, K)
    out,  # (N, OP, OQ, K)
    tap,  # (N, OP, OQ, K) uint8
    y,  # (N, P, Q, K)
    stats,  # (4, K)
    sums,  # (2, K); None: frozen statistics
    x,  # (N, H, W, C)
    partial,  # (splits, K, R, S, C)
    M,  # N * P * Q
    N,
    H,
    W,
    P,
    Q,
    OP,
    OQ,
    TILES,  # BLOCK_K-window tiles of one image
    STEPS,  # tiles per split
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW's partial result over a split's windows. Grid (column tiles, row tiles, splits)."""
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(stats + 2 * K + k, mask=k < K, other=0.0)
    # A pixel's mask has a bit for each row and for each column of taps that lies in the image. A column of the GEMM
    # needs one of each. A column beyond the last one needs a bit that no pixel has.
    BITS: tl.constexpr = max(R, S) + 1
    one = tl.full([1], 1, tl.int32 if BITS < 16 else tl.int64)
    r = j // (S * C)
    s = j // C % S
    needed = tl.where(j < R * S * C, (one << r) | (one << (BITS + s)), one << (BITS - 1))[None, :]
    columns = ((r * W + s) * C + j % C)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    first = tl.program_id(2) * STEPS
    last = tl.minimum(first + STEPS, N * TILES)
    for step in range(first, last):
        n = tl.cast(step // TILES, tl.int64)
        windows = step % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
        p, q, taps, grads = load_windows(dout, out, tap, n, windows, k, OP, OQ, K)
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                g = gather_grad(taps, grads, down, right, ACC)
                if sums is not None:
                    offsets, mask = locate(n, p, q, down, right, k, P, Q, K)
                    value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
                    g = center_grad(g, value, load_center(stats, sums, 1, k, M, K, ACC))
                dy = tl.zeros([BLOCK_K, BLOCK_M], x.dtype.element_ty)
                # The condition is always true, and the binary has no branch. But Triton lays a product's operands out
                # by the narrowest type that was loaded for them. That is tap's, and reads in the layout for bytes
                # conflict in sm_80's shared memory. What a branch returns hides the type.
                if step < last:
                    dy = (scale[None, :] * g).to(x.dtype.element_ty)
                row = 2 * p + down
                column = 2 * q + right
                live = (row < P) & (column < Q)
                h = row * STRIDE - PADDING
                w = column * STRIDE - PADDING
                bits = axis_taps(h, H, R, one) | (axis_taps(w, W, S, one) << BITS)
                inside = (tl.where(live, bits, 0)[:, None] & needed) == needed  # not live: a is 0, whatever dy is
                a = tl.load(x + n * H * W * C + (((h * W + w) * C)[:, None] + columns), mask=inside, other=0.0)
                acc = dot(tl.trans(dy), a, acc, PRECISION)
    partial += tl.program_id(2).to(tl.int64) * (K * R * S * C)
    mask = (k < K)[:, None] & (j < R * S * C)[None, :]
    tl.store(partial + k[:, None] * (R * S * C) + j[None, :], acc, mask=mask)


# ---- the launcher ----------------------------------------------------------------------------------------------


def conv_grad_weight_max_pool(
    dout: Tensor,
    out: Tensor,
    tap: Tensor,
    y: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
    tf32: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dW (K, C, R, S) channels_last of y = conv(x), from what `batch_norm_max_pool` made of y.

    Args:
        dout, out, tap: (N, K, OP, OQ) channels_last; tap uint8.
        y: (N, K, P, Q) channels_last.
        stats: (4, K). sums: (2, K) of `batch_norm_max_pool_backward_reduce`, None for frozen statistics.
        x: (N, C, H, W) channels_last.
        kernel_size, stride, padding: the convolution's.
        tf32: float32 products in TensorFloat-32.
        dtype: of dW; x's by default.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit, or a window too large.
    """
    nhwc_shape(x)
    check_nhwc("y", y, x)
    if min(*kernel_size, stride) < 1 or padding < 0:
        raise ValueError(
            f"expected a positive kernel_size and stride, and a padding of at least 0, got {kernel_size}, {stride} and "
            f"{padding}"
        )
    if max(kernel_size) > MAX_AXIS:
        raise ValueError(f"expected a kernel_size of at most {MAX_AXIS} along an axis, got {tuple(kernel_size)}")
    shape = ConvShape(*(x.shape[i] for i in (0, 2, 3, 1)), y.shape[1], *kernel_size, stride, padding)
    check_nhwc("y", y, x, (shape.N, shape.K, shape.P, shape.Q))
    pooled = (shape.N, shape.K, out_size(shape.P), out_size(shape.Q))
    check_nhwc("dout", dout, x, pooled)
    check_nhwc("out", out, x, pooled)
    check_nhwc("tap", tap, x, pooled, torch.uint8)
    partial_dtype, ACC = accumulator(x)
    precision = product_precision(x, tf32)
    check_vectors("stats", stats, (4, shape.K), x)
    if sums is not None:
        check_vectors("sums", sums, (2, shape.K), x)
    check_span(shape.H * shape.W * shape.C + shape.P * shape.Q * shape.K, 1, 1, 1)
    dw = empty_weight(x, shape, dtype)
    if x.numel() == 0:
        return dw.zero_()

    def run(config: tuning.Config) -> Tensor:
        columns = shape.R * shape.S * shape.C
        grid = triton.cdiv(columns, config.BLOCK_N), triton.cdiv(shape.K, config.BLOCK_M)
        tiles = triton.cdiv(pooled[2] * pooled[3], config.BLOCK_K)
        steps = pooled_steps(grid[0] * grid[1], shape.N * tiles)
        splits = triton.cdiv(shape.N * tiles, steps)
        partial = torch.empty((splits, dw.numel()), dtype=partial_dtype, device=x.device)
        launch(
            conv_grad_weight_max_pool_kernel,
            (*grid, splits),
            dout,
            out,
            tap,
            y,
            stats,
            sums,
            x,
            partial,
            shape.M,
            shape.N,
            shape.H,
            shape.W,
            shape.P,
            shape.Q,
            *pooled[2:],
            tiles,
            steps,
            ACC=ACC,
            PRECISION=precision,
            **shape.constants(),
            **config.options(),
            **FLAGS,
        )
        return merge_splits(partial, dw)

    config = tuning.gemm_config(
        "grad_weight_max_pool",
        shape,
        x,
        run,
        precision=precision,
        flat=True,
        centred=sums is not None,
    )
    return run(config)
