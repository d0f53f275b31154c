"""Convolution as implicit GEMM, with BatchNorm + ReLU before it, and statistics, bias or all of inference after it.

    y[m, k] = sum over r, s, c of a[n, h, w, c] * weight[k, r, s, c]
    h, w = p * stride - padding + r * dilation, q * stride - padding + s * dilation

    prologue   a = x, or relu(x * scale + shift) per input channel; padding is zero after it
    epilogue   y as it is; y + bias; y and, per row tile, mean and M2 of y as stored;
               relu((y + conv_bias - mean) * invstd * weight + bias [+ skip]) with running statistics
    shortcut   a 1x1 convolution of the same stride over the same pixels (a window's centre), in the same launch

x is (N, H, W, C), y (N, P, Q, K), weight (K, R, S, C), all dense: `torch.channels_last`. Rows of the GEMM are output
pixels m = (n, p, q), columns are k, the reduction runs over (r, s, c): in steps of one tap and BLOCK_K channels, or,
for few channels, over the flattened axis. Accumulation is float32 (float64 for float64).

Grid (row tiles * column tiles,), the columns fastest. Passes over activations: 2, it reads x and writes y. The shortcut
is one more write, `skip` one more read. Taps and column tiles read x again from the L2 cache, since programs that share
rows are neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .batch_norm_statistics import Moments
from .device.batch_norm import load_affine, load_running
from .device.implicit_gemm import dot, split_pixels, valid_taps
from .device.pointwise import affine, relu
from .device.prologue import batch_norm_relu
from .device.reductions import column_sums, lanes_along_columns
from .host.arguments import (
    FLAGS,
    SIZES,
    accumulator,
    check_nhwc,
    check_span,
    check_vector,
    check_vectors,
    product_precision,
)
from .host.launcher import launch
from .host.shapes import MAX_WINDOW, ConvShape, conv_shape
from .tuning import Config

WIDE = tl.constexpr(64)  # columns of a tile from which its moments are worth a layout of their own

# ---- the kernel ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def conv_forward_kernel(
    x,  # (N, H, W, C)
    weight,  # (K, R, S, C)
    stats,  # (4, C) or None: the prologue's mean, invstd, scale, shift
    y,  # (N, P, Q, K)
    bias,  # (K,) or None
    partial,  # (3, T, K) or None: moments of y in each row tile
    running_mean,  # (K,) or None: no inference epilogue
    running_var,  # (K,)
    norm_weight,  # (K,) or None
    norm_bias,  # (K,) or None
    conv_bias,  # (K,) or None
    skip,  # (N, P, Q, K) or None
    shortcut_weight,  # (K, 1, 1, C) or None
    shortcut_y,  # (N, P, Q, K)
    shortcut_bias,  # (K,) or None
    shortcut_partial,  # (3, T, K) or None
    H,
    W,
    P,
    Q,
    M,  # N * P * Q
    T,  # row tiles
    eps: tl.float64,
    RELU: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,  # M is a multiple of BLOCK_M: no row needs a mask
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles * column tiles,), the columns fastest."""
    COLUMN_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_TILES
    m0 = tile.to(tl.int64) * BLOCK_M
    n0 = m0 // (P * Q)  # the tile's first image: offsets from it fit in 32 bits
    rows = tl.arange(0, BLOCK_M)
    live = tl.full([BLOCK_M], True, tl.int1) if WHOLE else rows < M - m0
    pixels = (m0 - n0 * (P * Q)).to(tl.int32) + rows
    n, p, q = split_pixels(pixels, P, Q)
    h0 = p * STRIDE - PADDING
    w0 = q * STRIDE - PADDING
    x += n0 * H * W * C
    pixel0 = (n * H + h0) * W + w0
    k = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if FLAT:
        acc = reduce_flat(acc, x, weight, pixel0, h0, w0, live, k, H, W, C, K, R, S, DILATION, PRECISION, BLOCK_K)
    else:
        taps = valid_taps(h0, w0, live, H, W, R, S, DILATION)
        acc = reduce_taps(acc, x, weight, stats, pixel0, taps, k, W, C, K, R, S, DILATION, PRECISION, BLOCK_N, BLOCK_K)
    out = m0 * K + rows[:, None] * K + k[None, :]
    mask = live[:, None] & (k < K)[None, :]
    if running_mean is not None:
        mean, invstd = load_running(running_mean, running_var, conv_bias, eps, k, K, ACC)
        scale, shift = load_affine(mean, invstd, norm_weight, norm_bias, k, K)
        # In the accumulator's layout a thread would hold scale and shift of all its columns, on sm_100 of 64.
        acc = affine(lanes_along_columns(acc), scale[None, :], shift[None, :])
    if bias is not None:
        acc += tl.load(bias + k, mask=k < K).to(ACC)[None, :]
    if skip is not None:
        acc += tl.load(skip + out, mask=mask).to(ACC)
    value = acc.to(y.dtype.element_ty)
    if RELU:
        value = relu(value)
    tl.store(y + out, value, mask=mask)
    if partial is not None:
        store_moments(partial, value, live, tile, T, k, K, ACC)

    if shortcut_weight is not None:
        # The loop above has read its pixels, so they come from the cache. Its accumulator takes the other's place.
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        centre = (h0 + PADDING < H) & (w0 + PADDING < W) & live
        pixel0 += PADDING * W + PADDING
        acc = reduce_taps(
            acc, x, shortcut_weight, None, pixel0, centre.to(tl.int32), k, W, C, K, 1, 1, 1, PRECISION, BLOCK_N, BLOCK_K
        )
        if shortcut_bias is not None:
            acc += tl.load(shortcut_bias + k, mask=k < K).to(ACC)[None, :]
        value = acc.to(y.dtype.element_ty)
        tl.store(shortcut_y + out, value, mask=mask)
        if shortcut_partial is not None:
            store_moments(shortcut_partial, value, live, tile, T, k, K, ACC)


