"""What the convolutions of a block's chain, and its shortcut's, ask of their weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resnet.checks import check_conv_weight, check_input_type
from resnet.fusable import UnitParts, geometry_of
from resnet.fused.module import is_of, weight_shapes
from resnet.norm import Norm
from resnet.torch_backend.convolution import out_size

Shape = tuple[int, ...]


def chain_widths(
    every: Sequence[UnitParts], count: int, norms: Sequence[Norm]
) -> tuple[list[Shape], list[tuple[int, int]]]:
    """The shapes that weights should have, and (out, in) channels, of a chain of `count` convolutions and its shortcut.

    `norms` follow them one by one, as far as there are any.
    """
    groups = [part.conv.groups for part in every]

    def channels(shapes: list[Shape]) -> list[tuple[int, int]]:
        """(out, in) of each convolution, as those of a chain and its shortcut have to be."""
        C, outs = shapes[0][1] * groups[0], [shape[0] for shape in shapes[:count]]
        return [*zip(outs, [C, *outs]), (outs[-1], C)][: len(every)]

    def fit(shapes: list[Shape]) -> bool:
        widths = channels(shapes)
        own = [(K, C * g) for (K, C, *_), g in zip(shapes, groups, strict=True)]
        return own == widths and all(is_of(norm, K) for norm, (K, _) in zip(norms, widths))

    shapes = weight_shapes([part.conv for part in every], fit)
    return shapes, channels(shapes)


def unfit_weights(
    every: Sequence[UnitParts], shapes: list[Shape], widths: list[tuple[int, int]], x: Tensor, cast: bool
) -> str | None:
    """Refuse weights that do not go with x, and say which channels are no whole groups."""
    weights = {f"{part.conv_name}.weight": part.conv.weight for part in every}
    if not cast:
        check_input_type(x, weights)
    for (name, weight), part, (outs, ins), shape in zip(weights.items(), every, widths, shapes, strict=True):
        g = part.conv.groups
        check_conv_weight(name, weight, x, (outs, ins // g, *shape[2:]), cast)
        if outs % g or ins % g:
            return f"{name} makes {outs} channels of {ins}, which are not whole groups, {g} of them"
    return None


def unfit_windows(every: Sequence[UnitParts], shapes: list[Shape]) -> str | None:
    """Which weight has another window than its convolution's padding is for."""
    for part, shape in zip(every, shapes, strict=True):
        _, padding, dilation = geometry_of(part.conv)
        size = 2 * padding // dilation + 1
        if shape[2:] != (size, size):
            return f"{part.conv_name}.weight is {shape[2]}x{shape[3]}, not {size}x{size}"
    return None


def chain_maps(x: Tensor, units: Sequence[UnitParts], shapes: list[Shape]) -> tuple[list[Shape], int]:
    """The shape of each unit's output (N, K, P, Q), and the stride of all."""
    (N, _, P, Q), maps, strides = x.shape, [], 1
    for unit, (width, _, size, _) in zip(units, shapes):
        geometry = geometry_of(unit.conv)
        P, Q = out_size(P, size, *geometry), out_size(Q, size, *geometry)
        maps.append((N, width, P, Q))
        strides *= geometry[0]
    return maps, strides
