"""What `torch.utils.flop_counter` counts of the fused operators: their convolutions, as it counts the eager modules'.

A convolution's gradient of its input or weight takes as many operations as its forward.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch

from resnet.operands import (
    BLOCK_KINDS,
    FROZEN_KINDS,
    PRE_ACTIVATION_KINDS,
    SQUEEZE_KINDS,
    BlockKind,
    DeepStem,
    DeepStemKept,
    Geometry,
    Projection,
    Stem,
    StemKept,
    Unit,
    all_wanted,
    grad_inputs,
    pre_activation_inputs,
    shortcut_input,
    wanted,
)
from resnet.schema import unpack
from resnet.torch_backend.convolution import out_map

_COUNTER = "torch.utils.flop_counter"


def _convolution(x: Sequence[int], weight: Sequence[int], geometry: Geometry) -> int:
    """Operations of the convolution of shapes x (N, C, H, W) and weight (K, C / groups, R, S)."""
    return 2 * x[0] * math.prod(out_map(x, weight, geometry)) * math.prod(weight)


def _unit(x: Sequence[int], unit: Unit | Projection) -> int:
    return _convolution(x, unit.weight, unit.geometry)


def _convolutions(a: tuple) -> tuple[Unit | Projection, ...]:
    """Those of a chain one after the other; `a` has the fields of its arguments, or one for each of its needs."""
    return (*a.units, a.conv) if hasattr(a, "conv") else a.units


def _chain(a: tuple) -> list[tuple[int, int]]:
    """(operations of forward and of grad-input alike, of grad-weight) of each convolution of a chain that begins at x.

    A grad-weight with groups takes as many as the forward, but PyTorch counts it as one without groups.
    """
    x, units = a.x, []
    for unit in _convolutions(a):
        forward, groups = _unit(x, unit), x[1] // unit.weight[1]
        units.append((forward, forward * groups))
        x = (x[0], unit.weight[0], *out_map(x, unit.weight, unit.geometry))
    return units


def _chain_forward(a: tuple) -> int:
    return sum(forward for forward, _ in _chain(a))


def _chain_backward(a: tuple, asked: Sequence[bool], needs: tuple) -> int:
    """Operations of the gradients that are wanted; `asked` says whose grad-input is."""
    counted = zip(_chain(a), asked, _convolutions(needs), strict=True)
    return sum(grad_input * asked + grad_weight * unit.weight for (grad_input, grad_weight), asked, unit in counted)


def _shortcut(a: tuple) -> int:
    """Operations of a block's shortcut; `a` has the fields of a `BlockKind`'s arguments."""
    weight = a.shortcut.weight
    return 0 if weight is None else _convolution(shortcut_input(a), weight, a.shortcut.geometry)


def _stem_flops(*flat, out_shape: object = None) -> int:
    return _unit(*unpack(Stem, flat))


def _stem_backward_flops(dout: Sequence[int], *rest, out_shape: object = None) -> int:
    *kept, needs = rest
    kept, needs = unpack(StemKept, kept), unpack(Stem, needs)
    return _unit(kept.x, kept.unit) * (needs.x + wanted(needs.unit).weight)


def _chain_formulas(name: str, arguments: type[tuple], kept: type[tuple], results: int) -> dict[str, Callable]:
    """The formulas, by name, of a chain's operator, which gives so many results, and of its backward."""

    def forward(*flat, out_shape: object = None) -> int:
        return _chain_forward(unpack(arguments, flat))

    def backward(*flat, out_shape: object = None) -> int:
        *values, needs = flat[results:]
        needs = all_wanted(unpack(arguments, needs))
        return _chain_backward(unpack(kept, values), grad_inputs(needs), needs)

    return {name: forward, f"{name}_backward": backward}


def _block_formulas(kind: BlockKind) -> dict[str, Callable]:
    def forward(*flat, out_shape: object = None) -> int:
        block = unpack(kind.arguments, flat)
        return _chain_forward(block) + _shortcut(block)

    def backward(dout: Sequence[int], *rest, out_shape: object = None) -> int:
        *kept, needs = rest
        kept, needs = unpack(kind.kept, kept), all_wanted(unpack(kind.arguments, needs))
        if kind in PRE_ACTIVATION_KINDS:
            asked = pre_activation_inputs(needs)
            reached = asked[0] if kept.activated else needs.x
        else:
            asked, reached = grad_inputs(needs), needs.x
        return _chain_backward(kept, asked, needs) + _shortcut(kept) * (reached + needs.shortcut.weight)

    return {kind.name: forward, f"{kind.name}_backward": backward}


_DEEP_STEM = _chain_formulas("deep_stem", DeepStem, DeepStemKept, 1)
_BLOCKS = BLOCK_KINDS + PRE_ACTIVATION_KINDS
_FORMULAS = {
    **_DEEP_STEM,
    "deep_stem_inference": _DEEP_STEM["deep_stem"],
    "stem": _stem_flops,
    "stem_inference": _stem_flops,
    "stem_backward": _stem_backward_flops,
    **{name: formula for kind in _BLOCKS + FROZEN_KINDS for name, formula in _block_formulas(kind).items()},
    **{f"{kind.name}_inference": _block_formulas(kind)[kind.name] for kind in _BLOCKS},
    **{
        name: formula
        for kind in SQUEEZE_KINDS
        for name, formula in _chain_formulas(kind.name, kind.arguments, kind.kept, 3).items()
    },
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fused_residual, name))(formula)


class _RegisterOnImport:
    """Waits for the import of the counter: importing it here would import Triton, which not every user needs."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Register the operators' formulas, now or when the counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _RegisterOnImport())
