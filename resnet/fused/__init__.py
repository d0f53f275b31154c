"""`FusedResidual`, `FusedStem` and the others: the reference's modules on fused operators, same `state_dict`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: F401, for TorchScript, which compiles an eager forward's text here

from resnet.checks import check_block, check_strides, check_whole
from resnet.fusable import BlockParts, StemParts, UnitParts, Watched, gate_parts
from resnet.fused.block import FusedBlock
from resnet.fused.stem import FusedStemBase
from resnet.reference import BasicBlock, Bottleneck, Residual, ResidualBottleneck, SmallStem, Stem
from resnet.sequential import FusedSequential, linkable


class _FusedTextbookStem(FusedStemBase):
    """A stem with the textbook's constructor."""

    def __init__(self, in_channels: int, channels: int = 64):
        check_whole("in_channels", in_channels, 0)
        check_whole("channels", channels, 0)
        super().__init__(in_channels, channels)


class FusedStem(_FusedTextbookStem, Stem):
    """`Stem` with BatchNorm, ReLU and max-pool in one pass; same children, so the same `state_dict`.

    The ReLU comes after the pool, on a quarter of the pixels: relu(pool(z)) is pool(relu(z)), gradients included.
    Where a window's maximum is positive, its place is the same; where it is not, nothing passes the ReLU. NaN stays
    NaN. Backward needs the input, the convolution's output, the output, and a byte for each of its elements.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    forward.__wrapped__ = Stem.forward

    def _parts(self) -> StemParts | str:
        children = tuple(self._modules.values())
        if len(children) != 4:
            return f"it has {len(children)} children, not 4"
        conv, bn, relu, pool = children
        unit, others = UnitParts(conv, bn, "0", "1"), (Watched("2", relu, nn.ReLU),)
        return StemParts(unit, Watched("3", pool, nn.MaxPool2d), others)


class FusedSmallStem(_FusedTextbookStem, SmallStem):
    """`SmallStem` with BatchNorm and ReLU in one pass after PyTorch's convolution; same children and `state_dict`.

    Backward needs the input, the convolution's output and the output.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    forward.__wrapped__ = SmallStem.forward

    def _parts(self) -> StemParts | str:
        children = tuple(self._modules.values())
        if len(children) != 3:
            return f"it has {len(children)} children, not 3"
        conv, bn, relu = children
        return StemParts(UnitParts(conv, bn, "0", "1"), None, (Watched("2", relu, nn.ReLU),))


class _FusedTextbook(FusedBlock):
    """A block with the textbook's constructor."""

    stem = FusedStem
    small_stem = FusedSmallStem
    sequential = FusedSequential

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int | tuple[int, int] = 1
    ):
        check_block(input_channels, num_channels, use_1x1conv, strides)
        super().__init__(input_channels, num_channels, use_1x1conv, strides)


@linkable
class FusedResidual(_FusedTextbook, Residual):
    """The residual block on fused operators: BatchNorm, the residual add and ReLU move each activation once.

    Drop-in for `Residual` (d2l.ai): same constructor, parameters, buffers and `state_dict`. Activations are
    channels_last inside; an input in another layout is converted, outputs and gradients are channels_last. Backward
    needs the input, the two convolutions' outputs, the output, and per-channel vectors.

    A submodule that was replaced, hooked, parametrised or given a forward of its own makes the block run PyTorch's
    operators instead, with one warning that names it. So do global module hooks, and strides that are not the same
    along H and W.

    Raises, in the constructor:
        ValueError: channels or strides that are no whole numbers, or negative, or strides of 0; an identity shortcut
            whose shape cannot match, that is, `num_channels` other than `input_channels` or `strides` other than 1
            without `use_1x1conv`.
    Raises, in forward, before anything has changed:
        ValueError, TypeError: rank, channels, type or device of the input, or one value per channel in training.
        RuntimeError: on double backward.
    """

    def forward(self, X: Tensor) -> Tensor:
        return self._run(X)

    forward.__wrapped__ = Residual.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_textbook(self, 2, "conv3")


def _units(block: nn.Module, count: int) -> tuple[UnitParts, ...]:
    """conv1 and bn1, conv2 and bn2, ..."""
    own = block._modules
    try:  # the shorter way, by a call less for each
        return tuple([UnitParts(own[conv], own[bn], conv, bn) for conv, bn in _UNITS[count]])
    except KeyError:
        return tuple(UnitParts(own.get(conv), own.get(bn), conv, bn) for conv, bn in _UNITS[count])


