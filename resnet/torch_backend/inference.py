"""Inference on PyTorch's operators; on the CPU with BatchNorm folded into oneDNN's convolution.

The residual add and the ReLU are passes of their own, in place. Fused to oneDNN's convolution the add takes longer (by
2 to 9% of both, with AVX2), and oneDNN's ReLU drops NaN, which `torch.relu` keeps.

The stem of one channel is a matrix product of windows, for which oneDNN's convolution takes longer: a few images at a
time, pooled while their rows are in the cache.

A folded weight is kept, in oneDNN's blocked layout or as that matrix, for as long as the weight it was made from lives.
Whether it is still true is checked at every call against the values themselves, not against version counters, which
miss writes through `p.data`. The vectors are compared element by element; the weight is compared by its product with a
fixed random vector, which reads it once. A change too small to show there is below the rounding of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from resnet.norm import Norm
from resnet.torch_backend import batch_norm
from resnet.torch_backend.convolution import convolve, is_single_on_cpu, is_small, out_size


@dataclass(frozen=True)
class _Folded:
    kind: tuple  # eps, the layout's name, and which vectors were there
    values: Tensor  # the fingerprint of the weight, then the vectors
    weight: Tensor  # (K, C, R, S) * scale in the layout
    bias: Tensor  # (K,)


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the convolution's weight -> _Folded
_FOLDED_ROWS = 256  # output pixels; with fewer, reading the weight for its fingerprint takes longer than folding saves
_WINDOWS = 4608  # that are multiplied at a time; they and their products stay in the cache


def _can_fold(x: Tensor, stride: int) -> bool:
    """Whether oneDNN convolves x, and x has pixels enough for folding to pay."""
    rows = x.shape[0] * x.shape[2] * x.shape[3] // stride**2
    return (
        is_single_on_cpu(x)
        and rows >= _FOLDED_ROWS
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


@lru_cache(maxsize=32)
def _probe(length: int) -> Tensor:
    """Random signs and sizes from 0.5 to 1: a small factor would hide a change of the value that it meets."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(length, generator=generator).add_(1).div_(2)
    return sizes.mul_(torch.randint(0, 2, (length,), generator=generator).mul_(2).sub_(1))


def _fingerprint(weight: Tensor) -> Tensor:
    rows = weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)
    return rows.reshape(weight.shape[0], -1) @ _probe(weight[0].numel())


def _folded(
    weight: Tensor, norm: Norm, more: Tensor | None, layout: str, arrange: Callable[[Tensor], Tensor]
) -> _Folded:
    """The folded weight as `arrange` lays it out; from the cache as long as nothing has changed."""
    vectors = (*norm[:5], more)
    kind = (norm.eps, layout, *(v is None for v in vectors))
    values = torch.cat([_fingerprint(weight), *(v for v in vectors if v is not None)])
    entry = _cache.get(weight)
    if entry is None or entry.kind != kind or not torch.equal(entry.values, values):
        scale, shift = batch_norm.scale_shift(*batch_norm.freeze(norm, weight.dtype), norm)
        bias = shift if more is None else shift + more
        entry = _cache[weight] = _Folded(kind, values, arrange(weight * scale.view(-1, 1, 1, 1)), bias)
    return entry


def conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    stride: int,
    padding: int,
    more: Tensor | None = None,
) -> Tensor:
    """batch_norm(conv(x)) [+ more], a new tensor (N, K, P, Q) channels_last.

    x (N, C, H, W) is channels_last, weight is (K, C, R, S), more is (K,).
    """
    if _can_fold(x, stride) and not is_small(x, weight, stride, padding):
        return _conv_folded(x, weight, norm, stride, padding, more)
    bias = None if norm.conv_bias is None else norm.conv_bias.to(x.dtype)
    y = convolve(x, weight, bias, stride, padding)
    out = torch.native_batch_norm(y, *norm[:4], False, 0.0, norm.eps)[0]
    if more is not None:
        out.add_(more.view(-1, 1, 1))
    return out.contiguous(memory_format=torch.channels_last)


def _conv_folded(x: Tensor, weight: Tensor, norm: Norm, stride: int, padding: int, more: Tensor | None) -> Tensor:
    """`conv_batch_norm` by oneDNN's convolution."""
    geometry = ([padding] * 2, [stride] * 2, [1, 1], 1)
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    folded = _folded(weight, norm, more, "blocked", lambda product: reorder(product, *geometry, list(x.shape)))
    out = torch.ops.mkldnn._convolution_pointwise.default(x, folded.weight, folded.bias, *geometry, "none", [], None)
    return out.contiguous(memory_format=torch.channels_last)


def stem_inference(x: Tensor, weight: Tensor, norm: Norm, stride: int, padding: int) -> Tensor:
    """The stem: relu(max_pool(batch_norm(conv(x)))), the pool 3x3 with stride 2, padding 1; channels_last as x is."""
    (N, C, *size), (K, _, R, S) = x.shape, weight.shape
    if C > 1 or not _can_fold(x, stride):
        return torch.max_pool2d(conv_batch_norm(x, weight, norm, stride, padding), 3, 2, 1).relu_()
    folded = _folded(weight, norm, None, "windows", lambda product: product.flatten(1).t().contiguous())
    P, Q = out_size(size[0], R, stride, padding), out_size(size[1], S, stride, padding)
    padded = F.pad(x[:, 0], [padding] * 4)
    n, h, w = padded.stride()
    windows = padded.as_strided((N, P, Q, R, S), (n, stride * h, stride * w, h, w))
    images = max(1, _WINDOWS // (P * Q))
    gathered, z = x.new_empty(images * P * Q, R * S), x.new_empty(images * P * Q, K)
    pooled = x.new_empty(N, out_size(P, 3, 2, 1), out_size(Q, 3, 2, 1), K)
    for some, out in zip(windows.split(images), pooled.split(images)):
        rows = len(some) * P * Q
        gathered[:rows].view(some.shape).copy_(some)
        torch.addmm(folded.bias, gathered[:rows], folded.weight, out=z[:rows])
        maps = z[:rows].view(-1, P, Q, K).permute(0, 3, 1, 2)
        out.copy_(torch.max_pool2d(maps, 3, 2, 1).permute(0, 2, 3, 1))
    return pooled.permute(0, 3, 1, 2).relu_()
