"""A residual block with pre-activation on one operator."""

from __future__ import annotations

from torch import Tensor, nn

from resnet.checks import check_activation, check_norm, check_values_per_channel, check_vector
from resnet.fusable import (
    PreActivationParts,
    conv_state,
    geometry_of,
    module_state,
    unfusable_conv,
    unfusable_norm,
    unfusable_other,
    unfusable_unit,
    unlike_input,
)
from resnet.fused.chain import chain_maps, chain_widths, unfit_weights, unfit_windows
from resnet.fused.module import FusedModule, unit_arguments
from resnet.norm import Norm, held
from resnet.operands import POINTWISE, pre_activation_operator


class FusedPreActivation(FusedModule):
    """A block of convolutions of relu(norm(x)) whose modules `_parts` names: a `PreActivationParts`, or why not.

    conv2(relu(norm2(conv1(relu(norm1(x)))))) + shortcut, as in "Identity Mappings in Deep Residual Networks" (He et
    al., 2016, arXiv:1603.05027) and in Wide ResNets. The shortcut is x, or a convolution of x or of relu(norm1(x)).
    Backward needs x, each convolution's output but the last one's, and per-channel vectors.
    """

    def _parts(self) -> PreActivationParts | str:
        raise NotImplementedError

    def _operator(self, parts: PreActivationParts) -> str:
        return pre_activation_operator(len(parts.units))

    def _state(self, parts: PreActivationParts | str) -> tuple:
        if type(parts) is str:
            return "pre-activation", parts
        bn, _, units, shortcut, activated, others = parts
        state = ["pre-activation", len(units), activated, module_state(bn)]
        for conv, bn, *_ in units if shortcut is None else (*units, shortcut):
            state += (conv_state(conv), module_state(bn))
        for other in others:
            state.append((other.kind, module_state(other.module)))
        return tuple(state)

    def _reason_not_to_fuse(self, parts: PreActivationParts) -> str | None:
        bn, bn_name, units, shortcut, _, others = parts
        reason, strides = unfusable_other(others), 1
        for name, norm in ((bn_name, bn), *[(unit.bn_name, unit.bn) for unit in units[:-1]]):
            reason = reason or unfusable_norm(name, norm, others)
        for unit in units:
            reason = reason or unfusable_unit(unit.conv_name, unit.conv, others)
            if reason is not None:
                return reason
            strides *= unit.conv.stride[0]
        if shortcut is not None:
            reason = unfusable_conv(shortcut.conv_name, shortcut.conv, others, 1, 0, strides)
        return reason

    def _norm_pairs(self, parts: PreActivationParts) -> list[tuple[nn.BatchNorm2d, nn.Conv2d | None]]:
        """Each norm, and the convolution before it."""
        return [(parts.bn, None), *[(unit.bn, unit.conv) for unit in parts.units[:-1]]]

    def _check(self, parts: PreActivationParts, X: Tensor, flat: list, norms: list[Norm], cast: bool) -> str | None:
        bn, bn_name, units, shortcut, *_ = parts
        if cast and X.dtype != flat[0].dtype:
            return f"autocast leaves the input {X.dtype}, which {bn_name} reads"
        x, count, every = flat[0], len(units), units if shortcut is None else (*units, shortcut)
        shapes, widths = chain_widths(every, count, norms[1:])
        (K, _), (_, C) = widths[count - 1], widths[0]
        check_activation(X, C)
        reason = unfit_weights(every, shapes, widths, x, cast)
        if reason is not None:
            return reason
        for part in (units[-1],) if shortcut is None else (units[-1], shortcut):
            if part.conv.bias is not None:
                check_vector(f"{part.conv_name}.bias", part.conv.bias, x, K)
        read = [(bn_name, bn, C), *[(unit.bn_name, unit.bn, K) for unit, (K, _) in zip(units[:-1], widths)]]
        for (name, module, width), norm in zip(read, norms, strict=True):
            reason = unlike_input(name, module, x.dtype)
            if reason is not None:
                return reason
            check_norm(norm, x, width, name)
        reason = unfit_windows(every, shapes)
        if reason is not None:
            return reason
        maps, strides = chain_maps(x, units, shapes)
        if shortcut is None and (C != K or strides != 1):
            return f"its shortcut is the identity, and its convolutions give {C} -> {K} channels with stride {strides}"
        for (name, *_), norm, shape in zip(read, norms, (x.shape, *maps)):
            check_values_per_channel(norm, shape, name)
        return None

    def _arguments(self, parts: PreActivationParts, X: Tensor, x: Tensor, norms: list[Norm], cast: bool) -> list:
        _, _, units, shortcut, activated, _ = parts
        projections = units[-1:] if shortcut is None else (units[-1], shortcut)
        convs = [part.conv for part in (*units[:-1], *projections)]
        chain, weights, masters = unit_arguments(x, convs, norms[1:], cast)
        flat = [x, *norms[0], *chain[1:]]
        for conv, weight, master in [*zip(convs, weights, masters)][len(units) - 1 :]:
            flat += (weight, held(conv, "_parameters", "bias"), geometry_of(conv), master)
        if shortcut is None:
            flat += (None, None, POINTWISE, None)
        return [*flat, activated]
