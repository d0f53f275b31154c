"""`fuse` and `unfuse`: the residual blocks and stems of a finished model change their class for a fused one, and back.

Known are the ResNets and RegNets of torchvision, timm and transformers, none of which is imported, and this library's
own.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import (
    NORM_WITH_ACTIVATION,
    BlockParts,
    StemParts,
    UnitParts,
    Watched,
    full_name,
    gate_parts,
    is_norm,
    was_replaced,
)
from resnet.fused import (
    FusedBasicBlock,
    FusedBlock,
    FusedBottleneck,
    FusedResidual,
    FusedResidualBottleneck,
    FusedSmallStem,
    FusedStem,
    FusedStemBase,
    warn_once,
)
from resnet.reference import BasicBlock, Bottleneck, Residual, ResidualBottleneck, SmallStem, Stem
from resnet.sequential import FusedSequential, holds_blocks, is_watched, linkable, run_in_turn, run_linked

# ---- where the known classes keep their parts ------------------------------------------------------------------------


class BlockLayout(NamedTuple):
    """The dotted names, in a block, of the modules that its forward calls."""

    units: tuple[tuple[str, str], ...]  # convolution and BatchNorm, in their order
    relus: tuple[str, ...]
    shortcut: str  # a convolution, or a container of one and perhaps a BatchNorm; the identity where there is neither
    optional: tuple[str, ...] = ()  # what other kinds of blocks have, and this one must not
    containers: tuple[tuple[str, type | str], ...] = ()  # and their classes: see `_neighbour`
    shortcut_class: type | str = nn.Sequential
    gate: str = ""  # squeeze-and-excitation, where a block may have it, else an identity or nothing
    place: int = 0  # how many units precede it

    @property
    def names(self) -> tuple[str, ...]:
        units = [*self.units[: self.place], *[(self.gate,)] * bool(self.gate), *self.units[self.place :]]
        return (*sum(units, ()), *self.relus, self.shortcut, *self.optional)

    @property
    def perhaps_containers(self) -> tuple[str, ...]:
        return (self.gate, self.shortcut) if self.gate else (self.shortcut,)


class StemLayout(NamedTuple):
    """The dotted names of the modules that a stem's forward calls."""

    conv: str  # the last one, or a container of several: a deep stem
    bn: str
    relu: str
    pool: str = ""  # of a net for small images it may be an identity; or there is none
    containers: tuple[tuple[str, type | str], ...] = ()
    before: tuple[tuple[str, str, str], ...] = ()  # of a deep stem: the other convolutions, each with its norm and ReLU
    shortcut = ""
    optional = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*sum(self.before, ()), self.conv, self.bn, self.relu, *filter(None, [self.pool]))

    @property
    def perhaps_containers(self) -> tuple[str, ...]:
        return (self.conv,)


def _numbered(count: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"conv{i}", f"bn{i}") for i in range(1, count + 1))


def _torchvision(count: int) -> BlockLayout:
    return BlockLayout(_numbered(count), ("relu",), "downsample")


def _timm(count: int) -> BlockLayout:
    relus = tuple(f"act{i}" for i in range(1, count + 1))
    optional = ("drop_block", "aa", "drop_path")
    return BlockLayout(_numbered(count), relus, "downsample", optional, gate="se", place=count)


def _transformers(count: int, prefix: str = "ResNet", gate: int | None = None) -> BlockLayout:
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


def _torchvision_regnet() -> BlockLayout:
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


def _timm_regnet() -> BlockLayout:
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


def _rt_detr_stem() -> StemLayout:
    layers = [f"embedder.{i}" for i in range(3)]
    *before, last = ((f"{layer}.convolution", f"{layer}.normalization", f"{layer}.activation") for layer in layers)
    containers = (("embedder", nn.Sequential), *((layer, "RTDetrResNetConvLayer") for layer in layers))
    return StemLayout(*last, "pooler", containers, tuple(before))


def _places(layout: BlockLayout | StemLayout) -> frozenset[str]:
    """A layout's names, and those of all that they lie in."""
    paths = [name.split(".") for name in layout.names]
    return frozenset(".".join(path[:length]) for path in paths for length in range(1, len(path) + 1))


