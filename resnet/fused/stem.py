"""A stem on fused operators: convolution, BatchNorm, ReLU and max-pool."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from resnet import ops
from resnet.checks import check_activation, check_conv_weight, check_input_type, check_norm, check_values_per_channel
from resnet.functional import channels_last, checked, unchecked
from resnet.fusable import (
    StemParts,
    UnitParts,
    conv_state,
    geometry_of,
    module_state,
    pool_state,
    unfusable_as_conv,
    unfusable_conv,
    unfusable_norm,
    unfusable_other,
    unfusable_pool,
    unlike_input,
)
from resnet.fused.module import (
    GLOBAL_HOOKS,
    FusedModule,
    autocast_dtype,
    is_of,
    reason_not_to_take,
    trained_statistics,
    unit_arguments,
    warn_once,
    weight_shapes,
)
from resnet.norm import Norm, norm_of
from resnet.torch_backend.convolution import out_size


class FusedStemBase(FusedModule):
    """A stem whose modules `_parts` names: a `StemParts`, or why there are none.

    One without a pool leaves little to look at, since its convolution is PyTorch's, and has a `_run` of its own.
    """

    def _parts(self) -> StemParts | str:
        raise NotImplementedError

    def _run(self, X: Tensor) -> Tensor:
        parts = self._parts()
        if type(parts) is str or parts.pool is not None:
            return super()._run(X, parts)
        if isinstance(X, Proxy) or ops.is_transformed_or_recorded():
            return self._eager(X)
        reason = GLOBAL_HOOKS if _has_any_global_hook() else self._reason_not_to_fuse(parts)
        conv, bn, _, bn_name = parts.unit
        reason = reason or reason_not_to_take((X, conv.weight))
        if isinstance(X, Tensor):
            reason = reason or unlike_input(bn_name, bn, autocast_dtype(X) or X.dtype)
        if reason is None:
            norm = norm_of(bn, conv.bias)
            reason = trained_statistics([norm])
        if reason is not None:
            warn_once(type(self).__name__, reason)
            return self._eager(X)
        return _without_pool(parts.unit, norm, X)

    def _operator(self, parts: StemParts) -> str:
        return "deep_stem" if parts.before else "stem"

    def _state(self, parts: StemParts | str) -> tuple:
        if type(parts) is str:
            return "stem", parts
        _, pool, others, _ = parts
        state = ["stem", pool_state(pool.module)]
        for conv, bn, *_ in _units_of(parts):
            state += (conv_state(conv), module_state(bn))
        for other in others:
            state.append((other.kind, module_state(other.module)))
        return tuple(state)

    def _reason_not_to_fuse(self, parts: StemParts) -> str | None:
        _, pool, others, before = parts
        reason = unfusable_other(others)
        if before and (len(before) != 2 or pool is None):
            reason = reason or f"its convolutions are {len(before) + 1}, not 1 or 3 with a pool"
        for conv, bn, conv_name, bn_name in _units_of(parts):
            reason = reason or unfusable_as_conv(conv_name, conv, others)
            reason = reason or (pool and unfusable_conv(conv_name, conv, others))
            reason = reason or unfusable_norm(bn_name, bn, others)
        return reason or (pool and unfusable_pool(pool.name, pool.module))

    def _norm_pairs(self, parts: StemParts) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
        return [(unit.bn, unit.conv) for unit in _units_of(parts)]

    def _check(self, parts: StemParts, X: Tensor, flat: list, norms: list[Norm], cast: bool) -> str | None:
        units, x = _units_of(parts), flat[0]

        def fit(shapes: list[tuple[int, ...]]) -> bool:
            chained = [shape[1] for shape in shapes[1:]] == [shape[0] for shape in shapes[:-1]]
            return chained and all(is_of(norm, shape[0]) for norm, shape in zip(norms, shapes, strict=True))

        shapes = weight_shapes([unit.conv for unit in units], fit)
        C, size = shapes[0][1], x.shape[2:]
        check_activation(X, C)
        if not cast:
            check_input_type(x, {f"{unit.conv_name}.weight": unit.conv.weight for unit in units})
        for unit, norm, (K, _, R, S) in zip(units, norms, shapes, strict=True):
            conv, bn, name, bn_name = unit
            check_conv_weight(f"{name}.weight", conv.weight, x, (K, C, R, S), cast)
            if R != S:
                return f"{name}.weight is {R}x{S}, not square"
            reason = unlike_input(bn_name, bn, x.dtype)
            if reason is not None:
                return reason
            check_norm(norm, x, K, bn_name)
            C, size = K, [out_size(s, R, *geometry_of(conv)) for s in size]
            check_values_per_channel(norm, (x.shape[0], K, *size), bn_name)
        return None

    def _arguments(self, parts: StemParts, X: Tensor, x: Tensor, norms: list[Norm], cast: bool) -> list:
        return unit_arguments(x, [unit.conv for unit in _units_of(parts)], norms, cast)[0]


def _units_of(parts: StemParts) -> tuple[UnitParts, ...]:
    return (*parts.before, parts.unit)


def _without_pool(unit: UnitParts, norm: Norm, X: Tensor) -> Tensor:
    """relu(batch_norm(conv(X))), `norm` with the convolution's bias: the convolution is PyTorch's, of any kind.

    Its bias is left to the norm, where it costs no pass over the activation. With batch statistics it only shifts the
    running mean.
    """
    check_activation(X, None)
    conv = unit.conv
    y = conv._conv_forward(channels_last(X), conv.weight, None)
    out = unchecked(y, None, norm, True)
    return checked(y, None, norm, True, unit.bn_name) if out is None else out
