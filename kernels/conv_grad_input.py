"""Grad-input of a convolution as an implicit GEMM, with what follows it in the block's backward as its epilogue.

    acc[n,h,w,c] = sum over r,s,k of dy[n,p,q,k] * W[k,r,s,c],  p = (h + padding - r * dilation) / stride, q likewise

    None          dx = acc
    ReluMask      g = acc * (y1 * scale + shift > 0), stored in place of dx; sums (2, C) = sum g, sum g * xhat of y1
    KeptMask      g = acc * (a > 0), stored in place of dx
    IdentityGrad  dx = acc + g, or where g is of every s-th pixel alone, acc + g at those
    ShortcutGrad  dx = acc + the 1x1 shortcut's grad-input of g
    BlockEnd      g' = dx * (out > 0), dx as the two before, stored in its place; partial sums of g', g' * xhat of y
                  [and g' * zhat of z]: where the block before this one begins its backward

Rows of the GEMM are input pixels, columns are C, the reduction runs over (r, s, k). Activations are dense NHWC, the
weight is K,R,S,C contiguous (both `torch.channels_last`), in float16, bfloat16, float32 or float64; accumulation and
epilogue are float32 (float64 for float64), rounded once.

With a stride only every stride-th tap meets an output pixel, and which ones depends on (h, w) modulo stride alone. So
each parity class (h % stride, w % stride) is a sub-grid of its own that runs over its own taps. A class without taps
(1x1, stride 2) still runs its epilogue. All classes are one launch. A convolution with dilation has stride 1 here.

Grid (column tiles * classes * row tiles,). Passes over activations: it reads dy and writes dx. ReluMask also reads y1,
KeptMask a, IdentityGrad g, ShortcutGrad g, which has dy's pixels, BlockEnd out and y [and z] besides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .batch_norm_backward_reduce import NormedShortcut, check_shortcut, merge_sums
from .device.implicit_gemm import dot, split_pixels
from .device.pointwise import recomputed_relu_passes, relu_passes
from .device.reductions import column_sums
from .host.arguments import (
    FLAGS,
    SIZES,
    accumulator,
    check_nhwc,
    check_span,
    check_vector,
    check_vectors,
    nhwc_shape,
    product_precision,
)
from .host.launcher import launch
from .host.shapes import MAX_TAPS, ConvShape
from .tuning import Config, Epilogue

# ---- the kernel ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def grad_input_kernel(
    dy,  # (N, P, Q, K)
    weight,  # (K, R, S, C)
    dx,  # (N, H, W, C)
    a,  # (N, H, W, C) or None: what a ReLU gave, to mask by
    y1,  # (N, H, W, C) or None: what a norm read; without `a` the mask is that of relu(y1 * scale + shift)
    stats,  # (4, C) of y1, or None
    z,  # (N, H, W, C) or None: what the norm of a shortcut read
    z_stats,  # (4, C) of z
    partial,  # (2 or 3, T, C): sum g, sum g * xhat and sum g * zhat of each row tile
    g,  # the identity's, of every BRANCH_STRIDE-th pixel (N, H', W', C); the 1x1 shortcut's (N, P, Q, SHORTCUT_K); None
    shortcut_weight,  # (SHORTCUT_K, 1, 1, C) or None: the second branch is the identity
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
    DILATION: tl.constexpr,  # 1 with a stride
    SHORTCUT_K: tl.constexpr,
    BRANCH_STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of BLOCK_M pixels of one parity class by BLOCK_N channels. Grid (column tiles * classes * row tiles,).

    Column tiles run fastest and classes next, so that neighbouring programs read the same pixels of dy, from L2.
    """
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    cols = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // COLUMN_TILES
    ph = tile % STRIDE
    pw = tile // STRIDE % STRIDE
    r0, s0, p0, q0, A, B, height, width = parity_class(ph, pw, H, W, R, S, STRIDE, PADDING)

    # Offsets: 64 bits to the first image of the tile, 32 within the tile.
    area = tl.maximum(height, 1) * tl.maximum(width, 1)
    row0 = tile // (STRIDE * STRIDE) * BLOCK_M
    image0 = row0 // area
    rows = row0 - image0 * area + tl.arange(0, BLOCK_M)  # within the class, from image0 on
    inside = rows < (N - image0) * height * width
    n, i, j = split_pixels(rows, tl.maximum(height, 1), tl.maximum(width, 1))
    dy += image0.to(tl.int64) * (P * Q * K)
    dy_rows = ((n * P + p0 + i) * Q + q0 + j) * K
    if STRIDE == 1:
        pixels = rows
    else:
        pixels = (n * H + ph + STRIDE * i) * W + pw + STRIDE * j

    if BRANCH_STRIDE > 1:
        met = met_pixels(n, ph + STRIDE * i, pw + STRIDE * j, H, W, BRANCH_STRIDE)

    misses = missed_taps(p0, q0, i, j, inside, P, Q, R, S, STRIDE, DILATION)
    ks = tl.arange(0, BLOCK_K)
    dy_offsets = dy_rows[:, None] + ks[None, :]
    weight_offsets = ks[:, None] * (R * S * C) + cols[None, :]
    steps = tl.where(row0 < N * height * width, A * B * ((K + BLOCK_K - 1) // BLOCK_K), 0)
    acc = reduce_taps(
        dy,
        weight,
        dy_offsets,
        weight_offsets,
        misses,
        steps,
        B,
        r0,
        s0,
        cols,
        Q,
        C,
        K,
        R,
        S,
        STRIDE,
        DILATION,
        ACC,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if shortcut_weight is not None:
        image = image0.to(tl.int64) * (P * Q * SHORTCUT_K)
        acc = add_shortcut(
            acc,
            g,
            shortcut_weight,
            image,
            rows,
            inside,
            ph,
            pw,
            cols,
            C,
            SHORTCUT_K,
            PRECISION,
            BLOCK_N,
            BLOCK_K,
        )

    mask = inside[:, None]
    if C % BLOCK_N != 0:
        mask &= (cols < C)[None, :]
    image = image0.to(tl.int64) * (H * W * C)
    offsets = pixels[:, None] * C + cols[None, :]
    if shortcut_weight is None and g is not None:
        if BRANCH_STRIDE == 1:
            acc += tl.load(g + image + offsets, mask=mask, other=0.0).to(ACC)
        else:
            g += image0.to(tl.int64) * (tl.cdiv(H, BRANCH_STRIDE) * tl.cdiv(W, BRANCH_STRIDE) * C)
            met_offsets = met[:, None] * C + cols[None, :]
            acc += tl.load(g + met_offsets, mask=mask & (met >= 0)[:, None], other=0.0).to(ACC)
    if stats is not None:
        store_masked_by_relu(
            acc, dx, a, y1, stats, z, z_stats, partial, image, offsets, mask, inside, cols, tile, T, C, ACC
        )
    else:
        if a is not None:
            passes = relu_passes(tl.load(a + image + offsets, mask=mask, other=0.0))
            acc = tl.where(passes, acc, tl.zeros_like(acc))
        tl.store(dx + image + offsets, acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def parity_class(ph, pw, H, W, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The taps that the class (h % STRIDE, w % STRIDE) = (ph, pw) meets, A x B of them, and its height and width.

    Its pixels h = ph + STRIDE * i meet the taps r = r0 + STRIDE * a, a < A, at output pixel p = p0 + i - a, with
    dilation p0 + i - DILATION * a. The same holds along the other axis for w, j, s, b and q.
    """
    r0 = (ph + PADDING) % STRIDE
    s0 = (pw + PADDING) % STRIDE
    p0 = (ph + PADDING) // STRIDE
    q0 = (pw + PADDING) // STRIDE
    A = (R - r0 + STRIDE - 1) // STRIDE
    B = (S - s0 + STRIDE - 1) // STRIDE
    height = (H - ph + STRIDE - 1) // STRIDE
    width = (W - pw + STRIDE - 1) // STRIDE
    return r0, s0, p0, q0, A, B, height, width


@triton.jit
def missed_taps(
    p0,
    q0,
    i,
    j,
    inside,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
):
    """A bit mask per row: bit a says that taps (a, *) miss the image, bit 16 + b that taps (*, b) do.

    A step of the reduction asks for one tap by one AND with a scalar.
    """
    misses = tl.where(inside, 0, -1)
    for a in tl.static_range((R + STRIDE - 1) // STRIDE):
        misses |= tl.where((p0 + i - a * DILATION).to(tl.uint32) < P.to(tl.uint32), 0, 1 << a)
    for b in tl.static_range((S + STRIDE - 1) // STRIDE):
        misses |= tl.where((q0 + j - b * DILATION).to(tl.uint32) < Q.to(tl.uint32), 0, 65536 << b)
    return misses


@triton.jit
def reduce_taps(
    dy,
    weight,
    dy_offsets,
    weight_offsets,
    misses,
    steps,
    B,
    r0,
    s0,
    cols,
    Q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over a class's taps (a, b), B to a row, and over k. A step takes one tap and BLOCK_K channels."""
    CHANNEL_STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if R * S == 1:  # a plain product: nothing is asked of a tap
        hits = misses == 0
        for step in range(steps):
            k = step * BLOCK_K
            dy_tile = load_pixels(dy + k, dy_offsets, hits, ks, K - k, K, BLOCK_K)
            weight_tile = load_weight(weight + k * C, weight_offsets, ks, K - k, cols, C, K, BLOCK_N, BLOCK_K)
            acc = dot(dy_tile, weight_tile, acc, PRECISION)
    else:
        a = 0
        b = 0
        k = 0
        for _ in range(steps):
            hits = misses & (1 << a | 65536 << b) == 0
            dy_tile = load_pixels(dy + (k - (a * Q + b) * (DILATION * K)), dy_offsets, hits, ks, K - k, K, BLOCK_K)
            w = weight + (k * (R * S) + (r0 + STRIDE * a) * S + s0 + STRIDE * b) * C
            weight_tile = load_weight(w, weight_offsets, ks, K - k, cols, C, K, BLOCK_N, BLOCK_K)
            acc = dot(dy_tile, weight_tile, acc, PRECISION)
            if CHANNEL_STEPS > 1:
                k += BLOCK_K
                done = (k >= K).to(tl.int32)
                k -= done * (CHANNEL_STEPS * BLOCK_K)
                b += done
            else:
                b += 1
            done = (b == B).to(tl.int32)
            b -= done * B
            a += done
    return acc


@triton.jit
def load_pixels(x, offsets, hits, ks, left, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile (rows, BLOCK_K) of pixels by channels: zero beyond K, and in rows that do not hit the image."""
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


@triton.jit
def add_shortcut(
    acc,
    g,
    weight,
    image,
    rows,
    inside,
    ph,
    pw,
    cols,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + the 1x1 shortcut's grad-input of g.

    Its one tap meets the pixels h = STRIDE * p alone: those of the class (0, 0), whose rows are g's pixels in order.
    """
    ks = tl.arange(0, BLOCK_K)
    offsets = rows[:, None] * K + ks[None, :]
    weight_offsets = ks[:, None] * C + cols[None, :]
    for k in range(0, tl.where(ph + pw == 0, K, 0), BLOCK_K):
        tile = load_pixels(g + image + k, offsets, inside, ks, K - k, K, BLOCK_K)
        w = weight + k * C
        weight_tile = load_weight(w, weight_offsets, ks, K - k, cols, C, K, BLOCK_N, BLOCK_K)
        acc = dot(tile, weight_tile, acc, PRECISION)
    return acc


@triton.jit
def met_pixels(n, h, w, H, W, STRIDE: tl.constexpr):
    """The places of the pixels (n, h, w) in a map of every STRIDE-th pixel along H and W; -1 where it has none."""
    place = (n * tl.cdiv(H, STRIDE) + h // STRIDE) * tl.cdiv(W, STRIDE) + w // STRIDE
    return tl.where((h % STRIDE == 0) & (w % STRIDE == 0), place, -1)


@triton.jit
def store_masked_by_relu(
    acc,
    dx,
    a,
    y1,
    stats,
    z,
    z_stats,
    partial,
    image,
    offsets,
    mask,
    inside,
    cols,
    tile,
    T,
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store g = acc * (a > 0) in place of dx, and its sums g, g * xhat [and g * zhat] in row `tile` of partial.

    Without `a` the mask is recomputed: y1 * scale + shift > 0.
    """
    STORED: tl.constexpr = dx.dtype.element_ty
    live = cols < C
    if a is not None:
        passes = relu_passes(tl.load(a + image + offsets, mask=mask, other=0.0))
        value = tl.load(y1 + image + offsets, mask=mask, other=0.0).to(ACC)
    else:
        scale = tl.load(stats + (2 * C + cols)[None, :], mask=live[None, :])
        shift = tl.load(stats + (3 * C + cols)[None, :], mask=live[None, :])
        value = tl.load(y1 + image + offsets, mask=mask, other=0.0).to(ACC)
        passes = recomputed_relu_passes(value, scale, shift, STORED) & inside[:, None]  # outside, acc may be 0 * Inf
    g = tl.where(passes, acc.to(STORED).to(ACC), 0.0)
    tl.store(dx + image + offsets, g.to(STORED), mask=mask)
    sum_gx = column_sums(g * (value - tl.load(stats + cols[None, :], mask=live[None, :])))
    partial += tile.to(tl.int64) * C + cols
    plane = T.to(tl.int64) * C
    tl.store(partial, column_sums(g), mask=live)
    tl.store(partial + plane, sum_gx * tl.load(stats + C + cols, mask=live), mask=live)
    if z is not None:
        value = tl.load(z + image + offsets, mask=mask, other=0.0).to(ACC)
        sum_gz = column_sums(g * (value - tl.load(z_stats + cols[None, :], mask=live[None, :])))
        tl.store(partial + 2 * plane, sum_gz * tl.load(z_stats + C + cols, mask=live), mask=live)


# ---- the launcher ----------------------------------------------------------------------------------------------


class ReluMask(NamedTuple):
    """The convolution's input was relu(y1 * scale + shift) and was not kept."""

    y1: Tensor  # (N, C, H, W)
    stats: Tensor  # (4, C) = mean, invstd, scale, shift


class KeptMask(NamedTuple):
    """The convolution's input was a = relu(...), and was kept."""

    a: Tensor  # (N, C, H, W)


class IdentityGrad(NamedTuple):
    """The convolution's input, or every stride-th pixel of it, also takes an identity, whose gradient is g."""

    g: Tensor  # (N, C, H', W'), as many pixels as are met
    stride: int = 1


class ShortcutGrad(NamedTuple):
    """The convolution's input also feeds a 1x1 convolution of the same stride, whose gradient is g."""

    g: Tensor  # (N, L, P, Q)
    weight: Tensor  # (L, C, 1, 1)


class BlockEnd(NamedTuple):
    """The convolution's input also takes a shortcut, and is the block before's output relu(norm(y) + its shortcut)."""

    branch: IdentityGrad | ShortcutGrad
    out: Tensor  # (N, C, H, W)
    y: Tensor  # (N, C, H, W)
    stats: Tensor  # (4, C) = mean, invstd, scale, shift
    shortcut: NormedShortcut | None = None  # of that block, where it has a norm; its gradients are written elsewhere


AnyEpilogue = ReluMask | KeptMask | IdentityGrad | ShortcutGrad | BlockEnd | None
_EPILOGUES = {
    type(None): Epilogue.NONE,
    ReluMask: Epilogue.RELU_MASK,
    KeptMask: Epilogue.KEPT_MASK,
    IdentityGrad: Epilogue.IDENTITY_GRAD,
    ShortcutGrad: Epilogue.SHORTCUT_GRAD,
    BlockEnd: Epilogue.BLOCK_END,
}


def conv_grad_input(
    dy: Tensor,
    weight: Tensor,
    shape: ConvShape,
    epilogue: AnyEpilogue = None,
    tf32: bool = False,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dconv_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """dx (N, C, H, W) of dy (N, K, P, Q), with the epilogue applied.

    With ReluMask it is (g, sums (2, C)), with BlockEnd (g', partial (2 or 3, T, C)), as `merge_sums` takes it.

    `shape` is the forward convolution's. All activations and weights are dense channels_last and of dy's dtype and
    device; `stats` is contiguous float32 (float64 for float64). sum g * xhat and sum g are also written to `dweight`
    and `dbias` (C,), rounded to their types, and `dconv_bias` (C,) is zeroed. `tf32`: float32 products in
    TensorFloat-32. An empty batch launches nothing.

    Raises:
        ValueError: a shape, layout or device that does not fit, or one tile's pixels span 2^31 elements or more.
        TypeError: a type that does not fit.
    """
    vectors = {"dweight": dweight, "dbias": dbias, "dconv_bias": dconv_bias}
    _check(dy, weight, shape, epilogue, vectors)
    dtype, ACC = accumulator(dy)
    precision = product_precision(dy, tf32)
    size = shape.N, shape.C, shape.H, shape.W
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    kept, y1, stats, z, z_stats, branch = _operands(epilogue)
    planes = (stats is not None) * 2 + (z is not None)
    ends, masks = isinstance(epilogue, BlockEnd), isinstance(epilogue, ReluMask)
    shortcut_weight = branch.weight if isinstance(branch, ShortcutGrad) else None
    shortcut_K = shape.K if shortcut_weight is None else shortcut_weight.shape[0]
    branch_stride = branch.stride if isinstance(branch, IdentityGrad) else 1
    if shape.N == 0:
        for grad in vectors.values():
            if grad is not None:
                grad.zero_()
        size = (planes, shape.C) if masks else (planes, 1, shape.C)
        return (dx, torch.zeros(size, dtype=dtype, device=dy.device)) if planes else dx

    def run(config: Config) -> Tensor | None:
        T = _row_tiles(shape, config)
        partial = torch.empty((planes, T, shape.C), dtype=dtype, device=dy.device) if planes else None
        launch(
            grad_input_kernel,
            (T * triton.cdiv(shape.C, config.BLOCK_N),),
            dy,
            weight,
            dx,
            kept,
            y1,
            stats,
            z,
            z_stats,
            partial,
            branch.g if branch else None,
            shortcut_weight,
            shape.N,
            shape.H,
            shape.W,
            shape.P,
            shape.Q,
            T,
            **shape.constants(),
            DILATION=shape.dilation,
            SHORTCUT_K=shortcut_K,
            BRANCH_STRIDE=branch_stride,
            ACC=ACC,
            PRECISION=precision,
            **config.options(),
            **FLAGS,
        )
        return partial

    config = tuning.gemm_config(
        "grad_input",
        shape,
        dy,
        run,
        precision=precision,
        epilogue=_EPILOGUES[type(epilogue)],
        shortcut_channels=0 if shortcut_weight is None else shortcut_K,
        branch_stride=branch_stride,
        planes=planes,
    )
    partial = run(config)
    if ends:
        return dx, partial
    return (dx, merge_sums(partial, *vectors.values())) if masks else dx


def _operands(
    epilogue: AnyEpilogue,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, NamedTuple | None]:
    """(a, y1, stats, z, z_stats) as the kernel takes them, and the second branch."""
    if isinstance(epilogue, ReluMask):
        return None, *epilogue, None, None, None
    if isinstance(epilogue, KeptMask):
        return epilogue.a, None, None, None, None, None
    if isinstance(epilogue, BlockEnd):
        branch, out, y, stats, shortcut = epilogue
        return out, y, stats, *(shortcut[:2] if shortcut else (None, None)), branch
    return None, None, None, None, None, epilogue


def _row_tiles(shape: ConvShape, config: Config) -> int:
    """The row tiles of all parity classes: each class gets as many as the largest one, (0, 0), needs."""
    pixels = shape.N * triton.cdiv(shape.H, shape.stride) * triton.cdiv(shape.W, shape.stride)
    return triton.cdiv(pixels, config.BLOCK_M) * shape.stride**2


def _check(
    dy: Tensor,
    weight: Tensor,
    shape: ConvShape,
    epilogue: AnyEpilogue,
    vectors: dict[str, Tensor | None],
) -> None:
    nhwc_shape(dy)
    x, y = (shape.N, shape.C, shape.H, shape.W), (shape.N, shape.K, shape.P, shape.Q)
    check_nhwc("dy", dy, shape=y)
    check_nhwc("weight", weight, dy, (shape.K, shape.C, shape.R, shape.S))
    if isinstance(epilogue, ReluMask):
        check_nhwc("y1", epilogue.y1, dy, x)
        check_vectors("stats", epilogue.stats, (4, shape.C), dy)
        for name, vector in vectors.items():
            check_vector(name, vector, shape.C, dy)
    elif any(vector is not None for vector in vectors.values()):
        raise ValueError(f"{', '.join(vectors)}: only ReluMask has sums to write there")
    elif isinstance(epilogue, KeptMask):
        check_nhwc("a", epilogue.a, dy, x)
    elif isinstance(epilogue, BlockEnd):
        check_nhwc("out", epilogue.out, dy, x)
        check_nhwc("y", epilogue.y, dy, x)
        check_vectors("stats", epilogue.stats, (4, shape.C), dy)
        if epilogue.shortcut is not None:
            check_shortcut(epilogue.shortcut, epilogue.y)
    elif epilogue is not None and not isinstance(epilogue, (IdentityGrad, ShortcutGrad)):
        kinds = ", ".join(kind.__name__ for kind in _EPILOGUES if kind is not type(None))
        raise TypeError(f"epilogue: expected {kinds} or None, got {type(epilogue).__name__}")
    branch = epilogue
    if isinstance(epilogue, BlockEnd):
        branch = epilogue.branch
        if not isinstance(branch, (IdentityGrad, ShortcutGrad)):
            raise TypeError(f"branch: expected IdentityGrad or ShortcutGrad, got {type(branch).__name__}")
    if isinstance(branch, IdentityGrad):
        met = (triton.cdiv(pixels, branch.stride) for pixels in x[2:])
        check_nhwc("g", branch.g, dy, (*x[:2], *met))
    elif isinstance(branch, ShortcutGrad):
        reached = (shape.H - 1) // shape.stride + 1, (shape.W - 1) // shape.stride + 1
        if reached != y[2:]:
            raise ValueError(f"shape: a 1x1 shortcut of stride {shape.stride} has {reached} pixels, dy has {y[2:]}")
        L = branch.weight.shape[0]
        check_nhwc("shortcut weight", branch.weight, dy, (L, shape.C, 1, 1))
        check_nhwc("g", branch.g, dy, (shape.N, L, shape.P, shape.Q))

    if shape.dilation > 1 < shape.stride:
        raise ValueError(f"shape: expected stride 1 with dilation {shape.dilation}, got {shape.stride}")
    if max(shape.R, shape.S) > MAX_TAPS * shape.stride:
        raise ValueError(f"weight: {shape.R}x{shape.S} taps are more than {MAX_TAPS} per axis at stride {shape.stride}")
    rows = tuning.MOST_ROWS
    if shape.N * shape.H * shape.W + rows >= 2**31:
        raise ValueError(f"shape: expected fewer than 2^31 pixels, got {shape.N} images of {shape.H}x{shape.W}")
    area = (shape.H // shape.stride) * (shape.W // shape.stride)  # pixels of the smallest class that has any
    widest = branch.weight.shape[0] if isinstance(branch, ShortcutGrad) else shape.K
    span = (shape.P + shape.dilation * shape.R) * shape.Q * max(widest, shape.K)
    check_span(max(math.prod(x[1:]), span), area, shape.N, rows)
