"""The residual block on the Triton kernels.

A block launches, in this order (training, identity shortcut; the passes over an activation that each one makes):

    forward   conv1 + statistics 2, conv2 with bn1 and ReLU in its prologue + statistics 2, bn2 + add + ReLU 3
    backward  bn2 reduce 3, bn2 apply' 4, conv2 grad-input + ReLU' + bn1 reduce 3, conv2 grad-weight 2,
              bn1 apply' 3, conv1 grad-input + shortcut's gradient 4, conv1 grad-weight 2

A small kernel after every reduction merges its partials. Each convolution is one of up to three ways: see
`convolution`.
"""

from __future__ import annotations

from torch import Tensor

from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.conv_forward import Shortcut
from resnet.norm import Norm, empty_grads
from resnet.operands import Block, BlockGrad, BlockKept, BlockOutput, Convolutions
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import norm_stats


def _as_read(convs: Convolutions) -> Convolutions:
    """The convolutions as the kernels read them."""
    weights = [convolution.in_nhwc(weight) for weight in (convs.conv1, convs.conv2, convs.conv3)]
    return Convolutions(*weights, None if convs.conv3_bias is None else convs.conv3_bias.contiguous(), *convs[4:])


def block_forward(x: Tensor, convs: Convolutions, norm1: Norm, norm2: Norm) -> BlockOutput:
    """See `torch_backend.block_forward`."""
    convs = _as_read(convs)
    first = convolution.forward(x, convs.conv1, convs.stride, 1, norm1.training, conv3=convs.conv3)
    stats1 = norm_stats(first.y, first.moments, norm1)
    second = convolution.forward(first.y, convs.conv2, 1, 1, norm2.training, stats1)
    stats2 = norm_stats(second.y, second.moments, norm2)
    shortcut = x if convs.conv3 is None else first.shortcut
    out = batch_norm_add_relu(second.y, stats2, shortcut, shortcut_shift=convs.conv3_bias)
    return BlockOutput(out, first.y, second.y, stats1, stats2)


def block_backward(dout: Tensor, kept: BlockKept, needs: Block) -> BlockGrad:
    """See `torch_backend.block_backward`."""
    x, (out, y1, y2, stats1, stats2), convs, norm1, norm2 = kept
    convs = _as_read(convs)
    dtypes = [None if w is None else w.dtype for w in convs.trained]
    needs_a1 = needs.x or needs.convs.conv1 or any(needs.norm1)
    vectors1, vectors2 = (None,) * 3, empty_grads(norm2)
    sums2 = batch_norm_backward_reduce(dout, y2, out, stats2, True, *vectors2)
    dx = dconv1 = dconv2 = dconv3 = sum_g1 = None
    if needs_a1 or needs.convs.conv2:
        dy2 = batch_norm_backward_apply(dout, y2, out, stats2, sums2 if norm2.training else None)
    if needs_a1:
        vectors1 = empty_grads(norm1)
        g1, sums1 = convolution.grad_input_mask(dy2, convs.conv2, y1, stats1, vectors1)
        sum_g1 = sums1[0]
    if needs.convs.conv2:
        dconv2 = convolution.grad_weight(dy2, y1, convs.conv2, 1, 1, stats1, dtype=dtypes[1])
    if needs.x or needs.convs.conv1:
        dy1 = batch_norm_backward_apply(g1, y1, None, stats1, sums1 if norm1.training else None, dx=g1)
    if needs.x:
        dx = convolution.grad_input_add(dy1, convs.conv1, x, convs.stride, dout, out, convs.conv3)
    if needs.convs.conv1:
        dconv1 = convolution.grad_weight(dy1, x, convs.conv1, convs.stride, 1, dtype=dtypes[0])
    if needs.convs.conv3:
        dconv3 = convolution.grad_weight(dout, x, convs.conv3, convs.stride, 0, out=out, dtype=dtypes[2])
    (dweight1, dbias1, zeros1), (dweight2, dbias2, zeros2) = vectors1, vectors2
    sums = dweight1, dbias1, sum_g1, dweight2, dbias2, sums2[0]
    return BlockGrad(dx, dconv1, dconv2, dconv3, *sums, zeros1, zeros2)


def block_inference(x: Tensor, convs: Convolutions, norm1: Norm, norm2: Norm) -> Tensor:
    """See `torch_backend.block_inference`. Two launches where the own convolutions run."""
    convs = _as_read(convs)
    shortcut = None if convs.conv3 is None else Shortcut(convs.conv3, convs.conv3_bias)
    a1, z = convolution.inference(x, convs.conv1, norm1, convs.stride, 1, shortcut=shortcut, relu=True)
    return convolution.inference(a1, convs.conv2, norm2, 1, 1, skip=x if z is None else z, relu=True)[0]
