"""BatchNorm, ReLU and a 3x3 stride-2 max-pool in one pass: what follows the stem's convolution.

    z   = y * scale + shift
    out = relu(max of z over the window)
    tap = where in the window the maximum is, 0 to 8

y is (N, H, W, C); out and tap are (N, P, Q, C) with P = (H + 1) // 2 and Q = (W + 1) // 2, all dense NHWC. Window
(p, q) begins at pixel (2p - 1, 2q - 1). `tap` is uint8, an eighth of the bytes of PyTorch's int64 indices. relu(max z)
is max(relu z), and where it is positive the same pixel is the first to reach it: so ties and NaN are as in
`torch.nn.MaxPool2d` after a ReLU.

Grid (images * tiles of out's pixels, column tiles). Reads y once, and from the cache again where windows overlap.
Writes out and tap, each a quarter of y's elements. relu(z) is never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import affine, relu
from .host.arguments import SIZES, check_images, check_vectors
from .host.launcher import launch
from .host.tiling import Tiling, tiling


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


_THREADS = 128  # 4 warps


def out_size(size: int) -> int:
    """Pixels of out along an axis where y has `size`."""
    return (size + 1) // 2


def window_tiling(windows: int, y: Tensor) -> Tiling:
    """The tiling of a map's windows for y's channels in which a thread holds 16 bytes of y's type, and not more.

    With more, the compiler would give each thread 16 bytes of tap too, that is several vectors of y in a row, and
    neighbouring threads would no longer share sectors. Where a row is not whole vectors, a thread holds two elements:
    each needs an address of its own, and the addresses of more of them would spill.
    """
    vector = 16 // y.element_size()
    return tiling(windows, y.shape[1], _THREADS * (vector if y.shape[1] % vector == 0 else 2))


def batch_norm_max_pool(y: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """(out, tap): (N, C, P, Q) channels_last of y's type and of uint8, from y (N, C, H, W) and stats (4, C).

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit, or an image of 2^31 elements or more.
    """
    check_images(y)
    check_vectors("stats", stats, (4, y.shape[1]), y)
    N, C, H, W = y.shape
    P, Q = out_size(H), out_size(W)
    out = torch.empty((N, C, P, Q), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    tap = torch.empty_like(out, dtype=torch.uint8)
    t = window_tiling(P * Q, y)
    tiles = triton.cdiv(P * Q, t.BLOCK_M)
    launch(
        pool_kernel,
        (N * tiles, triton.cdiv(C, t.BLOCK_C)),
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
