"""A residual block on fused operators, with squeeze-and-excitation or without."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet import ops, torch_backend
from resnet.checks import (
    check_activation,
    check_norm,
    check_values_per_channel,
    check_vector,
)
from resnet.functional import channels_last, checked, unchecked
from resnet.fusable import (
    AVERAGE,
    BlockParts,
    GateParts,
    average_of,
    conv_state,
    gate_state,
    geometry_of,
    module_state,
    passed_over,
    pool_state,
    unfusable_average,
    unfusable_conv,
    unfusable_gate,
    unfusable_norm,
    unfusable_other,
    unfusable_unit,
    unlike_input,
)
from resnet.fused.chain import chain_maps, chain_widths, unfit_weights, unfit_windows
from resnet.fused.module import (
    FusedModule,
    records_gradient,
    trained_statistics,
    unit_arguments,
    without_autocast,
)
from resnet.kernels.host.facts import Recent
from resnet.norm import Norm, held, norm_of
from resnet.operands import POINTWISE, SHORTCUTS, Pooled, block_operator, squeeze_kind, squeeze_operator
from resnet.schema import unpack

_MAP = -len(Pooled._fields)  # the place of a pooled x among a block's arguments
_OPERATORS = {(units == 3, *shortcut): block_operator(units, *shortcut) for units in (2, 3) for shortcut in SHORTCUTS}


class FusedBlock(FusedModule):
    """A residual block whose modules `_parts` names: a `BlockParts`, or why there are none."""

    def _parts(self) -> BlockParts | str:
        raise NotImplementedError

    def _operator(self, parts: BlockParts) -> str:
        units, shortcut, _, pool, gate = parts
        if gate is not None:
            return squeeze_operator(gate.place)
        return _OPERATORS[units[2:] != (), shortcut is not None and shortcut.bn is not None, pool is not None]

    def _state(self, parts: BlockParts | str) -> tuple:
        if type(parts) is str:
            return "block", parts
        units, shortcut, others, pool, gate = parts
        state = ["block", len(units)]
        for conv, bn, *_ in units if shortcut is None else (*units, shortcut):
            state += (conv_state(conv), module_state(bn))
        if gate is not None:
            state += gate_state(gate)
        for other in others:
            state.append((other.kind, module_state(other.module)))
        if pool is not None:
            state.append(pool_state(pool.module, AVERAGE))
        return tuple(state)

    def _without_statistics(self, parts: BlockParts, flat: list, backend: ModuleType | None) -> str | None:
        if parts.gate is not None:
            return None if backend is torch_backend and not records_gradient(flat) else ""
        form = super()._without_statistics(parts, flat, backend)
        if form or flat[0].dtype == torch.float16:  # its range is too small for weights that are scaled
            return form
        trained = any(isinstance(t, Tensor) and t.requires_grad and t.dim() == 1 for t in flat)
        return "" if trained else "_frozen"

    def _reason_not_to_fuse(self, parts: BlockParts) -> str | None:
        _, shortcut, others, pool, _ = parts
        reason = unfusable_other(others)
        if parts.gate is not None:
            reason = reason or unfusable_gate(parts.gate)
        if reason is None and pool is not None:
            reason = unfusable_average(pool.name, pool.module)
            if shortcut is None or shortcut.bn is None:
                reason = reason or f"{pool.name} is a pool, and there is no convolution with a norm after it"
        if reason is not None:
            return reason
        strides = 1
        for unit in parts.units:
            reason = unfusable_unit(unit.conv_name, unit.conv, others) or unfusable_norm(unit.bn_name, unit.bn, others)
            if reason is not None:
                return reason
            strides *= unit.conv.stride[0]
        if shortcut is not None:
            reason = unfusable_conv(shortcut.conv_name, shortcut.conv, others, 1, 0, strides if pool is None else 1)
            if reason is None and shortcut.bn is not None:
                reason = unfusable_norm(shortcut.bn_name, shortcut.bn, others)
            if reason is not None:
                return reason
        return None

    def _norm_pairs(self, parts: BlockParts) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
        units = parts.units if parts.gate is None else parts.units[: parts.gate.place]
        pairs = [(unit.bn, unit.conv) for unit in units]
        if parts.shortcut is not None and parts.shortcut.bn is not None:
            pairs.append((parts.shortcut.bn, parts.shortcut.conv))
        return pairs

    def _check(self, parts: BlockParts, X: Tensor, flat: list, norms: list[Norm], cast: bool) -> str | None:
        (units, shortcut, _, pool, gate), x = parts, flat[0]
        if gate is not None:
            units = units[: gate.place]
        count, every = len(units), units if shortcut is None else (*units, shortcut)
        shapes, widths = chain_widths(every, count, norms)
        (K, _), (_, C) = widths[count - 1], widths[0]
        check_activation(X, C)
        reason = unfit_weights(every, shapes, widths, x, cast)
        if reason is not None:
            return reason
        if shortcut is not None and shortcut.bn is None and shortcut.conv.bias is not None:
            check_vector(f"{shortcut.conv_name}.bias", shortcut.conv.bias, x, K)
        for part, norm, (width, _) in zip(every, norms, widths):
            reason = unlike_input(part.bn_name, part.bn, x.dtype)
            if reason is not None:
                return reason
            check_norm(norm, x, width, part.bn_name)
        reason = unfit_windows(every, shapes)
        if reason is not None:
            return reason
        maps, strides = chain_maps(x, units, shapes)
        N, _, P, Q = maps[-1]
        if (shortcut is None if gate is None else _is_added(parts)) and (C != K or strides != 1):
            return f"its shortcut is the identity, and its convolutions give {C} -> {K} channels with stride {strides}"
        if pool is not None and (pooled := flat[_MAP].shape) != (N, C, P, Q):
            return f"{pool.name} gives {tuple(pooled)}, and the convolutions give maps of {P}x{Q}"
        for part, norm, shape in zip(every, norms, (*maps, maps[-1])):
            check_values_per_channel(norm, shape, part.bn_name)
        return None

    def _arguments(self, parts: BlockParts, X: Tensor, x: Tensor, norms: list[Norm], cast: bool) -> list:
        units, shortcut, _, pool, gate = parts
        if gate is not None:
            convs = [unit.conv for unit in units[: gate.place]]
            return [*unit_arguments(x, convs, norms, cast)[0], gate.place < len(units), _is_added(parts)]
        convs = [unit.conv for unit in (units if shortcut is None else (*units, shortcut))]
        flat, weights, masters = unit_arguments(x, convs, norms, cast)
        if shortcut is None:
            flat += (None, None, POINTWISE, None)
        elif shortcut.bn is None:
            conv = shortcut.conv
            flat += (weights[-1], held(conv, "_parameters", "bias"), geometry_of(conv), masters[-1])
        elif pool is not None:
            check_activation(X, None)
            with torch.no_grad():
                map_ = channels_last(pool.module(X).to(x.dtype))
            flat += (map_, *average_of(pool.module))
        return flat

    def _unrecorded(self, parts: BlockParts, X: Tensor, flat: list) -> Tensor:
        """A block with squeeze-and-excitation without gradients, by PyTorch's operators."""
        gate = parts.gate
        if gate.place < len(parts.units):  # folding the norms before it saves nothing on a CPU
            return self._eager(X)
        squeeze = unpack(squeeze_kind(gate.place).arguments, flat)
        with without_autocast(squeeze.x):
            h = torch_backend.squeeze_inference(squeeze.x, squeeze.units)
        factor, dtype = _gates(gate, h.mean((2, 3)), h.dtype)
        shortcut = X if gate.shortcut is None else _called(gate.shortcut, X)
        if _is_alike(shortcut, h):
            out = torch_backend.excite_inference(h, factor, channels_last(shortcut))
            return out if dtype == h.dtype else out.to(dtype)
        return F.relu((h * factor[..., None, None] + shortcut).to(dtype))  # the add in eager is in place

    def _excite(
        self,
        parts: BlockParts,
        X: Tensor,
        x: Tensor,
        recent: Recent,
        y: Tensor,
        pooled: Tensor,
        link: Tensor,
        stats: Tensor,
    ) -> Tensor:
        """What follows the squeeze, by its results: the gates, and the rest of the block."""
        gate = parts.gate
        factor, dtype = _gates(gate, pooled, y.dtype)
        if gate.place < len(parts.units):
            return self._last_unit(parts, X, recent.next, _excited(recent, y, stats, link, factor, None, True, False))
        if gate.shortcut is None:
            added = x.detach()  # x has its gradient by the squeeze
        else:
            shortcut = _called(gate.shortcut, X)
            if not _is_alike(shortcut, y):
                out = _excited(recent, y, stats, link, factor, None, False, False) + shortcut
                return F.relu(out.to(dtype))  # the add in eager is in place
            added = channels_last(shortcut)
        out = _excited(recent, y, stats, link, factor, added, False, True)
        return out if dtype == y.dtype else out.to(dtype)

    def _last_unit(self, parts: BlockParts, X: Tensor, recent: Recent, a: Tensor) -> Tensor:
        """relu(norm(conv(a)) + shortcut), the convolution PyTorch's."""
        (conv, bn, _, bn_name), shortcut = parts.units[-1], parts.gate.shortcut
        shortcut = X if shortcut is None else _called(shortcut, X)
        norm = norm_of(bn, conv.bias)
        if unlike_input(bn_name, bn, a.dtype) or trained_statistics([norm]):
            return F.relu(bn(conv(a)) + shortcut)
        y = conv._conv_forward(a, conv.weight, None)
        fits = type(shortcut) is Tensor and shortcut.shape == y.shape
        added = shortcut.to(y.dtype) if fits else None
        out = unchecked(y, added, norm, fits)
        if out is None:
            out = checked(y, added, norm, fits, bn_name, recent)
        return out if fits else F.relu(out + shortcut)


