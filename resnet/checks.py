"""Checks of what users pass in. Each raises before anything has been changed, and names what was wrong and expected."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.norm import VECTORS, Norm, statistics_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def check_shortcut(shortcut: Tensor, x: Tensor) -> None:
    """ValueError or TypeError unless the shortcut has x's shape, type and device."""
    if shortcut.shape != x.shape:
        raise ValueError(f"shortcut: expected the input's shape {tuple(x.shape)}, got {tuple(shortcut.shape)}")
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
    if t.shape != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), got {tuple(t.shape)}")
    if t.dtype != x.dtype and t.dtype != statistics_dtype(x.dtype):
        accepted = dict.fromkeys((x.dtype, statistics_dtype(x.dtype)))
        raise TypeError(f"{name}: expected {' or '.join(map(str, accepted))}, got {t.dtype}")
    _check_device(name, t, x)


def check_norm(norm: Norm, x: Tensor, channels: int, name: str = "batch_norm") -> None:
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


def check_values_per_channel(norm: Norm, shape: tuple[int, int, int, int], name: str = "batch_norm") -> None:
    """ValueError for a single value per channel under batch statistics, as `torch.nn.BatchNorm2d`: no variance."""
    N, _, H, W = shape
    if norm.training and N * H * W == 1:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, got input size {shape}")
