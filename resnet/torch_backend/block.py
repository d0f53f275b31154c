"""The residual block on PyTorch's own operators, in as few passes as they allow."""

from __future__ import annotations

from torch import Tensor

from resnet.norm import Norm
from resnet.operands import Block, BlockGrad, BlockKept, BlockOutput, Convolutions
from resnet.torch_backend import batch_norm
from resnet.torch_backend.convolution import add_projected, convolve, convolve_backward
from resnet.torch_backend.inference import conv_batch_norm


def block_forward(x: Tensor, convs: Convolutions, norm1: Norm, norm2: Norm) -> BlockOutput:
    """The block in training: out and what its backward needs. x (N, C, H, W) is channels_last, and so are the results.

    Running statistics are updated in place.
    """
    y1 = convolve(x, convs.conv1, None, convs.stride, 1)
    a1, stats1 = batch_norm.forward(y1, norm1)
    y2 = convolve(a1, convs.conv2, None, 1, 1)
    shortcut = x if convs.conv3 is None else convolve(x, convs.conv3, None, convs.stride, 0)
    out, stats2 = batch_norm.forward(y2, norm2, shortcut, convs.conv3_bias, into=a1)
    return BlockOutput(out, y1, y2, stats1, stats2)


def block_backward(dout: Tensor, kept: BlockKept, needs: Block) -> BlockGrad:
    """Gradients of `block_forward` from dout (N, K, P, Q) channels_last; a1 = relu(bn1(y1)) is computed again."""
    x, (out, y1, y2, stats1, stats2), convs, norm1, norm2 = kept
    grad2 = batch_norm.backward(dout, y2, out, stats2, norm2, shortcut=True)
    a1 = batch_norm.recompute(y1, stats1)
    da1, dconv2 = convolve_backward(grad2.dx, a1, convs.conv2, 1, 1, True, needs.convs.conv2)
    grad1 = batch_norm.backward(da1, y1, a1, stats1, norm1, consume=True)
    del a1, da1
    dx, dconv1 = convolve_backward(grad1.dx, x, convs.conv1, convs.stride, 1, needs.x, needs.convs.conv1)
    dconv3 = None
    if convs.conv3 is not None:
        dx3, dconv3 = convolve_backward(grad2.g, x, convs.conv3, convs.stride, 0, needs.x, needs.convs.conv3)
        dx = dx.add_(dx3) if needs.x else None
    elif needs.x:
        dx.add_(grad2.g)
    norms = (grad1.dweight, grad1.dbias, grad1.sum_g, grad2.dweight, grad2.dbias, grad2.sum_g)
    return BlockGrad(dx, dconv1, dconv2, dconv3, *norms)


def block_inference(x: Tensor, convs: Convolutions, norm1: Norm, norm2: Norm) -> Tensor:
    """The block with frozen statistics and without gradients: out (N, K, P, Q)."""
    a1 = conv_batch_norm(x, convs.conv1, norm1, convs.stride, 1).relu_()
    out = conv_batch_norm(a1, convs.conv2, norm2, 1, 1, convs.conv3_bias)
    return (out.add_(x) if convs.conv3 is None else add_projected(out, x, convs.conv3, convs.stride)).relu_()
