"""The operators' descriptions: what each takes, what it gives, what it keeps for backward, what backward gives.

`schema` makes the operators' flat arguments from these named tuples. A tuple of an operator's arguments also says,
with a flag in each place, which gradients are wanted, and, with a tensor in each place, what they are.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from resnet.norm import KeptNorm, Norm
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
    norm: KeptNorm
    relu: bool
    added: bool  # whether there was a shortcut


# ---- a convolution and its BatchNorm -----------------------------------------------------------------------------

# Stride, padding and dilation of a convolution, the same along H and W. How many groups it has follows from channels:
# each of the weight's (K, C, R, S) reads C of x's.
Geometry = tuple[int, int, int]
POINTWISE: Geometry = (1, 0, 1)  # of a 1x1 convolution without a stride, or of the identity


class Unit(NamedTuple):
    """A convolution, whose bias belongs to its norm.

    Under autocast the weight is a copy of another type, and the master is the parameter that it was made of. The
    gradient is then the master's: in its type and layout, where a copy's would be rounded and cast.
    """

    weight: Tensor  # (K, C, R, S)
    geometry: Geometry
    norm: Norm
    master: Alike = None  # (K, C, R, S)

    def kept(self) -> KeptUnit:
        return KeptUnit(self.weight, self.geometry, self.norm.kept(), self.master)


class KeptUnit(NamedTuple):
    """A `Unit` as backward needs it."""

    weight: Tensor
    geometry: Geometry
    norm: KeptNorm
    master: Alike = None


class KeptConv(NamedTuple):
    """A `Unit` as backward needs it where its norm is of constants."""

    weight: Tensor
    geometry: Geometry
    master: Alike = None


class Projection(NamedTuple):
    """A convolution that no BatchNorm follows: a shortcut's, 1x1, or a block's last one; or the identity."""

    weight: Tensor | None  # (K, C, R, S); None: the identity
    bias: Alike  # (K,); forward reads it
    geometry: Geometry
    master: Alike = None  # see `Unit`

    def kept(self) -> Projection:
        return self


class Pooled(NamedTuple):
    """x behind an average pool without padding, and the pool, by which the map's gradient becomes part of x's.

    A bottleneck with one is an operator of 60 arguments, of 64 that PyTorch allows.
    """

    map: Tensor  # (N, C, P, Q), no part of autograd's graph
    size: int
    stride: int


class UnitGrad(NamedTuple):
    """Gradients, None where nothing asked for them.

    `sum_g`, in the type of the statistics, is the gradient of what is added per channel behind the norm, and so of the
    bias of a shortcut without a norm. The bias of a convolution before frozen statistics has scale * sum_g, and before
    batch statistics zeros: a backend may give these in `conv_bias`, or leave them to its caller.
    """

    conv: Tensor | None = None
    weight: Tensor | None = None  # (K,)
    bias: Tensor | None = None  # (K,)
    sum_g: Tensor | None = None  # (K,)
    conv_bias: Tensor | None = None  # (K,) zeros, or None


class ChainGrad(NamedTuple):
    """Of a chain of units: a deep stem's, or one that ends in a squeeze."""

    x: Tensor | None
    units: tuple[UnitGrad, ...]


def wanted(flags: Unit | Projection) -> Unit | Projection:
    """Flags in which a copy is wanted where its master is."""
    return flags._replace(weight=flags.weight or flags.master)


def trained_dtype(part: KeptUnit | Projection) -> torch.dtype:
    """The type of a weight's gradient."""
    return (part.weight if part.master is None else part.master).dtype


# ---- the stem ----------------------------------------------------------------------------------------------------


class Stem(NamedTuple):
    """max_pool(relu(batch_norm(conv(x)))), the pool 3x3 with stride 2 and padding 1."""

    x: Tensor  # (N, C, H, W)
    unit: Unit


class StemOutput(NamedTuple):
    out: Tensor  # (N, K, OP, OQ)
    y: Tensor  # (N, K, P, Q) = conv(x)
    tap: Tensor  # (N, K, OP, OQ) uint8: which of its window's nine pixels was the maximum
    stats: Tensor  # (4, K)


