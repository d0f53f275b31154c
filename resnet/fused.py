"""`FusedResidual` and `FusedStem`: the reference's modules on fused operators, same constructors and `state_dict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from resnet import operands
from resnet.backends import ensure_available
from resnet.checks import check_activation, check_conv_weight, check_norm, check_values_per_channel, check_vector
from resnet.functional import channels_last
from resnet.norm import Norm
from resnet.operands import Convolutions
from resnet.reference import Residual, Stem
from resnet.schema import pack

_ops = torch.ops.fused_residual
_warned: set[str] = set()


def _warn_once(module: nn.Module, reason: str) -> None:
    message = f"{type(module).__name__} runs PyTorch's operators one by one: {reason}"
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _unfusable(name: str, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a submodule cannot be fused: it is not exactly of its kind (a subclass may do anything), or has hooks."""
    if type(module) is not kind:
        return f"{name} is a {type(module).__name__}, not a {kind.__name__}"
    if _has_hooks(module):
        return f"{name} has hooks, which a fused operator would not call"
    return None


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


def _unfusable_pool(name: str, pool: nn.Module) -> str | None:
    reason = _unfusable(name, pool, nn.MaxPool2d)
    if reason is not None:
        return reason
    expected = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    for field in ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"):
        if getattr(pool, field) != getattr(expected, field):
            return f"{name}.{field} is {getattr(pool, field)}, not {getattr(expected, field)}"
    return None


