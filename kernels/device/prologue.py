"""What a convolution applies to its input tile as it is loaded, in place of a pass of its own."""

import triton
import triton.language as tl

from .pointwise import affine


@triton.jit
def keep(x, inside):
    """x where `inside`, else 0. An AND of bits is one instruction for a pair of 16-bit values, and stops NaN too."""
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True) & tl.where(inside, -1, 0).to(tl.int16)
    elif x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True) & tl.where(inside, -1, 0).to(tl.int32)
    else:
        bits = x.to(tl.int64, bitcast=True) & tl.where(inside, -1, 0).to(tl.int64)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def packed_relu(x, scale, shift):
    """relu(x * scale + shift). Where x is float16 the result is too; else it is in the type of scale.

    The ReLU of a pair of float16 values is one instruction. It may come after the rounding, which keeps the sign. scale
    and shift have shapes that broadcast to x's.
    """
    z = affine(x.to(scale.dtype), scale, shift)
    if x.dtype == tl.float16:
        z = z.to(tl.float16)
    return tl.maximum(z, tl.zeros_like(z), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def affine_relu(x, scale, shift):
    """relu(x * scale + shift), rounded as it would be stored: bit-equal to what `batch_norm_add_relu` stores."""
    return packed_relu(x, scale, shift).to(x.dtype)


@triton.jit
def batch_norm_relu(x, scale, shift, inside):
    """relu(x * scale + shift) of a tile (rows, C), rounded as it would be stored; zero where not `inside` (rows, 1).

    Padding is zero after the activation, not relu(shift). So its rows get an upper bound of 0, the others infinity: for
    a pair of float16 values a minimum is one instruction, and a select is three.
    """
    z = packed_relu(x, scale[None, :], shift[None, :])
    bound = tl.where(inside, float("inf"), 0.0).to(z.dtype)
    return tl.minimum(z, bound, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
