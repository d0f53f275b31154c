"""The shortcut's gradient added to the convolution's, in place.

    dx = dx + dout * (out > 0)

It serves blocks whose grad-input convolution is PyTorch's; the fused one (conv_grad_input.py) adds it in its epilogue.
dx, dout and out are dense NHWC, read as vectors of N*H*W*C elements. Grid (blocks of elements,). Moves 4 activations:
it reads dx, dout and out, and writes dx.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import relu_passes
from .host.launch import check_nhwc
from .host.launcher import launch


@triton.jit
def add_masked_grad_kernel(
    dx,  # (N, H, W, C), overwritten
    dout,  # (N, H, W, C)
    out,  # (N, H, W, C)
    COUNT,  # N * H * W * C
    BLOCK: tl.constexpr,
):
    """dx + dout * (out > 0), summed in float32 (float64 for float64). Grid (blocks of elements,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < COUNT - first
    g = tl.load(dout + first + offsets, mask=mask)
    passes = relu_passes(tl.load(out + first + offsets, mask=mask))
    sum = tl.load(dx + first + offsets, mask=mask).to(tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32)
    sum += tl.where(passes, g, tl.zeros_like(g)).to(sum.dtype)
    tl.store(dx + first + offsets, sum.to(dx.dtype.element_ty), mask=mask)


def add_masked_grad(dx: Tensor, dout: Tensor, out: Tensor) -> Tensor:
    """dx, to which dout is added where the ReLU that made `out` lets it pass.

    All three are (N, C, H, W) channels_last, of one type and on one device. ValueError for another shape or layout,
    TypeError for another type.
    """
    check_nhwc("dx", dx)
    check_nhwc("dout", dout, dx, tuple(dx.shape))
    check_nhwc("out", out, dx, tuple(dx.shape))
    BLOCK = 4096 // dx.element_size()
    launch(
        add_masked_grad_kernel, (triton.cdiv(dx.numel(), BLOCK),), dx, dout, out, dx.numel(), BLOCK=BLOCK, num_warps=4
    )
    return dx
