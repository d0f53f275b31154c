"""The fused operations on the Triton kernels. Same functions as `torch_backend`.

A block launches, in this order (training, identity shortcut; the passes over an activation that each one makes):

    forward   conv1 + statistics 2, conv2 with bn1 and ReLU in its prologue + statistics 2, bn2 + add + ReLU 3
    backward  bn2 reduce 3, bn2 apply' 4, conv2 grad-input + ReLU' + bn1 reduce 3, conv2 grad-weight 2,
              bn1 apply' 3, conv1 grad-input + shortcut's gradient 4, conv1 grad-weight 2

Each convolution is one of up to three whole paths to the same result, between which `backends.pick` chooses: see
`resnet.convolution`. Behind every reduction a small kernel merges its partials.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet import backends
from resnet.block import BlockGrad, Convolutions, Needs, Saved, StemGrad
from resnet.convolution import convolve, convolve_backward
from resnet.kernels import batch_norm_max_pool as pool
from resnet.kernels.add_masked_grad import add_masked_grad
from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.batch_norm_statistics import Moments, batch_norm_statistics
from resnet.kernels.conv_forward import ConvOutput, Frozen, Shortcut, conv_forward
from resnet.kernels.conv_grad_input import ReluMask, Residual, ShortcutGrad, conv_grad_input
from resnet.kernels.conv_grad_weight import conv_grad_weight
from resnet.kernels.conv_grad_weight_max_pool import MAX_WINDOW, conv_grad_weight_max_pool
from resnet.kernels.host.shapes import conv_shape
from resnet.kernels.tuning import bucket
from resnet.norm import Norm, empty_grads
from resnet.triton_batch_norm import backward as batch_norm_backward
from resnet.triton_batch_norm import batch_stats, frozen_stats
from resnet.triton_batch_norm import forward as batch_norm

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "residual_block",
    "residual_block_backward",
    "residual_block_inference",
    "stem",
    "stem_backward",
    "stem_inference",
]


def _tf32(x: Tensor) -> bool:
    """Whether PyTorch's convolution would multiply x as TensorFloat-32."""
    return x.device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"


def _pick(direction: str, x: Tensor, weight: Tensor, fused: tuple, **variants: Callable[[], object]) -> object:
    """The result of the variant that `backends.pick` chooses. `fused` says what else the path does."""
    N, *image = x.shape
    key = (bucket(N), *image, tuple(weight.shape), x.dtype, _tf32(x), *fused)
    return backends.pick(direction, key, variants, x.device)()


# ---- the convolutions, each way --------------------------------------------------------------------------------


def _activated(x: Tensor, stats: Tensor | None) -> Tensor:
    """A convolution's input by a pass of its own: relu(x * scale + shift), or x where there are no stats."""
    return x if stats is None else batch_norm_add_relu(x, stats)


def _forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    moments: bool,
    stats: Tensor | None = None,
    conv3: Tensor | None = None,
) -> ConvOutput:
    """y = conv(a, weight) with its moments, where wanted; a is x, or relu(x * scale + shift) with `stats`."""

    def fused(x: Tensor, stats: Tensor | None) -> ConvOutput:
        shortcut = None if conv3 is None else Shortcut(conv3, None)
        return conv_forward(x, weight, stride, padding, stats=stats, moments=moments, shortcut=shortcut, tf32=_tf32(x))

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
    return _pick("forward", x, weight, (stride, moments, stats is not None, conv3 is not None), **variants)


def _norm_stats(y: Tensor, moments: Moments | None, norm: Norm) -> Tensor:
    """stats (4, K) of y's norm; with batch statistics the running ones are updated."""
    return frozen_stats(norm, y.dtype) if moments is None else batch_stats(moments, norm)


