"""`FusedResidual`, `FusedStem` and the others: the reference's modules on fused operators, same `state_dict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from resnet import ops, torch_backend
from resnet.backends import implementation
from resnet.checks import (
    check_activation,
    check_block,
    check_conv_weight,
    check_input_type,
    check_norm,
    check_strides,
    check_values_per_channel,
    check_vector,
    check_whole,
)
from resnet.functional import channels_last, checked, unchecked
from resnet.fusable import (
    AVERAGE,
    BlockParts,
    StemParts,
    UnitParts,
    Watched,
    average_of,
    conv_state,
    gate_parts,
    gate_state,
    geometry_of,
    hashable,
    module_state,
    passed_over,
    pool_state,
    unfusable,
    unfusable_average,
    unfusable_conv,
    unfusable_gate,
    unfusable_norm,
    unfusable_other,
    unfusable_pool,
    unfusable_unit,
    unlike_input,
)
from resnet.kernels.host.facts import Recent
from resnet.norm import VECTORS, Norm, held, norm_of
from resnet.operands import POINTWISE, SHORTCUTS, Pooled, block_operator, squeeze_operator
from resnet.reference import BasicBlock, Bottleneck, Residual, ResidualBottleneck, SmallStem, Stem
from resnet.sequential import FusedSequential, linkable
from resnet.torch_backend.convolution import out_size

_warned: set[str] = set()


def warn_once(name: str, reason: str) -> None:
    # Hooks beside a mode are those of a tool, such as a counter of FLOPs: it is to see all, and they go with it.
    if reason == _GLOBAL_HOOKS and torch._C._len_torch_dispatch_stack():
        return
    message = f"{name} runs PyTorch's operators one by one: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


# What torch.compiler.assume_constant_result sets, which imports the compiler: the graph does not break at a warning.
warn_once._dynamo_marked_constant = True

_GLOBAL_HOOKS = "global module hooks are registered, which a fused operator would not call for the submodules"


def _weight_shapes(convs: list[nn.Conv2d], fit: Callable[[list[tuple[int, ...]]], bool]) -> list[tuple[int, ...]]:
    """The shapes that weights should have: their own where these fit together, as PyTorch asks for no more, else those
    that their convolutions were made with.
    """
    own = [tuple(conv.weight.shape) for conv in convs]
    if all(len(shape) == 4 for shape in own) and fit(own):
        return own
    return [(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size) for conv in convs]


def _is_of(norm: Norm, channels: int) -> bool:
    return all(v is None or v.shape == (channels,) for v in norm[: len(VECTORS)])


# Asked once: torch.compile of PyTorch 2.11 cannot trace the question.
_AUTOCAST_KINDS = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast would run eager's convolutions on x; None where it would not cast."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    if x.dtype != torch.float64 and kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _reason_not_to_take(tensors: Sequence) -> str | None:
    mode = ops.function_mode()
    if mode is not None:
        return f"a {mode} is in force, which may know PyTorch's own functions alone"
    kind = ops.wrapper(tensors)
    return kind and f"one of its tensors is a {kind}, which may know PyTorch's own operators alone"


def _trained_statistics(norms: list[Norm]) -> str | None:
    for norm in norms:
        for statistic in () if norm.training else (norm.running_mean, norm.running_var):
            if statistic is not None and statistic.requires_grad:
                return "a norm's running statistics require grad, of which a fused operator has no gradient"
    return None


def _records_gradient(arguments: list) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """The operators take their inputs as they are; a device that has no autocast (meta) has none to disable."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in _AUTOCAST_KINDS else nullcontext()


_KEPT = 1024  # states; more of them come once, and all are forgotten
_fusable: dict[tuple, Recent] = {}  # states of modules that can be fused, and the facts of their arguments


