"""Grad-weight of a convolution as implicit GEMM, with BatchNorm + ReLU of its input before it.

    dW[k, r, s, c] = sum over output pixels (n, p, q) of dy[n, p, q, k] * a[n, h, w, c]
    h, w = p * stride - padding + r * dilation, q * stride - padding + s * dilation
    a = x as stored, or relu(x * scale + shift) of a BatchNorm, with padding zero after the ReLU

x is (N, H, W, C), dy is (N, P, Q, K), dW is (K, R, S, C), all dense: `torch.channels_last`. Rows of the GEMM are k,
columns are (r, s, c), the reduction runs over pixels.

The reduction is split. Every split leaves a partial result in float32 (float64 for float64), and a second kernel adds
these in a fixed order and rounds to the weight's type, so there are no atomics. The split depends on the shape alone.
So the bits are the same from run to run and from device to device.

Grid (tiles of dW, splits), then (columns of dW,). Passes over activations: 2, it reads dy and x; a is never stored. The
partials are written and read once; `_splits` keeps their bytes below a quarter of the activations' where that leaves
work for a whole GPU.

A NaN or Inf in dy or x makes every gradient it enters NaN or Inf. It may reach further than in a convolution that
skips its padding: here padding is a zero that is multiplied, and 0 * Inf is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .device.implicit_gemm import dot
from .device.prologue import affine_relu, keep
from .device.reductions import column_sums
from .host.arguments import FLAGS, SIZES, accumulator, check_nhwc, check_vectors, nhwc_shape, product_precision
from .host.launcher import launch
from .host.shapes import ConvShape, check_taps
from .host.tiling import reduction_splits
from .tuning import Config

# ---- the kernels -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def conv_grad_weight_kernel(
    dy,  # (N, P, Q, K)
    x,  # (N, H, W, C)
    stats,  # (4, C): mean, invstd, scale, shift; None: x is taken as it is
    dw,  # (splits, K, R, S, C) partial results, or (K, R, S, C) where there is one split
    H,
    W,
    P,
    Q,
    M,  # pixels of the reduction: x's where dy moves, else dy's
    STEPS,  # BLOCK_K-pixel steps of a split
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DY_MOVES: tl.constexpr,
    SAME: tl.constexpr,  # stride 1 and H, W = P, Q
    EVEN: tl.constexpr,  # M is a multiple of BLOCK_K
    FLAT: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """TAPS positions (r, s) of a row r, for BLOCK_M by BLOCK_N channels, over one split. Grid (tiles of dW, splits).

    One operand stands still: BLOCK_M of its channels are read in the order of its pixels, once for all taps. The other
    one moves: BLOCK_N of its channels are read at other pixels for each tap. dy stands still and x moves, unless x goes
    through BatchNorm with stride 1. Then dy moves, so that the activation is recomputed once for all taps and its
    padding is never met. The still operand is the dot's first, which the tensor cores of sm_90 take from registers.

    With FLAT, for few channels, a column is any of the R * S * C positions of a window, and each element of x has an
    address of its own.
    """
    COLUMNS: tl.constexpr = R * S * C if FLAT else C
    BLOCK_OUT: tl.constexpr = BLOCK_N if DY_MOVES else BLOCK_M
    BLOCK_IN: tl.constexpr = BLOCK_M if DY_MOVES else BLOCK_N
    ALONG: tl.constexpr = SAME and not FLAT  # the moving operand's pixels advance by BLOCK_K a step, as the still one's
    ks, cs, tap = weight_tile(K, COLUMNS, TAPS, BLOCK_OUT, BLOCK_IN)
    live_k = existing(ks, K, BLOCK_OUT)
    live_c = existing(cs, COLUMNS, BLOCK_IN)
    scale, shift = None, None
    if stats is not None:
        scale, shift = load_prologue(stats, cs % C if FLAT else cs, live_c, C, DY_MOVES)

    # The still operand's pixels of the first step: row i, column j and image n, counted from the split's first image.
    height = H if DY_MOVES else P
    width = W if DY_MOVES else Q
    m0 = tl.program_id(1).to(tl.int64) * STEPS * BLOCK_K
    left = tl.minimum(M - m0, STEPS * BLOCK_K).to(tl.int32)
    image = m0 // (height * width)
    rows = tl.arange(0, BLOCK_K)
    j, i, n = locate_pixels((m0 - image * height * width).to(tl.int32) + rows, height, width)

    # The moving operand's pixels at the first tap: row i * STRIDE + row0, column j * STRIDE + col0.
    if DY_MOVES:
        row0, col0 = PADDING - tap // S * DILATION, PADDING - tap % S * DILATION
        still_offsets = cs[:, None] + rows[None, :] * C
        x += m0 * C
        start = (m0 + row0 * Q + col0 if ALONG else image * P * Q) * K
        dy += start
    else:
        row0, col0 = tap // S * DILATION - PADDING, tap % S * DILATION - PADDING
        still_offsets = ks[:, None] + rows[None, :] * K
        dy += m0 * K
        if FLAT:
            r, s = cs // (S * C) * DILATION, cs // C % S * DILATION
        x += (m0 + row0 * W + col0 if ALONG else image * H * W) * C

    acc = ()
    for _ in tl.static_range(TAPS):
        acc += (tl.zeros([BLOCK_M, BLOCK_N], ACC),)
    for step in range(tl.cdiv(left, BLOCK_K)):
        valid = tl.full([BLOCK_K], True, tl.int1) if EVEN else rows < left - step * BLOCK_K
        v = i * STRIDE + row0
        w = j * STRIDE + col0
        if DY_MOVES:
            moved = rows if ALONG else (n * P + v) * Q + w
            a = load_input(x + still_offsets, valid[None, :], live_c[:, None], scale, shift)
            acc = multiply_by_moving_grad(
                acc, a, dy, moved, v, w, valid, ks, live_k, P, Q, K, R * S, PADDING, DILATION, TAPS, PRECISION
            )
        else:
            moved = rows if ALONG else (n * H + v) * W + w
            g = tl.load(dy + still_offsets, mask=live_k[:, None] & valid[None, :], other=0.0)
            if FLAT:
                offsets, inside = gathered_window(moved, v, w, valid, r, s, cs, H, W, C)
                a = load_input(x + offsets, inside, live_c[None, :], scale, shift)
                acc = (dot(g, a, acc[0], PRECISION),)
            else:
                acc = multiply_by_moving_input(
                    acc, g, x, scale, shift, moved, v, w, valid, cs, live_c, H, W, C, PADDING, DILATION, TAPS, PRECISION
                )
        j, i, n = next_pixels(j, i, n, height, width, BLOCK_K)
        if DY_MOVES:
            x += BLOCK_K * C
        if ALONG or not DY_MOVES:
            dy += BLOCK_K * K
        if ALONG and not DY_MOVES:
            x += BLOCK_K * C

    dw += tl.program_id(1).to(tl.int64) * (K * R * S * C)
    for t in tl.static_range(TAPS):
        offsets = ks[:, None] * (R * S * C) + (tap + t) * C + cs[None, :]
        mask = live_k[:, None] & live_c[None, :]
        tl.store(dw + offsets, tl.trans(acc[t]) if DY_MOVES else acc[t], mask=mask)


@triton.jit
def weight_tile(
    K: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
):
    """This program's tile of dW: its output channels, its input channels (positions where FLAT) and its first tap."""
    K_TILES: tl.constexpr = (K + BLOCK_OUT - 1) // BLOCK_OUT
    C_TILES: tl.constexpr = (COLUMNS + BLOCK_IN - 1) // BLOCK_IN
    ks = tl.program_id(0) % K_TILES * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    cs = tl.program_id(0) // K_TILES % C_TILES * BLOCK_IN + tl.arange(0, BLOCK_IN)
    tap = tl.program_id(0) // (K_TILES * C_TILES) * TAPS
    return ks, cs, tap


