"""A block's convolutions on the Triton backend: each has up to three ways to the same result.

"triton": what precedes and what follows the convolution is fused to it. "epilogue": what follows alone. "pytorch":
PyTorch's convolution, with BatchNorm's kernels before and after it. `resnet.convolution` says which; with "auto" the
whole ways are timed, and the fastest is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from resnet import settings
from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_reduce import NormedShortcut, backward_partials, batch_norm_backward_reduce
from resnet.kernels.batch_norm_statistics import batch_norm_statistics
from resnet.kernels.conv_forward import ConvOutput, Frozen, Shortcut, conv_forward
from resnet.kernels.conv_grad_input import (
    BlockEnd,
    IdentityGrad,
    KeptMask,
    ReluMask,
    ShortcutGrad,
    conv_grad_input,
)
from resnet.kernels.conv_grad_weight import conv_grad_weight
from resnet.kernels.host.shapes import MAX_TAPS, MAX_WINDOW, ConvShape, conv_shape, kernels_take, taps_fit
from resnet.kernels.tuning import bucket, memory
from resnet.operands import POINTWISE, BlockBefore, Geometry, Pooled, Projection, Unit
from resnet.torch_backend.block import pool_backward
from resnet.torch_backend.convolution import convolve, convolve_backward
from resnet.triton_backend.batch_norm import dense, frozen_stats

T = TypeVar("T")


def tf32(x: Tensor) -> bool:
    """Whether PyTorch's convolution would multiply x as TensorFloat-32, which concerns float32 alone."""
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip:  # MIOpen's are exact
        return False
    cudnn = torch.backends.cudnn
    return cudnn.enabled and cudnn.conv.fp32_precision == "tf32" and _has_tensor_cores(x.device)


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton's products run on tensor cores there, and float32 can be TensorFloat-32: not before sm_80."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def pick(direction: str, key: tuple, variants: Mapping[str, Callable[[], T]], device: torch.device) -> Callable[[], T]:
    """The one of a convolution's variants that `convolution` asks for, not yet called.

    Args:
        direction: "forward", "grad_input" or "grad_weight", whose times are compared.
        key: everything else that the times depend on (shape, type, what is fused), the device aside.
        variants: by name, whole paths to the same result, in the order "triton", "epilogue", "pytorch", the first two
            only where they exist. With "auto" they are timed, so a call must change nothing that another one reads:
            running statistics are updated outside. A GPU without tensor cores for them takes "pytorch" untimed.
    """
    chosen = settings.current_convolution()
    if chosen != "auto":
        asked = settings.VARIANTS.index(chosen)
        return next(variants[name] for name in settings.VARIANTS[asked:] if name in variants)
    if len(variants) == 1 or device.type == "cpu":
        return next(iter(variants.values()))
    if not _has_tensor_cores(device):
        return variants["pytorch"]
    return variants[memory.choose((direction, *key), variants, device)]


def run_picked(
    direction: str,
    x: Tensor,
    channels: int,
    weight: Tensor,
    geometry: Geometry,
    fused: tuple,
    **variants: Callable[[], object],
) -> object:
    """The result of the variant that `pick` chooses; PyTorch's for what the kernels do not know: groups; a stride
    together with a dilation; a dilation, a window or images that are too large.

    Args:
        x: what the variants read.
        channels: those of the convolution's input.
        fused: what else the variants do.
    """
    (K, C, R, S), (stride, _, dilation) = weight.shape, geometry
    N, _, H, W = x.shape
    pixels = H * W * stride**2 if direction.startswith("grad") else H * W  # of the larger map of an image
    fits = taps_fit(W, max(C, K), R, S, dilation) and kernels_take(pixels, C, K, R, S)
    if direction == "grad_input":
        fits = fits and max(R, S) <= MAX_TAPS * stride
    if channels > C or stride > 1 < dilation or not fits:
        return variants["pytorch"]()
    # Not the height and the width: a net that sees images of many sizes would time each of them.
    key = (bucket(N * H * W), tuple(weight.shape), *geometry, x.dtype, tf32(x), *fused)
    return pick(direction, key, variants, x.device)()


def as_read(part: Unit | Projection) -> Unit | Projection:
    """Part of a block with its weight as the kernels read it, K, R, S, C in memory: a copy where it lies otherwise."""
    if part.weight is None:
        return part
    return part._replace(weight=part.weight.contiguous(memory_format=torch.channels_last))


# ---- the ways ----------------------------------------------------------------------------------------------------


def _activated(x: Tensor, stats: Tensor | None) -> Tensor:
    """A convolution's input by a pass of its own: relu(x * scale + shift), or x where there are no stats."""
    return x if stats is None else batch_norm_add_relu(x, stats)


