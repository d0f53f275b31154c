"""Blocks and stems that somebody wrote: a forward whose text says that it is one, or that it has one.

With anything in it that is not understood a module is left alone.
"""

from __future__ import annotations

import ast
import itertools
from types import FunctionType

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import Attention, is_attention, is_norm, is_plain, is_sequence, was_replaced
from resnet.fused.module import autocast_dtype
from resnet.fusing.blocks import BlockMixin
from resnet.fusing.following import Followed, Forward, Value
from resnet.fusing.gates import read_gate
from resnet.fusing.known import Known
from resnet.fusing.layouts import BlockLayout, StemLayout, held_at
from resnet.fusing.sources import (
    Unread,
    chains_of_calls,
    delegated_to,
    forward_text,
    named_once,
    without,
)
from resnet.fusing.stems import POOLS, FoundMixin, alike


class WrittenMixin(BlockMixin):
    """A residual block of a class that nobody has listed."""

    def _call(self, x: Tensor) -> Tensor:
        if not all(condition.holds(self) for condition in self._known.conditions):
            parts = "its forward takes another way than it did when it was fused"
        else:
            parts = self._parts()
            if type(parts) is not str and parts.shortcut is None and _is_cast(x):
                parts = f"autocast leaves the input {x.dtype}, which is added"
        return self._run(x, parts)


class WrittenNetworkMixin(FoundMixin):
    """A network of a class that nobody has listed, whose forward has a stem."""

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        if "_layout" in vars(cls) and not cls._layout.relu:
            cls._around = staticmethod(_without_relu(cls._eager_method, cls._layout))

    def _call(self, x: Tensor) -> Tensor:
        if self._layout.relu or self._around is not None:
            return super()._call(x)
        return self._eager_method(x)  # the text is not what it was when it was fused

    def _stages(self) -> frozenset[str]:
        return super()._stages() & named_once(self._eager_method.__func__)


def _is_cast(x: object) -> bool:
    return isinstance(x, Tensor) and autocast_dtype(x) not in (None, x.dtype)


def read_block(module: nn.Module, eager: type[nn.Module]) -> Known | None:
    """What the forward of its class says about a module; None where that is no residual block, or cannot be told."""
    tree = forward_text(eager) if _may_be_block(module) else None
    if tree is None:
        return None
    block = _Block(module, eager)
    try:
        layout = block.read(tree)
    except Unread:
        return None
    return Known(WrittenMixin, layout, conditions=tuple(dict.fromkeys(block.conditions)))


def read_stem(module: nn.Module, eager: type[nn.Module]) -> Known | None:
    """The first stem in the forward of a network, its modules called in turn; None where there is none, or not clearly.

    The forward may be all in another method, as torchvision has it.
    """
    if not any(map(is_norm, module._modules.values())) or not is_plain(eager):
        return None
    method = delegated_to(eager.forward) or "forward"
    function = getattr(eager, method, None)
    if function is None or was_replaced(eager, method):
        return None
    for chain in chains_of_calls(function):
        names = [call.name for call in chain]
        for place in range(len(names) - 2):
            layout = _stem_of(module, eager, names[place : place + 4])
            if layout is not None:
                return Known(WrittenNetworkMixin, layout, method)
    return None


def _stem_of(module: nn.Module, eager: type[nn.Module], names: list[str]) -> StemLayout | None:
    """The stem of a network whose forward calls the modules of these names; "" is a ReLU that is a function."""
    found = [None if hasattr(eager, name) else module._modules.get(name) for name in names]
    *are_alike, ends_in_relu = alike(*found[:3])
    if not all(are_alike) or not (ends_in_relu or names[2] == ""):
        return None
    return StemLayout(*names if isinstance(found[-1], POOLS) else names[:3])


def _without_relu(function: FunctionType, layout: StemLayout) -> FunctionType | None:
    """A network's method without the ReLU that is a function, which its stem has; None where that cannot be told."""
    for chain in chains_of_calls(function):
        for call, after in itertools.pairwise(chain):
            if call.name == layout.bn and after.name == "":
                return without(function, after)
    return None


def _may_be_block(module: nn.Module) -> bool:
    """Whether it holds as many convolutions and norms as a block does, at most: few texts have to be read."""
    held = list(itertools.islice(module.modules(), 30))
    convs, norms = sum(isinstance(child, _ConvNd) for child in held), sum(map(is_norm, held))
    return 2 <= convs <= 6 and 2 <= norms <= 4


