"""BatchNorm apply, ReLU and 3x3 stride-2 max-pool in one pass: what follows the stem's convolution.

    forward   z = y * scale + shift;  out = relu(max of z over the window);  tap = where in the window, 0 to 8
    backward  g = sum of dout * (out > 0) over windows whose tap is this pixel;  then BatchNorm's, see batch_norm.py

y is (N, H, W, C), out is (N, P, Q, C) with P = (H + 1) // 2 and Q = (W + 1) // 2; window (p, q) begins at pixel
(2p - 1, 2q - 1). `tap` is uint8, an eighth of PyTorch's int64 indices. relu(max z) is max(relu z), and where it is
positive the first pixel to reach it is the same, so ties and NaN are as in `torch.nn.MaxPool2d` after a ReLU.

Passes over y-sized activations, out-sized ones (a quarter) in brackets: forward 1 (+ out, tap), backward reduce 1
(+ dout, out, tap), backward apply 2 (+ the same). Neither relu(z) nor g is ever written. Each pixel gathers from its
windows, so there are no atomics. A program of the backward takes windows (p, q), and of each the pixels (2p, 2q) to
(2p + 1, 2q + 1) in turn. These lie in 1, 2, 2 and 4 windows, all among the same four, loaded once: nine looks serve
them, where pixels that each ask all they might lie in take sixteen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_backward_reduce import merge_sums
from .device.batch_norm import center_grad, load_center
from .device.max_pool import gather_grad, load_windows, locate
from .device.pointwise import affine, relu
from .device.reductions import column_sums
from .host.launch import SIZES, accumulator, check_nhwc, check_vectors, nhwc_shape
from .host.tiling import Tiling, tiling

# ---- the kernels -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    y,  # (N, H, W, C)
    stats,  # (4, C): mean, invstd, scale, shift
    out,  # (N, P, Q, C)
    tap,  # (N, P, Q, C) uint8
    H,
    W,
    P,
    Q,
    TILES,  # BLOCK_M-pixel tiles of one image's out
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = relu(max z) and the tap that gave it. Grid (N * TILES, column tiles)."""
    n = (tl.program_id(0) // TILES).to(tl.int64)
    pixels = (tl.program_id(0) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    p = pixels // Q
    q = pixels % Q
    y += n * H * W * C
    scale = tl.load(stats + 2 * C + cols, mask=live)[None, :]
    shift = tl.load(stats + 3 * C + cols, mask=live)[None, :]
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), ACC)
    best_tap = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            h = 2 * p - 1 + r
            w = 2 * q - 1 + s
            inside = (p < P) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask = inside[:, None] & live[None, :]
            value = tl.load(y + (h * W + w)[:, None] * C + cols[None, :], mask=mask, other=0.0)
            z = affine(value.to(ACC), scale, shift).to(out.dtype.element_ty).to(ACC)
            better = mask & ((z > best) | (z != z))
            best = tl.where(better, z, best)
            best_tap = tl.where(better, r * 3 + s, best_tap)
    mask = (p < P)[:, None] & live[None, :]
    offsets = n * P * Q * C + pixels[:, None] * C + cols[None, :]
    tl.store(out + offsets, relu(best), mask=mask)
    tl.store(tap + offsets, best_tap.to(tl.uint8), mask=mask)


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
        center = load_center(stats, sums, cols, M, C, ACC)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            offsets, mask = locate(n, p, q, a, b, cols, H, W, C)
            g = gather_grad(taps, grads, a, b, ACC)
            if sums is not None:
                value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
                g = center_grad(g, value, center)
            tl.store(dy + offsets, scale[None, :] * g, mask=mask)


# ---- launchers -------------------------------------------------------------------------------------------------

_THREADS = 128  # 4 warps


def _tiling(windows: int, x: Tensor) -> Tiling:
    """The tiling of a map's windows for x's channels in which a thread holds 16 bytes of x's type, and not more.

    With more, the compiler would give each thread 16 bytes of tap too, that is several vectors of x in a row, and
    neighbouring threads would no longer share sectors. Where rows are no whole vectors, a thread holds two elements:
    each has its window's address to itself, and with more of them it would spill.
    """
    vector = 16 // x.element_size()
    return tiling(windows, x.shape[1], _THREADS * (vector if x.shape[1] % vector == 0 else 2))


def out_size(size: int) -> int:
    """Pixels of out along an axis of `size` pixels."""
    return (size + 1) // 2


def _check_pooled(dout: Tensor, y: Tensor, out: Tensor, tap: Tensor, stats: Tensor) -> None:
    N, C, H, W = y.shape
    shape = N, C, out_size(H), out_size(W)
    check_nhwc("dout", dout, y, shape)
    check_nhwc("out", out, y, shape)
    check_nhwc("tap", tap, y, shape, torch.uint8)
    check_vectors("stats", stats, (4, C), y)


def apply_pool(y: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """(out, tap): (N, C, P, Q) channels_last of y's type and of uint8, from y (N, C, H, W) and stats (4, C)."""
    nhwc_shape(y)
    check_vectors("stats", stats, (4, y.shape[1]), y)
    N, C, H, W = y.shape
    P, Q = out_size(H), out_size(W)
    out = y.new_empty((N, C, P, Q)).to(memory_format=torch.channels_last)
    tap = torch.empty_like(out, dtype=torch.uint8)
    t = _tiling(P * Q, y)
    tiles = triton.cdiv(P * Q, t.BLOCK_M)
    with torch.cuda.device_of(y):
        pool_kernel[(N * tiles, triton.cdiv(C, t.BLOCK_C))](
            y,
            stats,
            out,
            tap,
            H,
            W,
            P,
            Q,
            tiles,
            **t.options(y),
        )
    return out, tap


def backward_reduce(
    dout: Tensor,
    y: Tensor,
    out: Tensor,
    tap: Tensor,
    stats: Tensor,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Tensor:
    """sums (2, C) = sum g, sum g * xhat; also written to `dbias` and `dweight` (C,), rounded to their types."""
    nhwc_shape(y)
    _check_pooled(dout, y, out, tap, stats)
    N, C, H, W = y.shape
    P, Q = out.shape[2:]
    t = _tiling(P * Q, y)
    tiles = triton.cdiv(P * Q, t.BLOCK_M)
    whole = tiling(N * tiles * t.BLOCK_M, C)
    steps = triton.cdiv(whole.rows, t.BLOCK_M)
    T = triton.cdiv(N * tiles, steps)
    partial = torch.empty((2, T, C), dtype=accumulator(y)[0], device=y.device)
    with torch.cuda.device_of(y):
        pool_backward_reduce_kernel[(T, triton.cdiv(C, t.BLOCK_C))](
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
    return merge_sums(partial, dweight, dbias)


def backward_apply(dout: Tensor, y: Tensor, out: Tensor, tap: Tensor, stats: Tensor, sums: Tensor | None) -> Tensor:
    """dy (N, C, H, W) channels_last; `sums` None means frozen statistics."""
    M, C = nhwc_shape(y)
    _check_pooled(dout, y, out, tap, stats)
    if sums is not None:
        check_vectors("sums", sums, (2, y.shape[1]), y)
    (N, _, H, W), (P, Q) = y.shape, out.shape[2:]
    t = _tiling(P * Q, y)
    tiles = triton.cdiv(P * Q, t.BLOCK_M)
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    with torch.cuda.device_of(y):
        pool_backward_apply_kernel[(N * tiles, triton.cdiv(C, t.BLOCK_C))](
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
