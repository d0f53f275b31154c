"""BatchNorm, the excitation, the residual add and ReLU in one pass: the tail of a block with squeeze-and-excitation.

    out = [relu](gate * [relu](y * scale + shift) [+ shortcut])

y, shortcut and out are dense NHWC, N images of H*W rows and C columns; gate is (N, C), a factor for each map. Grid
(images * row tiles, column tiles). Moves 2 activations, 3 with a shortcut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import affine
from .device.pointwise import relu as relu_of
from .host.arguments import SIZES, check_images, check_nhwc, check_vectors
from .host.launcher import launch
from .host.tiling import elements_of, tiling


@triton.jit(do_not_specialize=SIZES)
def excite_kernel(
    y,  # (N, ROWS, C)
    stats,  # (4, C)
    gate,  # (N, C)
    shortcut,  # (N, ROWS, C) or None
    out,  # (N, ROWS, C)
    ROWS,  # pixels of an image
    TILES,  # BLOCK_M-row tiles of an image
    INNER: tl.constexpr,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = [relu](gate * [relu](y * scale + shift) [+ shortcut]). Grid (N * TILES, column tiles).

    The sum is rounded to the stored type before the ReLU.
    """
    n = (tl.program_id(0) // TILES).to(tl.int64)
    rows = (tl.program_id(0) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mask = (rows < ROWS)[:, None] & live[None, :]
    offsets = n * ROWS * C + rows[:, None] * C + cols[None, :]
    scale = tl.load(stats + 2 * C + cols, mask=live)[None, :]
    shift = tl.load(stats + 3 * C + cols, mask=live)[None, :]
    factor = tl.load(gate + n * C + cols, mask=live).to(ACC)[None, :]
    h = affine(tl.load(y + offsets, mask=mask).to(ACC), scale, shift)
    if INNER:
        h = relu_of(h)
    if shortcut is not None:
        z = tl.fma(h, factor, tl.load(shortcut + offsets, mask=mask).to(ACC))
    else:
        z = h * factor
    z = z.to(out.dtype.element_ty)
    if RELU:
        z = relu_of(z)
    tl.store(out + offsets, z, mask=mask)


def check_gate(gate: Tensor, y: Tensor, name: str = "gate") -> None:
    """ValueError or TypeError unless it is a contiguous (N, C) of the type and device of y (N, C, H, W)."""
    check_vectors(name, gate, y.shape[:2], y, y.dtype)


def batch_norm_excite(
    y: Tensor,
    stats: Tensor,
    gate: Tensor,
    shortcut: Tensor | None = None,
    inner_relu: bool = False,
    relu: bool = True,
) -> Tensor:
    """[relu](gate * [relu](y * scale + shift) [+ shortcut]): the outer ReLU with `relu`, the inner with `inner_relu`.

    y, shortcut and the result are (N, C, H, W) channels_last, of one type and on one device. stats is (4, C), gate
    (N, C) of y's type.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit, or an image of 2^31 elements or more.
    """
    check_images(y)
    N, C, H, W = y.shape
    check_vectors("stats", stats, (4, C), y)
    check_gate(gate, y)
    if shortcut is not None:
        check_nhwc("shortcut", shortcut, y, y.shape)
    out = torch.empty_like(y, memory_format=torch.channels_last)
    t = tiling(H * W, C, elements_of(C))
    tiles = triton.cdiv(H * W, t.BLOCK_M)
    launch(
        excite_kernel,
        (N * tiles, triton.cdiv(C, t.BLOCK_C)),
        y,
        stats,
        gate,
        shortcut,
        out,
        H * W,
        tiles,
        INNER=inner_relu,
        RELU=relu,
        **t.options(y),
    )
    return out