def _grad_input_mask(
    dy: Tensor, weight: Tensor, y1: Tensor, stats: Tensor, dweight: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(g, sums): the gradient of a = relu(y1 * scale + shift) behind that ReLU, for a 3x3 convolution of a."""

    def fused() -> tuple[Tensor, Tensor]:
        return conv_grad_input(dy, weight, conv_shape(y1, weight, 1, 1), ReluMask(y1, stats), _tf32(dy), dweight, dbias)

    def pytorch() -> tuple[Tensor, Tensor]:
        da, _ = convolve_backward(dy, y1, weight, 1, 1, True, False)
        return da, batch_norm_backward_reduce(da, y1, None, stats, dweight=dweight, dbias=dbias)

    return _pick("grad_input", dy, weight, ("mask",), epilogue=fused, pytorch=pytorch)


def _grad_input_add(
    dy: Tensor, weight: Tensor, x: Tensor, stride: int, dout: Tensor, out: Tensor, conv3: Tensor | None
) -> Tensor:
    """dx of a block: conv1's grad-input of dy plus the shortcut's gradient, of dout * (out > 0)."""

    def fused() -> Tensor:
        epilogue = Residual(dout, out) if conv3 is None else ShortcutGrad(dout, out, conv3)
        return conv_grad_input(dy, weight, conv_shape(x, weight, stride, 1), epilogue, _tf32(dy))

    def pytorch() -> Tensor:
        dx, _ = convolve_backward(dy, x, weight, stride, 1, True, False)
        if conv3 is None:
            return add_masked_grad(dx, dout, out)
        g = torch.ops.aten.threshold_backward(dout, out, 0)
        return dx.add_(convolve_backward(g, x, conv3, stride, 0, True, False)[0])

    return _pick("grad_input", dy, weight, (stride, conv3 is not None), epilogue=fused, pytorch=pytorch)


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    stats: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dW of conv(a), a as in `_forward`; with `out`, dy counts where the ReLU that made out let it pass."""

    def fused(x: Tensor, stats: Tensor | None) -> Tensor:
        return conv_grad_weight(dy, x, weight.shape[2:], stride, padding, stats, out, _tf32(dy))

    def pytorch() -> Tensor:
        g = dy if out is None else torch.ops.aten.threshold_backward(dy, out, 0)
        return convolve_backward(g, _activated(x, stats), weight, stride, padding, False, True)[1]

    variants = {
        "epilogue": lambda: fused(_activated(x, stats), None),
        "pytorch": pytorch,
    }
    if stats is not None:
        variants = {"triton": lambda: fused(x, stats), **variants}
    return _pick("grad_weight", dy, weight, (x.shape[1], stride, stats is not None, out is not None), **variants)


# ---- the block -------------------------------------------------------------------------------------------------


def residual_block(x: Tensor, convs: Convolutions, norm1: Norm, norm2: Norm) -> Saved:
    """See `torch_backend.residual_block`."""
    first = _forward(x, convs.conv1, convs.stride, 1, norm1.training, conv3=convs.conv3)
    stats1 = _norm_stats(first.y, first.moments, norm1)
    second = _forward(first.y, convs.conv2, 1, 1, norm2.training, stats1)
    stats2 = _norm_stats(second.y, second.moments, norm2)
    shortcut = x if convs.conv3 is None else first.shortcut
    out = batch_norm_add_relu(second.y, stats2, shortcut, shortcut_shift=convs.conv3_bias)
    return Saved(x, first.y, second.y, out, stats1, stats2)


def residual_block_backward(
    dout: Tensor, saved: Saved, convs: Convolutions, norm1: Norm, norm2: Norm, needs: Needs
) -> BlockGrad:
    """See `torch_backend.residual_block_backward`."""
    x, y1, y2, out, stats1, stats2 = saved
    dweight2, dbias2 = empty_grads(norm2)
    sums2 = batch_norm_backward_reduce(dout, y2, out, stats2, dweight=dweight2, dbias=dbias2)
    dx = dconv1 = dconv2 = dconv3 = dweight1 = dbias1 = sum_g1 = None
    if needs.inner or needs.conv2:
        dy2 = batch_norm_backward_apply(dout, y2, out, stats2, sums2 if norm2.training else None)
    if needs.inner:
        dweight1, dbias1 = empty_grads(norm1)
        g1, sums1 = _grad_input_mask(dy2, convs.conv2, y1, stats1, dweight1, dbias1)
        sum_g1 = sums1[0]
    if needs.conv2:
        dconv2 = _grad_weight(dy2, y1, convs.conv2, 1, 1, stats1)
    if needs.x or needs.conv1:
        dy1 = batch_norm_backward_apply(g1, y1, None, stats1, sums1 if norm1.training else None, dx=g1)
    if needs.x:
        dx = _grad_input_add(dy1, convs.conv1, x, convs.stride, dout, out, convs.conv3)
    if needs.conv1:
        dconv1 = _grad_weight(dy1, x, convs.conv1, convs.stride, 1)
    if needs.conv3:
        dconv3 = _grad_weight(dout, x, convs.conv3, convs.stride, 0, out=out)
    return BlockGrad(dx, dconv1, dconv2, dconv3, dweight1, dbias1, sum_g1, dweight2, dbias2, sums2[0])


def residual_block_inference(x: Tensor, convs: Convolutions, norm1: Norm, norm2: Norm) -> Tensor:
    """See `torch_backend.residual_block_inference`. Two launches where the own convolutions run."""
    shortcut = None if convs.conv3 is None else Shortcut(convs.conv3, convs.conv3_bias)
    a1, z = _inference(x, convs.conv1, norm1, convs.stride, 1, shortcut=shortcut, relu=True)
    return _inference(a1, convs.conv2, norm2, 1, 1, skip=x if z is None else z, relu=True)[0]


def stem_inference(x: Tensor, weight: Tensor, norm: Norm, stride: int, padding: int) -> Tensor:
    """See `inference.stem`. One launch, and PyTorch's pool."""
    y = _inference(x, weight, norm, stride, padding)[0]
    return torch.max_pool2d(y, 3, 2, 1).relu_()


def _inference(
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
        frozen = Frozen(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.conv_bias, norm.eps)
        output = conv_forward(
            x, weight, stride, padding, frozen=frozen, skip=skip, relu=relu, shortcut=shortcut, tf32=_tf32(x)
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
    return _pick("inference", x, weight, fused_to_it, epilogue=fused, pytorch=pytorch)


# ---- the stem --------------------------------------------------------------------------------------------------


def stem(x: Tensor, weight: Tensor, norm: Norm, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `torch_backend.stem`."""
    y, moments, _, _ = _forward(x, weight, stride, padding, norm.training)
    stats = _norm_stats(y, moments, norm)
    out, tap = pool.apply_pool(y, stats)
    return out, y, tap, stats


def stem_backward(
    dout: Tensor,
    x: Tensor,
    y: Tensor,
    out: Tensor,
    tap: Tensor,
    stats: Tensor,
    weight: Tensor,
    norm: Norm,
    stride: int,
    padding: int,
    needs_x: bool,
    needs_conv: bool,
) -> StemGrad:
    """See `torch_backend.stem_backward`. dy is written only where the input's gradient is wanted."""
    dweight, dbias = empty_grads(norm)
    sums = pool.backward_reduce(dout, y, out, tap, stats, dweight, dbias)
    used = sums if norm.training else None
    dx = dconv = None

    def fused() -> Tensor:
        return conv_grad_weight_max_pool(dout, out, tap, y, stats, used, x, weight.shape[2:], stride, padding, _tf32(x))

    def pytorch() -> Tensor:
        dy = pool.backward_apply(dout, y, out, tap, stats, used)
        return convolve_backward(dy, x, weight, stride, padding, False, True)[1]

    # dy is stored for grad-input, for a window that the fused product does not take, and in float64, of which the
    # compiler refuses the fused product at some shapes.
    stored = needs_x or max(weight.shape[2:]) > MAX_WINDOW or x.dtype == torch.float64
    if stored:
        dy = pool.backward_apply(dout, y, out, tap, stats, used)
    if needs_x:
        dx = _pick(
            "grad_input",
            dy,
            weight,
            (stride,),
            epilogue=lambda: conv_grad_input(dy, weight, conv_shape(x, weight, stride, padding), tf32=_tf32(x)),
            pytorch=lambda: convolve_backward(dy, x, weight, stride, padding, True, False)[0],
        )
    if needs_conv and stored:
        dconv = _grad_weight(dy, x, weight, stride, padding)
    elif needs_conv:
        dconv = _pick("grad_weight", y, weight, (stride, "max_pool"), triton=fused, pytorch=pytorch)
    return StemGrad(dx, dconv, dweight, dbias, sums[0])
