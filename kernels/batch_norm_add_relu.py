"""BatchNorm, the residual add and ReLU in one pass.

    out = relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]])

x, shortcut and out are dense NHWC, read as matrices of M = N*H*W rows and C columns. Grid (row tiles, column tiles).
Moves 2 activations, 3 with a shortcut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import affine, relu
from .host.arguments import SIZES, check_nhwc, check_vectors, nhwc_shape
from .host.launcher import launch
from .host.tiling import elements_of, tiling


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x,  # (M, C)
    stats,  # (4, C)
    shortcut,  # (M, C) or None
    shortcut_scale,  # (C,) or None: ones
    shortcut_shift,  # (C,) or None: zeros
    out,  # (M, C)
    M,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]]). Grid (row tiles, column tiles).

    The sum is rounded to the stored type before the ReLU.
    """
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mask = (rows < M - row0)[:, None] & live[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    x += row0 * C
    out += row0 * C
    scale = tl.load(stats + 2 * C + cols, mask=live)
    shift = tl.load(stats + 3 * C + cols, mask=live)
    if shortcut_shift is not None:
        shift += tl.load(shortcut_shift + cols, mask=live).to(ACC)
    z = affine(tl.load(x + offsets, mask=mask).to(ACC), scale[None, :], shift[None, :])
    if shortcut is not None:
        skip = tl.load(shortcut + row0 * C + offsets, mask=mask).to(ACC)
        if shortcut_scale is not None:
            z = tl.fma(skip, tl.load(shortcut_scale + cols, mask=live).to(ACC)[None, :], z)
        else:
            z += skip
    z = z.to(out.dtype.element_ty)
    if RELU:
        z = relu(z)
    tl.store(out + offsets, z, mask=mask)


def batch_norm_add_relu(
    x: Tensor,
    stats: Tensor,
    shortcut: Tensor | None = None,
    shortcut_scale: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]]), without the ReLU where not `relu`.

    x, shortcut, `out` and the result are (N, C, H, W) channels_last, of one type and on one device. stats is (4, C), as
    `batch_norm_finalize` gives it; shortcut_scale and shortcut_shift are (C,). The result is written to `out` where
    that is given; it may be x.

    Raises:
        ValueError, TypeError: a shape, layout, type or device that does not fit.
    """
    M, C = nhwc_shape(x)
    check_vectors("stats", stats, (4, C), x)
    if shortcut is not None:
        check_nhwc("shortcut", shortcut, x, x.shape)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    else:
        check_nhwc("out", out, x, x.shape)
    t = tiling(M, C, elements_of(C))
    launch(
        apply_kernel,
        (triton.cdiv(M, t.BLOCK_M), triton.cdiv(C, t.BLOCK_C)),
        x,
        stats,
        shortcut,
        shortcut_scale,
        shortcut_shift,
        out,
        M,
        RELU=relu,
        **t.options(x),
    )
    return out