class _Fused:
    """`forward`, as `_run`, of a module that one operator can do the work of; the eager module is the next base.

    Each class has a `forward` whose `__wrapped__` is the eager one: `torch.jit.script` compiles the source of that.

    What can be fused and what has to be refused depends on the modules' settings and on facts of the tensors. Where
    the same ones have passed before, they are not looked at one by one.
    """

    def _eager(self, X: Tensor) -> Tensor:
        """The same by the modules, one by one."""
        return super().forward(X)

    def _run(self, X: Tensor, parts: BlockParts | StemParts | str | None = None) -> Tensor:
        """The forward; `parts` where the caller has asked for them already."""
        compiling = torch.compiler.is_compiling()
        direct = not compiling and ops.is_direct()
        if isinstance(X, Proxy) or (not direct and ops.is_transformed_or_recorded()):
            return self._eager(X)
        watched = _has_any_global_hook()
        if parts is None:
            parts = self._parts()
        state = None if compiling or watched else self._state(parts)
        try:
            recent = _fusable.get(state)
        except TypeError:  # a setting cannot be hashed
            state = hashable(state)
            recent = _fusable.get(state)
        if recent is None:
            reason = _GLOBAL_HOOKS if watched else parts if isinstance(parts, str) else self._reason_not_to_fuse(parts)
            if reason is not None:
                warn_once(type(self).__name__, reason)
                return self._eager(X)
            recent = Recent()
            if state is not None:
                _remember(state, recent)
        if not isinstance(X, Tensor):
            check_activation(X, None)  # which refuses it
        simple = direct and type(X) is Tensor and X.layout is torch.strided
        reason = None if simple else _reason_not_to_take((X,))  # before a pool is called, for the arguments
        if reason is not None:
            warn_once(type(self).__name__, reason)
            return self._eager(X)
        pairs = self._norm_pairs(parts)
        norms = [norm_of(bn, held(conv, "_parameters", "bias")) for bn, conv in pairs]
        dtype = _autocast_dtype(X)
        x = X if dtype is None else X.to(dtype)
        flat = self._arguments(parts, X, x, norms, dtype is not None)
        known = recent.known(flat) if direct else None
        check = (recent, X.dtype, dtype)
        if known is None or check not in known.facts.passed:
            reason = None if known else _reason_not_to_take(flat)
            reason = reason or self._check(parts, X, flat, norms, dtype is not None)
            if reason is not None:
                warn_once(type(self).__name__, reason)
                return self._eager(X)
            x = channels_last(x)
            if x is not flat[0]:
                flat[0] = x
                known = known and recent.known(flat)
            elif known is not None:
                known.facts.passed.add(check)
        reason = _trained_statistics(norms)
        if reason is not None:
            warn_once(type(self).__name__, reason)
            return self._eager(X)
        if not compiling:
            implementation(x)  # raises what the operator would, before anything changes
        batch_statistics = False
        for i, norm in enumerate(norms):
            batch_statistics |= norm.training
            if (count := norm.num_batches_tracked) is None:  # the operator counts the batch, if anything does
                continue
            count.add_(1)
            if any(held(other, "_buffers", "num_batches_tracked") is count for other, _ in pairs[i + 1 :]):
                # The other will count the batch once more, and this average is over as many as there are now.
                norms[i] = norms[i]._replace(num_batches_tracked=count.clone())
                flat = self._arguments(parts, X, x, norms, dtype is not None)
                known = known and recent.known(flat)
        name = self._operator(parts)
        if not batch_statistics:
            form = self._without_statistics(parts, flat)
            if form is None:
                return self._eager(X)
            name += form
        if known is None or x.dtype == torch.float64:
            with _without_autocast(x):
                out = ops.call(name, flat, known)
        elif dtype is None:
            out = ops.call(name, flat, known)
        else:
            kind = x.device.type
            torch.set_autocast_enabled(kind, False)  # the context manager takes 2 us longer
            try:
                out = ops.call(name, flat, known)
            finally:
                torch.set_autocast_enabled(kind, True)
        return self._excite(parts, X, x, recent.next, *out) if type(out) is tuple else out

    def _without_statistics(self, parts: BlockParts | StemParts, flat: list) -> str | None:
        """The end of the operator's name where the norms take no batch statistics; None where eager is quicker."""
        return "" if _records_gradient(flat) else "_inference"


