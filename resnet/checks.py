"""Checks of what users pass in. Each raises before anything has been changed, and names what was wrong and expected."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resnet.norm import VECTORS, Norm, statistics_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- a constructor's arguments -----------------------------------------------------------------------------------


def check_whole(name: str, value: object, least: int) -> None:
    """ValueError unless the value is a whole number of at least `least`."""
    if not _is_whole(value, least):
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _is_whole(value: object, least: int) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def check_stages(name: str, numbers: Sequence[int], stages: int | None = None) -> None:
    """ValueError unless the numbers are a list of whole ones of at least 1, as many as `stages` says."""
    if not isinstance(numbers, (tuple, list)) or not numbers:
        raise ValueError(f"{name}: expected a list of whole numbers, got {numbers!r}")
    if stages is not None and len(numbers) != stages:
        raise ValueError(f"{name}: expected {stages} numbers, got {len(numbers)}: {numbers!r}")
    for i, number in enumerate(numbers):
        check_whole(f"{name}[{i}]", number, 1)


def check_strides(name: str, strides: int | tuple[int, ...]) -> tuple[int, ...]:
    """The strides as one number or two; ValueError unless they are whole ones of at least 1, as a convolution's."""
    steps = strides if isinstance(strides, (tuple, list)) else (strides,)
    if len(steps) not in (1, 2) or not all(_is_whole(step, 1) for step in steps):
        raise ValueError(f"{name}: expected a whole number of at least 1, or a pair of them, got {strides!r}")
    return tuple(steps)


def check_block(input_channels: int, num_channels: int, use_1x1conv: bool, strides: int | tuple[int, ...]) -> None:
    """ValueError for numbers that no channels or strides can be, and for an identity shortcut where the block's output
    has another shape than its input. Strides may be a pair, as a convolution's.
    """
    check_whole("input_channels", input_channels, 0)
    check_whole("num_channels", num_channels, 0)
    steps = check_strides("strides", strides)
    if not use_1x1conv and (input_channels != num_channels or any(step != 1 for step in steps)):
        raise ValueError(
            "an identity shortcut needs num_channels == input_channels and strides == 1, got "
            f"{input_channels} -> {num_channels} channels, strides {strides}; pass use_1x1conv=True"
        )


# ---- tensors -----------------------------------------------------------------------------------------------------


def check_activation(x: Tensor, channels: int | None, name: str = "input") -> None:
    """ValueError unless x is (N, channels, H, W) with H, W >= 1; TypeError for a type that no kernel takes.

    None accepts any number of channels.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name}: expected 4 axes (N, C, H, W), got {x.dim()}: shape {tuple(shape)}")
    _, C, H, W = shape
    if channels is not None and channels != C:
        raise ValueError(f"{name}: expected {channels} channels, got {C}: shape {tuple(shape)}")
    if H < 1 or W < 1:
        raise ValueError(f"{name}: expected height and width of at least 1, got shape {tuple(shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def check_input_type(x: Tensor, weights: Mapping[str, Tensor]) -> None:
    """TypeError where x has another type than the weights, if these agree: else one of them is the odd one."""
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) == 1 and x.dtype not in dtypes:
        expected, got = (str(dtype).removeprefix("torch.") for dtype in (*dtypes, x.dtype))
        raise TypeError(f"input: expected {expected} as {next(iter(weights))}, got {got}")


def check_shortcut(shortcut: Tensor, x: Tensor, cast: bool = False) -> None:
    """ValueError or TypeError unless the shortcut has x's shape, device and, if it is not `cast`, type."""
    if shortcut.shape != x.shape:
        raise ValueError(f"shortcut: expected the input's shape {tuple(x.shape)}, got {tuple(shortcut.shape)}")
    if not cast:
        _check_dtype("shortcut", shortcut, x)
    _check_device("shortcut", shortcut, x)


def _check_dtype(name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected the input's type {x.dtype}, got {t.dtype}")


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected the input's device {x.device}, got {t.device}")


def check_conv_weight(name: str, t: Tensor, x: Tensor, shape: tuple[int, ...], cast: bool) -> None:
    """ValueError or TypeError unless a convolution's weight has the shape, x's type (any that is `cast`) and device."""
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if not cast:
        _check_dtype(name, t, x)
    _check_device(name, t, x)


def check_vector(name: str, t: Tensor, x: Tensor, channels: int) -> None:
    """ValueError or TypeError unless t is (channels,), on x's device, of x's type or that of the statistics."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.shape != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), got {tuple(t.shape)}")
    if t.dtype != x.dtype and t.dtype != statistics_dtype(x.dtype):
        accepted = dict.fromkeys((x.dtype, statistics_dtype(x.dtype)))
        raise TypeError(f"{name}: expected {' or '.join(map(str, accepted))}, got {t.dtype}")
    _check_device(name, t, x)


def check_norm(norm: Norm, x: Tensor, channels: int, name: str) -> None:
    """ValueError or TypeError unless the norm is complete for its mode and each vector passes `check_vector`.

    A count is () int64 on x's device.
    """
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name}: expected running_mean and running_var both or neither")
    if not norm.training and norm.running_mean is None:
        raise ValueError(f"{name}: expected running_mean and running_var, since training is False, got None")
    for field, t in zip(VECTORS, norm):
        if t is not None:
            check_vector(f"{name}.{field}", t, x, channels)
    for field, t in (("running_mean", norm.running_mean), ("running_var", norm.running_var)):
        if norm.training and t is not None and channels > 1 and t.stride(0) == 0:
            raise ValueError(f"{name}.{field}: expected {channels} values in memory to update, got one value expanded")
    for field, number in (("momentum", norm.momentum), ("eps", norm.eps)):
        if isinstance(number, Tensor) or (not isinstance(number, (int, float)) and not hasattr(number, "__float__")):
            raise TypeError(f"{name}.{field}: expected a number, got {type(number).__name__}")
    if norm.eps < 0 or (norm.training and norm.eps == 0):
        least = "above 0 in training" if norm.training else "of at least 0"
        raise ValueError(f"{name}.eps: expected a number {least}, got {norm.eps}")
    if norm.num_batches_tracked is not None:
        _check_count(f"{name}.num_batches_tracked", norm.num_batches_tracked, x)


def _check_count(name: str, t: Tensor, x: Tensor) -> None:
    if t.dim() != 0:
        raise ValueError(f"{name}: expected shape (), got {tuple(t.shape)}")
    if t.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {t.dtype}")
    _check_device(name, t, x)


def check_values_per_channel(norm: Norm, shape: tuple[int, int, int, int], name: str) -> None:
    """ValueError for a single value per channel under batch statistics, as `torch.nn.BatchNorm2d`: no variance.

    Other processes of the norm's group may have more of them.
    """
    N, _, H, W = shape
    if norm.training and not norm.group and N * H * W == 1:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, got input size {shape}")