@triton.jit
def existing(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE. Where blocks divide SIZE it is known, and no load needs a mask for it."""
    return index < SIZE if SIZE % BLOCK else tl.full([BLOCK], True, tl.int1)


@triton.jit
def load_prologue(stats, channels, live, C: tl.constexpr, DY_MOVES: tl.constexpr):
    """scale and shift of the input's channels. They lie along the rows of its tile where dy moves, else the columns."""
    scale = tl.load(stats + 2 * C + channels, mask=live, other=0.0)
    shift = tl.load(stats + 3 * C + channels, mask=live, other=0.0)
    if DY_MOVES:
        scale, shift = scale[:, None], shift[:, None]
    else:
        scale, shift = scale[None, :], shift[None, :]
    return scale, shift


@triton.jit
def locate_pixels(pixels, height, width):
    """Column, row and image of each pixel, counted over maps of height x width."""
    return pixels % width, pixels // width % height, pixels // (height * width)


@triton.jit
def next_pixels(j, i, n, height, width, BLOCK_K: tl.constexpr):
    """The pixels BLOCK_K further. It adds and carries where `locate_pixels` divides."""
    j += BLOCK_K % width
    carry = j >= width
    j -= tl.where(carry, width, 0)
    i += BLOCK_K // width % height + carry.to(tl.int32)
    carry = i >= height
    i -= tl.where(carry, height, 0)
    n += BLOCK_K // (width * height) + carry.to(tl.int32)
    return j, i, n


@triton.jit
def multiply_by_moving_grad(
    acc,
    a,
    dy,
    moved,
    p,
    q,
    valid,
    ks,
    live_k,
    P,
    Q,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[t] + a @ g for each tap t. Its g, of dy, is read at the pixels (p, q - t * DILATION).

    A window of one tap meets all of them.
    """
    new = ()
    for t in tl.static_range(TAPS):
        inside = valid
        if WINDOW > 1 or PADDING > 0:
            inside = valid & within(p, P) & within(q - t * DILATION, Q)
        offsets = (moved - t * DILATION)[:, None] * K + ks[None, :]
        g = tl.load(dy + offsets, mask=inside[:, None] & live_k[None, :], other=0.0)
        new += (dot(a, g, acc[t], PRECISION),)
    return new


@triton.jit
def multiply_by_moving_input(
    acc,
    g,
    x,
    scale,
    shift,
    moved,
    h,
    w,
    valid,
    cs,
    live_c,
    H,
    W,
    C: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[t] + g @ a for each tap t. Its a is read at the pixels (h, w + t * DILATION)."""
    new = ()
    for t in tl.static_range(TAPS):
        inside = valid
        if PADDING > 0:
            inside = valid & within(h, H) & within(w + t * DILATION, W)
        offsets = (moved + t * DILATION)[:, None] * C + cs[None, :]
        a = load_input(x + offsets, inside[:, None], live_c[None, :], scale, shift)
        new += (dot(g, a, acc[t], PRECISION),)
    return new


@triton.jit
def gathered_window(pixel0, h0, w0, valid, r, s, cs, H, W, C: tl.constexpr):
    """Where x has the positions `cs` = (r, s, c) of each row's window, and which of these lie in the image."""
    offsets = pixel0[:, None] * C + ((r * W + s) * C + cs % C)[None, :]
    h, w = h0[:, None] + r[None, :], w0[:, None] + s[None, :]
    return offsets, valid[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def within(index, size):
    """0 <= index < size, as one comparison."""
    return index.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def load_input(pointers, inside, live, scale, shift):
    """A tile of the convolution's input, activated where scale is given, zero where not `inside`.

    Its channels may lie along either axis; scale and shift lie along the same one.
    """
    value = tl.load(pointers, mask=inside & live, other=0.0)
    if scale is not None:
        value = keep(affine_relu(value, scale, shift), inside)
    return value


@triton.jit
def merge_splits_kernel(
    partial,  # (T, SIZE)
    dw,  # (SIZE,)
    T,
    SIZE,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dW, the sum of its partial results in a fixed order. Grid (column tiles,). Reads the partials once."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    splits = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK], ACC)
    for t in range(0, T, BLOCK_T):
        mask = (t + splits < T)[:, None] & (cols < SIZE)[None, :]
        total += tl.load(partial + (t + splits).to(tl.int64)[:, None] * SIZE + cols[None, :], mask=mask, other=0.0)
    tl.store(dw + cols, column_sums(total), mask=cols < SIZE)


# ---- the tiling ------------------------------------------------------------------------------------------------

_MAX_SPAN = 2**31  # elements that 32-bit offsets reach


@dataclass(frozen=True)
class GradWeightPlan:
    """How one convolution's grad-weight is launched. It depends on the shape and the types alone, not on the device."""

    splits: int
    tiles: int
    steps: int  # in a split
    pixels: int  # that the reduction runs over
    constants: dict[str, object]


def fit(config: Config, shape: ConvShape, itemsize: int, activated: bool) -> Config:
    """config, its tile no larger than dW, nor smaller than a tensor core's. `activated`: the launch has `stats`."""
    columns = shape.R * shape.S * shape.C if shape.few_channels else shape.C
    still, moving = (columns, shape.K) if dy_moves(shape, activated) else (shape.K, columns)
    if itemsize > 2:  # wider elements fill more registers
        config = Config(min(64, config.BLOCK_M), min(64, config.BLOCK_N), 16, 4, 2)

    def size(block: int, n: int) -> int:
        return max(16, min(block, triton.next_power_of_2(n)))

    BLOCK_M = size(config.BLOCK_M, still)
    num_warps = min(config.num_warps, BLOCK_M // (8 if itemsize == 8 else 16))  # a tensor core's rows at least
    return replace(config, BLOCK_M=BLOCK_M, BLOCK_N=size(config.BLOCK_N, moving), num_warps=num_warps)


def dy_moves(shape: ConvShape, activated: bool) -> bool:
    """Whether x stands still from tap to tap, so that its activation is computed once: see the kernel."""
    return activated and shape.stride == 1 and not shape.few_channels


@cache
def plan(shape: ConvShape, config: Config, itemsize: int, activated: bool) -> GradWeightPlan:
    """Splits, tiles and specialisation of a launch."""
    flat = shape.few_channels
    moves = dy_moves(shape, activated)
    accumulators = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps) * max(1, itemsize // 4)
    taps = shape.S if not flat and accumulators * shape.S <= tuning.MAX_ACCUMULATORS else 1
    block_k, block_c = (config.BLOCK_N, config.BLOCK_M) if moves else (config.BLOCK_M, config.BLOCK_N)
    tiles = triton.cdiv(shape.K, block_k)
    if flat:
        tiles *= triton.cdiv(shape.R * shape.S * shape.C, block_c)
    else:
        tiles *= triton.cdiv(shape.C, block_c) * (shape.R * shape.S // taps)
    M = shape.N * shape.H * shape.W if moves else shape.M
    steps = triton.cdiv(M, config.BLOCK_K)
    per_split = triton.cdiv(steps, _splits(shape, tiles, steps, itemsize))
    return GradWeightPlan(
        splits=triton.cdiv(steps, per_split),
        tiles=tiles,
        steps=per_split,
        pixels=M,
        constants={
            **shape.constants(),
            "DILATION": shape.dilation,
            "DY_MOVES": moves,
            "SAME": shape.stride == 1 and (shape.H, shape.W) == (shape.P, shape.Q),
            "EVEN": M % config.BLOCK_K == 0,
            "FLAT": flat,
            "TAPS": taps,
        },
    )


def _splits(shape: ConvShape, tiles: int, steps: int, itemsize: int) -> int:
    """Splits that the reduction's `steps` should make.

    Where tensors are huge, they are so many that 32-bit offsets reach all of a split.
    """
    activations = shape.N * (shape.H * shape.W * shape.C + shape.P * shape.Q * shape.K)
    partial = shape.K * shape.R * shape.S * shape.C * max(4, itemsize)
    splits = reduction_splits(tiles, steps, activations * itemsize, partial)
    return max(splits, min(steps, triton.cdiv(4 * activations, _MAX_SPAN)))


# ---- the launchers ---------------------------------------------------------------------------------------------


def conv_grad_weight(
    dy: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int = 1,
    *,
    stats: Tensor | None = None,
    tf32: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dW (K, C, R, S) from dy (N, K, P, Q) and x (N, C, H, W), all channels_last; of `dtype`, x's by default.

    With `stats` (4, C), as `batch_norm_finalize` gives them, the convolution's input was relu(x * scale + shift).
    float32 is multiplied in full, with `tf32` on tensor cores. The gradient of a bias is not taken here: wherever a
    convolution has one, the backward of the BatchNorm or ReLU that follows it has summed dy already.

    Raises:
        ValueError: a shape, layout or device that does not fit, or tensors too large for 32-bit offsets.
        TypeError: a type that does not fit.
    """
    shape = _check(dy, x, kernel_size, (stride, padding, dilation), stats)
    precision = product_precision(x, tf32)
    if shape.N == 0:
        return empty_weight(x, shape, dtype).zero_()

    def run(config: Config) -> Tensor:
        return _launch(config, dy, x, shape, stats, precision, empty_weight(x, shape, dtype))

    config = tuning.gemm_config(
        "grad_weight",
        shape,
        x,
        run,
        precision=precision,
        flat=shape.few_channels,
        prologue=stats is not None,
    )
    return run(config)


def _launch(
    config: Config,
    dy: Tensor,
    x: Tensor,
    shape: ConvShape,
    stats: Tensor | None,
    precision: str,
    dw: Tensor,
) -> Tensor:
    config = fit(config, shape, x.element_size(), stats is not None)
    planned = plan(shape, config, x.element_size(), stats is not None)
    dtype, ACC = accumulator(x)
    size = planned.splits, shape.K, shape.R, shape.S, shape.C
    partial = dw if planned.splits == 1 else torch.empty(size, dtype=dtype, device=x.device)
    launch(
        conv_grad_weight_kernel,
        (planned.tiles, planned.splits),
        dy,
        x,
        stats,
        partial,
        shape.H,
        shape.W,
        shape.P,
        shape.Q,
        planned.pixels,
        planned.steps,
        **planned.constants,
        ACC=ACC,
        PRECISION=precision,
        **config.options(),
        **FLAGS,
    )
    return dw if planned.splits == 1 else merge_splits(partial, dw)


def merge_splits(partial: Tensor, dw: Tensor) -> Tensor:
    """dw, any shape, the sum of partial (splits, ...) in the order of dw's memory, rounded to dw's type."""
    splits, size = partial.shape[0], dw.numel()
    BLOCK_T = min(16, triton.next_power_of_2(splits))
    BLOCK = 1024 // BLOCK_T
    launch(
        merge_splits_kernel,
        (triton.cdiv(size, BLOCK),),
        partial,
        dw,
        splits,
        size,
        ACC=accumulator(partial)[1],
        BLOCK_T=BLOCK_T,
        BLOCK=BLOCK,
        num_warps=4,
        **FLAGS,
    )
    return dw


def empty_weight(x: Tensor, shape: ConvShape, dtype: torch.dtype | None) -> Tensor:
    """An uninitialised weight (K, C, R, S) channels_last, of `dtype`, x's by default, on x's device."""
    return x.new_empty((shape.K, shape.R, shape.S, shape.C), dtype=dtype).permute(0, 3, 1, 2)


def _check(
    dy: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    geometry: tuple[int, int, int],
    stats: Tensor | None,
) -> ConvShape:
    nhwc_shape(x)
    check_nhwc("dy", dy, x)
    (N, C, H, W), (R, S), (stride, padding, dilation) = x.shape, kernel_size, geometry
    if min(R, S, stride, dilation) < 1 or padding < 0:
        raise ValueError(
            f"expected a positive kernel_size, stride and dilation, and a padding of at least 0, got {kernel_size}, "
            f"{stride}, {dilation} and {padding}"
        )
    shape = ConvShape(N, H, W, C, dy.shape[1], R, S, stride, padding, dilation)
    expected = (N, shape.K, shape.P, shape.Q)
    if tuple(dy.shape) != expected or shape.P < 1 or shape.Q < 1:
        raise ValueError(
            f"dy: expected shape {expected} for x {tuple(x.shape)}, a {R}x{S} kernel, stride {stride}, padding "
            f"{padding} and dilation {dilation}, got {tuple(dy.shape)}"
        )
    if stats is not None:
        check_vectors("stats", stats, (4, C), x)
    if 4 * max(H * W * C, shape.P * shape.Q * shape.K) > _MAX_SPAN or shape.K * R * S * C > _MAX_SPAN:
        raise ValueError(f"an image or the weight is too large for 32-bit offsets: {shape}")
    check_taps(shape)
    return shape