def _remember(state: tuple, recent: Recent) -> None:
    if len(_fusable) >= _KEPT:
        _fusable.clear()
    _fusable[state] = recent


def _weights(convs: list[nn.Conv2d], x: Tensor, cast: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights as autocast multiplies them where it casts, and the parameters that such copies were made of.

    On a GPU the copies of channels_last weights are one launch.
    """
    weights, masters, sources, copies = [], [], [], []
    for conv in convs:
        weight, master = held(conv, "_parameters", "weight"), None
        if cast and weight.dtype != x.dtype and (type(weight) is nn.Parameter or not ops.wrapper((weight,))):
            master, source = weight, weight.detach()
            # A 1x1 weight keeps its strides: where they are others, PyTorch copies one weight after the other.
            alike = source.is_contiguous(memory_format=torch.channels_last)
            layout = torch.preserve_format if alike else torch.channels_last
            weight = torch.empty_like(source, dtype=x.dtype, memory_format=layout)
            sources += (source,)
            copies += (weight,)
        weights += (weight,)
        masters += (master,)
    if copies:
        torch._foreach_copy_(copies, sources)
    return weights, masters


def _unit_arguments(
    x: Tensor, convs: list[nn.Conv2d], norms: list[Norm], cast: bool
) -> tuple[list, list[Tensor], list[Tensor | None]]:
    """x and the units of those convolutions that have a norm, flat; and `_weights` of all."""
    weights, masters = _weights(convs, x, cast)
    flat = [x]
    for conv, norm, weight, master in zip(convs, norms, weights, masters):
        geometry = conv.stride[0], conv.padding[0], conv.dilation[0]  # `geometry_of`, without a call
        flat += (weight, geometry, *norm, master)
    return flat, weights, masters


class FusedStemBase(_Fused):
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
        reason = _GLOBAL_HOOKS if _has_any_global_hook() else self._reason_not_to_fuse(parts)
        conv, bn, _, bn_name = parts.unit
        reason = reason or _reason_not_to_take((X, conv.weight))
        if isinstance(X, Tensor):
            reason = reason or unlike_input(bn_name, bn, _autocast_dtype(X) or X.dtype)
        if reason is None:
            norm = norm_of(bn, conv.bias)
            reason = _trained_statistics([norm])
        if reason is not None:
            warn_once(type(self).__name__, reason)
            return self._eager(X)
        return _without_pool(parts.unit, norm, X)

    def _operator(self, parts: StemParts) -> str:
        return "deep_stem" if parts.before else "stem"

    def _state(self, parts: StemParts | str) -> tuple:
        if type(parts) is str:
            return "stem", parts
        _, relu, pool, others, _ = parts
        state = ["stem", pool_state(pool.module)]
        for conv, bn, *_ in _units_of(parts):
            state += (conv_state(conv), module_state(bn))
        for other in (relu, *others):
            state.append((other.kind, module_state(other.module)))
        return tuple(state)

    def _reason_not_to_fuse(self, parts: StemParts) -> str | None:
        _, relu, pool, others, before = parts
        reason = unfusable_other((*others, relu))
        if before and (len(before) != 2 or pool is None):
            reason = reason or f"its convolutions are {len(before) + 1}, not 1 or 3 with a pool"
        for conv, bn, conv_name, bn_name in _units_of(parts):
            reason = reason or unfusable(conv_name, conv, nn.Conv2d)
            reason = reason or (pool and unfusable_conv(conv_name, conv, None, None, None))
            reason = reason or unfusable_norm(bn_name, bn, others)
        return reason or (pool and unfusable_pool(pool.name, pool.module))

    def _norm_pairs(self, parts: StemParts) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
        return [(unit.bn, unit.conv) for unit in _units_of(parts)]

    def _check(self, parts: StemParts, X: Tensor, flat: list, norms: list[Norm], cast: bool) -> str | None:
        units, x = _units_of(parts), flat[0]

        def fit(shapes: list[tuple[int, ...]]) -> bool:
            chained = [shape[1] for shape in shapes[1:]] == [shape[0] for shape in shapes[:-1]]
            return chained and all(_is_of(norm, shape[0]) for norm, shape in zip(norms, shapes, strict=True))

        shapes = _weight_shapes([unit.conv for unit in units], fit)
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
        return _unit_arguments(x, [unit.conv for unit in _units_of(parts)], norms, cast)[0]


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


_MAP = -len(Pooled._fields)  # the place of a pooled x among a block's arguments
_OPERATORS = {(units == 3, *shortcut): block_operator(units, *shortcut) for units in (2, 3) for shortcut in SHORTCUTS}


class FusedBlock(_Fused):
    """A residual block whose modules `_parts` names: a `BlockParts`, or why there are none."""

    sequential = FusedSequential

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

    def _without_statistics(self, parts: BlockParts, flat: list) -> str | None:
        if parts.gate is not None:
            # Its operators are the same. With gates before the last convolution they save nothing on a CPU.
            inner = parts.gate.place < len(parts.units) and not torch.compiler.is_compiling()
            return None if inner and not _records_gradient(flat) and implementation(flat[0]) is torch_backend else ""
        form = super()._without_statistics(parts, flat)
        if form or flat[0].dtype == torch.float16:  # its range is too small for weights that are scaled
            return form
        trained = any(isinstance(t, Tensor) and t.requires_grad and t.dim() == 1 for t in flat)
        return "" if trained else "_frozen"

    def _reason_not_to_fuse(self, parts: BlockParts) -> str | None:
        reason, shortcut, pool = unfusable_other(parts.others), parts.shortcut, parts.pool
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
            reason = unfusable_unit(unit.conv_name, unit.conv) or unfusable_norm(unit.bn_name, unit.bn, parts.others)
            if reason is not None:
                return reason
            strides *= unit.conv.stride[0]
        if shortcut is not None:
            reason = unfusable_conv(shortcut.conv_name, shortcut.conv, 1, 0, strides if pool is None else 1)
            if reason is None and shortcut.bn is not None:
                reason = unfusable_norm(shortcut.bn_name, shortcut.bn, parts.others)
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
        groups = [part.conv.groups for part in every]

        def channels(shapes: list[tuple[int, ...]]) -> list[tuple[int, int]]:
            """(out, in) of each convolution, as those of a chain and its shortcut have to be."""
            C, outs = shapes[0][1] * groups[0], [shape[0] for shape in shapes[:count]]
            return [*zip(outs, [C, *outs]), (outs[-1], C)][: len(every)]

        def fit(shapes: list[tuple[int, ...]]) -> bool:
            widths = channels(shapes)
            own = [(K, C * g) for (K, C, *_), g in zip(shapes, groups, strict=True)]
            return own == widths and all(_is_of(norm, K) for norm, (K, _) in zip(norms, widths))

        shapes = _weight_shapes([part.conv for part in every], fit)
        widths = channels(shapes)
        (K, _), (_, C) = widths[count - 1], widths[0]
        check_activation(X, C)
        weights = {f"{part.conv_name}.weight": part.conv.weight for part in every}
        if not cast:
            check_input_type(x, weights)
        for (name, weight), (outs, ins), g, shape in zip(weights.items(), widths, groups, shapes, strict=True):
            check_conv_weight(name, weight, x, (outs, ins // g, *shape[2:]), cast)
            if outs % g or ins % g:
                return f"{name} makes {outs} channels of {ins}, which are not whole groups, {g} of them"
        if shortcut is not None and shortcut.bn is None and shortcut.conv.bias is not None:
            check_vector(f"{shortcut.conv_name}.bias", shortcut.conv.bias, x, K)
        for part, norm, (width, _) in zip(every, norms, widths):
            reason = unlike_input(part.bn_name, part.bn, x.dtype)
            if reason is not None:
                return reason
            check_norm(norm, x, width, part.bn_name)
        for part, shape in zip(every, shapes, strict=True):
            _, padding, dilation = geometry_of(part.conv)
            size = 2 * padding // dilation + 1
            if shape[2:] != (size, size):
                return f"{part.conv_name}.weight is {shape[2]}x{shape[3]}, not {size}x{size}"
        (N, _, P, Q), maps, strides = x.shape, [], 1
        for unit, (width, _, size, _) in zip(units, shapes):
            geometry = geometry_of(unit.conv)
            P, Q = out_size(P, size, *geometry), out_size(Q, size, *geometry)
            maps.append((N, width, P, Q))
            strides *= geometry[0]
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
            return [*_unit_arguments(x, convs, norms, cast)[0], gate.place < len(units), _is_added(parts)]
        convs = [unit.conv for unit in (units if shortcut is None else (*units, shortcut))]
        flat, weights, masters = _unit_arguments(x, convs, norms, cast)
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
        gate, (N, C) = parts.gate, pooled.shape
        factor = pooled.view(N, 1, C) if gate.row else pooled.view(N, C, 1, 1)
        for module in gate.called:
            factor = module(factor)
        if gate.row:
            factor = factor.view(N, -1, 1, 1)
        factor = factor.to(y.dtype).expand(N, C, 1, 1).flatten(1).contiguous()
        if gate.place < len(parts.units):
            return self._last_unit(parts, X, recent.next, _excited(recent, y, stats, link, factor, None, True, False))
        if gate.shortcut is None:  # x has its gradient by the squeeze
            return _excited(recent, y, stats, link, factor, x.detach(), False, True)
        shortcut = _called(gate.shortcut, X)
        if type(shortcut) is Tensor and shortcut.shape == y.shape and shortcut.dtype == y.dtype:
            return _excited(recent, y, stats, link, factor, channels_last(shortcut), False, True)
        out = _excited(recent, y, stats, link, factor, None, False, False) + shortcut
        return F.relu(out.to(y.dtype))  # the add in eager is in place

    def _last_unit(self, parts: BlockParts, X: Tensor, recent: Recent, a: Tensor) -> Tensor:
        """relu(norm(conv(a)) + shortcut), the convolution PyTorch's."""
        (conv, bn, _, bn_name), shortcut = parts.units[-1], parts.gate.shortcut
        shortcut = X if shortcut is None else _called(shortcut, X)
        norm = norm_of(bn, conv.bias)
        if unlike_input(bn_name, bn, a.dtype) or _trained_statistics([norm]):
            return F.relu(bn(conv(a)) + shortcut)
        y = conv._conv_forward(a, conv.weight, None)
        fits = type(shortcut) is Tensor and shortcut.shape == y.shape
        added = shortcut.to(y.dtype) if fits else None
        out = unchecked(y, added, norm, fits)
        if out is None:
            out = checked(y, added, norm, fits, bn_name, recent)
        return out if fits else F.relu(out + shortcut)


def _called(shortcut: nn.Module, X: Tensor) -> Tensor:
    """What a shortcut gives. An `nn.SyncBatchNorm` at its end works on a CPU, too, as those of the units do."""
    if isinstance(shortcut, nn.Sequential) and type(shortcut).forward is nn.Sequential.forward:
        *others, bn = shortcut._modules.values() or (None,)
        if type(bn) is nn.SyncBatchNorm and passed_over(bn) is passed_over(shortcut) is None:
            norm = norm_of(bn)
            if _trained_statistics([norm]) is None:
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
    with _without_autocast(flat[0]):
        return ops.call("excite", flat, found)


class _FusedTextbookStem(FusedStemBase):
    """A stem with the textbook's constructor."""

    def __init__(self, in_channels: int, channels: int = 64):
        check_whole("in_channels", in_channels, 0)
        check_whole("channels", channels, 0)
        super().__init__(in_channels, channels)


class FusedStem(_FusedTextbookStem, Stem):
    """`Stem` with BatchNorm, ReLU and max-pool in one pass; same children, so the same `state_dict`.

    The ReLU comes after the pool, on a quarter of the pixels: relu(pool(z)) is pool(relu(z)), gradients included.
    Where a window's maximum is positive, its place is the same; where it is not, nothing passes the ReLU. NaN stays
    NaN. Backward needs the input, the convolution's output, the output, and a byte for each of its elements.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    forward.__wrapped__ = Stem.forward

    def _parts(self) -> StemParts | str:
        children = tuple(self._modules.values())
        if len(children) != 4:
            return f"it has {len(children)} children, not 4"
        conv, bn, relu, pool = children
        return StemParts(UnitParts(conv, bn, "0", "1"), Watched("2", relu, nn.ReLU), Watched("3", pool, nn.MaxPool2d))


class FusedSmallStem(_FusedTextbookStem, SmallStem):
    """`SmallStem` with BatchNorm and ReLU in one pass after PyTorch's convolution; same children and `state_dict`.

    Backward needs the input, the convolution's output and the output.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    forward.__wrapped__ = SmallStem.forward

    def _parts(self) -> StemParts | str:
        children = tuple(self._modules.values())
        if len(children) != 3:
            return f"it has {len(children)} children, not 3"
        conv, bn, relu = children
        return StemParts(UnitParts(conv, bn, "0", "1"), Watched("2", relu, nn.ReLU), None)


class _FusedTextbook(FusedBlock):
    """A block with the textbook's constructor."""

    stem = FusedStem
    small_stem = FusedSmallStem

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int | tuple[int, int] = 1
    ):
        check_block(input_channels, num_channels, use_1x1conv, strides)
        super().__init__(input_channels, num_channels, use_1x1conv, strides)