def _held(module: object, name: str) -> object:
    """What a dotted name in a module stands for; None where there is nothing."""
    for part in name.split("."):
        own = getattr(module, "__dict__", {})
        children = own.get("_modules", {})
        module = children[part] if part in children else own.get(part)
    return module


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """The children of the module of a name, each with its own."""
    return [(f"{name}.{key}", child) for key, child in module._modules.items()]


def _watched(module: _Changed) -> list[Watched]:
    """The containers, whose own calls the operator replaces, and what their classes do not put in: it may be called."""
    found = []
    for place, kind in module._layout.containers:
        container = _held(module, place)
        found.append(Watched(place, container, kind))
        if isinstance(container, nn.Module):
            inner = _children(place, container)
            found += [Watched(name, child, nn.Identity) for name, child in inner if name not in module._places]
    return found


def _out_of_order(module: _Changed) -> str | None:
    """What calls its modules one after the other, and has them in another order than its class: it, or a container."""
    if (
        isinstance(module, nn.Sequential)
        and not isinstance(module, _Network)
        and (*module._modules,) != module._layout.names
    ):
        return f"it has the modules {', '.join(module._modules)}, not {', '.join(module._layout.names)}"
    for place, _ in module._layout.containers:
        container = _held(module, place)
        if isinstance(container, nn.Sequential):
            inside = [name.removeprefix(f"{place}.") for name in module._layout.names if name.startswith(f"{place}.")]
            order = [*dict.fromkeys(name.split(".")[0] for name in inside)]
            found = [name for name in container._modules if name in order]
            if found != [name for name in order if name in found]:
                return f"{place} has its modules in the order {', '.join(found)}"
    return None


def _shortcut(name: str, module: object, kind: type) -> tuple[UnitParts | None, list[Watched], Watched | None]:
    """The shortcut's convolution and BatchNorm, None for the identity; all else, which has to be identities; a pool.

    What follows the convolution is taken for the BatchNorm, so that another norm is refused as one.
    """
    if module is None:
        return None, [], None
    if isinstance(module, _ConvNd):
        return UnitParts(module, None, name), [], None
    if type(module) is nn.Identity or not isinstance(module, nn.Module):
        return None, [Watched(name, module, nn.Identity)], None
    others, children = [Watched(name, module, kind)], _children(name, module)
    nested = [child for child in children if type(child[1]) is kind]
    if nested and kind is not nn.Sequential and type(module) is nn.Sequential:  # its children stand in its place
        others = [Watched(name, module, nn.Sequential), Watched(*nested[0], kind)]
        place = children.index(nested[0])
        children[place : place + 1] = _children(*nested[0])
    conv = bn = pool = None
    for place, child in children:
        if conv is None and isinstance(child, _ConvNd):
            conv = place, child
        elif conv is not None and bn is None and type(child) not in (nn.Identity, type(None)):
            bn = place, child
        elif conv is None and pool is None and isinstance(child, nn.AvgPool2d):
            pool = Watched(place, child, nn.AvgPool2d)
        else:
            others.append(Watched(place, child, nn.Identity))
    if conv is None:
        return None, others, pool
    bn_name, norm = bn or ("", None)
    if norm is not None and norm._modules:  # an activation that it holds would follow it
        others.append(Watched(bn_name, norm, type(norm)))
        others += [Watched(place, child, nn.Identity) for place, child in _children(bn_name, norm)]
    return UnitParts(conv[1], norm, conv[0], bn_name), others, pool


# ---- the classes that the known ones are changed for -----------------------------------------------------------------


class _Kept(NamedTuple):
    """The parts of a module, and all children that were seen when they were found."""

    parts: BlockParts | StemParts | str
    # Of a module, and a copy; of a sequence also their order, which dicts are equal without.
    children: tuple[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None], list[str] | None], ...]

    def hold(self, module: _Changed) -> bool:
        own = module.__dict__
        if self.children[0][0] is not own["_modules"]:  # as in a replica, which has its original's attributes
            return False
        for now, then, order in self.children:
            if now != then or (order is not None and [*now] != order):
                return False
        # What is not None here is no module, which would be among the children, but perhaps a function.
        layout = module._layout
        return own.get(layout.shortcut) is None and all(own.get(name) is None for name in layout.optional)


