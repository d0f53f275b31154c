"""Shapes of a convolution and its implicit GEMMs, checked once for the kernels that run them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Arguments that count pixels, tiles or steps. Another batch or image size may make one 1 or a multiple of 16;
# no kernel is compiled anew for that: masks are of whole rows, and vectors lie along the channels.
SIZES = ("N", "H", "W", "P", "Q", "OP", "OQ", "M", "T", "G", "ROWS", "TILES", "STEPS")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    @property
    def few_channels(self) -> bool:
        """Fewer than the smallest tile of a tensor core: the reduction or the columns are (r, s, c) as one axis."""
        return self.C < 16

    def constants(self) -> dict[str, int]:
        """What every convolution kernel is specialised for."""
        return {"C": self.C, "K": self.K, "R": self.R, "S": self.S, "STRIDE": self.stride, "PADDING": self.padding}


def conv_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> ConvShape:
    """Of x (N, C, H, W) and weight (K, C, R, S), both dense channels_last; ValueError or TypeError otherwise."""
    check_nhwc("x", x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    check_nhwc("weight", weight, x)
    (N, C, H, W), (K, _, R, S) = x.shape, weight.shape
    if weight.shape[1] != C:
        raise ValueError(f"weight: expected {C} input channels as x has, got shape {tuple(weight.shape)}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    shape = ConvShape(N, H, W, C, K, R, S, stride, padding)
    if shape.P < 1 or shape.Q < 1:
        raise ValueError(f"x: {H}x{W} pixels are fewer than a {R}x{S} kernel with padding {padding} needs")
    return shape


def product_precision(x: Tensor, tf32: bool) -> str:
    """`tl.dot`'s input_precision for operands of x's type: "tf32" concerns float32 alone."""
    return "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


def check_nhwc(name: str, t: Tensor, like: Tensor | None = None, shape: tuple[int, ...] | None = None) -> None:
    """ValueError unless t is dense channels_last (of `shape`), TypeError unless of the type and device of `like`."""
    if t.dim() != 4 or not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name}: expected a dense channels_last tensor (N, C, H, W), got shape {tuple(t.shape)}, "
            f"strides {t.stride()}"
        )
    if shape is not None and t.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise TypeError(f"{name}: expected {like.dtype} on {like.device}, got {t.dtype} on {t.device}")


def check_like(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """ValueError or TypeError unless t is contiguous and has this shape, type and device."""
    if t.shape != shape or not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor of shape {shape}, got {tuple(t.shape)}, {t.stride()}")
    if t.dtype != dtype or t.device != device:
        raise TypeError(f"{name}: expected {dtype} on {device}, got {t.dtype} on {t.device}")


def check_vector(name: str, t: Tensor | None, length: int, like: Tensor) -> None:
    """ValueError or TypeError unless t is None or (length,), contiguous, floating, on the device of `like`."""
    if t is None:
        return
    if t.shape != (length,) or not t.is_contiguous() or t.device != like.device:
        raise ValueError(
            f"{name}: expected a contiguous ({length},) on {like.device}, got {tuple(t.shape)} on {t.device}"
        )
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating type, got {t.dtype}")


def check_span(image: int, pixels: int, images: int, rows: int) -> None:
    """ValueError where `rows` rows of a tile, `pixels` of them to an image, lie more than 2^31 elements apart.

    Offsets within a tile are 32 bits wide, from a 64-bit base at the tile's first image.
    """
    span = image * min(images, rows // max(pixels, 1) + 2)
    if span >= 2**31:
        raise ValueError(f"expected images whose tiles span less than 2^31 elements, got {image} elements an image")
