"""Few cases for many options: any two values of any two options meet in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import pytest

from tests.helpers.blocks import name_of


def pairwise(*forbidden: Collection[tuple[str, object]], **options: tuple) -> list[dict]:
    """Combinations in which any two values of two options meet, unless that pair is `forbidden`.

    A missing pair begins a combination. The other options follow, each with the value that meets most missing pairs.
    """
    names = list(options)
    barred = set(map(frozenset, forbidden))
    pairs = [
        frozenset(pair)
        for a, b in itertools.combinations(names, 2)
        for pair in itertools.product(((a, v) for v in options[a]), ((b, v) for v in options[b]))
    ]
    missing = dict.fromkeys(pair for pair in pairs if pair not in barred)  # a dict, since it has an order
    chosen = []
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name not in row:
                meets = {v: [frozenset([(name, v), item]) for item in row.items()] for v in options[name]}
                allowed = [v for v in options[name] if not any(pair in barred for pair in meets[v])]
                row[name] = max(allowed, key=lambda v: sum(pair in missing for pair in meets[v]))
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        chosen.append({name: row[name] for name in names})
    return chosen


def each_pair(
    *forbidden: Collection[tuple[str, str]], indirect: Sequence[str] = (), **options: tuple | dict
) -> pytest.MarkDecorator:
    """Run the test with `pairwise` options. An option's values are given by name, or `name_of` names them.

    Args:
        forbidden: pairs of (option, name of its value).
        indirect: options that are parameters of a fixture.
    """
    values = {o: some if isinstance(some, dict) else {name_of(v): v for v in some} for o, some in options.items()}
    cases = pairwise(*forbidden, **{option: tuple(named) for option, named in values.items()})
    rows = [pytest.param(*(values[o][name] for o, name in case.items()), id="-".join(case.values())) for case in cases]
    return pytest.mark.parametrize(list(options), rows, indirect=indirect)


def each_pair_compiled(**options: tuple | dict) -> pytest.MarkDecorator:
    """`each_pair` on each of the emulator's architectures. There is no float64 on sm_90, whose product it lacks."""
    forbidden = ("emulate", "sm_90"), ("dtype", "float64")
    return each_pair(forbidden, indirect=["emulate"], emulate={"sm_80": 80, "sm_90": 90}, **options)