# A child that knows its block, as by a hook, would keep it alive from here: `fuse` and `unfuse` begin anew.
_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


class _Changed:
    """What `fuse` changes a class for is made of this, the operator's mixin and the eager class, in this order."""

    _eager_class: type[nn.Module]
    _eager_method: Callable[[nn.Module, Tensor], Tensor]  # in whose place `_call` is
    _method: str  # its name
    _layout: BlockLayout | StemLayout  # its containers' classes are looked up
    _places: frozenset[str]  # of the layout

    def __reduce_ex__(self, protocol: int) -> tuple:
        """The class has no name that pickle could import; it is made anew where the module is read.

        One that is derived from it is its maker's to find.
        """
        reduced = super().__reduce_ex__(max(protocol, 2))
        if "_eager_class" not in vars(type(self)):
            return reduced
        _, _, *state = reduced
        return _rebuild, (self._eager_class,), *state

    def _call_unless_replaced(self, x: Tensor) -> Tensor:
        """`_call`, or what somebody has put into the eager class since it was fused."""
        eager = getattr(self._eager_class, self._method)
        if eager is type(self)._eager_method:
            return self._call(x)
        warn_once(type(self).__name__, f"{full_name(self._eager_class)}.{self._method} was replaced")
        return eager(self, x)

    def _parts(self) -> BlockParts | StemParts | str:
        """What `_find_parts` gives. To find them takes longer than to see that no module has been replaced since."""
        if torch.compiler.is_compiling():
            return _out_of_order(self) or self._find_parts()
        kept = _kept.get(self)
        if kept is None or not kept.hold(self):
            places = [*(name for name, _ in self._layout.containers), *self._layout.perhaps_containers]
            containers = [self, *(_held(self, name) for name in places)]
            if isinstance(containers[-1], nn.Module):  # in which one of a library's own may lie, or a norm of its own
                inner = [child for child in containers[-1]._modules.values() if child is not None]
                containers += inner + [child for module in inner for child in module._modules.values()]
            children = []
            for module in containers:
                if isinstance(module, nn.Module):
                    now = module._modules
                    children.append((now, dict(now), [*now] if isinstance(module, nn.Sequential) else None))
            _kept[self] = kept = _Kept(_out_of_order(self) or self._find_parts(), tuple(children))
        return kept.parts


class _Block(_Changed, FusedBlock):
    _call = FusedBlock._run

    def _find_parts(self) -> BlockParts | str:
        layout = self._layout
        units = tuple(UnitParts(_held(self, conv), _held(self, bn), conv, bn) for conv, bn in layout.units)
        gate, attention = None, _held(self, layout.gate) if layout.gate else None
        shortcut, others, pool = _held(self, layout.shortcut), [], None
        if attention is not None and type(attention) is not nn.Identity:
            gate = gate_parts(layout.gate, attention, layout.place, None if type(shortcut) is nn.Identity else shortcut)
        if gate is None:
            shortcut, others, pool = _shortcut(layout.shortcut, shortcut, layout.shortcut_class)
            if attention is not None:
                others.append(Watched(layout.gate, attention, nn.Identity))
        elif gate.shortcut is None and shortcut is not None:
            others.append(Watched(layout.shortcut, shortcut, nn.Identity))
        shortcut = None if gate is not None else shortcut
        others += [Watched(name, _held(self, name), nn.ReLU) for name in layout.relus]
        optional = (Watched(name, _held(self, name), nn.Identity) for name in layout.optional)
        others += [other for other in optional if other.module is not None]
        for name, module, _ in others:
            if module is not None and not isinstance(module, nn.Module):
                return f"{name} is a {type(module).__name__} and no module"
        return BlockParts(units, shortcut, (*others, *_watched(self)), pool, gate)