class StemKept(NamedTuple):
    """Two tensors of y's pooled size are kept, out and a byte per element, in place of one of y's own."""

    x: Tensor
    output: StemOutput
    unit: KeptUnit


class StemGrad(NamedTuple):
    x: Tensor | None
    unit: UnitGrad


class DeepStem(NamedTuple):
    """A stem of three convolutions: each of the first two with its norm and a ReLU, the last with the pool, too."""

    x: Tensor  # (N, C, H, W)
    units: tuple[Unit, Unit, Unit]


class DeepStemOutput(NamedTuple):
    out: Tensor  # (N, K, OP, OQ)
    ys: tuple[Tensor, Tensor, Tensor]  # the convolutions, the last of which is (N, K, P, Q)
    tap: Tensor  # (N, K, OP, OQ) uint8, as a `StemOutput`'s
    stats: tuple[Tensor, Tensor, Tensor]  # (4, K) of each one's norm


class DeepStemKept(NamedTuple):
    """What precedes a convolution, relu(norm(y)), is computed again from y."""

    x: Tensor
    output: DeepStemOutput
    units: tuple[KeptUnit, KeptUnit, KeptUnit]


def are_summed(norm: KeptNorm, needs: Norm) -> bool:
    """Whether anything asks for the sums of a norm's backward: batch statistics, or a vector that is trained."""
    return norm.training or any(needs)


# ---- the residual block ------------------------------------------------------------------------------------------


class BlockKind(NamedTuple):
    """The descriptions of one kind of residual block: a chain of units with ReLU between them, and its shortcut.

    arguments  x (N, C, H, W); units: a Unit each; shortcut: a Projection, or a Unit where it has a norm; pooled:
               where the shortcut reads a pooled x
    output     out (N, K, P, Q); ys: the units' convolutions, the last of which is (N, K, P, Q); stats: (4, K) of each
               one's norm; shortcut: the shortcut's convolution and its stats where it has a norm, else nothing
    kept       x, output, units, shortcut and pooled; what precedes a convolution, relu(norm(y)), is computed again
               from y
    """

    name: str  # of its operator
    arguments: type[tuple]
    output: type[tuple]
    kept: type[tuple]


def block_operator(units: int, normed: bool, pooled: bool = False) -> str:
    """The name of a kind's operator."""
    return f"residual_block_{units}{'_pooled' if pooled else '_normed' if normed else ''}"


@cache
def block_kind(units: int, normed: bool, pooled: bool = False) -> BlockKind:
    """The kind of `units` units whose shortcut has a norm, and may read a pooled x, or is a Projection."""

    def parts(unit: type[tuple], shortcut: type[tuple]) -> list[tuple[str, type]]:
        return [("units", tuple[(unit,) * units]), ("shortcut", shortcut), *[("pooled", Pooled)] * pooled]

    maps, shortcut = tuple[(Tensor,) * units], tuple[(Tensor,) * (2 * normed)]
    outputs = [("out", Tensor), ("ys", maps), ("stats", maps), ("shortcut", shortcut)]
    output = NamedTuple("BlockOutput", outputs)
    kept = parts(KeptUnit, KeptUnit if normed else Projection)
    return BlockKind(
        block_operator(units, normed, pooled),
        NamedTuple("Block", [("x", Tensor), *parts(Unit, Unit if normed else Projection)]),
        output,
        NamedTuple("BlockKept", [("x", Tensor), ("output", output), *kept]),
    )


@cache
def frozen_kind(units: int, normed: bool, pooled: bool = False) -> BlockKind:
    """The kind of such a block whose norms are constants: of running statistics, and no vector of theirs is trained.

    output     out; inner: relu(norm(conv)) of each unit but the last; stats: (4, K) of each norm, the shortcut's last
    kept       x, output, the units' convolutions, the shortcut's, of which the bias is left out, and pooled
    """
    kind = block_kind(units, normed, pooled)
    outputs = [("inner", tuple[(Tensor,) * (units - 1)]), ("stats", tuple[(Tensor,) * (units + normed)])]
    output = NamedTuple("FrozenBlockOutput", [("out", Tensor), *outputs])
    convs = [("units", tuple[(KeptConv,) * units]), ("shortcut", Projection), *[("pooled", Pooled)] * pooled]
    kept = NamedTuple("FrozenBlockKept", [("x", Tensor), ("output", output), *convs])
    return BlockKind(f"{kind.name}_frozen", kind.arguments, output, kept)


