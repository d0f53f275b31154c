"""Operators described by named tuples: one description gives the schema, the flat arguments and the way back.

An operator of `torch.library` takes a flat list of tensors and numbers. Here a named tuple, whose fields may be named
tuples themselves, says what they are; a field that is added there is added everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from string import ascii_lowercase
from typing import Annotated, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

T = TypeVar("T", bound=tuple)

Updated = Annotated[Tensor | None, "updated in place"]
Alike = Annotated[Tensor | None, "backward does not read its values"]  # only its shape, type and layout

_TYPES = {
    Tensor: "Tensor",
    **dict.fromkeys((Tensor | None, Updated, Alike), "Tensor?"),
    int: "int",
    tuple[int, int, int]: "int[3]",
    bool: "bool",
    float: "float",
    str: "str",
}


class Leaf(NamedTuple):
    """One argument of an operator."""

    name: str  # of the field, after the names of those that it lies in
    type: str  # in a schema
    updated: bool
    read: bool  # a tensor, for its values


@cache
def leaves(kind: type[tuple]) -> tuple[Leaf, ...]:
    """The flat arguments of a named tuple's class, or of a tuple type such as `tuple[Norm, Norm]`, in order."""
    found: list[Leaf] = []
    for field, hint in _fields(kind):
        if hint in _TYPES:
            type_ = _TYPES[hint]
            found.append(Leaf(field, type_, hint == Updated, type_.startswith("Tensor") and hint != Alike))
        else:
            found += [leaf._replace(name=f"{field}_{leaf.name}") for leaf in leaves(hint)]
    return tuple(found)


def _fields(kind: type[tuple]) -> list[tuple[str, object]]:
    """The names and types of a named tuple's fields; those of a plain tuple are counted from 1."""
    if get_origin(kind) is tuple:
        return [(str(i), hint) for i, hint in enumerate(get_args(kind), 1)]
    return list(get_type_hints(kind, include_extras=True).items())


@cache
def updates(kind: type[tuple]) -> tuple[tuple[int, int], ...]:
    """The places of the arguments that may be updated in place, each with that of the flag `training` beside it."""
    names = [leaf.name for leaf in leaves(kind)]
    beside = lambda name: next(n for n in names if n.endswith("training") and name.startswith(n[: -len("training")]))  # noqa: E731
    return tuple((i, names.index(beside(leaf.name))) for i, leaf in enumerate(leaves(kind)) if leaf.updated)


def parameters(kind: type[tuple], updates: bool = True) -> str:
    """The arguments in a schema, such as "Tensor x, Tensor(a!)? mean"; without `updates` none is written to."""
    letters = iter(ascii_lowercase)
    written = []
    for name, type_, updated, _ in leaves(kind):
        if updated and updates:
            type_ = type_.replace("Tensor", f"Tensor({next(letters)}!)")
        written.append(f"{type_} {name}")
    return ", ".join(written)


def pack(value: tuple) -> list:
    """The leaves of a named tuple, as `leaves` orders them."""
    return _packer(type(value))(value)


@cache
def _packer(kind: type[tuple]) -> Callable[[tuple], list]:
    """`pack`, written out for a class, as `_unpacker` is."""

    def written(kind: type[tuple], value: str) -> list[str]:
        found: list[str] = []
        for i, (_, hint) in enumerate(_fields(kind)):
            found += [f"{value}[{i}]"] if hint in _TYPES else written(hint, f"{value}[{i}]")
        return found

    return eval(f"lambda value: [{', '.join(written(kind, 'value'))}]")


def received(flat: Sequence) -> tuple:
    """The arguments of an operator as they were given: PyTorch's dispatcher makes lists of tuples."""
    return tuple([tuple(value) if type(value) is list else value for value in flat])


def unpack(kind: type[T], flat: Sequence) -> T:
    """The named tuple whose leaves are `flat`: the inverse of `pack`."""
    return _unpacker(kind)(flat)


@cache
def _unpacker(kind: type[T]) -> Callable[[Sequence], T]:
    """`unpack`, written out for a class: it runs several times in each call of an operator."""
    classes: dict[str, type] = {}
    places = count()

    def written(kind: type[tuple]) -> str:
        fields = [f"flat[{next(places)}]" if hint in _TYPES else written(hint) for _, hint in _fields(kind)]
        if get_origin(kind) is tuple:
            return f"({''.join(f'{field}, ' for field in fields)})"
        classes[kind.__name__] = kind
        return f"{kind.__name__}({', '.join(fields)})"

    return eval(f"lambda flat: {written(kind)}", classes)
