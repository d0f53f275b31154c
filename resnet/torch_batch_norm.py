"""BatchNorm + add + ReLU on PyTorch's own operators, in as few passes as they allow: what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.norm import Norm, NormGrad, statistics_dtype

aten = torch.ops.aten


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the batch, (C,) each; updates the running statistics in place."""
    dtype = statistics_dtype(x.dtype)
    running = norm.running_mean, norm.running_var
    # PyTorch takes the batch's statistics in the type of the running ones: float32 ones where those are not.
    accumulated = running
    if running[0] is None or running[0].dtype != dtype:
        accumulated = tuple(x.new_zeros(x.shape[1], dtype=dtype) if r is None else r.to(dtype) for r in running)
    mean, var = aten.batch_norm_update_stats(x, *accumulated, norm.momentum)
    if norm.conv_bias is not None:
        accumulated[0].add_(norm.conv_bias, alpha=norm.momentum)
    if running[0] is not None and accumulated is not running:
        for r, a in zip(running, accumulated, strict=True):
            r.copy_(a)
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


def _affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift per channel in one pass: BatchNorm's frozen form with mean 0, variance 1 and eps 0."""
    arguments = (x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0)
    if out is None:
        return torch.native_batch_norm(*arguments)[0]
    unused = scale.new_empty(0), scale.new_empty(0)
    return torch.native_batch_norm(*arguments, out=(out, *unused))[0]


def forward(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out = relu(batch_norm(x) [+ shortcut [+ shortcut_shift]]) and stats (4, C) = mean, invstd, scale, shift.

    x, shortcut and out are (N, C, H, W) channels_last of one type; shortcut_shift is (C,). Running statistics are
    updated in place when `norm.training`. `into`, a tensor like x that is no longer needed, becomes out.
    """
    mean, invstd = _statistics(x, norm) if norm.training else freeze(norm, statistics_dtype(x.dtype))
    scale, shift = scale_shift(mean, invstd, norm)
    stats = torch.stack((mean, invstd, scale, shift))
    out = _affine(x, scale, shift if shortcut_shift is None else shift + shortcut_shift, into)
    if shortcut is not None:
        out.add_(shortcut)
    return out.relu_() if relu else out, stats


def recompute(x: Tensor, stats: Tensor) -> Tensor:
    """relu(x * scale + shift), bit-equal to what `forward` gave."""
    return _affine(x, stats[2], stats[3]).relu_()


def backward(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    norm: Norm,
    relu: bool = True,
    shortcut: bool = False,
    consume: bool = False,
) -> NormGrad:
    """Gradients of `forward` from dout, x, out (N, C, H, W) channels_last; `g` with a ReLU and a shortcut.

    `consume` allows to overwrite dout.
    """
    mean, invstd = stats[0], stats[1]
    if not relu:
        g = dout
    elif consume:
        g = aten.threshold_backward.grad_input(dout, out, 0, grad_input=dout)
    else:
        g = aten.threshold_backward(dout, out, 0)
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
