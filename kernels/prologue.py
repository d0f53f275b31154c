"""What a convolution applies to its input tile as it is loaded, in place of a pass of its own."""

import triton
import triton.language as tl

from kernels.pointwise import affine


@triton.jit
def batch_norm_relu(x, scale, shift, inside):
    """relu(x * scale + shift) of a tile (rows, C), rounded as it would be stored; zero where not `inside` (rows, 1).

    Padding is zero after the activation, not relu(shift): an upper bound of 0 on its rows, infinity on the others,
    since on a pair of halves a minimum is one instruction and a select is three. Bit-equal to what `batch_norm.apply`
    stores: where ReLU and rounding change places, rounding keeps the sign.
    """
    z = affine(x.to(scale.dtype), scale[None, :], shift[None, :])
    if x.dtype == tl.float16:  # then the maximum of two halves is one instruction
        z = z.to(tl.float16)
    z = tl.maximum(z, tl.zeros_like(z), propagate_nan=tl.PropagateNan.ALL)
    bound = tl.where(inside, float("inf"), 0.0).to(z.dtype)
    return tl.minimum(z, bound, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
