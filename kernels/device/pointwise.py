"""The per-element mathematics that forward and backward kernels share, so that both agree bit for bit."""

import triton
import triton.language as tl


@triton.jit
def affine(x, scale, shift):
    """x * scale + shift as one fused multiply-add: explicit, so that no compiler flag changes the rounding."""
    return tl.fma(x, scale, shift)


@triton.jit
def is_not_positive(z):
    """z <= 0, false for NaN. bfloat16 is widened: some of Triton's interpreters would compare its bit patterns."""
    if z.dtype.is_bf16():
        z = z.to(tl.float32)
    return z <= 0


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN, as `torch.relu`: a plain maximum would drop it."""
    return tl.where(is_not_positive(z), 0.0, z)


@triton.jit
def relu_passes(z):
    """Where ReLU lets the gradient through: not (z <= 0), so a NaN passes it on as `torch.relu`'s backward does.

    z is the value as stored: a positive number that a 16-bit type rounds to zero has no gradient.
    """
    return is_not_positive(z) == 0


@triton.jit
def recomputed_relu_passes(x, scale, shift, STORED: tl.constexpr):
    """`relu_passes` of x * scale + shift as the forward pass stored it, from x: no mask is kept for backward."""
    return relu_passes(affine(x, scale, shift).to(STORED))


@triton.jit
def inverse_std(var, eps):
    """1 / sqrt(var + eps), correctly rounded in float32 where `rsqrt` would be approximate."""
    if var.dtype == tl.float64:
        return 1.0 / tl.sqrt(var + eps)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn((var + eps).to(tl.float32)))