SHORTCUTS = ((False, False), (True, False), (True, True))  # whether there is a norm, and whether x is pooled
_KINDS = [(units, *shortcut) for units in (2, 3) for shortcut in SHORTCUTS]
BLOCK_KINDS = tuple(block_kind(*kind) for kind in _KINDS)
FROZEN_KINDS = tuple(frozen_kind(*kind) for kind in _KINDS)


class BlockGrad(NamedTuple):
    x: Tensor | None
    units: tuple[UnitGrad, ...]
    shortcut: UnitGrad  # of a Projection only `conv` and `sum_g`
    partial: Tensor | None = None  # see `BlockBefore`


class BlockBefore(NamedTuple):
    """What a block's backward takes of the block before it, whose output relu(norm(y) + shortcut) is this one's x.

    In place of x's gradient it then gives that block's g, the gradient behind the ReLU; and partial sums (2 or 3, T, K)
    of g, g * xhat and, where the shortcut has a norm, g * zhat. The backward of the block before begins with them.
    """

    y: Tensor  # (N, K, P, Q)
    stats: Tensor  # (4, K)
    z: Tensor | None  # (N, K, P, Q): the shortcut's convolution, where that has a norm
    z_stats: Tensor | None  # (4, K)

    @staticmethod
    def of(kept: tuple) -> BlockBefore:
        """That of a block of a kind in `BLOCK_KINDS`, by what it keeps."""
        _, ys, stats, shortcut = kept.output
        return BlockBefore(ys[-1], stats[-1], *(shortcut or (None, None)))


# ---- squeeze-and-excitation ----------------------------------------------------------------------------------------

# PyTorch computes the gates between the squeeze and the excitation, by whatever modules there are. So these are two
# operators, though in backward they are one fusion. The norm's output h is never stored: y and stats stand for it. In
# the place of y's gradient the excitation therefore gives g, the gradient of gate * h. What else the squeeze needs of
# it comes as the gradient of `link` (3, N, C): of each image the sum of g, the sum of g * xhat, and the gates.


def squeeze_operator(units: int) -> str:
    """The name of the operator of a chain that ends in a squeeze."""
    return f"squeeze_{units}"


@cache
def squeeze_kind(units: int) -> BlockKind:
    """The kind of a chain of units with ReLU between them, at the end of which each image's means are taken.

    arguments  x (N, C, H, W); units; relu: whether one follows the last norm, too; added: whether x is the shortcut of
               what the excitation gives
    output     y (N, K, P, Q): the last convolution; pooled (N, K): the means of [relu](norm(y)); link (3, N, K): see
               `batch_norm_squeeze`; stats (4, K) of the last norm; ys and inner_stats: those of the other units
    kept       x, all ys, stats and units, link, relu and added
    """
    before, all_ = tuple[(Tensor,) * (units - 1)], tuple[(Tensor,) * units]
    outputs = [("y", Tensor), ("pooled", Tensor), ("link", Tensor), ("stats", Tensor)]
    flags = [("relu", bool), ("added", bool)]
    kept = [("x", Tensor), ("ys", all_), ("stats", all_), ("link", Tensor), ("units", tuple[(KeptUnit,) * units])]
    return BlockKind(
        squeeze_operator(units),
        NamedTuple("Squeeze", [("x", Tensor), ("units", tuple[(Unit,) * units]), *flags]),
        NamedTuple("SqueezeOutput", [*outputs, ("ys", before), ("inner_stats", before)]),
        NamedTuple("SqueezeKept", [*kept, *flags]),
    )


SQUEEZE_KINDS = tuple(map(squeeze_kind, (2, 3)))


class Excite(NamedTuple):
    """[relu](gate * [relu](norm(y)) [+ shortcut])."""

    y: Tensor  # (N, C, H, W)
    stats: Tensor  # (4, C)
    link: Alike  # (3, N, C)
    gate: Tensor  # (N, C)
    shortcut: Tensor | None  # (N, C, H, W)
    inner_relu: bool  # whether one follows the norm
    relu: bool  # whether one ends it