class _Block(Followed):
    """What the forward of a block does."""

    def read(self, tree: ast.FunctionDef) -> BlockLayout:
        followed = Forward.of(self, self.module, self.eager, "", self.input)
        return self.layout(followed.returned(tree.body))

    def layout(self, result: Value) -> BlockLayout:
        """Where the modules of the block are that gives this."""
        if result.what != "relu" or result.of[0].what != "sum":
            raise Unread
        for main, branch in itertools.permutations(map(self.steps, result.of[0].of)):
            gates = [step for step in main if step.what == "gate"]
            if len(main) - len(gates) in (5, 8) and len(branch) <= 3:
                break
        else:
            raise Unread
        before_gate = len(main) if not gates else main.index(gates[0])
        main = [step for step in main if step not in gates]
        if len(gates) > 1 or before_gate not in (len(main) - 2, len(main)):
            raise Unread
        convs, norms, relus = main[::3], main[1::3], main[2::3]
        # Each value is read once: nothing is computed beside, and nothing that was changed in place is read again.
        names = [value.name for value in self.made if value.what == "module"]
        if len(main) + len(gates) + len(branch) + 2 != len(self.made) or len({*names}) != len(names):
            raise Unread
        if not (all(map(_is_conv, convs)) and all(map(_is_norm, norms)) and all(step.what == "relu" for step in relus)):
            raise Unread
        shortcut, shortcut_norm, shortcut_class = self.shortcut(branch)
        place = (before_gate + 1) // 3 if gates else 0
        if gates and (place < 2 or shortcut_norm):  # no operator ends sooner, and a shortcut is called as one module
            raise Unread
        gate = {"gate": gates[0].name, "place": place, "attention": _read(gates[0])} if gates else {}
        return BlockLayout(
            units=tuple((conv.name, norm.name) for conv, norm in zip(convs, norms, strict=True)),
            relus=tuple(step.name for step in (*relus, result)),
            shortcut=shortcut,
            shortcut_norm=shortcut_norm,
            optional=tuple(name for name in self.idle if name != shortcut and not self.is_inside(name)),
            containers=tuple(
                (name, kind) for name, kind in self.containers.items() if not f"{name}.".startswith(f"{shortcut}.")
            ),
            shortcut_class=shortcut_class,
            **gate,
        )

    def shortcut(self, steps: list[Value]) -> tuple[str, str, type[nn.Module]]:
        """The name of the module that is the shortcut, and of its norm where that lies beside it; "" for none.

        The third is the class of what holds its convolution, or of the container in it that does.
        """
        if not steps:
            idle = [
                name for name in (*self.containers, *self.idle) if not self.is_inside(name) and not self.holds_any(name)
            ]
            name = next(iter(idle), "")
            return name, "", self.containers.get(name, nn.Sequential)
        if any(step.what != "module" for step in steps):
            raise Unread
        outer, *inner = sorted({step.name.rpartition(".")[0] for step in steps})
        if {outer, *inner} <= {*self.containers} and [name.rpartition(".")[0] for name in inner] in ([], [outer]):
            if not all(self.calls_its_children(name, steps) for name in (outer, *inner)):
                raise Unread
            return outer, "", self.containers[(outer, *inner)[-1]]
        conv, *norm = steps
        if self.is_inside(conv.name) or not _is_conv(conv) or len(norm) > 1 or not all(map(_is_norm, norm)):
            raise Unread
        return conv.name, norm[0].name if norm else "", nn.Sequential

    def calls_its_children(self, name: str, steps: list[Value]) -> bool:
        """Whether a container calls what it holds in its order, as a sequence does."""
        held = {f"{name}.{key}": child for key, child in held_at(self.module, name)._modules.items()}
        called = [step.name for step in steps if step.name in held]
        names = [place for place, child in held.items() if type(child) not in (nn.Identity, type(None))]
        return is_sequence(self.containers[name]) or names == called

    def is_inside(self, name: str) -> bool:
        """Whether it is a module of a container that was called."""
        return name.rpartition(".")[0] in self.containers

    def holds_any(self, name: str) -> bool:
        """Whether something in a module of this name was called."""
        return any(value.name.startswith(f"{name}.") for value in self.made)


def _read(gate: Value) -> tuple[type[nn.Module], Attention] | None:
    kind = type(gate.module)
    return None if is_attention(gate.module) else (kind, read_gate(kind))


def _is_conv(value: Value) -> bool:
    return isinstance(value.module, _ConvNd)


def _is_norm(value: Value) -> bool:
    return is_norm(value.module)
