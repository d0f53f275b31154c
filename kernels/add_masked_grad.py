"""The shortcut's gradient added to the convolution's: dx += dout * (out > 0).

For blocks whose grad-input convolution is PyTorch's; the fused one (conv_grad_input.py) does this in its epilogue.
Activations are dense (N, H, W, C), read as one vector. Moves 4: reads dx, dout, out, writes dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.pointwise import relu_passes
from .host.launch import check_nhwc


@triton.jit
def add_masked_grad_kernel(
    dx,  # (N, H, W, C), overwritten
    dout,  # (N, H, W, C)
    out,  # (N, H, W, C)
    COUNT,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of elements,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < COUNT - first
    g = tl.load(dout + first + offsets, mask=mask)
    passes = relu_passes(tl.load(out + first + offsets, mask=mask))
    sum = tl.load(dx + first + offsets, mask=mask).to(tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32)
    sum += tl.where(passes, g, tl.zeros_like(g)).to(sum.dtype)
    tl.store(dx + first + offsets, sum.to(dx.dtype.element_ty), mask=mask)


def add_masked_grad(dx: Tensor, dout: Tensor, out: Tensor) -> Tensor:
    """dx, to which dout is added where the ReLU that made out passes it; (N, C, H, W) channels_last, of one type."""
    check_nhwc("dx", dx)
    check_nhwc("dout", dout, dx, tuple(dx.shape))
    check_nhwc("out", out, dx, tuple(dx.shape))
    BLOCK = 4096 // dx.element_size()
    with torch.cuda.device_of(dx):
        add_masked_grad_kernel[(triton.cdiv(dx.numel(), BLOCK),)](dx, dout, out, dx.numel(), BLOCK=BLOCK, num_warps=4)
    return dx