def _gates(gate: GateParts, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """(N, C), what the modules make of the means of all maps (N, C); and the type of their product with the maps."""
    N, C = pooled.shape
    factor = pooled.view({"map": (N, C, 1, 1), "row": (N, 1, C), "matrix": (N, C)}[gate.means])
    for module in gate.called:
        factor = module(factor)
    if gate.means != "map":
        factor = factor.view(N, -1, 1, 1)
    product = dtype if factor.dtype == dtype else torch.promote_types(dtype, factor.dtype)
    return factor.to(dtype).expand(N, C, 1, 1).flatten(1).contiguous(), product


def _is_alike(shortcut: object, y: Tensor) -> bool:
    return type(shortcut) is Tensor and shortcut.shape == y.shape and shortcut.dtype == y.dtype


def _called(shortcut: nn.Module, X: Tensor) -> Tensor:
    """What a shortcut gives. An `nn.SyncBatchNorm` at its end works on a CPU, too, as those of the units do."""
    if isinstance(shortcut, nn.Sequential) and type(shortcut).forward is nn.Sequential.forward:
        *others, bn = shortcut._modules.values() or (None,)
        if type(bn) is nn.SyncBatchNorm and passed_over(bn) is passed_over(shortcut) is None:
            norm = norm_of(bn)
            if trained_statistics([norm]) is None:
                for module in others:
                    X = module(X)
                out = unchecked(X, None, norm, False)
                return checked(X, None, norm, False, "the shortcut's norm") if out is None else out
    return shortcut(X)


def _is_added(parts: BlockParts) -> bool:
    """Whether the input of a block with squeeze-and-excitation at its end is its shortcut, too."""
    return parts.gate.shortcut is None and parts.gate.place == len(parts.units)


def _excited(recent: Recent, *flat: object) -> Tensor:
    """[relu](gate * [relu](norm(y)) [+ shortcut]), by the fields of `operands.Excite`."""
    found = recent.known(flat) if not torch.compiler.is_compiling() and ops.is_direct() else None
    if found is not None and not torch._C._is_any_autocast_enabled():
        return ops.call("excite", flat, found)
    with without_autocast(flat[0]):
        return ops.call("excite", flat, found)
