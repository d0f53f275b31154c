"""Shapes of a convolution and its implicit GEMMs, checked once for the kernels that run them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .arguments import check_nhwc, nhwc_shape


@dataclass(frozen=True)
class ConvShape:
    """y (N, P, Q, K) = conv(x (N, H, W, C), weight (K, R, S, C)); stride, padding, dilation are those of both axes."""

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: int
    padding: int
    dilation: int = 1

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding - self.dilation * (self.R - 1) - 1) // self.stride + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding - self.dilation * (self.S - 1) - 1) // self.stride + 1

    @property
    def M(self) -> int:
        """Output pixels: rows of the forward's implicit GEMM."""
        return self.N * self.P * self.Q

    @property
    def few_channels(self) -> bool:
        """Whether C is below a tensor core's smallest tile. Then kernels may take (r, s, c) as one axis."""
        return self.C < 16

    def constants(self) -> dict[str, int]:
        """The constants for which every convolution kernel is compiled."""
        return {"C": self.C, "K": self.K, "R": self.R, "S": self.S, "STRIDE": self.stride, "PADDING": self.padding}


_MAX_REACH = 2**30  # elements, half of what 32-bit offsets reach


def taps_fit(width: int, channels: int, R: int, S: int, dilation: int) -> bool:
    """Whether 32-bit offsets reach from tap to tap of a window, in a map of so many columns and channels."""
    return dilation == 1 or dilation * (R * width + S) * channels <= _MAX_REACH


_MAX_IMAGE = 2**29  # elements: a tile may lie in a few images, and 32-bit offsets reach 2^31
MAX_WINDOW = 63  # pixels: a row's bit mask has one for each
MAX_TAPS = 15  # along an axis, for each step of the stride: grad-input's mask of missed taps has one bit for each


def kernels_take(pixels: int, channels: int, K: int, R: int, S: int) -> bool:
    """Whether the convolution kernels take images of so many pixels, C and K channels, and such a window.

    Of few channels the forward takes any window without a prologue, and grad-input one of `MAX_TAPS`.
    """
    return pixels * max(channels, K) <= _MAX_IMAGE and (channels < 16 or R * S <= MAX_WINDOW)


def check_taps(shape: ConvShape) -> None:
    """ValueError unless `taps_fit` in both maps."""
    if not taps_fit(max(shape.W, shape.Q), max(shape.C, shape.K), shape.R, shape.S, shape.dilation):
        raise ValueError(f"dilation: {shape.dilation} is too large for 32-bit offsets between a window's taps: {shape}")


def conv_shape(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int = 1) -> ConvShape:
    """The shape of the convolution of x (N, C, H, W) with weight (K, C, R, S), both dense channels_last.

    Raises:
        ValueError: another layout, channels that do not match, a bad stride, padding or dilation, no output pixel, taps
            too far apart.
        TypeError: another type.
    """
    nhwc_shape(x)
    check_nhwc("weight", weight, x)
    (N, C, H, W), (K, _, R, S) = x.shape, weight.shape
    if weight.shape[1] != C:
        raise ValueError(f"weight: expected {C} input channels as x has, got shape {tuple(weight.shape)}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    shape = ConvShape(N, H, W, C, K, R, S, stride, padding, dilation)
    if shape.P < 1 or shape.Q < 1:
        dilated = f", dilation {dilation}" * (dilation > 1)
        raise ValueError(f"x: {H}x{W} pixels are fewer than a {R}x{S} kernel with padding {padding}{dilated} needs")
    check_taps(shape)
    return shape
