"""BatchNorm + add + ReLU on PyTorch's own operators, in as few passes as they allow: what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.norm import Norm, NormGrad, statistics_dtype

aten = torch.ops.aten


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the batch, (C,) each; updates the running statistics in place."""
    dtype = statistics_dtype(x.dtype)
    # PyTorch keeps the statistics in the type of the running ones; for half-precision x that has to be float32.
    spare = x.new_zeros(x.shape[1], dtype=dtype)
    mean, var = aten.batch_norm_update_stats(x, spare, spare.clone(), 0.0)
    if norm.running_mean is not None:
        shifted = mean if norm.conv_bias is None else mean + norm.conv_bias
        norm.running_mean.mul_(1 - norm.momentum).add_(shifted, alpha=norm.momentum)
    if norm.running_var is not None:
        n = x.numel() // x.shape[1]
        norm.running_var.mul_(1 - norm.momentum).add_(var, alpha=norm.momentum * n / (n - 1))
    return mean, (var + norm.eps).rsqrt_()


def freeze(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the running statistics, (C,) each in `dtype`, the convolution's bias folded in."""
    mean = norm.running_mean.to(dtype)
    if norm.conv_bias is not None:
        mean = mean - norm.conv_bias
    return mean, (norm.running_var.to(dtype) + norm.eps).rsqrt_()


def scale_shift(mean: Tensor, invstd: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(scale, shift), (C,) each: batch_norm(x) = x * scale + shift."""
    scale = invstd if norm.weight is None else invstd * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift per channel in one pass: BatchNorm's frozen form with mean 0, variance 1 and eps 0."""
    return torch.native_batch_norm(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0)[0]


def forward(
    x: Tensor, norm: Norm, shortcut: Tensor | None = None, shortcut_shift: Tensor | None = None, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """out = relu(batch_norm(x) [+ shortcut [+ shortcut_shift]]) and stats (4, C) = mean, invstd, scale, shift.

    x, shortcut and out are (N, C, H, W) channels_last of one type; shortcut_shift is (C,). Running statistics are
    updated in place when `norm.training`.
    """
    mean, invstd = _statistics(x, norm) if norm.training else freeze(norm, statistics_dtype(x.dtype))
    scale, shift = scale_shift(mean, invstd, norm)
    stats = torch.stack((mean, invstd, scale, shift))
    out = _affine(x, scale, shift if shortcut_shift is None else shift + shortcut_shift)
    if shortcut is not None:
        out.add_(shortcut)
    return out.relu_() if relu else out, stats


def recompute(x: Tensor, stats: Tensor) -> Tensor:
    """relu(x * scale + shift), bit-equal to what `forward` gave."""
    return _affine(x, stats[2], stats[3]).relu_()


def backward(
    dout: Tensor, x: Tensor, out: Tensor, stats: Tensor, norm: Norm, relu: bool = True, shortcut: bool = False
) -> NormGrad:
    """Gradients of `forward` from dout, x, out (N, C, H, W) channels_last; `g` where a ReLU and a shortcut ask for it."""
    mean, invstd = stats[0], stats[1]
    g = aten.threshold_backward(dout, out, 0) if relu else dout
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(mean.dtype)
    if norm.training:
        running, saved, eps = (None, None), (mean, invstd), norm.eps
    else:
        running, saved, eps = (mean, invstd**-2), (None, None), 0.0
    dx, dweight, sum_g = aten.native_batch_norm_backward(
        g, x, weight, *running, *saved, norm.training, eps, [True, True, True]
    )
    return NormGrad(
        dx,
        None if norm.weight is None else dweight.to(norm.weight.dtype),
        None if norm.bias is None else sum_g.to(norm.bias.dtype),
        sum_g,
        g if shortcut and relu else None,
    )
