"""Shapes of a convolution and its implicit GEMMs, checked once for the kernels that run them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvShape:
    """y (N, P, Q, K) = conv(x (N, H, W, C), weight (K, R, S, C)), the same stride and padding along H and W."""

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: int
    padding: int

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding - self.R) // self.stride + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding - self.S) // self.stride + 1

    @property
    def M(self) -> int:
        """Output pixels: rows of the forward's implicit GEMM."""
        return self.N * self.P * self.Q

    def constants(self) -> dict[str, int]:
        """What every convolution kernel is specialised for."""
        return {"C": self.C, "K": self.K, "R": self.R, "S": self.S, "STRIDE": self.stride, "PADDING": self.padding}


def conv_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> ConvShape:
    """Of x (N, C, H, W) and weight (K, C, R, S), both dense channels_last; ValueError or TypeError otherwise."""
    check_nhwc("x", x)
    check_nhwc("weight", weight, x)
    (N, C, H, W), (K, _, R, S) = x.shape, weight.shape
    if weight.shape[1] != C:
        raise ValueError(f"weight: expected {C} input channels as x has, got shape {tuple(weight.shape)}")
    shape = ConvShape(N, H, W, C, K, R, S, stride, padding)
    if shape.P < 1 or shape.Q < 1:
        raise ValueError(f"x: {H}x{W} pixels are fewer than a {R}x{S} kernel with padding {padding} needs")
    return shape


def is_nhwc(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def check_nhwc(name: str, t: Tensor, like: Tensor | None = None) -> None:
    """ValueError unless t is a dense channels_last tensor, TypeError unless of the type of `like`."""
    if not is_nhwc(t):
        raise ValueError(
            f"{name}: expected a dense channels_last tensor, got shape {tuple(t.shape)}, strides {t.stride()}"
        )
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise TypeError(f"{name}: expected {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
