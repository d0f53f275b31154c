"""Grad-input of a convolution as an implicit GEMM, with what follows it in the block's backward as its epilogue.

    acc[n,h,w,c] = sum over r,s,k of dy[n,p,q,k] * W[k,r,s,c],  p = (h + padding - r) / stride, q likewise

    plain       dx = acc
    ReluMask    g = acc * (y1 * scale + shift > 0), stored in place of dx; sums (2, C) = sum g, sum g * xhat of y1
    Residual    dx = acc + dout * (out > 0)
    Shortcut    dx = acc + the 1x1 shortcut's grad-input of dout * (out > 0), or of dout where `out` is None

Rows of the GEMM are input pixels, columns are C, the reduction runs over (r, s, k). Activations are dense NHWC, the
weight is K,R,S,C contiguous (both `torch.channels_last`), in float16, bfloat16, float32 or float64; accumulation and
epilogue are float32 (float64 for float64), rounded once.

With a stride only every stride-th tap meets an output pixel, and which ones depends on (h, w) modulo stride alone. So
each parity class (h % stride, w % stride) is a sub-grid of its own that runs over its own taps; a class without taps
(1x1, stride 2) still runs its epilogue. All classes are one launch.

Passes over an activation, besides dy and dx: ReluMask 1 (y1), Residual 2, Shortcut 2 (1 without `out`) of dy's size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.batch_norm import FLAGS, accumulator, merge_sums, nhwc_shape
from kernels.geometry import ConvShape, check_nhwc
from kernels.pointwise import recomputed_relu_passes, relu_passes
from kernels.tuning import Config


@triton.jit
def load_pixels(x, offsets, hits, ks, left, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile (rows, BLOCK_K) of channels of pixels; zero where a row does not hit the image, and beyond K."""
    mask = hits[:, None]
    if K % BLOCK_K != 0:
        mask &= (ks < left)[None, :]
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def load_weight(
    weight,
    offsets,
    ks,
    left,
    cols,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile (BLOCK_K, BLOCK_N) of one tap's weights; zero beyond K and C."""
    if K % BLOCK_K != 0 and C % BLOCK_N != 0:
        return tl.load(weight + offsets, mask=(ks < left)[:, None] & (cols < C)[None, :], other=0.0)
    elif K % BLOCK_K != 0:
        return tl.load(weight + offsets, mask=(ks < left)[:, None], other=0.0)
    elif C % BLOCK_N != 0:
        return tl.load(weight + offsets, mask=(cols < C)[None, :], other=0.0)
    else:
        return tl.load(weight + offsets)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "T"])
