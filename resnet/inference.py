"""Inference on the CPU: BatchNorm folded into the convolution, the residual add as oneDNN's post-operation.

The ReLU is a pass of its own, in place: oneDNN's drops NaN, which `torch.relu` keeps.

A folded weight is kept, in oneDNN's blocked layout, for as long as the weight it was made from lives. Whether it is
still true is checked at every call against the values themselves, not against version counters, which miss writes
through `p.data`: the scale is compared element by element, and of the weight its product with a fixed random vector,
one read of the weight. A change too small to show there is below the rounding of the convolution itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resnet import torch_batch_norm
from resnet.norm import Norm


@dataclass(frozen=True)
class _Folded:
    scale: Tensor  # (K,), what was folded in
    fingerprint: Tensor  # (K,), of the weight it was folded into
    weight: Tensor  # (K, C, R, S) * scale, oneDNN's blocked layout

    def made_from(self, scale: Tensor, fingerprint: Tensor) -> bool:
        return torch.equal(self.scale, scale) and torch.equal(self.fingerprint, fingerprint)


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the convolution's weight -> _Folded


def can_fold(run: ModuleType, x: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes x: float32 on the CPU, under the PyTorch backend."""
    return (
        run is torch_batch_norm
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


@lru_cache(maxsize=32)
def _probe(length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(0))


def _fingerprint(weight: Tensor) -> Tensor:
    rows = weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)
    return rows.reshape(weight.shape[0], -1) @ _probe(weight[0].numel())


def _folded(weight: Tensor, scale: Tensor, geometry: tuple, input_size: torch.Size) -> Tensor:
    fingerprint = _fingerprint(weight)
    entry = _cache.get(weight)
    if entry is None or not entry.made_from(scale, fingerprint):
        product = weight * scale.view(-1, 1, 1, 1)
        packed = torch.ops.mkldnn._reorder_convolution_weight(product, *geometry, list(input_size))
        entry = _cache[weight] = _Folded(scale, fingerprint, packed)
    return entry.weight


def conv_batch_norm_add_relu(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    shortcut: Tensor | None,
    shortcut_shift: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
) -> Tensor:
    """relu(conv(x, weight * scale) + shift [+ shortcut [+ shortcut_shift]]), up to the ReLU in one oneDNN call.

    x (N, C, H, W) and shortcut (N, K, P, Q) are channels_last; weight is (K, C, R, S).
    """
    scale, shift = torch_batch_norm.scale_shift(*torch_batch_norm.freeze(norm, x.dtype), norm)
    if shortcut_shift is not None:
        shift = shift + shortcut_shift
    geometry = ([padding] * 2, [stride] * 2, [1, 1], 1)
    folded = _folded(weight, scale, geometry, x.shape)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    if shortcut is None:
        out = pointwise(x, folded, shift, *geometry, "none", [], None)
    else:
        out = pointwise.binary(x, shortcut, folded, shift, *geometry, "add", 1.0, None, [], None)
    return out.relu_() if relu else out