@linkable
class FusedResidual(_FusedTextbook, Residual):
    """The residual block on fused operators: BatchNorm, the residual add and ReLU move each activation once.

    Drop-in for `Residual` (d2l.ai): same constructor, parameters, buffers and `state_dict`. Activations are
    channels_last inside; an input in another layout is converted, outputs and gradients are channels_last. Backward
    needs the input, the two convolutions' outputs, the output, and per-channel vectors.

    A submodule that was replaced, hooked, parametrised or given a forward of its own makes the block run PyTorch's
    operators instead, with one warning that names it. So do global module hooks, and strides that are not the same
    along H and W.

    Raises, in the constructor:
        ValueError: channels or strides that are no whole numbers, or negative, or strides of 0; an identity shortcut
            whose shape cannot match, that is, `num_channels` other than `input_channels` or `strides` other than 1
            without `use_1x1conv`.
    Raises, in forward, before anything has changed:
        ValueError, TypeError: rank, channels, type or device of the input, or one value per channel in training.
        RuntimeError: on double backward.
    """

    def forward(self, X: Tensor) -> Tensor:
        return self._run(X)

    forward.__wrapped__ = Residual.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_textbook(self, 2, "conv3")


def _units(block: nn.Module, count: int) -> tuple[UnitParts, ...]:
    """conv1 and bn1, conv2 and bn2, ..."""
    own = block._modules
    try:
        return tuple([UnitParts(own[conv], own[bn], conv, bn) for conv, bn in _UNITS[count]])
    except KeyError:
        return tuple(UnitParts(own.get(conv), own.get(bn), conv, bn) for conv, bn in _UNITS[count])


