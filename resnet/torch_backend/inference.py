"""Inference on PyTorch's operators; on the CPU with BatchNorm folded into the convolution where that moves less.

Folding scales the weight, at every call: it pays where the convolution's output has more elements than its weight. A
folded weight that was kept would have to be checked against all that it was made from, which takes as long.

The residual add and the ReLU are passes of their own, in place. Fused to oneDNN's convolution the add takes longer (by
2 to 9% of both, with AVX2), and oneDNN's ReLU drops NaN, which `torch.relu` keeps.

The stem's output is the largest map of all. Where it is large, a few images at a time are pooled while their pixels are
in the cache. Of one channel it is a matrix product of windows, for which oneDNN's convolution takes longer where there
are many, but not where products lag.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from resnet.norm import Norm
from resnet.operands import Geometry, Unit
from resnet.torch_backend import batch_norm
from resnet.torch_backend.convolution import convolve, convolve_windows, is_single_on_cpu, limits, out_map, out_size

_FOLDED = 1 << 16  # elements of the output; with fewer, a pass over it takes less time than the calls that fold
_MANY_WINDOWS = 1 << 14  # of a stem of one channel; with fewer, oneDNN's convolution takes no longer
_LARGE = 1 << 23  # elements of a stem's output: from 32 MiB on glibc asks the system for fresh memory each time
_WINDOWS = 4608  # at a time; they and their products stay in the cache


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


def _outputs(x: torch.Size, weight: torch.Size, geometry: Geometry) -> int:
    """Elements of conv(x, weight)."""
    return x[0] * weight[0] * math.prod(out_map(x, weight, geometry))


@lru_cache(1024)
def _pays(x: torch.Size, weight: torch.Size, geometry: Geometry) -> bool:
    """Whether folding moves less than a pass over the output of conv(x, weight)."""
    return _outputs(x, weight, geometry) > max(weight.numel(), _FOLDED)


def conv_batch_norm(x: Tensor, unit: Unit, more: Tensor | None = None) -> Tensor:
    """batch_norm(conv(x)) [+ more], a new tensor (N, K, P, Q) channels_last.

    x (N, C, H, W) is channels_last, more is (K,).
    """
    weight, geometry, norm, _ = unit
    if is_single_on_cpu(x) and _pays(x.shape, weight.shape, geometry):
        folded, bias = _folded(weight, norm, more)
        out = convolve(x, folded, bias, geometry)
        # Where scaling the weight overflowed, scaling the convolution need not. An image meets all of the weight.
        if _is_finite(min(folded, out[0], key=Tensor.numel)):
            return out
    bias = None if norm.conv_bias is None else norm.conv_bias.to(x.dtype)
    y = convolve(x, weight, bias, geometry)
    out = torch.native_batch_norm(y, *norm[:4], False, 0.0, norm.eps)[0]
    if more is not None:
        out.add_(more.view(-1, 1, 1))
    return out.contiguous(memory_format=torch.channels_last)


def stem_inference(x: Tensor, unit: Unit) -> Tensor:
    """The stem: relu(max_pool(batch_norm(conv(x)))), the pool 3x3 with stride 2, padding 1; channels_last as x is."""
    weight, geometry, norm, _ = unit
    K = weight.shape[0]
    by_products = x.shape[1] == 1 and limits().many_rows
    many = K * _MANY_WINDOWS if by_products else _LARGE
    in_parts = is_single_on_cpu(x) and _outputs(x.shape, weight.shape, geometry) >= many
    if in_parts:
        folded, bias = _folded(weight, norm)
        in_parts = _is_finite(folded)  # as the padding's zeros need it, too
    if not in_parts:
        return torch.max_pool2d(conv_batch_norm(x, unit), 3, 2, 1).relu_()
    P, Q = out_map(x.shape, weight.shape, geometry)
    pooled = x.new_empty(x.shape[0], out_size(P, 3, 2, 1), out_size(Q, 3, 2, 1), K)
    convolution = convolve_windows if by_products else convolve
    images = max(1, _WINDOWS // (P * Q))
    for some, out in zip(x.split(images), pooled.split(images)):
        y = convolution(some, folded, bias, geometry)
        out.copy_(torch.max_pool2d(y, 3, 2, 1).permute(0, 2, 3, 1))
    return pooled.permute(0, 3, 1, 2).relu_()
