"""Stems of the known libraries: modules of their own, and networks whose forward calls the stem's modules itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet import torch_backend
from resnet.backends import implementation
from resnet.fusable import StemParts, UnitParts, Watched, is_norm
from resnet.fused.stem import FusedStemBase
from resnet.fusing.changed import Changed, children_of, no_module, watched_in
from resnet.fusing.layouts import StemLayout, held_at
from resnet.fusing.sources import called_in_turn
from resnet.sequential import FusedSequential, is_watched, run_in_turn, run_linked


class StemMixin(Changed, FusedStemBase):
    """A module that is a stem and nothing else."""

    _call = FusedStemBase._run

    def _called(self) -> tuple[str, ...]:
        """The names of the modules that are called."""
        return self._layout.names

    def _find_parts(self) -> StemParts | str:
        conv, bn, relu, name = self._layout[:4]
        before = [(each, held_at(self, each)) for each in sum(self._layout.before, ())]
        last = held_at(self, conv)
        pool, others = Watched(name, held_at(self, name), nn.MaxPool2d), watched_in(self)
        if type(last) is nn.Sequential and len(last) % 3 == 1 and not before:
            others.append(Watched(conv, last, nn.Sequential))
            *before, (conv, last) = children_of(conv, last)
        others += [Watched(*each, nn.ReLU) for each in before[2::3]]
        if relu:
            others.append(Watched(relu, held_at(self, relu), nn.ReLU))
        if name not in self._called():
            pool = None
        elif type(pool.module) is nn.Identity:
            others.append(pool._replace(kind=nn.Identity))
            pool = None
        return no_module((*others, *filter(None, (pool,)))) or StemParts(
            UnitParts(last, held_at(self, bn), conv, bn),
            pool,
            tuple(others),
            tuple(UnitParts(c, n, c_name, n_name) for (c_name, c), (n_name, n) in zip(before[::3], before[1::3])),
        )


class EmbeddingsMixin(StemMixin):
    """A stem that checks the channels of its input."""

    def _call(self, x: Tensor) -> Tensor:
        return self._run(x) if x.shape[1] == self.num_channels else self._eager(x)  # which says what was expected


class NetworkMixin(StemMixin):
    """A network whose forward calls the stem's modules itself."""

    _holds_more = True
    _around: FunctionType | None = None  # what calls the stem, where that is not the eager method

    def _call(self, x: Tensor) -> Tensor:
        stages = frozenset()
        if not is_watched(x) and not getattr(self, "grad_checkpointing", False):
            stages = self._stages()
        return (self._around or self._eager_method.__func__)(WithStem(self, stages), x)

    def _stages(self) -> frozenset[str]:
        """The names of the modules that it calls one after the other."""
        return called_in_turn(self._eager_method.__func__)

    def _calls(self) -> tuple[str, ...]:
        """What its forward calls in the place of the stem; "" is a ReLU that is a function."""
        return self._called()

    def _eager(self, x: Tensor) -> Tensor:
        for name in self._calls():
            x = getattr(self, name)(x) if name else F.relu(x)
        return x


class SequenceMixin(NetworkMixin):
    """A network that is an `nn.Sequential`, whose first modules are the stem."""

    def _called(self) -> tuple[str, ...]:
        return first_names(self, self._layout)

    def _call(self, x: Tensor) -> Tensor:
        names = self._called()
        if not starts_with(self, names):  # any more
            return self._eager_method(x)
        return run_in_turn([module for name, module in self._modules.items() if name not in names], self._run(x))


class FoundMixin(NetworkMixin):
    """A convolution, its norm and a ReLU, wherever they were found: a stem, or another layer.

    Without a pool they are left to PyTorch's operators where these are as fast, as they are on a CPU. The same
    holds where a model has no residual blocks and eager's output would not be channels_last: a `view` may follow.
    """

    def _run(self, x: Tensor) -> Tensor:
        parts = self._parts()
        if type(parts) is not str and parts.pool is None and isinstance(x, Tensor):
            conv, bn, *_ = parts.unit
            needed = x.is_cpu and type(bn) is nn.SyncBatchNorm  # PyTorch's own works on GPUs alone
            on_cpu = not torch.compiler.is_compiling() and implementation(x) is torch_backend
            keeps = self._known.keeps_layout and not any(map(_is_channels_last, (x, getattr(conv, "weight", None))))
            if not needed and (on_cpu or keeps):
                return self._eager(x)
        return super()._run(x)