_UNITS = {count: [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)] for count in (2, 3)}


def _parts_of_textbook(block: nn.Module, units: int, shortcut: str) -> BlockParts | str:
    conv, plain = block._modules.get(shortcut), block.__dict__
    if shortcut in plain and plain[shortcut] is not None:
        return f"{shortcut} is a {type(plain[shortcut]).__name__} and no module"
    return BlockParts(_units(block, units), None if conv is None else UnitParts(conv, None, shortcut))


def _parts_of_published(block: nn.Module, units: int) -> BlockParts | str:
    own = block._modules
    relu, downsample = Watched("relu", own.get("relu"), nn.ReLU), own.get("downsample")
    se, plain = own.get("se"), block.__dict__
    for name in ("se", "downsample"):
        if name in plain and plain[name] is not None:
            return f"{name} is a {type(plain[name]).__name__} and no module"
    if se is not None:
        gate = gate_parts("se", se, units, downsample)
        if gate is None:
            return f"se is a {type(se).__name__}, not a SqueezeExcite"
        return BlockParts(_units(block, units), None, (relu,), None, gate)
    if downsample is None:
        return BlockParts(_units(block, units), None, (relu,))
    children = tuple(downsample._modules.values())
    others, pool, place = (relu, Watched("downsample", downsample, nn.Sequential)), None, len(children) - 2
    if place == 1 and isinstance(children[0], nn.AvgPool2d):
        pool = Watched("downsample.0", children[0], nn.AvgPool2d)
    elif place == 1:
        others += (Watched("downsample.0", children[0], nn.Identity),)
    elif place != 0:
        return f"downsample has {len(children)} children, not 2 or 3"
    shortcut = UnitParts(*children[place:], f"downsample.{place}", f"downsample.{place + 1}")
    return BlockParts(_units(block, units), shortcut, others, pool)


