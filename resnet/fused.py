"""`FusedResidual` and `FusedStem`: the reference's modules on fused operators, same constructors and `state_dict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F  # noqa: F401, a name in the eager block's source, which TorchScript compiles
from torch.nn.modules.module import _has_any_global_hook

from resnet import ops
from resnet.backends import implementation
from resnet.checks import (
    check_activation,
    check_block,
    check_conv_weight,
    check_input_type,
    check_norm,
    check_values_per_channel,
    check_vector,
    check_whole,
)
from resnet.functional import channels_last
from resnet.kernels.host.facts import Recent
from resnet.norm import VECTORS, Norm, held, norm_of
from resnet.reference import Residual, Stem
from resnet.torch_backend.convolution import out_size

_warned: set[str] = set()


def _warn_once(name: str, reason: str) -> None:
    # Hooks beside a mode are those of a tool, such as a counter of FLOPs: it is to see all, and they go with it.
    if reason == _GLOBAL_HOOKS and torch._C._len_torch_dispatch_stack():
        return
    message = f"{name} runs PyTorch's operators one by one: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


# What torch.compiler.assume_constant_result sets, which imports the compiler: the graph does not break at a warning.
_warn_once._dynamo_marked_constant = True

_GLOBAL_HOOKS = "global module hooks are registered, which a fused operator would not call for the submodules"
_FORWARD = {kind: kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)}


def passed_over(module: nn.Module) -> str | None:
    """What calling a submodule would run, and a fused operator would not; in as few calls as can be."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks"
    own, kind = module.__dict__, type(module)
    if (
        "forward" in own
        or "_conv_forward" in own
        or ("_compiled_call_impl" in own and own["_compiled_call_impl"] is not None)
        or (kind in _FORWARD and kind.forward is not _FORWARD[kind])
    ):
        return "a forward of its own"
    return None


