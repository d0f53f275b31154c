"""Where the known classes keep the modules that their forward calls."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import nn

from resnet.fusable import NORM_WITH_ACTIVATION, Attention


class BlockLayout(NamedTuple):
    """The dotted names, in a block, of the modules that its forward calls."""

    units: tuple[tuple[str, str], ...]  # convolution and BatchNorm, in their order
    relus: tuple[str, ...]  # one of each unit, "" where that is a function; or those that there are
    shortcut: str  # a convolution, or a container of one and perhaps a BatchNorm; the identity where there is neither
    optional: tuple[str, ...] = ()  # what other kinds of blocks have, and this one must not
    containers: tuple[tuple[str, type | str], ...] = ()  # and their classes: see `_neighbour`
    shortcut_class: type | str = nn.Sequential
    gate: str = ""  # squeeze-and-excitation, where a block may have it, else an identity or nothing
    place: int = 0  # how many units precede it
    shortcut_norm: str = ""  # where it lies beside the shortcut's convolution
    attention: tuple[type, Attention] | None = None  # the gate's class, and what that does, where nobody has listed it
    first_norm: str = ""  # with pre-activation: a norm and a ReLU precede each convolution, this one the first
    activated: bool = False  # whether the shortcut's convolution reads what they give

    @property
    def names(self) -> tuple[str, ...]:
        relus, units = self.relus, self.units
        if self.first_norm:
            relus, units = (), [(self.first_norm,), *((relu, *unit) for relu, unit in zip(relus, units))]
        elif len(relus) == len(units):
            relus, units = (), [(*unit, relu) for unit, relu in zip(units, relus)]
        units = [*units[: self.place], (self.gate,), *units[self.place :]]
        return (*filter(None, (*sum(units, ()), *relus, self.shortcut, self.shortcut_norm)), *self.optional)

    @property
    def perhaps_containers(self) -> tuple[str, ...]:
        return (self.gate, self.shortcut) if self.gate else (self.shortcut,)


class StemLayout(NamedTuple):
    """The dotted names of the modules that a stem's forward calls."""

    conv: str  # the last one, or a container of several: a deep stem
    bn: str
    relu: str  # "" for a function
    pool: str = ""  # of a net for small images it may be an identity; or there is none
    containers: tuple[tuple[str, type | str], ...] = ()
    before: tuple[tuple[str, str, str], ...] = ()  # of a deep stem: the other convolutions, each with its norm and ReLU
    shortcut = ""
    optional = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*sum(self.before, ()), self.conv, self.bn, *filter(None, (self.relu, self.pool)))

    @property
    def calls(self) -> tuple[str, ...]:
        """The names, with "" for a ReLU that is a function."""
        return (*sum(self.before, ()), self.conv, self.bn, self.relu, *filter(None, (self.pool,)))

    @property
    def perhaps_containers(self) -> tuple[str, ...]:
        return (self.conv,)


def _numbered(count: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"conv{i}", f"bn{i}") for i in range(1, count + 1))


def torchvision_block(count: int) -> BlockLayout:
    return BlockLayout(_numbered(count), ("relu",), "downsample")


def timm_block(count: int) -> BlockLayout:
    relus = tuple(f"act{i}" for i in range(1, count + 1))
    optional = ("drop_block", "aa", "drop_path")
    return BlockLayout(_numbered(count), relus, "downsample", optional, gate="se", place=count)


def transformers_block(count: int, prefix: str = "ResNet", gate: int | None = None) -> BlockLayout:
    """`prefix` is that of the library's classes; `gate` the place of squeeze-and-excitation among the layers.

    RT-DETR's shortcut may lie beside a pool in a container.
    """
    layers = [f"layer.{i}" for i in range(count + (gate is not None)) if i != gate]
    return BlockLayout(
        units=tuple((f"{layer}.convolution", f"{layer}.normalization") for layer in layers),
        relus=(*(f"{layer}.activation" for layer in layers[:-1]), "activation"),
        shortcut="shortcut",
        optional=(f"{layers[-1]}.activation",),
        containers=(("layer", nn.Sequential), *((layer, f"{prefix}ConvLayer") for layer in layers)),
        shortcut_class=f"{prefix}ShortCut",
        gate="" if gate is None else f"layer.{gate}",
        place=gate or 0,
    )


