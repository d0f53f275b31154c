"""What a convolution applies to its input tile as it is loaded, in place of a pass of its own."""

import triton
import triton.language as tl

from kernels.pointwise import affine, relu


@triton.jit
def batch_norm_relu(x, scale, shift, inside):
    """relu(x * scale + shift) of a tile (rows, C), rounded as it would be stored; zero where not `inside` (rows, 1).

    Padding is zero after the activation, not relu(shift). Bit-equal to what `batch_norm.apply` stores.
    """
    z = affine(x.to(scale.dtype), scale[None, :], shift[None, :]).to(x.dtype)
    return tl.where(inside, relu(z), tl.zeros_like(z))
