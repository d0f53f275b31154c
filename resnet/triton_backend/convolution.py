"""A block's convolutions on the Triton backend: each has up to three ways to the same result.

"triton": what precedes and what follows the convolution is fused to it. "epilogue": what follows alone. "pytorch":
PyTorch's convolution, with BatchNorm's kernels before and after it. `resnet.convolution` says which; with "auto" the
whole ways are timed, and the fastest is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from resnet import settings
from resnet.kernels.add_masked_grad import add_masked_grad
from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.batch_norm_statistics import batch_norm_statistics
from resnet.kernels.conv_forward import ConvOutput, Frozen, Shortcut, conv_forward
from resnet.kernels.conv_grad_input import IdentityGrad, ReluMask, ShortcutGrad, conv_grad_input
from resnet.kernels.conv_grad_weight import conv_grad_weight
from resnet.kernels.host.shapes import conv_shape
from resnet.kernels.tuning import bucket, memory
from resnet.norm import Norm
from resnet.torch_backend.convolution import convolve, convolve_backward
from resnet.triton_backend.batch_norm import dense, frozen_stats

T = TypeVar("T")


def tf32(x: Tensor) -> bool:
    """Whether PyTorch's convolution would multiply x as TensorFloat-32, which concerns float32 alone."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"


def pick(direction: str, key: tuple, variants: Mapping[str, Callable[[], T]], device: torch.device) -> Callable[[], T]:
    """The one of a convolution's variants that `convolution` asks for, not yet called.

    Args:
        direction: "forward", "grad_input" or "grad_weight", whose times are compared.
        key: everything else that the times depend on (shape, type, what is fused), the device aside.
        variants: by name, whole paths to the same result, in the order "triton", "epilogue", "pytorch", the first two
            only where they exist. With "auto" they are timed, so a call must change nothing that another one reads:
            running statistics are updated outside.
    """
    chosen = settings.current_convolution()
    if chosen != "auto":
        asked = settings.VARIANTS.index(chosen)
        return next(variants[name] for name in settings.VARIANTS[asked:] if name in variants)
    if len(variants) == 1 or device.type == "cpu":
        return next(iter(variants.values()))
    return variants[memory.choose((direction, *key), variants, device)]


def run_picked(direction: str, x: Tensor, weight: Tensor, fused: tuple, **variants: Callable[[], object]) -> object:
    """The result of the variant that `pick` chooses. `fused` says what else the variants do."""
    N, *image = x.shape
    key = (bucket(N), *image, tuple(weight.shape), x.dtype, tf32(x), *fused)
    return pick(direction, key, variants, x.device)()


def in_nhwc(weight: Tensor | None) -> Tensor | None:
    """The weight as the kernels read it, K, R, S, C in memory: a copy where it lies otherwise."""
    return None if weight is None else weight.contiguous(memory_format=torch.channels_last)


# ---- the ways ----------------------------------------------------------------------------------------------------


def _activated(x: Tensor, stats: Tensor | None) -> Tensor:
    """A convolution's input by a pass of its own: relu(x * scale + shift), or x where there are no stats."""
    return x if stats is None else batch_norm_add_relu(x, stats)


def forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    moments: bool,
    stats: Tensor | None = None,
    conv3: Tensor | None = None,
) -> ConvOutput:
    """y = conv(a, weight), and y's moments where wanted; a is x, or relu(x * scale + shift) with `stats`."""

    def fused(x: Tensor, stats: Tensor | None) -> ConvOutput:
        shortcut = None if conv3 is None else Shortcut(conv3, None)
        return conv_forward(x, weight, stride, padding, stats=stats, moments=moments, shortcut=shortcut, tf32=tf32(x))

    def pytorch() -> ConvOutput:
        y = convolve(_activated(x, stats), weight, None, stride, padding)
        z = None if conv3 is None else convolve(x, conv3, None, stride, 0)
        return ConvOutput(y, batch_norm_statistics(y) if moments else None, z, None)

    variants = {
        "epilogue": lambda: fused(_activated(x, stats), None),
        "pytorch": pytorch,
    }
    if stats is not None:
        variants = {"triton": lambda: fused(x, stats), **variants}
    return run_picked("forward", x, weight, (stride, moments, stats is not None, conv3 is not None), **variants)