class ExciteOutput(NamedTuple):
    out: Tensor  # (N, C, H, W)


class ExciteKept(NamedTuple):
    y: Tensor
    out: Tensor | None  # None without a ReLU at the end
    stats: Tensor
    gate: Tensor
    inner_relu: bool


class ExciteGrad(NamedTuple):
    g: Tensor | None  # that of the shortcut, and, before the gate, of the norm; None: dout itself
    gate: Tensor
    link: Tensor


# ---- the residual block with pre-activation -------------------------------------------------------------------------


def pre_activation_operator(convolutions: int) -> str:
    """The name of the operator of a block with pre-activation."""
    return f"pre_activation_block_{convolutions}"


@cache
def pre_activation_kind(convolutions: int) -> BlockKind:
    """The kind of a block of so many convolutions, each of relu(norm(what is before it)), whose sum has no ReLU.

    arguments  x (N, C, H, W); norm: that of x; units: each convolution but the last, with the norm after it; conv: the
               last one; shortcut: a convolution of relu(norm(x)), or the identity of x
    output     out (N, K, P, Q); ys: the convolutions but the last; stats: (4, C) of each norm, that of x first
    kept       x, ys, stats and the arguments; relu(norm(x)) and the others are computed again
    """
    maps, stats = tuple[(Tensor,) * (convolutions - 1)], tuple[(Tensor,) * convolutions]

    def parts(norm: type[tuple], unit: type[tuple]) -> list[tuple[str, type]]:
        units = tuple[(unit,) * (convolutions - 1)]
        return [
            ("norm", norm),
            ("units", units),
            ("conv", Projection),
            ("shortcut", Projection),
            ("activated", bool),
        ]

    made = [("ys", maps), ("stats", stats)]
    return BlockKind(
        pre_activation_operator(convolutions),
        NamedTuple("PreActivation", [("x", Tensor), *parts(Norm, Unit)]),
        NamedTuple("PreActivationOutput", [("out", Tensor), *made]),
        NamedTuple("PreActivationKept", [("x", Tensor), *made, *parts(KeptNorm, KeptUnit)]),
    )


PRE_ACTIVATION_KINDS = tuple(map(pre_activation_kind, (2, 3)))


class PreActivationGrad(NamedTuple):
    x: Tensor | None
    norm: UnitGrad  # of the norm of x: all but `conv`
    units: tuple[UnitGrad, ...]
    conv: UnitGrad  # of a Projection only `conv` and `sum_g`
    shortcut: UnitGrad


def pre_activation_inputs(needs: tuple) -> list[bool]:
    """For each convolution, whether anything asks for its grad-input, whose sums are those of the norm before it."""
    asked = [needs.x or any(needs.norm)]
    for unit in needs.units:
        asked.append(asked[-1] or unit.weight or any(unit.norm))
    return asked


# `needs` has a flag in each place of a block's arguments, or of another chain's.


def all_wanted(needs: tuple) -> tuple:
    """The needs with each part's flags as `wanted` gives them."""
    needs = needs._replace(units=tuple(map(wanted, needs.units)))
    if hasattr(needs, "conv"):
        needs = needs._replace(conv=wanted(needs.conv))
    return needs._replace(shortcut=wanted(needs.shortcut)) if hasattr(needs, "shortcut") else needs


def grad_inputs(needs: tuple) -> list[bool]:
    """For each unit, whether anything asks for its convolution's grad-input, whose sums are the norm's before it."""
    asked = [needs.x]
    for unit in needs.units[:-1]:
        asked.append(asked[-1] or unit.weight or any(unit.norm))
    return asked


def shortcut_input(block: tuple) -> Tensor:
    """What the shortcut reads, of a block's arguments or of what it keeps: x, or a pooled x."""
    return block.pooled.map if hasattr(block, "pooled") else block.x


def shortcut_reached(needs: tuple) -> bool:
    """Whether anything asks for the gradient of a shortcut with a norm, or for that norm's sums."""
    return needs.x or needs.shortcut.weight or any(needs.shortcut.norm)
