"""What a residual block brings to the fused operations, and what its backward gives back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Convolutions(NamedTuple):
    """The block's convolutions; the biases of conv1 and conv2 belong to their norms."""

    conv1: Tensor  # (K, C, 3, 3), padding 1
    conv2: Tensor  # (K, K, 3, 3), padding 1, stride 1
    conv3: Tensor | None  # (K, C, 1, 1), the shortcut's; None: the identity
    conv3_bias: Tensor | None  # (K,)
    stride: int  # of conv1 and conv3


class Saved(NamedTuple):
    """What a block keeps for backward: four activations and per-channel vectors."""

    x: Tensor  # (N, C, H, W)
    y1: Tensor  # (N, K, P, Q) = conv1(x)
    y2: Tensor  # (N, K, P, Q) = conv2(relu(bn1(y1)))
    out: Tensor  # (N, K, P, Q)
    stats1: Tensor  # (4, K) = mean, invstd, scale, shift
    stats2: Tensor  # (4, K)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    conv1: bool
    conv2: bool
    conv3: bool
    conv3_bias: bool
    weight1: bool
    bias1: bool
    conv_bias1: bool
    weight2: bool
    bias2: bool
    conv_bias2: bool

    @property
    def inner(self) -> bool:
        """Whether anything in front of conv2 is."""
        return self.x or self.conv1 or self.weight1 or self.bias1 or self.conv_bias1


class BlockGrad(NamedTuple):
    """Gradients, None where nothing asked for them; the sums are of the type of the statistics."""

    x: Tensor | None
    conv1: Tensor | None
    conv2: Tensor | None
    conv3: Tensor | None
    weight1: Tensor | None  # (K,)
    bias1: Tensor | None  # (K,)
    sum_g1: Tensor | None  # (K,): the gradient of anything added per channel behind conv1, were the statistics frozen
    weight2: Tensor | None
    bias2: Tensor | None
    sum_g2: Tensor  # (K,): likewise behind conv2 and behind the shortcut


class StemOutput(NamedTuple):
    """What a stem gives, and keeps for backward beside its input."""

    out: Tensor  # (N, K, OP, OQ)
    y: Tensor  # (N, K, P, Q) = conv(x)
    tap: Tensor  # (N, K, OP, OQ) uint8: which of its window's nine pixels was the maximum
    stats: Tensor  # (4, K) = mean, invstd, scale, shift


class StemGrad(NamedTuple):
    x: Tensor | None
    conv: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    sum_g: Tensor
