"""What `fuse` did, to be printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class FuseItem(NamedTuple):
    """One module of a model: its name there, "" for the model itself, its eager class, and why it was left alone."""

    name: str
    kind: str
    reason: str | None = None
    stem: bool = False  # whether it is a network, or a sequence, whose stem is meant


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; printed, a summary.

    Attributes:
        fused: the blocks and stems that are fused now.
        left: those that are not, with a reason, and the modules of classes that are derived from known ones, unless
            their forward could be read.
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
    groups: dict[tuple[str, str | None, bool], list[str]] = {}
    for name, *what in items:
        groups.setdefault(tuple(what), []).append(name or "the model itself")
    for (kind, reason, stem), names in groups.items():
        of = "stem of " if stem else ""
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