@linkable
class FusedResidualBottleneck(_FusedTextbook, ResidualBottleneck):
    """`ResidualBottleneck`, the textbook's block with a bottleneck, on fused operators: see `FusedResidual`."""

    def forward(self, X: Tensor) -> Tensor:
        return self._run(X)

    forward.__wrapped__ = ResidualBottleneck.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_textbook(self, 3, "conv4")


@linkable
class FusedBasicBlock(FusedBlock, BasicBlock):
    """`BasicBlock`, the published block of ResNet-18 and 34, on fused operators: see `FusedResidual`.

    Same constructor, parameters, buffers and `state_dict`. Where the shortcut has a BatchNorm, backward needs its
    convolution's output as well.

    Raises, in the constructor:
        ValueError: channels or strides that are no whole numbers, or negative, or a stride of 0.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        avg_down: bool = False,
        squeeze_excite: bool = False,
    ):
        check_whole("in_channels", in_channels, 0)
        check_whole("channels", channels, 0)
        check_strides("stride", stride)
        super().__init__(in_channels, channels, stride, avg_down=avg_down, squeeze_excite=squeeze_excite)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    forward.__wrapped__ = BasicBlock.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_published(self, 2)


@linkable
class FusedBottleneck(FusedBlock, Bottleneck):
    """`Bottleneck`, the published block of ResNet-50 and deeper, on fused operators: see `FusedBasicBlock`."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int | tuple[int, int] = 1,
        *,
        mid_width: int | None = None,
        avg_down: bool = False,
        groups: int = 1,
        dilation: int = 1,
        squeeze_excite: bool = False,
    ):
        check_whole("in_channels", in_channels, 0)
        check_whole("width", width, 0)
        check_strides("stride", stride)
        if mid_width is not None:
            check_whole("mid_width", mid_width, 0)
        check_whole("groups", groups, 1)
        check_whole("dilation", dilation, 1)
        super().__init__(
            in_channels,
            width,
            stride,
            mid_width=mid_width,
            avg_down=avg_down,
            groups=groups,
            dilation=dilation,
            squeeze_excite=squeeze_excite,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    forward.__wrapped__ = Bottleneck.forward

    def _parts(self) -> BlockParts | str:
        return _parts_of_published(self, 3)