def grad_input_mask(
    dy: Tensor, weight: Tensor, y1: Tensor, stats: Tensor, vectors: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """(g, sums) for a 3x3 convolution of a = relu(y1 * scale + shift): g is a's gradient where the ReLU passes it.

    `vectors`, as `empty_grads` gives them, are written.
    """

    def fused() -> tuple[Tensor, Tensor]:
        return conv_grad_input(dy, weight, conv_shape(y1, weight, 1, 1), ReluMask(y1, stats), tf32(dy), *vectors)

    def pytorch() -> tuple[Tensor, Tensor]:
        da, _ = convolve_backward(dy, y1, weight, 1, 1, True, False)
        return da, batch_norm_backward_reduce(da, y1, None, stats, True, *vectors)

    return run_picked("grad_input", dy, weight, ("mask",), epilogue=fused, pytorch=pytorch)


def grad_input_add(
    dy: Tensor, weight: Tensor, x: Tensor, stride: int, dout: Tensor, out: Tensor, conv3: Tensor | None
) -> Tensor:
    """dx of a block: conv1's grad-input from dy plus the shortcut's gradient from dout * (out > 0)."""

    def fused() -> Tensor:
        epilogue = IdentityGrad(dout, out) if conv3 is None else ShortcutGrad(dout, out, conv3)
        return conv_grad_input(dy, weight, conv_shape(x, weight, stride, 1), epilogue, tf32(dy))

    def pytorch() -> Tensor:
        dx, _ = convolve_backward(dy, x, weight, stride, 1, True, False)
        if conv3 is None:
            return add_masked_grad(dx, dout, out)
        g = torch.ops.aten.threshold_backward(dout, out, 0)
        return dx.add_(convolve_backward(g, x, conv3, stride, 0, True, False)[0])

    return run_picked("grad_input", dy, weight, (stride, conv3 is not None), epilogue=fused, pytorch=pytorch)


def grad_weight(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    stats: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dW of conv(a), a as in `forward`, of `dtype`: x's by default.

    With `out`, dy counts only where the ReLU that made out passes it.
    """
    dtype = dtype or x.dtype

    def fused(x: Tensor, stats: Tensor | None) -> Tensor:
        return conv_grad_weight(dy, x, weight.shape[2:], stride, padding, stats, out, tf32(dy), dtype)

    def pytorch() -> Tensor:
        g = dy if out is None else torch.ops.aten.threshold_backward(dy, out, 0)
        return convolve_backward(g, _activated(x, stats), weight, stride, padding, False, True)[1].to(dtype)

    variants = {
        "epilogue": lambda: fused(_activated(x, stats), None),
        "pytorch": pytorch,
    }
    if stats is not None:
        variants = {"triton": lambda: fused(x, stats), **variants}
    key = (x.shape[1], stride, stats is not None, out is not None, dtype)
    return run_picked("grad_weight", dy, weight, key, **variants)


def inference(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    stride: int,
    padding: int,
    skip: Tensor | None = None,
    shortcut: Shortcut | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """relu(batch_norm(conv(x)) [+ skip]), and the shortcut's convolution of x."""

    def fused() -> tuple[Tensor, Tensor | None]:
        vectors = dense(norm)
        frozen = Frozen(
            vectors.running_mean, vectors.running_var, vectors.weight, vectors.bias, vectors.conv_bias, norm.eps
        )
        output = conv_forward(
            x, weight, stride, padding, frozen=frozen, skip=skip, relu=relu, shortcut=shortcut, tf32=tf32(x)
        )
        return output.y, output.shortcut

    def pytorch() -> tuple[Tensor, Tensor | None]:
        y = convolve(x, weight, None, stride, padding)
        z = None
        if shortcut is not None:
            bias = None if shortcut.bias is None else shortcut.bias.to(x.dtype)
            z = convolve(x, shortcut.weight, bias, stride, 0)
        return batch_norm_add_relu(y, frozen_stats(norm, y.dtype), skip, relu=relu, out=y), z

    fused_to_it = (stride, skip is not None, shortcut is not None, relu)
    return run_picked("inference", x, weight, fused_to_it, epilogue=fused, pytorch=pytorch)