def _is_channels_last(x: object) -> bool:
    """Whether a convolution gives channels_last for it, be it the input or the weights."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


POOLS = nn.MaxPool2d, nn.Identity


class CutMixin(FoundMixin, SequenceMixin):
    """An `nn.Sequential` whose first modules are a stem, as they are where a network was cut up, or that is one."""

    _prefix = "FusedStem"  # there is a FusedSequential
    __jit_unused_properties__ = ("_layout",)

    @property
    def _layout(self) -> StemLayout:
        names = [*self._modules][:4]
        return StemLayout(*names if isinstance(self._modules[names[-1]], POOLS) else names[:3])

    def _called(self) -> tuple[str, ...]:
        return self._layout.names

    def _call(self, x: Tensor) -> Tensor:
        return super()._call(x) if begins_with_stem(self) else self._eager_method(x)


def _is_conv(module: nn.Module) -> bool:
    """Whether it is a convolution, or a deep stem's sequence of convolutions with norms and ReLUs between them."""
    deep = type(module) is nn.Sequential and len(module) % 3 == 1
    return isinstance(module[0] if deep else module, nn.Conv2d)


def begins_with_stem(sequence: nn.Sequential) -> bool:
    """Whether its first modules are a stem: with a pool, or without one where blocks or nothing follow.

    A fused sequence passes with one of them replaced, which a warning then names. A slice of it begins otherwise.
    """
    conv, norm, relu, after = [*sequence._modules.values(), *[None] * 4][:4]
    ends = len(sequence) == 3 or isinstance(after, POOLS) or (after is not None and len(after._modules) > 0)
    needed = 3 if isinstance(sequence, CutMixin) else 4
    return sum((_is_conv(conv), is_norm(norm), isinstance(relu, nn.ReLU), ends)) >= needed


class GetterMixin(SequenceMixin):
    """A mapping of modules, run in turn, that gives the outputs of some: of the stem's at most the last one's."""

    def _call(self, x: Tensor) -> Tensor:
        names = self._called()
        if not starts_with(self, names) or given_inside(self, names) is not None:  # any more
            return self._eager_method(x)
        return self._eager_method.__func__(_ItemsWithStem(self), x)


class FeaturesMixin(GetterMixin):
    """One that may run each of its modules under a checkpoint, which counts a batch twice in the stem's BatchNorm."""

    def _call(self, x: Tensor) -> Tensor:
        return self._eager_method(x) if self.grad_checkpointing else super()._call(x)


def given_inside(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The name of a module inside the stem whose output is asked for; None where there is none."""
    return next((name for name in names[:-1] if name in module.return_layers), None)


def first_names(module: nn.Module, layout: StemLayout) -> tuple[str, ...]:
    """The names that a sequence has to begin with: one for small images has no pool."""
    return layout.names if layout.pool in module._modules else layout.names[:-1]


def starts_with(module: nn.Module, names: tuple[str, ...]) -> bool:
    return tuple(module._modules)[: len(names)] == names


class WithStem:
    """What a network's forward gets for `self`: the first module of the stem runs all of it, the others do nothing.

    What follows the stem stays the library's own code, in whatever version. `stages` are modules that it calls one
    after the other, so that the blocks of one may be linked to those of the next.
    """

    _network: NetworkMixin

    def __init__(self, network: NetworkMixin, stages: Iterable[str] = ()):
        first, *rest = filter(None, network._calls())
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


class _ItemsWithStem(WithStem):
    """The same for a network whose forward goes through its `items`."""

    def items(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return [(name, getattr(self, name)) for name in self._network._modules]


def _as_it_is(x: Tensor) -> Tensor:
    return x
