"""The base of the classes that `fuse` gives to modules: it finds a module's parts, and pickles it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resnet.fusable import BlockParts, StemParts, Watched, full_name
from resnet.fused.module import warn_once
from resnet.fusing.layouts import BlockLayout, StemLayout, held_at


def children_of(name: str, module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """The children of the module of a name, each with its own."""
    return [(f"{name}.{key}", child) for key, child in module._modules.items()]


def watched_in(module: Changed) -> list[Watched]:
    """The containers, whose calls the operator replaces, and children not of their class, which may be called."""
    found = []
    for place, kind in module._layout.containers:
        container = held_at(module, place)
        found.append(Watched(place, container, kind))
        if isinstance(container, nn.Module):
            inner = children_of(place, container)
            found += [Watched(name, child, nn.Identity) for name, child in inner if name not in module._places]
    return found


def no_module(others: Iterable[Watched]) -> str | None:
    """Which of them was replaced by something else than a module, as by a function."""
    for name, module, _ in others:
        if module is not None and not isinstance(module, nn.Module):
            return f"{name} is a {type(module).__name__} and no module"
    return None


def _out_of_order(module: Changed) -> str | None:
    """Why the module, or a container in it, does not run its modules in its class's order; None where each does."""
    in_turn = isinstance(module, nn.Sequential) and not module._holds_more
    if in_turn and (*module._modules,) != module._layout.names:
        return f"it has the modules {', '.join(module._modules)}, not {', '.join(module._layout.names)}"
    for place, _ in module._layout.containers:
        container = held_at(module, place)
        if isinstance(container, nn.Sequential):
            inside = [name.removeprefix(f"{place}.") for name in module._layout.names if name.startswith(f"{place}.")]
            order = [*dict.fromkeys(name.split(".")[0] for name in inside)]
            found = [name for name in container._modules if name in order]
            if found != [name for name in order if name in found]:
                return f"{place} has its modules in the order {', '.join(found)}"
    return None


class _Kept(NamedTuple):
    """The parts of a module, and all children that were seen when they were found."""

    parts: BlockParts | StemParts | str
    # For each container: its children, a copy of them, and of a sequence their order, which == of dicts ignores.
    children: tuple[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None], list[str] | None], ...]

    def hold(self, module: Changed) -> bool:
        own = module.__dict__
        if self.children[0][0] is not own["_modules"]:  # as in a replica, which has its original's attributes
            return False
        for now, then, order in self.children:
            if now != then or (order is not None and [*now] != order):
                return False
        # A module would be among the children. So what is not None here is something else, perhaps a function.
        layout = module._layout
        return own.get(layout.shortcut) is None and all(own.get(name) is None for name in layout.optional)


# A child that refers to its block, as by a hook, keeps the block alive from here until `fuse` or `unfuse` clears it.
kept_parts: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


class Changed:
    """A class that `fuse` makes has three bases: this, the operator's module class, the eager class, in this order."""

    _eager_class: type[nn.Module]
    _eager_method: Callable[[nn.Module, Tensor], Tensor]  # in whose place `_call` is
    _eager_code: CodeType  # of it
    _method: str  # its name
    _layout: BlockLayout | StemLayout  # its containers' classes are looked up
    _places: frozenset[str]  # of the layout
    _rebuild: Callable[[type[nn.Module]], nn.Module]  # an empty module, from the eager class
    _prefix = "Fused"  # of the name of the class
    _holds_more = False  # than the modules of the layout

    def __reduce_ex__(self, protocol: int) -> tuple:
        """The class has no name that pickle could import; it is made anew where the module is read.

        One that is derived from it is its maker's to find.
        """
        reduced = super().__reduce_ex__(max(protocol, 2))
        if "_eager_class" not in vars(type(self)):
            return reduced
        _, _, *state = reduced
        return self._rebuild, (self._eager_class,), *state

    def _call_unless_replaced(self, x: Tensor) -> Tensor:
        """`_call`, or what somebody has put into the eager class since it was fused."""
        eager = getattr(self._eager_class, self._method)
        if eager is type(self)._eager_method and eager.__code__ is self._eager_code:
            return self._call(x)
        warn_once(type(self).__name__, f"{full_name(self._eager_class)}.{self._method} was replaced")
        return eager(self, x)

    def _parts(self) -> BlockParts | StemParts | str:
        """What `_find_parts` gives. To find them takes longer than to see that no module has been replaced since."""
        if torch.compiler.is_compiling():
            return _out_of_order(self) or self._find_parts()
        kept = kept_parts.get(self)
        if kept is None or not kept.hold(self):
            places = [*(name for name, _ in self._layout.containers), *self._layout.perhaps_containers]
            containers = [self, *(held_at(self, name) for name in places)]
            if isinstance(containers[-1], nn.Module):  # in which one of a library's own may lie, or a norm of its own
                inner = [child for child in containers[-1]._modules.values() if child is not None]
                containers += inner + [child for module in inner for child in module._modules.values()]
            children = []
            for module in containers:
                if isinstance(module, nn.Module):
                    now = module._modules
                    children.append((now, dict(now), [*now] if isinstance(module, nn.Sequential) else None))
            kept_parts[self] = kept = _Kept(_out_of_order(self) or self._find_parts(), tuple(children))
        return kept.parts