def _norm(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> Norm:
    """The settings with which `nn.BatchNorm2d.forward` would call `F.batch_norm` now; changes nothing."""
    tracked = not bn.training or bn.track_running_stats
    return Norm(
        weight=bn.weight,
        bias=bn.bias,
        running_mean=bn.running_mean if tracked else None,
        running_var=bn.running_var if tracked else None,
        conv_bias=conv.bias,
        training=bn.training or bn.running_mean is None,
        momentum=0.0 if bn.momentum is None else bn.momentum,
        eps=bn.eps,
    )


def _count_batch(bn: nn.BatchNorm2d, norm: Norm) -> Norm:
    """Count the batch as `nn.BatchNorm2d` does; a momentum of None becomes the cumulative average's."""
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            return norm._replace(momentum=1.0 / float(bn.num_batches_tracked))
    return norm


def _weight_shape(conv: nn.Conv2d) -> tuple[int, ...]:
    return (conv.out_channels, conv.in_channels, *conv.kernel_size)


def to_channels_last(module: nn.Module) -> None:
    """Hold the convolutions' weights as K, R, S, C, so that no call has to convert them."""
    module.to(memory_format=torch.channels_last)


def check_identity_shortcut(input_channels: int, num_channels: int, use_1x1conv: bool, strides: int) -> None:
    """ValueError for a shortcut that is the identity where the block's output has another shape than its input."""
    if not use_1x1conv and (input_channels != num_channels or strides != 1):
        raise ValueError(
            "an identity shortcut needs num_channels == input_channels and strides == 1, got "
            f"{input_channels} -> {num_channels} channels, strides {strides}; pass use_1x1conv=True"
        )


# Asked once: torch.compile of PyTorch 2.11 cannot trace the question.
_AUTOCAST_KINDS = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast would run eager's convolutions on x; None where it would not cast."""
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


def _call(recorded: Callable, inference: Callable, arguments: tuple, batch_statistics: bool) -> Tensor:
    """The operator for inference where the statistics are frozen and no gradient is recorded, else the other."""
    flat = pack(arguments)
    with _without_autocast(arguments.x):
        if batch_statistics or _records_gradient(flat):
            return recorded(*flat)[0]
        return inference(*flat)


class FusedStem(Stem):
    """`Stem` with BatchNorm, ReLU and max-pool in one pass; same children, so the same `state_dict`.

    The ReLU comes after the pool, on a quarter of the pixels: relu(pool(z)) is pool(relu(z)), gradients included.
    Where a window's maximum is positive, its place is the same; where it is not, nothing passes the ReLU. NaN stays
    NaN. Backward needs the input, the convolution's output, the output, and a byte for each of its elements.
    """

    def __init__(self, in_channels: int, channels: int = 64):
        super().__init__(in_channels, channels)
        to_channels_last(self)

    def forward(self, X: Tensor) -> Tensor:
        conv, bn, relu, pool = self
        reason = (
            _unfusable("0", conv, nn.Conv2d)
            or _unfusable_conv("0", conv, conv.kernel_size[0], conv.padding[0], None)
            or _unfusable("1", bn, nn.BatchNorm2d)
            or _unfusable("2", relu, nn.ReLU)
            or _unfusable_pool("3", pool)
        )
        if reason is not None:
            _warn_once(self, reason)
            return super().forward(X)
        check_activation(X, conv.in_channels)
        dtype = _autocast_dtype(X)
        x = channels_last(X if dtype is None else X.to(dtype))
        norm = _norm(bn, conv)
        size = [(s + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1 for s in x.shape[2:]]
        check_conv_weight("0.weight", conv.weight, x, _weight_shape(conv), cast=dtype is not None)
        check_norm(norm, x, conv.out_channels, "1")
        check_values_per_channel(norm, (x.shape[0], conv.out_channels, *size), "1")
        ensure_available(x)
        norm = _count_batch(bn, norm)
        arguments = operands.Stem(x, conv.weight.to(x.dtype), conv.stride[0], conv.padding[0], norm)
        return _call(_ops.stem, _ops.stem_inference, arguments, norm.training)


class FusedResidual(Residual):
    """The residual block on fused operators: BatchNorm, the residual add and ReLU move each activation once.

    Drop-in for `Residual` (d2l.ai): same constructor, parameters, buffers and `state_dict`. Activations are
    channels_last inside; an input in another layout is converted, outputs and gradients are channels_last. Backward
    needs the input, the two convolutions' outputs, the output, and per-channel vectors.

    A submodule that was replaced, hooked or parametrised makes the block run PyTorch's operators instead, with one
    warning that names it.

    Raises, in the constructor:
        ValueError: an identity shortcut whose shape cannot match, that is, `num_channels` other than
            `input_channels` or `strides` other than 1 without `use_1x1conv`.
    Raises, in forward, before anything has changed:
        ValueError, TypeError: rank, channels, type or device of the input, or one value per channel in training.
        RuntimeError: on double backward.
    """

    stem = FusedStem

    def __init__(self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1):
        check_identity_shortcut(input_channels, num_channels, use_1x1conv, strides)
        super().__init__(input_channels, num_channels, use_1x1conv, strides)
        to_channels_last(self)

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

    def _check(self, x: Tensor, norms: tuple[Norm, Norm], cast: bool) -> None:
        check_activation(x, self.conv1.in_channels)
        stride = self.conv1.stride[0]
        shape = (x.shape[0], self.conv1.out_channels, *((s - 1) // stride + 1 for s in x.shape[2:]))
        for name, conv in (("conv1", self.conv1), ("conv2", self.conv2), ("conv3", self.conv3)):
            if conv is not None:
                check_conv_weight(f"{name}.weight", conv.weight, x, _weight_shape(conv), cast)
        if self.conv3 is not None and self.conv3.bias is not None:
            check_vector("conv3.bias", self.conv3.bias, x, shape[1])
        for name, norm in zip(("bn1", "bn2"), norms, strict=True):
            check_norm(norm, x, shape[1], name)
            check_values_per_channel(norm, shape, name)

    def forward(self, X: Tensor) -> Tensor:
        reason = self._reason_not_to_fuse()
        if reason is not None:
            _warn_once(self, reason)
            return super().forward(X)
        norm1, norm2 = _norm(self.bn1, self.conv1), _norm(self.bn2, self.conv2)
        check_activation(X, self.conv1.in_channels)
        dtype = _autocast_dtype(X)
        x = channels_last(X if dtype is None else X.to(dtype))
        self._check(x, (norm1, norm2), cast=dtype is not None)
        ensure_available(x)
        norm1, norm2 = _count_batch(self.bn1, norm1), _count_batch(self.bn2, norm2)
        convs = Convolutions(
            self.conv1.weight.to(x.dtype),
            self.conv2.weight.to(x.dtype),
            None if self.conv3 is None else self.conv3.weight.to(x.dtype),
            None if self.conv3 is None else self.conv3.bias,
            self.conv1.stride[0],
        )
        arguments = operands.Block(x, convs, norm1, norm2)
        return _call(_ops.residual_block, _ops.residual_block_inference, arguments, norm1.training or norm2.training)
