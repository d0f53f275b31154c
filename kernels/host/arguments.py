"""Checks of arguments, which name what was wrong and what was expected, and options of every launch."""

from __future__ import annotations

from typing import NoReturn

import torch
import triton.language as tl
from torch import Tensor

# Arguments that count pixels, tiles or steps. With another batch or image size one may become 1 or a multiple of 16. No
# kernel is compiled anew for that: a mask takes or leaves whole rows, and vectors lie along the channels.
SIZES = ("N", "H", "W", "P", "Q", "OP", "OQ", "M", "T", "G", "ROWS", "TILES", "STEPS")

# The kernels say tl.fma where they want one; the compiler makes none of a product and a sum.
FLAGS = {"enable_fp_fusion": False}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The type of sums and of per-channel vectors for activations like x: float32, or float64 for float64."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def product_precision(x: Tensor, tf32: bool) -> str:
    """`tl.dot`'s input_precision for operands of x's type: "tf32" concerns float32 alone."""
    return "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


# ---- checks ------------------------------------------------------------------------------------------------------


def nhwc_shape(x: Tensor) -> tuple[int, int]:
    """(M, C) of a dense NHWC activation; ValueError for another layout, TypeError for a type that no kernel takes."""
    check_nhwc("x", x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    return x.numel() // x.shape[1], x.shape[1]


def check_nhwc(
    name: str,
    t: Tensor,
    like: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse t unless it is dense channels_last, of `shape`, and of the type and device of `like`.

    `dtype` replaces the type of `like`. TypeError for another type, ValueError for anything else.
    """
    if dtype is None and like is not None:
        dtype = like.dtype
    device = None if like is None else like.device
    fits = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and (shape is None or t.shape == shape)
    if not fits or dtype not in (None, t.dtype) or device not in (None, t.device):
        _refuse(name, t, "a dense channels_last tensor (N, C, H, W)", shape, dtype, device)


def check_vectors(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuse t unless it is contiguous, of `shape` and `dtype`, by default that of the statistics of `like`, and on the
    device of `like`.
    """
    dtype = dtype or accumulator(like)[0]
    if t.shape != shape or not t.is_contiguous() or t.dtype != dtype or t.device != like.device:
        _refuse(name, t, "a contiguous tensor", shape, dtype, like.device)


def check_vector(name: str, t: Tensor | None, length: int, like: Tensor) -> None:
    """Refuse t unless it is None or (length,), contiguous, of a floating type, on the device of `like`."""
    if t is None:
        return
    if t.shape != (length,) or not t.is_contiguous() or t.device != like.device:
        _refuse(name, t, "a contiguous tensor", (length,), None, like.device)
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating type, got {t.dtype}")


def _refuse(
    name: str,
    t: Tensor,
    layout: str,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> NoReturn:
    expected = [layout]
    if shape is not None:
        expected.append(f"shape {tuple(shape)}")
    kind = " on ".join(str(part) for part in (dtype, device) if part is not None)
    raise (ValueError if dtype in (None, t.dtype) else TypeError)(
        f"{name}: expected {', '.join(expected + [kind] * bool(kind))}; "
        f"got shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype} on {t.device}"
    )


def check_images(y: Tensor) -> None:
    """ValueError or TypeError unless y is a dense NHWC activation whose images have fewer than 2^31 elements each."""
    nhwc_shape(y)
    check_span(y.shape[1:].numel(), 1, 1, 1)


def check_span(image: int, pixels: int, images: int, rows: int) -> None:
    """ValueError where `rows` rows of a tile, `pixels` of them to an image, lie more than 2^31 elements apart.

    Offsets within a tile are 32 bits wide, from a 64-bit base at the tile's first image.
    """
    span = image * min(images, rows // max(pixels, 1) + 2)
    if span >= 2**31:
        raise ValueError(f"expected images whose tiles span less than 2^31 elements, got {image} elements an image")