def grad_input_kernel(
    dy,  # (N, P, Q, K)
    weight,  # (K, R, S, C)
    dx,  # (N, H, W, C)
    y1,  # (N, H, W, C) or None: no ReLU to mask by
    stats,  # (4, C) of y1
    partial,  # (2, T, C): sum g and sum g * xhat of each row tile
    dout,  # (N, H, W, C) of the identity, (N, P, Q, K) of the 1x1 shortcut, or None: no second branch
    out,  # as dout, or None: dout is not masked
    shortcut_weight,  # (K, 1, 1, C) or None: the second branch is the identity
    N,
    H,
    W,
    P,
    Q,
    T,  # row tiles, of all parity classes
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of BLOCK_M pixels of one parity class by BLOCK_N channels. Grid (column tiles * classes * row tiles,).

    Column tiles run fastest and classes next, so that programs side by side read the same pixels of dy from L2.
    """
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    cols = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // COLUMN_TILES

    # The parity class: pixels h = ph + STRIDE * i meet the taps r = r0 + STRIDE * a, a < A, at p = p0 + i - a.
    ph = tile % STRIDE
    pw = tile // STRIDE % STRIDE
    r0 = (ph + PADDING) % STRIDE
    s0 = (pw + PADDING) % STRIDE
    p0 = (ph + PADDING) // STRIDE
    q0 = (pw + PADDING) // STRIDE
    A = (R - r0 + STRIDE - 1) // STRIDE
    B = (S - s0 + STRIDE - 1) // STRIDE
    height = (H - ph + STRIDE - 1) // STRIDE
    width = (W - pw + STRIDE - 1) // STRIDE
    area = tl.maximum(height * width, 1)

    # Offsets: 64 bits to the first image of the tile, 32 within the tile.
    row0 = tile // (STRIDE * STRIDE) * BLOCK_M
    image0 = row0 // area
    rows = row0 - image0 * area + tl.arange(0, BLOCK_M)  # within the class, from image0 on
    inside = rows < (N - image0) * height * width
    n = rows // area
    i = (rows - n * area) // tl.maximum(width, 1)
    j = rows - n * area - i * width
    dy += image0.to(tl.int64) * (P * Q * K)
    dy_rows = ((n * P + p0 + i) * Q + q0 + j) * K
    if STRIDE == 1:
        pixels = rows
    else:
        pixels = (n * H + ph + STRIDE * i) * W + pw + STRIDE * j

    # Bit a of a row is set where tap a misses the image, bit 16 + b likewise: a tap is one AND with a scalar.
    misses = tl.where(inside, 0, -1)
    for a in tl.static_range((R + STRIDE - 1) // STRIDE):
        misses |= tl.where((p0 + i >= a) & (p0 + i < P + a), 0, 1 << a)
    for b in tl.static_range((S + STRIDE - 1) // STRIDE):
        misses |= tl.where((q0 + j >= b) & (q0 + j < Q + b), 0, 65536 << b)

    ks = tl.arange(0, BLOCK_K)
    REDUCTION_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    dy_offsets = dy_rows[:, None] + ks[None, :]
    weight_offsets = ks[:, None] * (R * S * C) + cols[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    a = 0
    b = 0
    k = 0
    for _ in range(tl.where(row0 < N * height * width, A * B * REDUCTION_TILES, 0)):
        hits = misses & (1 << a | 65536 << b) == 0
        dy_tile = load_pixels(dy + (k - (a * Q + b) * K), dy_offsets, hits, ks, K - k, K, BLOCK_K)
        w = weight + (k * (R * S) + (r0 + STRIDE * a) * S + s0 + STRIDE * b) * C
        weight_tile = load_weight(w, weight_offsets, ks, K - k, cols, C, K, BLOCK_N, BLOCK_K)
        acc = tl.dot(dy_tile, weight_tile, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if REDUCTION_TILES > 1:
            k += BLOCK_K
            done = (k >= K).to(tl.int32)
            k -= done * (REDUCTION_TILES * BLOCK_K)
            b += done
        else:
            b += 1
        done = (b == B).to(tl.int32)
        b -= done * B
        a += done

    if shortcut_weight is not None:  # h = STRIDE * p: only the class (0, 0), whose rows are the pixels of dout in order
        image = image0.to(tl.int64) * (P * Q * K)
        offsets = rows[:, None] * K + ks[None, :]
        weight_offsets = ks[:, None] * C + cols[None, :]
        for t in tl.range(tl.where(ph + pw == 0, REDUCTION_TILES, 0), num_stages=2):
            k = t * BLOCK_K
            g = load_pixels(dout + image + k, offsets, inside, ks, K - k, K, BLOCK_K)
            if out is not None:
                z = load_pixels(out + image + k, offsets, inside, ks, K - k, K, BLOCK_K)
                g = tl.where(relu_passes(z), g, tl.zeros_like(g))
            w = shortcut_weight + k * C
            weight_tile = load_weight(w, weight_offsets, ks, K - k, cols, C, K, BLOCK_N, BLOCK_K)
            acc = tl.dot(g, weight_tile, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)

    mask = inside[:, None]
    if C % BLOCK_N != 0:
        mask &= (cols < C)[None, :]
    image = image0.to(tl.int64) * (H * W * C)
    offsets = pixels[:, None] * C + cols[None, :]
    STORED: tl.constexpr = dx.dtype.element_ty
    if y1 is not None:
        live = cols < C
        mean = tl.load(stats + cols, mask=live)
        invstd = tl.load(stats + C + cols, mask=live)
        scale = tl.load(stats + 2 * C + cols, mask=live)
        shift = tl.load(stats + 3 * C + cols, mask=live)
        value = tl.load(y1 + image + offsets, mask=mask, other=0.0).to(ACC)
        passes = mask & recomputed_relu_passes(value, scale[None, :], shift[None, :], STORED)
        g = acc.to(STORED)
        g = tl.where(passes, g, tl.zeros_like(g))  # zero beyond the last row too, where acc is 0 * weight
        tl.store(dx + image + offsets, g, mask=mask)
        g = g.to(ACC)
        index = tile * C + cols
        tl.store(partial + index, tl.sum(g, 0), mask=live)
        tl.store(partial + T * C + index, tl.sum(g * (value - mean[None, :]), 0) * invstd, mask=live)
    else:
        if shortcut_weight is None and dout is not None:
            g = tl.load(dout + image + offsets, mask=mask, other=0.0)
            z = tl.load(out + image + offsets, mask=mask, other=0.0)
            acc += tl.where(relu_passes(z), g, tl.zeros_like(g)).to(ACC)
        tl.store(dx + image + offsets, acc.to(STORED), mask=mask)


# ---- launcher --------------------------------------------------------------------------------------------------


class ReluMask(NamedTuple):
    """The convolution's input was relu(y1 * scale + shift) and was not kept."""

    y1: Tensor  # (N, C, H, W)
    stats: Tensor  # (4, C) = mean, invstd, scale, shift


class Residual(NamedTuple):
    """The convolution's input also is the identity shortcut of out = relu(... + input)."""

    dout: Tensor  # (N, C, H, W)
    out: Tensor  # (N, C, H, W)


class Shortcut(NamedTuple):
    """The convolution's input also feeds a 1x1 convolution of the same stride, of which dout * (out > 0) is known."""

    dout: Tensor  # (N, K, P, Q)
    out: Tensor | None  # (N, K, P, Q); None: dout is taken as it is
    weight: Tensor  # (K, C, 1, 1)


# Columns as wide as C and rows enough that two programs share an SM.
CONFIGS = (
    Config(128, 64, 64, 4, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(128, 64, 32, 4, 4),
    Config(256, 64, 32, 4, 3),
    Config(32, 32, 32, 2, 2),
)


def conv_grad_input(
    dy: Tensor,
    weight: Tensor,
    shape: ConvShape,
    epilogue: ReluMask | Residual | Shortcut | None = None,
    tf32: bool = False,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    M, T = 0, 0
    x = dy.new_empty((shape.N, shape.C, shape.H, shape.W)).contiguous(memory_format=torch.channels_last)
    mask = epilogue if isinstance(epilogue, ReluMask) else None
    branch = epilogue if isinstance(epilogue, (Residual, Shortcut)) else None
    acc, ACC = accumulator(dy)

    def run(config):
        area = triton.cdiv(shape.H, shape.stride) * triton.cdiv(shape.W, shape.stride)
        T = triton.cdiv(shape.N * area, config.BLOCK_M) * shape.stride**2
        partial = torch.empty((2, T, shape.C), dtype=acc, device=dy.device) if mask else None
        grid = (T * triton.cdiv(shape.C, config.BLOCK_N),)
        grad_input_kernel[grid](
            dy,
            weight,
            x,
            mask.y1 if mask else None,
            mask.stats if mask else None,
            partial,
            branch.dout if branch else None,
            branch.out if branch else None,
            branch.weight if isinstance(branch, Shortcut) else None,
            shape.N,
            shape.H,
            shape.W,
            shape.P,
            shape.Q,
            T,
            **shape.constants(),
            ACC=ACC,
            INPUT_PRECISION="tf32" if tf32 else "ieee",
            **config.options(),
            **FLAGS,
        )
        return partial

    partial = run(tuning.best((), CONFIGS, run, dy.device))
    return (x, merge_sums(partial, dweight, dbias)) if mask else x
