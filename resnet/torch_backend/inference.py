"""Inference on PyTorch's operators; on the CPU with BatchNorm folded into the convolution where that moves less.

Folding scales the weight, at every call: it pays where the convolution's output has more elements than its weight. A
folded weight that was kept would have to be checked against all that it was made from, which takes as long.

The residual add and the ReLU are passes of their own, in place. Fused to oneDNN's convolution the add takes longer (by
2 to 9% of both, with AVX2), and oneDNN's ReLU drops NaN, which `torch.relu` keeps.

The stem of one channel is a matrix product of windows, for which oneDNN's convolution takes longer where there are
many: a few images at a time, pooled while their rows are in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet.norm import Norm
from resnet.operands import Unit
from resnet.torch_backend import batch_norm
from resnet.torch_backend.convolution import convolve, is_single_on_cpu, out_map, out_size, windows

_FOLDED = 1 << 16  # elements of the output; with fewer, a pass over it takes less time than the calls that fold
_MANY_WINDOWS = 1 << 14  # of the stem; with fewer, oneDNN's convolution takes no longer
_WINDOWS = 4608  # that are multiplied at a time; they and their products stay in the cache


def _folded(weight: Tensor, norm: Norm, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that computes batch_norm(conv(x)) [+ more]."""
    scale, shift = batch_norm.scale_shift(*batch_norm.freeze(norm, weight.dtype), norm)
    return weight * scale.view(-1, 1, 1, 1), shift if more is None else shift + more


def _is_finite(values: Tensor) -> bool:
    """Whether their sum is; a sum that overflows is rare enough to be taken for a value that does."""
    return math.isfinite(values.sum().item())


def fold_shortcut(x: Tensor, unit: Unit) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) of the convolution that computes a normed 1x1 shortcut of x; None where it is not to be folded."""
    if not is_single_on_cpu(x):
        return None
    weight, bias = _folded(unit.weight, unit.norm)
    return (weight, bias) if _is_finite(weight) else None  # scaling it may overflow where scaling z does not


def _outputs(x: Tensor, weight: Tensor, stride: int, padding: int) -> int:
    """Elements of conv(x, weight)."""
    P, Q = out_map(x.shape, weight.shape, stride, padding)
    return x.shape[0] * weight.shape[0] * P * Q


def conv_batch_norm(x: Tensor, unit: Unit, more: Tensor | None = None) -> Tensor:
    """batch_norm(conv(x)) [+ more], a new tensor (N, K, P, Q) channels_last.

    x (N, C, H, W) is channels_last, more is (K,).
    """
    weight, stride, padding, norm, _ = unit
    if is_single_on_cpu(x) and _outputs(x, weight, stride, padding) > max(weight.numel(), _FOLDED):
        folded, bias = _folded(weight, norm, more)
        out = convolve(x, folded, bias, stride, padding)
        # Where scaling the weight overflowed, scaling the convolution need not. An image meets all of the weight.
        if _is_finite(min(folded, out[0], key=Tensor.numel)):
            return out
    bias = None if norm.conv_bias is None else norm.conv_bias.to(x.dtype)
    y = convolve(x, weight, bias, stride, padding)
    out = torch.native_batch_norm(y, *norm[:4], False, 0.0, norm.eps)[0]
    if more is not None:
        out.add_(more.view(-1, 1, 1))
    return out.contiguous(memory_format=torch.channels_last)


def stem_inference(x: Tensor, unit: Unit) -> Tensor:
    """The stem: relu(max_pool(batch_norm(conv(x)))), the pool 3x3 with stride 2, padding 1; channels_last as x is."""
    weight, stride, padding, norm, _ = unit
    N, K, C = x.shape[0], *weight.shape[:2]
    multiplied = C == 1 and is_single_on_cpu(x) and _outputs(x, weight, stride, padding) >= K * _MANY_WINDOWS
    if multiplied:
        folded, bias = _folded(weight, norm)
        multiplied = _is_finite(folded)  # by the padding's zeros, too
    if not multiplied:
        return torch.max_pool2d(conv_batch_norm(x, unit), 3, 2, 1).relu_()
    weight = folded
    P, Q = out_map(x.shape, weight.shape, stride, padding)
    met = windows(x, weight, stride, padding).flatten(4)
    images = max(1, _WINDOWS // (P * Q))
    gathered, z = x.new_empty(images * P * Q, weight[0].numel()), x.new_empty(images * P * Q, K)
    pooled = x.new_empty(N, out_size(P, 3, 2, 1), out_size(Q, 3, 2, 1), K)
    for some, out in zip(met.split(images), pooled.split(images)):
        rows = len(some) * P * Q
        gathered[:rows].view(some.shape).copy_(some)
        torch.addmm(bias, gathered[:rows], weight.flatten(1).t(), out=z[:rows])
        maps = z[:rows].view(-1, P, Q, K).permute(0, 3, 1, 2)
        out.copy_(torch.max_pool2d(maps, 3, 2, 1).permute(0, 2, 3, 1))
    return pooled.permute(0, 3, 1, 2).relu_()