def _unfusable(name: str, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a submodule cannot be fused: it is not exactly of its kind (a subclass may do anything), or is watched."""
    if type(module) is not kind:
        got, expected = type(module).__name__, kind.__name__
        if got == expected:
            got, expected = (f"{k.__module__}.{k.__qualname__}" for k in (type(module), kind))
        return f"{name} is a {got}, not a {expected}"
    found = passed_over(module)
    return None if found is None else f"{name} has {found}, which a fused operator would not call"


def _unfusable_conv(name: str, conv: nn.Module, kernel: int, padding: int, stride: int | None) -> str | None:
    """Why a convolution cannot be fused; `stride` None accepts any that is the same along H and W."""
    reason = _unfusable(name, conv, nn.Conv2d)
    if reason is not None:
        return reason
    expected = {
        "kernel_size": (kernel, kernel),
        "padding": (padding, padding),
        "stride": (conv.stride[0] if stride is None else stride,) * 2,
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    }
    for field, value in expected.items():
        if getattr(conv, field) != value:
            return f"{name}.{field} is {getattr(conv, field)}, not {value}"
    return None


_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")


def _unfusable_pool(name: str, pool: nn.Module) -> str | None:
    reason = _unfusable(name, pool, nn.MaxPool2d)
    if reason is not None:
        return reason
    expected = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    for field in _POOL:
        if getattr(pool, field) != getattr(expected, field):
            return f"{name}.{field} is {getattr(pool, field)}, not {getattr(expected, field)}"
    return None


def _conv_state(conv: nn.Module | None) -> tuple:
    """All that fusing and checking ask of a convolution, its tensors aside."""
    if type(conv) is not nn.Conv2d:
        return (type(conv),)
    own = conv.__dict__
    return (
        own["in_channels"],
        own["out_channels"],
        _hashable(own["kernel_size"]),
        _hashable(own["stride"]),
        _hashable(own["padding"]),
        _hashable(own["dilation"]),
        own["groups"],
        own["padding_mode"],
        passed_over(conv),
    )


def _hashable(value: object) -> object:
    """A setting in a state: PyTorch's modules take a list where they mean a tuple."""
    return repr(value) if type(value) is list else value


def _state(module: nn.Module) -> tuple:
    """All that fusing asks of another module."""
    return type(module), passed_over(module)


def _weight_shapes(convs: list[nn.Conv2d], fit: Callable[[list[tuple[int, ...]]], bool]) -> list[tuple[int, ...]]:
    """The shapes that weights should have: their own where these fit together, as PyTorch asks for no more, else those
    that their convolutions were made with.
    """
    own = [tuple(conv.weight.shape) for conv in convs]
    if all(len(shape) == 4 for shape in own) and fit(own):
        return own
    return [(conv.out_channels, conv.in_channels, *conv.kernel_size) for conv in convs]


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

    def _run(self, X: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        direct = not compiling and ops.is_direct()
        if isinstance(X, Proxy) or (not direct and ops.is_transformed_or_recorded()):
            return super().forward(X)
        watched = _has_any_global_hook()
        state = None if compiling or watched else self._state()
        recent = _fusable.get(state)
        if recent is None:
            reason = _GLOBAL_HOOKS if watched else self._reason_not_to_fuse()
            if reason is not None:
                _warn_once(type(self).__name__, reason)
                return super().forward(X)
            recent = Recent()
            if state is not None:
                _remember(state, recent)
        if not isinstance(X, Tensor):
            check_activation(X, None)  # which refuses it
        pairs = self._norm_pairs()
        norms = [norm_of(bn, held(conv, "_parameters", "bias")) for bn, conv in pairs]
        dtype = _autocast_dtype(X)
        x = X if dtype is None else X.to(dtype)
        flat = self._arguments(x, norms, dtype is not None)
        known = recent.known(flat) if direct else None
        check = (recent, X.dtype, dtype)
        if known is None or check not in known.facts.passed:
            reason = self._check(X, x, norms, dtype is not None)
            if reason is not None:
                _warn_once(type(self).__name__, reason)
                return super().forward(X)
            x = channels_last(x)
            if x is not flat[0]:
                flat[0] = x
                known = known and recent.known(flat)
            elif known is not None:
                known.facts.passed.add(check)
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
                flat = self._arguments(x, norms, dtype is not None)
                known = known and recent.known(flat)
        name = self._operator if batch_statistics or _records_gradient(flat) else f"{self._operator}_inference"
        if known is not None and dtype is None and x.dtype != torch.float64:
            return ops.call(name, flat, known)
        with _without_autocast(x):
            return ops.call(name, flat, known)


def _remember(state: tuple, recent: Recent) -> None:
    if len(_fusable) >= _KEPT:
        _fusable.clear()
    _fusable[state] = recent


def _weight(conv: nn.Conv2d, x: Tensor, cast: bool) -> tuple[Tensor, Tensor | None]:
    """A convolution's weight as autocast multiplies it, and the parameter that such a copy was made of."""
    weight = held(conv, "_parameters", "weight")
    if not cast or weight.dtype == x.dtype:
        return weight, None
    return weight.detach().to(x.dtype, memory_format=torch.channels_last), weight


class FusedStem(_Fused, Stem):
    """`Stem` with BatchNorm, ReLU and max-pool in one pass; same children, so the same `state_dict`.

    The ReLU comes after the pool, on a quarter of the pixels: relu(pool(z)) is pool(relu(z)), gradients included.
    Where a window's maximum is positive, its place is the same; where it is not, nothing passes the ReLU. NaN stays
    NaN. Backward needs the input, the convolution's output, the output, and a byte for each of its elements.
    """

    _operator = "stem"

    def __init__(self, in_channels: int, channels: int = 64):
        check_whole("in_channels", in_channels, 0)
        check_whole("channels", channels, 0)
        super().__init__(in_channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    forward.__wrapped__ = Stem.forward

    def _state(self) -> tuple:
        children = tuple(self._modules.values())
        if len(children) != 4:
            return "stem", len(children)
        conv, bn, relu, pool = children
        window = [_hashable(getattr(pool, field, None)) for field in _POOL]
        return "stem", _conv_state(conv), _state(bn), _state(relu), _state(pool), *window

    def _reason_not_to_fuse(self) -> str | None:
        if len(self) != 4:
            return f"it has {len(self)} children, not 4"
        conv, bn, relu, pool = self
        return (
            _unfusable("0", conv, nn.Conv2d)
            or _unfusable_conv("0", conv, conv.kernel_size[0], conv.padding[0], None)
            or _unfusable("1", bn, nn.BatchNorm2d)
            or _unfusable("2", relu, nn.ReLU)
            or _unfusable_pool("3", pool)
        )

    def _norm_pairs(self) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
        conv, bn, _, _ = self._modules.values()
        return [(bn, conv)]

    def _check(self, X: Tensor, x: Tensor, norms: list[Norm], cast: bool) -> str | None:
        conv, (norm,) = self[0], norms
        (shape,) = _weight_shapes([conv], lambda shapes: _is_of(norm, shapes[0][0]))
        K, C, R, S = shape
        check_activation(X, C)
        if not cast:
            check_input_type(x, {"0.weight": conv.weight})
        check_conv_weight("0.weight", conv.weight, x, shape, cast)
        if R != S:
            return f"0.weight is {R}x{S}, not square"
        check_norm(norm, x, K, "1")
        size = [out_size(s, R, conv.stride[0], conv.padding[0]) for s in x.shape[2:]]
        check_values_per_channel(norm, (x.shape[0], K, *size), "1")
        return None

    def _arguments(self, x: Tensor, norms: list[Norm], cast: bool) -> list:
        conv = self[0]
        weight, master = _weight(conv, x, cast)
        return [x, weight, conv.stride[0], conv.padding[0], *norms[0], master]


class FusedResidual(_Fused, Residual):
    """The residual block on fused operators: BatchNorm, the residual add and ReLU move each activation once.

    Drop-in for `Residual` (d2l.ai): same constructor, parameters, buffers and `state_dict`. Activations are
    channels_last inside; an input in another layout is converted, outputs and gradients are channels_last. Backward
    needs the input, the two convolutions' outputs, the output, and per-channel vectors.

    A submodule that was replaced, hooked, parametrised or given a forward of its own makes the block run PyTorch's
    operators instead, with one warning that names it. So do global module hooks, convolutions of two widths, and
    strides that are not the same along H and W.

    Raises, in the constructor:
        ValueError: channels or strides that are no whole numbers, or negative, or strides of 0; an identity shortcut
            whose shape cannot match, that is, `num_channels` other than `input_channels` or `strides` other than 1
            without `use_1x1conv`.
    Raises, in forward, before anything has changed:
        ValueError, TypeError: rank, channels, type or device of the input, or one value per channel in training.
        RuntimeError: on double backward.
    """

    stem = FusedStem
    _operator = "residual_block"

    def __init__(self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1):
        check_block(input_channels, num_channels, use_1x1conv, strides)
        super().__init__(input_channels, num_channels, use_1x1conv, strides)

    def forward(self, X: Tensor) -> Tensor:
        return self._run(X)

    forward.__wrapped__ = Residual.forward

    def _reason_not_to_fuse(self) -> str | None:
        reason = (
            _unfusable_conv("conv1", self.conv1, 3, 1, None)
            or _unfusable_conv("conv2", self.conv2, 3, 1, 1)
            or _unfusable("bn1", self.bn1, nn.BatchNorm2d)
            or _unfusable("bn2", self.bn2, nn.BatchNorm2d)
        )
        if reason is None and self.conv3 is not None:
            reason = _unfusable_conv("conv3", self.conv3, 1, 0, self.conv1.stride[0])
        return reason

    def _state(self) -> tuple:
        own = self._modules
        convs = (_conv_state(own.get("conv1")), _conv_state(own.get("conv2")), _conv_state(own.get("conv3")))
        return "block", *convs, _state(own.get("bn1")), _state(own.get("bn2"))

    def _norm_pairs(self) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
        own = self._modules
        return [(own["bn1"], own["conv1"]), (own["bn2"], own["conv2"])]

    def _check(self, X: Tensor, x: Tensor, norms: list[Norm], cast: bool) -> str | None:
        convs = {"conv1": self.conv1, "conv2": self.conv2}
        if self.conv3 is not None:
            convs["conv3"] = self.conv3

        def fit(shapes: list[tuple[int, ...]]) -> bool:
            (M, C, *_), (K, inner, *_), *shortcut = shapes
            widths = _is_of(norms[0], M) and _is_of(norms[1], K) and inner == M
            return widths and all(shape[:2] == (K, C) for shape in shortcut)

        shapes = _weight_shapes(list(convs.values()), fit)
        (M, C, *_), (K, *_) = shapes[:2]
        check_activation(X, C)
        weights = {f"{name}.weight": conv.weight for name, conv in convs.items()}
        if not cast:
            check_input_type(x, weights)
        for (name, weight), width, shape in zip(weights.items(), ((M, C), (K, M), (K, C)), shapes):
            check_conv_weight(name, weight, x, (*width, *shape[2:]), cast)
        if self.conv3 is not None and self.conv3.bias is not None:
            check_vector("conv3.bias", self.conv3.bias, x, K)
        for name, norm, width in zip(("bn1", "bn2"), norms, (M, K), strict=True):
            check_norm(norm, x, width, name)
        for name, shape, size in zip(weights, shapes, (3, 3, 1)):
            if shape[2:] != (size, size):
                return f"{name} is {shape[2]}x{shape[3]}, not {size}x{size}"
        stride = self.conv1.stride[0]
        if M != K:
            return f"conv1 has {M} output channels, and conv2 has {K}"
        if self.conv3 is None and (C != K or stride != 1):
            return f"its shortcut is the identity, and its convolutions give {C} -> {K} channels with stride {stride}"
        shape = (x.shape[0], K, *(out_size(s, 3, stride, 1) for s in x.shape[2:]))
        for name, norm in zip(("bn1", "bn2"), norms, strict=True):
            check_values_per_channel(norm, shape, name)
        return None

    def _arguments(self, x: Tensor, norms: list[Norm], cast: bool) -> list:
        own = self._modules
        conv1, conv3 = own["conv1"], own.get("conv3")
        weight1, master1 = _weight(conv1, x, cast)
        weight2, master2 = _weight(own["conv2"], x, cast)
        weight3 = master3 = bias3 = None
        if conv3 is not None:
            (weight3, master3), bias3 = _weight(conv3, x, cast), held(conv3, "_parameters", "bias")
        convs = weight1, weight2, weight3, bias3, conv1.stride[0], master1, master2, master3
        return [x, *convs, *norms[0], *norms[1]]