def torchvision_regnet() -> BlockLayout:
    layers = [f"f.{letter}" for letter in "abc"]
    return BlockLayout(
        units=tuple((f"{layer}.0", f"{layer}.1") for layer in layers),
        relus=("f.a.2", "f.b.2", "activation"),
        shortcut="proj",
        containers=(("f", "BottleneckTransform"), *((layer, "Conv2dNormActivation") for layer in layers)),
        shortcut_class="Conv2dNormActivation",
        gate="f.se",
        place=2,
    )


def timm_regnet() -> BlockLayout:
    """The norms hold the activations that follow them."""
    layers = [f"conv{i}" for i in (1, 2, 3)]
    return BlockLayout(
        units=tuple((f"{layer}.conv", f"{layer}.bn") for layer in layers),
        relus=("conv1.bn.act", "conv2.bn.act", "act3"),
        shortcut="downsample",
        optional=("drop_path",),
        containers=(
            *((layer, "ConvNormAct") for layer in layers),
            *((f"{layer}.bn", NORM_WITH_ACTIVATION) for layer in layers),
        ),
        shortcut_class="ConvNormAct",
        gate="se",
        place=2,
    )


def rt_detr_stem() -> StemLayout:
    layers = [f"embedder.{i}" for i in range(3)]
    *before, last = ((f"{layer}.convolution", f"{layer}.normalization", f"{layer}.activation") for layer in layers)
    containers = (("embedder", nn.Sequential), *((layer, "RTDetrResNetConvLayer") for layer in layers))
    return StemLayout(*last, "pooler", containers, tuple(before))


class Condition(NamedTuple):
    """What a forward asks about an attribute of its module, and the answer."""

    name: str
    is_none: bool  # whether it is None; else whether it is true
    answer: bool

    def holds(self, module: nn.Module) -> bool:
        value = held_at(module, self.name)
        if self.is_none:
            return (value is None) == self.answer
        return self.answer if value else not self.answer  # dynamo of PyTorch 2.11 has no `bool` of a module


class Equal(NamedTuple):
    """What an attribute of a module was when its forward was read: a name, or a list of names as a tuple."""

    name: str
    value: object

    def holds(self, module: nn.Module) -> bool:
        value = held_at(module, self.name)
        return (tuple(value) if isinstance(value, list) else value) == self.value


def held_at(module: object, name: str) -> object:
    """What a dotted name in a module stands for; None where there is nothing."""
    for part in name.split("."):
        own = getattr(module, "__dict__", {})
        children = own.get("_modules", {})
        module = children[part] if part in children else own.get(part)
    return module


def places_of(layout: BlockLayout | StemLayout) -> frozenset[str]:
    """A layout's names, and those of all that they lie in."""
    paths = [name.split(".") for name in layout.names]
    return frozenset(".".join(path[:length]) for path in paths for length in range(1, len(path) + 1))


def classes_in(layout: BlockLayout | StemLayout) -> list[type[nn.Module]]:
    """The classes of a layout's containers, which were looked up."""
    kinds = [kind for _, kind in layout.containers]
    if isinstance(layout, BlockLayout):
        kinds.append(layout.shortcut_class)
    return [kind for kind in kinds if issubclass(kind, nn.Module)]


def _neighbour(cls: type, other: type | str) -> type:
    """A class by its name in the Python module that `cls` is in, or by its full name, which has dots."""
    if not isinstance(other, str):
        return other
    module, _, name = other.rpartition(".")
    return getattr(sys.modules.get(module or cls.__module__), name, type(None))


def looked_up(cls: type, layout: BlockLayout | StemLayout) -> BlockLayout | StemLayout:
    layout = layout._replace(containers=tuple((name, _neighbour(cls, kind)) for name, kind in layout.containers))
    if isinstance(layout, BlockLayout):
        layout = layout._replace(shortcut_class=_neighbour(cls, layout.shortcut_class))
    return layout