@triton.jit
def reduce_taps(
    acc,
    x,
    weight,
    stats,
    pixel0,
    taps,
    k,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + sum over (r, s, c), a tap and BLOCK_K channels a step. `pixel0` is the first pixel of each row's window."""
    CHANNEL_STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    c = tl.arange(0, BLOCK_K)
    x += pixel0[:, None] * C + c[None, :]
    weight += k[None, :] * (R * S * C) + c[:, None]
    if stats is not None:
        scale, shift = load_channels(stats, c, C, BLOCK_K)
    for i in range(R * S * CHANNEL_STEPS):
        if R * S == 1:  # a plain product: nothing is asked of a tap
            tap = 0
            c0 = i * BLOCK_K
        else:
            tap = i // CHANNEL_STEPS
            c0 = i % CHANNEL_STEPS * BLOCK_K
        mask = ((taps & (tl.cast(1, taps.dtype) << tap)) != 0)[:, None]
        if C % BLOCK_K != 0:
            mask = mask & (c < C - c0)[None, :]
        a = tl.load(x + ((tap // S * W + tap % S) * (DILATION * C) + c0), mask=mask, other=0.0)
        if stats is not None:
            inside = (taps >> tap & 1) == 1  # computed again: once pipelined, the mask above is a later step's
            a = batch_norm_relu(a, scale, shift, inside[:, None])
            if CHANNEL_STEPS > 1:  # the next step's, to registers: half of the reads from shared memory would conflict
                scale, shift = load_channels(stats, (i + 1) % CHANNEL_STEPS * BLOCK_K + c, C, BLOCK_K)
        if C % BLOCK_K == 0 and K % BLOCK_N == 0:
            b = tl.load(weight + (tap * C + c0))
        else:
            b = tl.load(weight + (tap * C + c0), mask=(c < C - c0)[:, None] & (k < K)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def load_channels(stats, c, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale and shift of a step's channels. Both are 0 beyond C, and so the prologue's result is."""
    if C % BLOCK_K == 0:
        return tl.load(stats + 2 * C + c), tl.load(stats + 3 * C + c)
    else:
        mask = c < C
        return tl.load(stats + 2 * C + c, mask=mask, other=0.0), tl.load(stats + 3 * C + c, mask=mask, other=0.0)


@triton.jit
def reduce_flat(
    acc,
    x,
    weight,
    pixel0,
    h0,
    w0,
    live,
    k,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + sum over j = (r, s, c) as one axis: with few channels a step of one tap would be mostly padding."""
    FAR: tl.constexpr = -(1 << 30)
    h0 = tl.where(live, h0, FAR)
    for j0 in range(0, R * S * C, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        r = j // (S * C) * DILATION
        s = j // C % S * DILATION
        c = j % C
        # Rows that are not live lie far outside, as do positions beyond the last one, and a negative index is a large
        # unsigned one. So two comparisons do the work of six.
        h = h0[:, None] + tl.where(j < R * S * C, r, FAR)[None, :]
        w = w0[:, None] + s[None, :]
        inside = (h.to(tl.uint32) < tl.cast(H, tl.uint32)) & (w.to(tl.uint32) < tl.cast(W, tl.uint32))
        a = tl.load(x + (pixel0[:, None] * C + ((r * W + s) * C + c)[None, :]), mask=inside, other=0.0)
        mask = (j < R * S * C)[:, None] & (k < K)[None, :]
        b = tl.load(weight + (k[None, :] * (R * S * C) + j[:, None]), mask=mask, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def sum_rows(x):
    """Sums over the rows of a tile whose moments are taken: `column_sums` where `lanes_along_columns` has spread it."""
    if x.shape[1] >= WIDE:
        total = column_sums(x)
    else:
        total = tl.sum(x, 0)
    return total


@triton.jit
def store_moments(partial, value, live, tile, T, k, K: tl.constexpr, ACC: tl.constexpr):
    """Store a tile's moments in row `tile` of partial (3, T, K): mean, M2, and the mean's rounding error.

    For 16-bit types that error is 0: where their mean is large beside their deviations, their sum is exact.
    """
    if value.shape[1] >= WIDE:
        value = lanes_along_columns(value)
    rows = tl.sum(live.to(tl.int32), 0).to(ACC)
    rest = tl.zeros([value.shape[1]], ACC)
    SIXTEEN_BIT: tl.constexpr = value.dtype.primitive_bitwidth == 16
    value = tl.where(live[:, None], value.to(ACC), 0.0)  # a bias has made the others nonzero
    mean = sum_rows(value) / rows
    delta = tl.where(live[:, None], value - mean[None, :], 0.0)
    m2 = sum_rows(delta * delta)
    if not SIXTEEN_BIT:
        rest = sum_rows(delta) / rows
        m2 -= rest * rest * rows
    plane = tl.cast(T, tl.int64) * K
    partial += tile.to(tl.int64) * K + k
    tl.store(partial, mean, mask=k < K)
    tl.store(partial + plane, m2, mask=k < K)
    tl.store(partial + 2 * plane, rest, mask=k < K)


# ---- the launcher ----------------------------------------------------------------------------------------------


class Frozen(NamedTuple):
    """A BatchNorm with running statistics after the convolution; vectors are (K,)."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    conv_bias: Tensor | None  # of the convolution itself
    eps: float


_NOT_FROZEN = Frozen(None, None, None, None, None, 0.0)


class Shortcut(NamedTuple):
    """The block's 1x1 convolution, of the same input and stride."""

    weight: Tensor  # (K, C, 1, 1)
    bias: Tensor | None  # (K,)


class ConvOutput(NamedTuple):
    """What `conv_forward` returns, None for what it was not asked for."""

    y: Tensor  # (N, K, P, Q)
    moments: Moments | None
    shortcut: Tensor | None  # (N, K, P, Q)
    shortcut_moments: Moments | None


class Fusions(NamedTuple):
    """What is fused to a convolution: arguments of `conv_forward`."""

    stats: Tensor | None
    bias: Tensor | None
    frozen: Frozen | None
    skip: Tensor | None
    relu: bool
    moments: bool
    shortcut: Shortcut | None
    shortcut_moments: bool

    def flatten(self, shape: ConvShape) -> bool:
        """Whether the reduction runs over (r, s, c) as one axis. Neither the prologue nor the shortcut can."""
        return shape.few_channels and self.stats is None and self.shortcut is None

    def switches(self) -> dict[str, bool]:
        """What the kernel is compiled with, in the key of its tile."""
        return {
            "prologue": self.stats is not None,
            "relu": self.relu,
            "moments": self.moments,
            "bias": self.bias is not None,
            "frozen": self.frozen is not None,
            "skip": self.skip is not None,
            "shortcut": self.shortcut is not None,
            "shortcut_moments": self.shortcut_moments,
        }


def conv_forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int = 1,
    *,
    stats: Tensor | None = None,
    bias: Tensor | None = None,
    frozen: Frozen | None = None,
    skip: Tensor | None = None,
    relu: bool = False,
    moments: bool = False,
    shortcut: Shortcut | None = None,
    shortcut_moments: bool = False,
    tf32: bool = False,
) -> ConvOutput:
    """y = conv(a, weight) and what is fused to it; semantics of `torch.nn.functional.conv2d` for one group.

    Args:
        x: (N, C, H, W) channels_last, float16, bfloat16, float32 or float64.
        weight: (K, C, R, S) channels_last, of x's type.
        stride, padding, dilation: the same along H and W; padding is with zeros, after the prologue.
        stats: (4, C) of `batch_norm_finalize`: a = relu(x * scale + shift) in place of x.
        bias: (K,), added to y.
        frozen: y becomes batch_norm(y) with running statistics.
        skip: (N, K, P, Q) channels_last, added after `frozen` and `bias`.
        relu: a ReLU comes last.
        moments: also take mean and M2 of y's row tiles, of the values as stored.
        shortcut: also compute the 1x1 convolution of x (never of a) with the same stride.
        shortcut_moments: also take those of the shortcut's output.
        tf32: float32 products in TensorFloat-32.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    shape = conv_shape(x, weight, stride, padding, dilation)
    fusions = Fusions(stats, bias, frozen, skip, relu, moments, shortcut, shortcut_moments)
    _check(x, shape, fusions)
    precision = product_precision(x, tf32)

    def run(config: Config) -> ConvOutput:
        return _launch(config, x, weight, shape, fusions, precision)

    flat = fusions.flatten(shape)
    return run(tuning.gemm_config("forward", shape, x, run, precision=precision, flat=flat, **fusions.switches()))


def _launch(
    config: Config, x: Tensor, weight: Tensor, shape: ConvShape, fusions: Fusions, precision: str
) -> ConvOutput:
    dtype, ACC = accumulator(x)
    T = triton.cdiv(shape.M, config.BLOCK_M)
    frozen, shortcut = fusions.frozen or _NOT_FROZEN, fusions.shortcut
    y = torch.empty(_y_shape(shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    z = torch.empty_like(y) if shortcut is not None else None
    y_moments, z_moments = (
        Moments(x.new_empty((3, T, shape.K), dtype=dtype), config.BLOCK_M, shape.M) if wanted else None
        for wanted in (fusions.moments, fusions.shortcut_moments)
    )
    check_span(shape.H * shape.W * shape.C, shape.P * shape.Q, shape.N, config.BLOCK_M)
    if shape.M:
        launch(
            conv_forward_kernel,
            (T * triton.cdiv(shape.K, config.BLOCK_N),),
            x,
            weight,
            fusions.stats,
            y,
            fusions.bias,
            y_moments and y_moments.partial,
            frozen.running_mean,
            frozen.running_var,
            frozen.weight,
            frozen.bias,
            frozen.conv_bias,
            fusions.skip,
            shortcut and shortcut.weight,
            z,
            shortcut and shortcut.bias,
            z_moments and z_moments.partial,
            shape.H,
            shape.W,
            shape.P,
            shape.Q,
            shape.M,
            T,
            frozen.eps,
            RELU=fusions.relu,
            FLAT=fusions.flatten(shape),
            WHOLE=shape.M % config.BLOCK_M == 0,
            ACC=ACC,
            DILATION=shape.dilation,
            PRECISION=precision,
            **shape.constants(),
            **config.options(),
            **FLAGS,
        )
    return ConvOutput(y, y_moments, z, z_moments)


def _y_shape(shape: ConvShape) -> tuple[int, int, int, int]:
    return shape.N, shape.K, shape.P, shape.Q


def _check(x: Tensor, shape: ConvShape, fusions: Fusions) -> None:
    if fusions.stats is not None:
        check_vectors("stats", fusions.stats, (4, shape.C), x)
    check_vector("bias", fusions.bias, shape.K, x)
    for name, vector in zip(Frozen._fields[:-1], fusions.frozen or ()):
        check_vector(name, vector, shape.K, x)
    if fusions.skip is not None:
        check_nhwc("skip", fusions.skip, x, _y_shape(shape))
    if fusions.shortcut is not None:
        check_nhwc("shortcut.weight", fusions.shortcut.weight, x, (shape.K, shape.C, 1, 1))
        check_vector("shortcut.bias", fusions.shortcut.bias, shape.K, x)
        width = 2 * shape.padding + 1
        if shape.R != shape.S or (shape.R - 1) * shape.dilation + 1 != width:
            dilated = f" with dilation {shape.dilation}" * (shape.dilation > 1)
            raise ValueError(
                f"shortcut: expected a window with its centre at the padding, that is {width} wide, "
                f"got {shape.R}x{shape.S}{dilated}"
            )
    elif fusions.shortcut_moments:
        raise ValueError("shortcut_moments: expected a shortcut to take them of, got none")
    if not fusions.flatten(shape) and shape.R * shape.S > MAX_WINDOW:
        raise ValueError(
            f"weight: expected a window of at most {MAX_WINDOW} pixels (a row's bit mask has one for each), "
            f"got {shape.R}x{shape.S}"
        )
