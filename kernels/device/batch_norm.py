"""BatchNorm's per-channel vectors and its gradient, for the kernels that fuse it to something else."""

import triton
import triton.language as tl

from .pointwise import inverse_std, recomputed_relu_passes, relu_passes


@triton.jit
def load_running(running_mean, running_var, conv_bias, eps, cols, C: tl.constexpr, ACC: tl.constexpr):
    """mean and invstd of the running statistics, the convolution's bias folded into the mean."""
    mean = tl.load(running_mean + cols, mask=cols < C, other=0.0).to(ACC)
    if conv_bias is not None:
        mean -= tl.load(conv_bias + cols, mask=cols < C, other=0.0).to(ACC)
    return mean, inverse_std(tl.load(running_var + cols, mask=cols < C, other=0.0).to(ACC), eps)


@triton.jit
def load_affine(mean, invstd, weight, bias, cols, C: tl.constexpr):
    """scale and shift: batch_norm(x) = x * scale + shift."""
    scale = invstd
    if weight is not None:
        scale = invstd * tl.load(weight + cols, mask=cols < C, other=0.0).to(invstd.dtype)
    shift = -mean * scale
    if bias is not None:
        shift = tl.fma(-mean, scale, tl.load(bias + cols, mask=cols < C, other=0.0).to(invstd.dtype))
    return scale, shift


@triton.jit
def store_stats(stats, weight, bias, mean, invstd, cols, C: tl.constexpr):
    """Write mean, invstd, scale and shift of the channels `cols` to stats (4, C)."""
    scale, shift = load_affine(mean, invstd, weight, bias, cols, C)
    tl.store(stats + cols, mean, mask=cols < C)
    tl.store(stats + C + cols, invstd, mask=cols < C)
    tl.store(stats + 2 * C + cols, scale, mask=cols < C)
    tl.store(stats + 3 * C + cols, shift, mask=cols < C)


@triton.jit
def load_masked_grad(
    dout, x_value, out, scale, shift, offsets, mask, RELU: tl.constexpr, STORED: tl.constexpr, ACC: tl.constexpr
):
    """g = dout * (out > 0). Without `out` its sign is recomputed from x."""
    g = tl.load(dout + offsets, mask=mask, other=0.0).to(ACC)
    if RELU:
        if out is not None:
            passes = relu_passes(tl.load(out + offsets, mask=mask, other=0.0))
        else:
            passes = recomputed_relu_passes(x_value, scale[None, :], shift[None, :], STORED)
        g = tl.where(passes, g, 0.0)
    return g


@triton.jit
def load_center(stats, sums, PLANE: tl.constexpr, cols, M, C: tl.constexpr, ACC: tl.constexpr):
    """(mean, sum_g / M, invstd * sum_gx / M) of the channels `cols`: what `center_grad` needs.

    sums (2 or 3, C) has sum g first, and sum g * xhat in row PLANE.
    """
    live = cols < C
    share = 1.0 / (M + tl.zeros([1], tl.int64)).to(ACC)  # one division, not one for each channel
    mean = tl.load(stats + cols, mask=live)
    invstd = tl.load(stats + C + cols, mask=live)
    mean_g = tl.load(sums + cols, mask=live) * share
    slope = tl.load(sums + PLANE * C + cols, mask=live) * share * invstd
    return mean[None, :], mean_g[None, :], slope[None, :]


@triton.jit
def center_grad(g, x_value, center):
    """g - sum_g / M - xhat * sum_gx / M: the gradient through the batch's statistics."""
    mean, mean_g, slope = center
    return tl.fma(-slope, x_value - mean, g - mean_g)