class _Stem(_Changed, FusedStemBase):
    _call = FusedStemBase._run

    def _called(self) -> tuple[str, ...]:
        """The names of the modules that are called."""
        return self._layout.names

    def _find_parts(self) -> StemParts:
        conv, bn, relu, name = self._layout[:4]
        before = [(each, _held(self, each)) for each in sum(self._layout.before, ())]
        last = _held(self, conv)
        pool, others = Watched(name, _held(self, name), nn.MaxPool2d), _watched(self)
        if type(last) is nn.Sequential and len(last) % 3 == 1:
            others.append(Watched(conv, last, nn.Sequential))
            *before, (conv, last) = _children(conv, last)
        others += [Watched(*each, nn.ReLU) for each in before[2::3]]
        if name not in self._called():
            pool = None
        elif type(pool.module) is nn.Identity:
            others.append(pool._replace(kind=nn.Identity))
            pool = None
        return StemParts(
            UnitParts(last, _held(self, bn), conv, bn),
            Watched(relu, _held(self, relu), nn.ReLU),
            pool,
            tuple(others),
            tuple(UnitParts(c, n, c_name, n_name) for (c_name, c), (n_name, n) in zip(before[::3], before[1::3])),
        )


class _Embeddings(_Stem):
    def _call(self, x: Tensor) -> Tensor:
        return self._run(x) if x.shape[1] == self.num_channels else self._eager(x)  # which says what was expected


class _Network(_Stem):
    """A network whose forward calls the stem's modules itself."""

    def _call(self, x: Tensor) -> Tensor:
        stages = frozenset()
        if not is_watched(x) and not getattr(self, "grad_checkpointing", False):
            stages = _called_in_turn(self._eager_method.__func__)
        return self._eager_method.__func__(_WithStem(self, stages), x)

    def _eager(self, x: Tensor) -> Tensor:
        for name in self._called():
            x = getattr(self, name)(x)
        return x


class _Sequence(_Network):
    """A network that is an `nn.Sequential`, whose first modules are the stem."""

    def _called(self) -> tuple[str, ...]:
        return _first(self, self._layout)

    def _call(self, x: Tensor) -> Tensor:
        names = self._called()
        if not _starts_with(self, names):  # any more
            return super().forward(x)
        return run_in_turn([module for name, module in self._modules.items() if name not in names], self._run(x))


class _Getter(_Sequence):
    """A sequence, a mapping of its modules, that gives what some of them give: of the stem's the last at most."""

    def _call(self, x: Tensor) -> Tensor:
        names = self._called()
        if not _starts_with(self, names) or _given(self, names) is not None:  # any more
            return self._eager_method(x)
        return self._eager_method.__func__(_ItemsWithStem(self), x)


class _Features(_Getter):
    """One that may run each of its modules under a checkpoint, which counts a batch twice in the stem's BatchNorm."""

    def _call(self, x: Tensor) -> Tensor:
        return self._eager_method(x) if self.grad_checkpointing else super()._call(x)


def _given(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """What lies inside a stem and is asked for."""
    return next((name for name in names[:-1] if name in module.return_layers), None)


def _first(module: nn.Module, layout: StemLayout) -> tuple[str, ...]:
    """The names that a sequence has to begin with: one for small images has no pool."""
    return layout.names if layout.pool in module._modules else layout.names[:-1]


def _starts_with(module: nn.Module, names: tuple[str, ...]) -> bool:
    return tuple(module._modules)[: len(names)] == names


class _Stage(_Changed):
    """A stage that runs its blocks one after the other: see `FusedSequential`."""

    def _call(self, x: Tensor) -> Tensor:
        if getattr(self, "grad_checkpointing", False):
            return self._eager_method(x)
        return run_in_turn(_blocks_of(self)._modules.values(), x)


def _blocks_of(stage: nn.Module) -> nn.Module:
    """What holds the blocks of a stage of an eager or fused class, and nothing else."""
    return _held(stage, "layers") or stage


class _WithStem:
    """A network as its own forward is to see it: the first module of the stem is all of it, and the others do nothing.

    What follows the stem stays the library's own code, in whatever version. `stages` are modules that it calls one
    after the other, so that the blocks of one may be linked to those of the next.
    """

    def __init__(self, network: _Network, stages: Iterable[str] = ()):
        first, *rest = network._layout.names
        self._network = network
        setattr(self, first, network._run)
        for name in rest:
            setattr(self, name, _as_it_is)
        last, before = None, None

        def linked(stage: nn.Module, x: Tensor) -> Tensor:
            nonlocal last, before
            last, before = run_linked((stage,), x, before if x is last else None)
            return last

        for name in stages:
            if type(stage := network._modules.get(name)) is FusedSequential:
                setattr(self, name, functools.partial(linked, stage))

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)


