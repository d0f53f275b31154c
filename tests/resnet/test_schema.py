"""A named tuple describes an operator: its schema, its flat arguments, and the way back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet.operands import block_kind
from resnet.schema import Updated, leaves, pack, parameters, received, unpack


class Inner(NamedTuple):
    scale: Tensor | None
    mean: Updated
    eps: float


class Outer(NamedTuple):
    x: Tensor
    first: Inner
    stride: int
    window: tuple[int, int, int]
    second: Inner
    relu: bool


def test_a_schema_names_nested_fields_after_those_they_lie_in_and_marks_what_is_updated():
    assert parameters(Outer) == (
        "Tensor x, Tensor? first_scale, Tensor(a!)? first_mean, float first_eps, int stride, int[3] window, "
        "Tensor? second_scale, Tensor(b!)? second_mean, float second_eps, bool relu"
    )


def test_a_schema_without_updates_writes_to_nothing():
    assert "!" not in parameters(Outer, updates=False)
    assert parameters(Outer).replace("(a!)", "").replace("(b!)", "") == parameters(Outer, updates=False)


def test_what_is_packed_comes_back_as_it_was():
    value = Outer(1, Inner(2, 3, 4), 5, (6, 6, 6), Inner(7, 8, 9), 10)
    assert pack(value) == [1, 2, 3, 4, 5, (6, 6, 6), 7, 8, 9, 10]
    assert unpack(Outer, pack(value)) == value


def test_a_list_of_the_dispatcher_is_the_tuple_that_was_given():
    assert received([1, [2, 3, 4], "5", None]) == (1, (2, 3, 4), "5", None)


def test_the_places_of_the_arguments_also_hold_flags():
    kind = block_kind(2, normed=True).arguments
    flags = [leaf.name == "units_2_norm_bias" for leaf in leaves(kind)]
    needs = unpack(kind, flags)
    assert needs.units[1].norm.bias
    assert sum(pack(needs)) == 1
