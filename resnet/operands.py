"""The operators' descriptions: what each takes, what it gives, what it keeps for backward, what backward gives.

`schema` makes the operators' flat arguments from these named tuples. A tuple of an operator's arguments also says,
with a flag in each place, which gradients are wanted, and, with a tensor in each place, what they are.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet.norm import Norm
from resnet.schema import Alike

# ---- relu(batch_norm(x) + shortcut) ------------------------------------------------------------------------------


class BatchNormAddRelu(NamedTuple):
    x: Tensor  # (N, C, H, W)
    shortcut: Tensor | None  # (N, C, H, W)
    norm: Norm
    relu: bool  # whether a ReLU ends it


class BatchNormAddReluOutput(NamedTuple):
    out: Tensor  # (N, C, H, W)
    stats: Tensor  # (4, C) = mean, invstd, scale, shift


class BatchNormAddReluKept(NamedTuple):
    x: Tensor
    out: Tensor | None  # None without a ReLU
    stats: Tensor
    norm: Norm
    relu: bool
    added: bool  # whether there was a shortcut


# ---- the stem ----------------------------------------------------------------------------------------------------


class Stem(NamedTuple):
    """max_pool(relu(batch_norm(conv(x)))), the pool 3x3 with stride 2 and padding 1."""

    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (K, C, R, S)
    stride: int
    padding: int
    norm: Norm
    master: Alike = None  # (K, C, R, S), see `Convolutions`


class StemOutput(NamedTuple):
    out: Tensor  # (N, K, OP, OQ)
    y: Tensor  # (N, K, P, Q) = conv(x)
    tap: Tensor  # (N, K, OP, OQ) uint8: which of its window's nine pixels was the maximum
    stats: Tensor  # (4, K)


class StemKept(NamedTuple):
    """Two tensors of y's pooled size are kept, out and a byte per element, in place of one of y's own."""

    x: Tensor
    output: StemOutput
    weight: Tensor
    norm: Norm
    stride: int
    padding: int
    master: Alike


class StemGrad(NamedTuple):
    x: Tensor | None
    conv: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    sum_g: Tensor
    conv_bias: Tensor | None = None


# ---- the residual block ------------------------------------------------------------------------------------------


class Convolutions(NamedTuple):
    """A block's convolutions; the biases of conv1 and conv2 belong to their norms.

    Under autocast the weights are copies of another type, and the masters are the parameters that they were made of.
    Gradients are then the masters': in their types and layouts, where a copy's would be rounded and cast.
    """

    conv1: Tensor  # (K, C, 3, 3), padding 1
    conv2: Tensor  # (K, K, 3, 3), padding 1, stride 1
    conv3: Tensor | None  # (K, C, 1, 1), the shortcut's; None: the identity
    conv3_bias: Tensor | None  # (K,)
    stride: int  # of conv1 and conv3
    master1: Alike = None
    master2: Alike = None
    master3: Alike = None

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the gradients are of."""
        return tuple(weight if master is None else master for weight, master in zip(self[:3], self[-3:], strict=True))

    def wanted(self) -> Convolutions:
        """Flags in which a copy is wanted where its master is."""
        weights = [weight or master for weight, master in zip(self[:3], self[-3:], strict=True)]
        return Convolutions(*weights, *self[3:])


class Block(NamedTuple):
    x: Tensor  # (N, C, H, W)
    convs: Convolutions
    norm1: Norm
    norm2: Norm


class BlockOutput(NamedTuple):
    out: Tensor  # (N, K, P, Q)
    y1: Tensor  # (N, K, P, Q) = conv1(x)
    y2: Tensor  # (N, K, P, Q) = conv2(relu(bn1(y1)))
    stats1: Tensor  # (4, K) = mean, invstd, scale, shift
    stats2: Tensor  # (4, K)


class BlockKept(NamedTuple):
    """Four activations and per-channel vectors; relu(bn1(y1)) is computed again from y1."""

    x: Tensor
    output: BlockOutput
    convs: Convolutions
    norm1: Norm
    norm2: Norm


class BlockGrad(NamedTuple):
    """Gradients, None where nothing asked for them; the sums are in the type of the statistics.

    A sum of g is the gradient of anything that is added per channel, as a convolution's bias is. A bias before batch
    statistics has zeros for a gradient, which a backend may give or leave to its caller.
    """

    x: Tensor | None
    conv1: Tensor | None
    conv2: Tensor | None
    conv3: Tensor | None
    weight1: Tensor | None  # (K,)
    bias1: Tensor | None  # (K,)
    sum_g1: Tensor | None  # (K,): the gradient of what is added to y1, if bn1's statistics are frozen
    weight2: Tensor | None
    bias2: Tensor | None
    sum_g2: Tensor  # (K,): the gradient of what is added to the shortcut, and, if bn2's are frozen, to y2
    conv_bias1: Tensor | None = None  # (K,) zeros, or None
    conv_bias2: Tensor | None = None