class _ItemsWithStem(_WithStem):
    """The same for a network whose forward goes through its `items`."""

    def items(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(name, getattr(self, name)) for name in self._network._modules]


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _Known(NamedTuple):
    mixin: type[_Changed]
    layout: BlockLayout | StemLayout
    method: str = "forward"  # what the mixin's `_call` replaces


_KNOWN = {
    "resnet.published.ResNet": _Known(_Sequence, StemLayout("conv1", "bn1", "relu", "maxpool")),
    "torchvision.models.resnet.BasicBlock": _Known(_Block, _torchvision(2)),
    "torchvision.models.resnet.Bottleneck": _Known(_Block, _torchvision(3)),
    "torchvision.models.resnet.ResNet": _Known(
        _Network, StemLayout("conv1", "bn1", "relu", "maxpool"), "_forward_impl"
    ),
    "torchvision.models._utils.IntermediateLayerGetter": _Known(_Getter, StemLayout("conv1", "bn1", "relu", "maxpool")),
    "torchvision.models.regnet.ResBottleneckBlock": _Known(_Block, _torchvision_regnet()),
    "torchvision.models.regnet.SimpleStemIN": _Known(_Stem, StemLayout("0", "1", "2")),
    "timm.models.regnet.Bottleneck": _Known(_Block, _timm_regnet()),
    "timm.models.resnet.BasicBlock": _Known(_Block, _timm(2)),
    "timm.models.resnet.Bottleneck": _Known(_Block, _timm(3)),
    **{
        f"timm.models._features.{name}": _Known(_Features, StemLayout("conv1", "bn1", "act1", "maxpool"), "_collect")
        for name in ("FeatureDictNet", "FeatureListNet")
    },
    "timm.models.resnet.ResNet": _Known(_Network, StemLayout("conv1", "bn1", "act1", "maxpool"), "forward_features"),
    "transformers.models.resnet.modeling_resnet.ResNetBasicLayer": _Known(_Block, _transformers(2)),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": _Known(_Block, _transformers(3)),
    "transformers.models.regnet.modeling_regnet.RegNetXLayer": _Known(_Block, _transformers(3, "RegNet")),
    "transformers.models.regnet.modeling_regnet.RegNetYLayer": _Known(_Block, _transformers(3, "RegNet", gate=2)),
    "transformers.models.regnet.modeling_regnet.RegNetEmbeddings": _Known(
        _Embeddings,
        StemLayout(
            conv="embedder.convolution",
            bn="embedder.normalization",
            relu="embedder.activation",
            containers=(("embedder", "RegNetConvLayer"),),
        ),
    ),
    "transformers.models.resnet.modeling_resnet.ResNetEmbeddings": _Known(
        _Embeddings,
        StemLayout(
            conv="embedder.convolution",
            bn="embedder.normalization",
            relu="embedder.activation",
            pool="pooler",
            containers=(("embedder", "ResNetConvLayer"),),
        ),
    ),
    **{
        f"transformers.models.rt_detr.modeling_rt_detr_resnet.{name}": _Known(mixin, layout)
        for name, mixin, layout in (
            ("RTDetrResNetBasicLayer", _Block, _transformers(2, "RTDetrResNet")),
            ("RTDetrResNetBottleNeckLayer", _Block, _transformers(3, "RTDetrResNet")),
            ("RTDetrResNetEmbeddings", _Embeddings, _rt_detr_stem()),
        )
    },
}
_STAGES = {
    "timm.models.regnet.RegStage",
    "torchvision.models.regnet.AnyStage",
    "transformers.models.resnet.modeling_resnet.ResNetStage",
    "transformers.models.rt_detr.modeling_rt_detr_resnet.RTDetrResNetStage",
}
_OWN: dict[type[nn.Module], type[nn.Module]] = {  # which have names already
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    Residual: FusedResidual,
    ResidualBottleneck: FusedResidualBottleneck,
    SmallStem: FusedSmallStem,
    Stem: FusedStem,
}
_EAGER = {fused: eager for eager, fused in _OWN.items()} | {FusedSequential: nn.Sequential}


