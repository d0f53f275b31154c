"""The residual block on PyTorch's own operators where its norms are constants: their scale belongs to the weights.

With W' = scale * W the gradients are those of convolutions by W', dW = scale * dW', and BatchNorm takes no pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.operands import BlockGrad, Pooled, Projection, Unit, UnitGrad, grad_inputs
from resnet.torch_backend import batch_norm
from resnet.torch_backend.block import activations, add_shortcut_grad
from resnet.torch_backend.convolution import convolve_backward

aten = torch.ops.aten


def frozen_block_forward(x: Tensor, units: tuple[Unit, ...], shortcut: Unit | Projection, *pooled: Pooled) -> tuple:
    """The fields of a frozen `BlockKind.output`. x (N, C, H, W) and the results are channels_last."""
    *inner, out = activations(x, units, shortcut, *pooled)
    norms = [part.norm for part in (*units, shortcut) if isinstance(part, Unit)]
    return out, tuple(inner), tuple(batch_norm.frozen_stats(norm, x.dtype) for norm in norms)


def folded(weight: Tensor, scale: Tensor) -> Tensor:
    """scale * weight, (K, C, R, S), in the weight's type and layout."""
    return torch.mul(weight, scale.view(-1, 1, 1, 1), out=torch.empty_like(weight))


def unfolded(grad: Tensor | None, scale: Tensor) -> Tensor | None:
    """The weight's gradient from that of the folded one, which it may overwrite, in the type of the scale."""
    if grad is None:
        return None
    scale = scale.view(-1, 1, 1, 1)
    return grad.mul_(scale) if grad.dtype == scale.dtype else grad * scale


def frozen_block_backward(dout: Tensor, kept: tuple, needs: tuple) -> BlockGrad:
    """Gradients of `frozen_block_forward` from dout (N, K, P, Q) channels_last."""
    x, (out, inner, stats), units, shortcut, *_ = kept
    scales = [each[2] for each in stats]
    asked, grads, dx = grad_inputs(needs), [UnitGrad()] * len(units), None
    g = dz = aten.threshold_backward.default(dout, out, 0)
    for i in reversed(range(len(units))):
        weight, geometry, _ = units[i]
        a = inner[i - 1] if i else x
        flags = asked[i], needs.units[i].weight
        da, dconv = convolve_backward(g, a, folded(weight, scales[i]), geometry, *flags)
        grads[i] = UnitGrad(unfolded(dconv, scales[i]))
        if i == 0:
            dx = da
        elif not asked[i]:
            break
        else:
            g = aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    weight, normed = shortcut.weight, len(scales) > len(units)
    dconv = add_shortcut_grad(dx, dz, kept, folded(weight, scales[-1]) if normed else weight, needs)
    dconv = unfolded(dconv, scales[-1]) if normed else dconv
    return BlockGrad(dx, tuple(grads), UnitGrad(dconv))
