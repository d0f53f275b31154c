"""What `torch.utils.flop_counter` counts of the fused operators: their convolutions, as it counts the eager modules'.

A convolution's gradient of its input or weight takes as many operations as its forward.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch

from resnet.operands import Block, BlockKept, Stem, StemKept
from resnet.schema import unpack
from resnet.torch_backend.convolution import out_size

_COUNTER = "torch.utils.flop_counter"


def _convolution(x: Sequence[int], weight: Sequence[int], stride: int, padding: int) -> int:
    """Operations of the convolution of shapes x (N, C, H, W) and weight (K, C, R, S)."""
    N, _, H, W = x
    K, C, R, S = weight
    return 2 * N * out_size(H, R, stride, padding) * out_size(W, S, stride, padding) * K * C * R * S


def _stem(a: Stem | StemKept) -> int:
    return _convolution(a.x, a.weight, a.stride, a.padding)


def _block(a: Block | BlockKept) -> tuple[int, int, int]:
    """Operations of conv1, conv2 and conv3."""
    conv1, conv2, conv3, _, stride, *_ = a.convs
    N, _, H, W = a.x
    middle = (N, conv1[0], out_size(H, 3, stride, 1), out_size(W, 3, stride, 1))
    shortcut = 0 if conv3 is None else _convolution(a.x, conv3, stride, 0)
    return _convolution(a.x, conv1, stride, 1), _convolution(middle, conv2, 1, 1), shortcut


def _stem_flops(*flat, out_shape: object = None) -> int:
    return _stem(unpack(Stem, flat))


def _stem_backward_flops(dout: Sequence[int], *rest, out_shape: object = None) -> int:
    *kept, needs = rest
    needs = unpack(Stem, needs)
    return _stem(unpack(StemKept, kept)) * (needs.x + (needs.weight or needs.master))


def _block_flops(*flat, out_shape: object = None) -> int:
    return sum(_block(unpack(Block, flat)))


def _block_backward_flops(dout: Sequence[int], *rest, out_shape: object = None) -> int:
    *kept, needs = rest
    conv1, conv2, conv3 = _block(unpack(BlockKept, kept))
    needs = unpack(Block, needs)
    convs, norm = needs.convs.wanted(), needs.norm1
    before_conv2 = needs.x or convs.conv1 or norm.weight or norm.bias or norm.conv_bias
    return conv1 * (needs.x + convs.conv1) + conv2 * (before_conv2 + convs.conv2) + conv3 * (needs.x + convs.conv3)


_FORMULAS = {
    "stem": _stem_flops,
    "stem_inference": _stem_flops,
    "stem_backward": _stem_backward_flops,
    "residual_block": _block_flops,
    "residual_block_inference": _block_flops,
    "residual_block_backward": _block_backward_flops,
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