def _known(cls: type) -> _Known | None:
    return _KNOWN.get(full_name(cls))


def _eager_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused one stands for; any other is its own."""
    return _EAGER.get(cls) or vars(cls).get("_eager_class", cls)


def _neighbour(cls: type, other: type | str) -> type:
    """A class by its name in the Python module that `cls` is in, or by its full name, which has dots."""
    if not isinstance(other, str):
        return other
    module, _, name = other.rpartition(".")
    return getattr(sys.modules.get(module or cls.__module__), name, type(None))


def _looked_up(cls: type, layout: BlockLayout | StemLayout) -> BlockLayout | StemLayout:
    layout = layout._replace(containers=tuple((name, _neighbour(cls, kind)) for name, kind in layout.containers))
    if isinstance(layout, BlockLayout):
        layout = layout._replace(shortcut_class=_neighbour(cls, layout.shortcut_class))
    return layout


def _calling(eager: FunctionType) -> FunctionType:
    """`_call_unless_replaced` in the place of an eager method, with its arguments' names and its text.

    TorchScript compiles the text. What it names is then taken from the function's globals, which are therefore the
    eager method's.
    """

    def method(self, x):
        return self._call_unless_replaced(x)

    code = method.__code__.replace(co_varnames=eager.__code__.co_varnames[:2])
    return functools.update_wrapper(FunctionType(code, eager.__globals__), eager)


@functools.cache
def _fused_class(eager: type[nn.Module]) -> type[nn.Module]:
    if eager in _OWN:
        return _OWN[eager]
    mixin, layout, method = _known(eager)
    cls = _derived(mixin, eager, method, _layout=_looked_up(eager, layout), _places=_places(layout))
    return linkable(cls) if mixin is _Block else cls


@functools.cache
def _fused_stage_class(eager: type[nn.Module]) -> type[nn.Module]:
    return FusedSequential if eager is nn.Sequential else _derived(_Stage, eager, "forward")


def _derived(mixin: type[_Changed], eager: type[nn.Module], method: str, **others: object) -> type[nn.Module]:
    """The class that one is changed for; `others` are attributes beside those that each has."""
    own = {
        "__module__": __name__,
        "__doc__": f"A `{full_name(eager)}` that `resnet.fuse` has changed the class of.",
        "_eager_class": eager,
        "_eager_method": getattr(eager, method),
        "_method": method,
        method: _calling(getattr(eager, method)),
    }
    return type(f"Fused{eager.__name__}", (mixin, eager), own | others)


def _rebuild(eager: type[nn.Module]) -> nn.Module:
    """An empty fused module, which pickle and deepcopy fill."""
    cls = _fused_class(eager) if _is_known(eager) else _fused_stage_class(eager)
    return cls.__new__(cls)


# ---- whether a module does what its class is known for ---------------------------------------------------------------


@functools.cache
def _begins_with(function: FunctionType, names: tuple[str, ...]) -> bool:
    """Whether a forward begins with `x = self.NAME(x)` for each of these names, and has them nowhere else."""
    tree = _tree_of(function)
    if tree is None:
        return False
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [ast.unparse(line) for line in body[: len(names)]] == [f"x = self.{name}(x)" for name in names] and all(
        attributes.count(name) == 1 for name in names
    )


@functools.cache
def _called_in_turn(function: FunctionType) -> frozenset[str]:
    """The NAMEs of `x = self.NAME(x)` in a method of x; none where it may show an x to others.

    That is, where a statement reads x more than once, or neither gives x a new value nor returns.
    """
    tree = _tree_of(function)
    if tree is None:
        return frozenset()
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    reading = [(statement, _reads_of_x(statement)) for statement in statements if _reads_of_x(statement)]
    if sum(reads for _, reads in reading) != _reads_of_x(tree):  # one is in a condition
        return frozenset()
    found = []
    for statement, reads in reading:
        targets = [ast.unparse(target) for target in getattr(statement, "targets", ())]
        if reads > 1 or not (targets == ["x"] or isinstance(statement, ast.Return)):
            return frozenset()
        found += re.findall(r"^x = self\.(\w+)\(x\)$", ast.unparse(statement))
    return frozenset(found)


def _tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """None where there is no text to read."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except OSError:
        return None
    return tree