def _with_prologue(
    fused: Callable[[Tensor, Tensor | None], T], pytorch: Callable[[], T], x: Tensor, stats: Tensor | None
) -> dict[str, Callable[[], T]]:
    """The variants of a convolution of relu(x * scale + shift). Without stats nothing precedes it."""
    variants = {"epilogue": lambda: fused(_activated(x, stats), None), "pytorch": pytorch}
    return variants if stats is None else {"triton": lambda: fused(x, stats), **variants}


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    moments: bool,
    stats: Tensor | None = None,
    shortcut: Tensor | None = None,
    shortcut_moments: bool = False,
) -> ConvOutput:
    """y = conv(a, weight), and y's moments where wanted; a is x, or relu(x * scale + shift) with `stats`.

    `shortcut`, a weight (K, C, 1, 1), makes a second output of x with the same stride, and its moments where wanted.
    There is none with `stats`.
    """

    def fused(x: Tensor, stats: Tensor | None) -> ConvOutput:
        return conv_forward(
            x,
            weight,
            *geometry,
            stats=stats,
            moments=moments,
            shortcut=None if shortcut is None else Shortcut(shortcut, None),
            shortcut_moments=shortcut_moments,
            tf32=tf32(x),
        )

    def pytorch() -> ConvOutput:
        y = convolve(_activated(x, stats), weight, None, geometry)
        z = None if shortcut is None else convolve(x, shortcut, None, (geometry[0], 0, 1))
        z_moments = batch_norm_statistics(z) if shortcut_moments else None
        return ConvOutput(y, batch_norm_statistics(y) if moments else None, z, z_moments)

    fused_to_it = (moments, stats is not None, shortcut is not None, shortcut_moments)
    variants = _with_prologue(fused, pytorch, x, stats)
    if weight.shape[2:].numel() > MAX_WINDOW:  # the prologue needs a bit for each pixel of a window
        variants.pop("triton", None)
    return run_picked("forward", x, x.shape[1], weight, geometry, fused_to_it, **variants)


def grad_input_mask(
    dy: Tensor,
    weight: Tensor,
    geometry: Geometry,
    y: Tensor,
    stats: Tensor,
    vectors: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """(g, sums) for a convolution of a = relu(y * scale + shift): g is a's gradient where the ReLU passes it.

    `vectors`, as `empty_grads` gives them, are written.
    """

    def fused() -> tuple[Tensor, Tensor]:
        shape = conv_shape(y, weight, *geometry)
        return conv_grad_input(dy, weight, shape, ReluMask(y, stats), tf32(dy), *vectors)

    def pytorch() -> tuple[Tensor, Tensor]:
        da, _ = convolve_backward(dy, y, weight, geometry, True, False)
        return da, batch_norm_backward_reduce(da, y, None, stats, True, *vectors)

    return run_picked("grad_input", dy, y.shape[1], weight, geometry, ("mask",), epilogue=fused, pytorch=pytorch)


def grad_input_relu(dy: Tensor, weight: Tensor, geometry: Geometry, a: Tensor) -> Tensor:
    """The gradient of what a ReLU made a of, for a convolution of a."""

    def fused() -> Tensor:
        return conv_grad_input(dy, weight, conv_shape(a, weight, *geometry), KeptMask(a), tf32(dy))

    def pytorch() -> Tensor:
        da, _ = convolve_backward(dy, a, weight, geometry, True, False)
        return torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da)

    return run_picked("grad_input", dy, a.shape[1], weight, geometry, ("relu",), epilogue=fused, pytorch=pytorch)