_UNITS = {count: [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)] for count in (2, 3)}


def _parts_of_textbook(block: nn.Module, units: int, shortcut: str) -> BlockParts | str:
    conv, plain = block._modules.get(shortcut), block.__dict__
    if shortcut in plain and plain[shortcut] is not None:
        return f"{shortcut} is a {type(plain[shortcut]).__name__} and no module"
    return BlockParts(_units(block, units), None if conv is None else UnitParts(conv, None, shortcut))


def _parts_of_published(block: nn.Module, units: int) -> BlockParts | str:
    own = block._modules
    relu, downsample = Watched("relu", own.get("relu"), nn.ReLU), own.get("downsample")
    se, plain = own.get("se"), block.__dict__
    for name in ("se", "downsample"):
        if name in plain and plain[name] is not None:
            return f"{name} is a {type(plain[name]).__name__} and no module"
    if se is not None:
        gate = gate_parts("se", se, units, downsample)
        if gate is None:
            return f"se is a {type(se).__name__}, not a SqueezeExcite"
        return BlockParts(_units(block, units), None, (relu,), None, gate)
    if downsample is None:
        return BlockParts(_units(block, units), None, (relu,))
    children = tuple(downsample._modules.values())
    others, pool, place = (relu, Watched("downsample", downsample, nn.Sequential)), None, len(children) - 2
    if place == 1 and isinstance(children[0], nn.AvgPool2d):
        pool = Watched("downsample.0", children[0], nn.AvgPool2d)
    elif place == 1:
        others += (Watched("downsample.0", children[0], nn.Identity),)
    elif place != 0:
        return f"downsample has {len(children)} children, not 2 or 3"
    shortcut = UnitParts(*children[place:], f"downsample.{place}", f"downsample.{place + 1}")
    return BlockParts(_units(block, units), shortcut, others, pool)


@linkable
class FusedResidualBottleneck(_FusedTextbook, ResidualBottleneck):
    """`ResidualBottleneck`, the textbook's block with a bottleneck, on fused operators: see `FusedResidual`."""

    def forward(self, X: Tensor) -> Tensor:
        return self._run(X)

    forward.__wrapped__ = ResidualBottleneck.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_textbook(self, 3, "conv4")


@linkable
class FusedBasicBlock(FusedBlock, BasicBlock):
    """`BasicBlock`, the published block of ResNet-18 and 34, on fused operators: see `FusedResidual`.

    Same constructor, parameters, buffers and `state_dict`. Where the shortcut has a BatchNorm, backward needs its
    convolution's output as well.

    Raises, in the constructor:
        ValueError: channels or strides that are no whole numbers, or negative, or a stride of 0.
    """

    sequential = FusedSequential

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        avg_down: bool = False,
        squeeze_excite: bool = False,
    ):
        check_whole("in_channels", in_channels, 0)
        check_whole("channels", channels, 0)
        check_strides("stride", stride)
        super().__init__(in_channels, channels, stride, avg_down=avg_down, squeeze_excite=squeeze_excite)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    forward.__wrapped__ = BasicBlock.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_published(self, 2)


@linkable
class FusedBottleneck(FusedBlock, Bottleneck):
    """`Bottleneck`, the published block of ResNet-50 and deeper, on fused operators: see `FusedBasicBlock`."""

    sequential = FusedSequential

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int | tuple[int, int] = 1,
        *,
        mid_width: int | None = None,
        avg_down: bool = False,
        groups: int = 1,
        dilation: int = 1,
        squeeze_excite: bool = False,
    ):
        check_whole("in_channels", in_channels, 0)
        check_whole("width", width, 0)
        check_strides("stride", stride)
        if mid_width is not None:
            check_whole("mid_width", mid_width, 0)
        check_whole("groups", groups, 1)
        check_whole("dilation", dilation, 1)
        super().__init__(
            in_channels,
            width,
            stride,
            mid_width=mid_width,
            avg_down=avg_down,
            groups=groups,
            dilation=dilation,
            squeeze_excite=squeeze_excite,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    forward.__wrapped__ = Bottleneck.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_published(self, 3)