def _reads_of_x(tree: ast.AST) -> int:
    return sum(
        isinstance(node, ast.Name) and node.id == "x" and isinstance(node.ctx, ast.Load) for node in ast.walk(tree)
    )


def _unlike_its_class(module: nn.Module, eager: type[nn.Module]) -> str | None:
    """Why what a module computes cannot be told from its class."""
    if eager in _OWN:
        return "it has a forward of its own" if "forward" in vars(module) else None
    mixin, layout, method = _known(eager)
    for name in {"forward", method}:
        if name in vars(module):
            return f"it has a {name} of its own"
    looked_up = _looked_up(eager, layout)
    containers = [kind for _, kind in looked_up.containers]
    if isinstance(looked_up, BlockLayout):
        containers.append(looked_up.shortcut_class)
    classes = [kind for kind in containers if kind.__module__ == eager.__module__ and "forward" in vars(kind)]
    for cls, name in ((eager, method), *((cls, "forward") for cls in classes)):
        if was_replaced(cls, name):
            return f"{full_name(cls)}.{name} was replaced"
    if issubclass(mixin, _Sequence):
        names = _first(module, layout)
        if not _starts_with(module, names):
            return f"it does not begin with {', '.join(names)}"
        given = _given(module, names) if issubclass(mixin, _Getter) else None
        return None if given is None else f"it gives what {given} gives"
    if issubclass(mixin, _Network):
        if not _begins_with(getattr(eager, method), layout.names):
            return (
                f"{full_name(eager)}.{method} does not begin with {', '.join(layout.names)}, and have them nowhere else"
            )
        return None
    held = (*module._modules, *module._parameters, *module._buffers)
    other = next((name for name in held if name not in _places(layout)), None)
    return None if other is None else f"its {other} is none that its class is known to have"


# ---- fuse, unfuse and the report -------------------------------------------------------------------------------------


class FuseItem(NamedTuple):
    """One module of a model: its name there, "" for the model itself, its eager class, and why it was left alone."""

    name: str
    kind: str
    reason: str | None = None


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; printed, a summary.

    Attributes:
        fused: the blocks and stems that are fused now.
        left: those that are not, with a reason, and the modules of classes that are derived from known ones.
        unknown: how many modules of each other class hold both a convolution and a BatchNorm.
    """

    fused: tuple[FuseItem, ...]
    left: tuple[FuseItem, ...]
    unknown: dict[str, int]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}", *_grouped(self.fused)]
        if not self.fused and not self.left:
            lines = ["fused: 0, as the model has no block or stem that resnet.fuse knows"]
        if self.left:
            lines += [f"left as they are: {len(self.left)}", *_grouped(self.left)]
        if self.unknown:
            lines += [f"of other classes, with a convolution and a BatchNorm: {sum(self.unknown.values())}"]
            lines += [f"  {count} {kind}" for kind, count in self.unknown.items()]
        return "\n".join(lines)


def _grouped(items: tuple[FuseItem, ...]) -> Iterator[str]:
    """A line for each class and reason, with the names of the modules."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name, kind, reason in items:
        groups.setdefault((kind, reason), []).append(name or "the model itself")
    for (kind, reason), names in groups.items():
        known = _KNOWN.get(kind)
        of = "stem of " if known is not None and issubclass(known.mixin, _Network) else ""
        why = "" if reason is None else f", since {reason}"
        yield f"  {len(names)} {of}{kind}{why}: {', '.join(_in_ranges(names))}"


def _in_ranges(names: list[str]) -> list[str]:
    """layer1.0-2 in place of layer1.0, layer1.1, layer1.2."""
    ranges: list[tuple[str, int | str, int | str]] = []  # what is before the last dot, the first and the last after it
    for name in names:
        head, _, last = name.rpartition(".")
        number = int(last) if last.isdecimal() else last
        if ranges and ranges[-1][0] == head and type(number) is int and ranges[-1][2] == number - 1:
            ranges[-1] = head, ranges[-1][1], number
        else:
            ranges.append((head, number, number))
    dotted = ((f"{head}." if head else "", first, last) for head, first, last in ranges)
    return [f"{head}{first}" + ("" if first == last else f"-{last}") for head, first, last in dotted]