def grad_input_add(
    dy: Tensor,
    weight: Tensor,
    geometry: Geometry,
    x: Tensor,
    shortcut: Unit | Projection,
    g: Tensor,
    before: BlockBefore | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """dx of a block: its first convolution's grad-input from dy, plus the shortcut's from g.

    With `before`, of the block that x is the output of, it is what `BlockBefore` says: (that block's g, partial sums).
    """

    def branch() -> IdentityGrad | ShortcutGrad:
        """With another stride the shortcut has a launch of its own, for the pixels of x that it meets."""
        if shortcut.weight is None:
            return IdentityGrad(g)
        stride = shortcut.geometry[0]
        if stride == geometry[0]:
            return ShortcutGrad(g, shortcut.weight)
        (N, K, P, Q), C = g.shape, x.shape[1]
        met = ConvShape(N, P, Q, C, K, R=1, S=1, stride=1, padding=0)
        return IdentityGrad(conv_grad_input(g, shortcut.weight, met, tf32=tf32(dy)), stride)

    def linked() -> tuple[Tensor, Tensor]:
        epilogue = BlockEnd(branch(), x, before.y, before.stats, _normed(before))
        return conv_grad_input(dy, weight, conv_shape(x, weight, *geometry), epilogue, tf32(dy))

    def fused() -> Tensor:
        return conv_grad_input(dy, weight, conv_shape(x, weight, *geometry), branch(), tf32(dy))

    def pytorch() -> Tensor:
        dx, _ = convolve_backward(dy, x, weight, geometry, True, False)
        if shortcut.weight is None:
            return dx.add_(g)
        return dx.add_(convolve_backward(g, x, shortcut.weight, shortcut.geometry, True, False)[0])

    projected = None if shortcut.weight is None else (shortcut.geometry[0], shortcut.weight.shape[0])
    variants, key = {"epilogue": fused, "pytorch": pytorch}, ("add", projected)
    if before is not None:
        variants = {name: partial(_reduced, variant, x, before) for name, variant in variants.items()}
        variants = {"triton": linked, **variants}
        key += "before", before.z is not None
    return run_picked("grad_input", dy, x.shape[1], weight, geometry, key, **variants)


def _reduced(dx: Callable[[], Tensor], out: Tensor, before: BlockBefore) -> tuple[Tensor, Tensor]:
    """(g, partial sums) of the block before, of dx in a launch of their own; g is written over it."""
    g = dx()
    return g, backward_partials(g, before.y, out, before.stats, shortcut=_normed(before), g=g)


def _normed(before: BlockBefore) -> NormedShortcut | None:
    return None if before.z is None else NormedShortcut(before.z, before.z_stats)


def grad_input(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dx of conv(x), to which nothing is fused."""

    def fused() -> Tensor:
        return conv_grad_input(dy, weight, conv_shape(x, weight, *geometry), tf32=tf32(dy))

    def pytorch() -> Tensor:
        return convolve_backward(dy, x, weight, geometry, True, False)[0]

    return run_picked("grad_input", dy, x.shape[1], weight, geometry, (), epilogue=fused, pytorch=pytorch)


def pooled_grad(dz: Tensor, weight: Tensor, x: Tensor, pooled: Pooled) -> tuple[Projection, Tensor]:
    """What `grad_input_add` takes of a shortcut that reads a pooled x: its share of dx, as an identity's.

    dz is the gradient of the shortcut's convolution, which is 1x1 of stride 1.
    """
    dmap = grad_input(dz, pooled.map, weight, POINTWISE)
    return Projection(None, None, POINTWISE), pool_backward(dmap, x, pooled)


def grad_weight(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    stats: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """dW of conv(a), a as in `forward`, of `dtype`."""

    def fused(x: Tensor, stats: Tensor | None) -> Tensor:
        return conv_grad_weight(dy, x, weight.shape[2:], *geometry, stats=stats, tf32=tf32(dy), dtype=dtype)

    def pytorch() -> Tensor:
        return convolve_backward(dy, _activated(x, stats), weight, geometry, False, True)[1].to(dtype)

    key = (stats is not None, dtype)
    return run_picked("grad_weight", dy, x.shape[1], weight, geometry, key, **_with_prologue(fused, pytorch, x, stats))


def inference(
    x: Tensor,
    unit: Unit,
    skip: Tensor | None = None,
    shortcut: Shortcut | None = None,
    relu: bool = False,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """relu(batch_norm(conv(a)) [+ skip]), a as in `forward`; without `stats` also the shortcut's convolution of x."""
    weight, geometry, norm, _ = unit

    def fused(x: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vectors = dense(norm)
        frozen = Frozen(
            vectors.running_mean, vectors.running_var, vectors.weight, vectors.bias, vectors.conv_bias, norm.eps
        )
        output = conv_forward(
            x, weight, *geometry, stats=stats, frozen=frozen, skip=skip, relu=relu, shortcut=shortcut, tf32=tf32(x)
        )
        return output.y, output.shortcut

    def pytorch() -> tuple[Tensor, Tensor | None]:
        y = convolve(_activated(x, stats), weight, None, geometry)
        z = None
        if shortcut is not None:
            bias = None if shortcut.bias is None else shortcut.bias.to(x.dtype)
            z = convolve(x, shortcut.weight, bias, (geometry[0], 0, 1))
        return batch_norm_add_relu(y, frozen_stats(norm, y.dtype), skip, relu=relu, out=y), z

    fused_to_it = (skip is not None, shortcut is not None, relu, stats is not None)
    return run_picked(
        "inference", x, x.shape[1], weight, geometry, fused_to_it, **_with_prologue(fused, pytorch, x, stats)
    )


def forward_add(x: Tensor, conv: Projection, stats: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    """conv(a) + bias [+ skip] of a convolution that no norm follows; a as in `forward`."""
    weight, geometry = conv.weight, conv.geometry
    bias = None if conv.bias is None else conv.bias.contiguous()

    def fused(x: Tensor, stats: Tensor | None) -> Tensor:
        return conv_forward(x, weight, *geometry, stats=stats, bias=bias, skip=skip, tf32=tf32(x)).y

    def pytorch() -> Tensor:
        y = convolve(_activated(x, stats), weight, None if bias is None else bias.to(x.dtype), geometry)
        return y if skip is None else y.add_(skip)

    fused_to_it = ("projection", stats is not None, skip is not None)
    return run_picked(
        "inference", x, x.shape[1], weight, geometry, fused_to_it, **_with_prologue(fused, pytorch, x, stats)
    )