def _is_known(cls: type) -> bool:
    return cls in _OWN or _known(cls) is not None


def _reason_not_to_fuse(module: nn.Module) -> str | None:
    """Why a module of a fused class runs PyTorch's operators."""
    parts = module._parts()
    return parts if isinstance(parts, str) else module._reason_not_to_fuse(parts)


def _fuse(module: nn.Module, eager: type[nn.Module]) -> str | None:
    """Change the class of a module of a known one, or say why not."""
    reason = _unlike_its_class(module, eager)
    if reason is not None:
        return reason
    before, module.__class__ = type(module), _fused_class(eager)
    reason = _reason_not_to_fuse(module)
    if reason is not None:
        module.__class__ = before
    return reason


def _runs_its_blocks_in_turn(module: nn.Module) -> bool:
    """Whether a module is of an eager class that does nothing else, and holds fused blocks, or sequences of them."""
    kind = type(module)
    if (kind is not nn.Sequential and full_name(kind) not in _STAGES) or "forward" in vars(module):
        return False
    return not was_replaced(kind, "forward") and holds_blocks(_blocks_of(module))


def _normalizes(module: nn.Module) -> bool:
    children = module._modules.values()
    return any(isinstance(child, _ConvNd) for child in children) and any(map(is_norm, children))


def fuse(model: nn.Module) -> FuseReport:
    """Let the residual blocks and stems in a model run as fused operators from now on; in place.

    A fused module keeps all that it has: parameters and buffers, and so the `state_dict` and an optimizer's state, and
    hooks, modes, device and type. Its class becomes one that is derived from its own. It can be pickled and copied;
    whoever reads it needs this library. For a fused copy call `copy.deepcopy` first: a choice between the two here
    would have `fuse` return now a model and now a report.

    Known are this library's blocks and stems, those of the ResNets of torchvision, timm and transformers, RT-DETR's
    too, and those of their RegNets, but for timm's stems. A block may have squeeze-and-excitation: timm's `SEModule`,
    `EffectiveSEModule` and `EcaModule` after its last norm, and what RegNetYs have before the last convolution. Where a
    network calls the modules of its stem itself, it is the network that changes its class. An `nn.Sequential` of blocks
    becomes a `FusedSequential`, and the classes of stages that these libraries have become such, too; the report does
    not name them. A module stays as it is where it might compute something else than the operator: with another
    activation or norm, another attention, stochastic depth, anti-aliasing, hooks on what is inside, or a class that is
    derived from a known one.

    A second call changes nothing, and its report is the same.

    Args:
        model: any module; one block alone will do.

    Returns:
        What was fused, and what was not and why. Print it.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("fuse", model)
    _kept.clear()
    fused, left, unknown = [], [], Counter()
    inside = None  # the block, or the stem's container, whose submodules come now
    for name, module in model.named_modules():
        eager = _eager_class(type(module))
        base = next(filter(_is_known, eager.__mro__), None)
        if base is None:
            if _normalizes(module) and not (inside is not None and f"{name}.".startswith(inside)):
                unknown[full_name(eager)] += 1
            continue
        if base is eager:
            reason = _fuse(module, eager)
        elif isinstance(module, (_Changed, *_EAGER)):  # derived from a fused one, as by a tool that changes classes
            reason = _reason_not_to_fuse(module)
        else:
            reason = f"it is derived from {full_name(base)} and may compute something else"
        (fused if reason is None else left).append(FuseItem(name, full_name(eager), reason))
        inside = f"{name}." if name else ""
        if base not in _OWN and issubclass(_known(base).mixin, _Network):
            inside += f"{_known(base).layout.conv}."
    for module in reversed(list(model.modules())):  # what holds others comes after these
        if _runs_its_blocks_in_turn(module):
            module.__class__ = _fused_stage_class(type(module))
    return FuseReport(tuple(fused), tuple(left), dict(unknown))


def unfuse(model: nn.Module) -> None:
    """Give all modules in a model that `fuse` has changed their own class back; `FusedResidual` becomes `Residual`.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("unfuse", model)
    _kept.clear()
    for module in model.modules():
        eager = _eager_class(type(module))
        if eager is not type(module):
            module.__class__ = eager


def _check_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got a {type(model).__name__}")
