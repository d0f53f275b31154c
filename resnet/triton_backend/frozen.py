"""The residual block on the Triton kernels where its norms are constants: see `torch_backend.frozen`.

A block of two units launches, in this order (identity shortcut; the passes over an activation of each):

    forward   conv1 + bn1 + ReLU 2, conv2 + bn2 + add + ReLU 3
    backward  ReLU' 3, conv2 grad-weight 2, conv2 grad-input + ReLU' 3, conv1 grad-weight 2,
              conv1 grad-input + shortcut's gradient 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.operands import (
    BlockGrad,
    Geometry,
    Pooled,
    Projection,
    Unit,
    UnitGrad,
    grad_inputs,
    shortcut_input,
    trained_dtype,
)
from resnet.torch_backend.frozen import folded, unfolded
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import frozen_stats
from resnet.triton_backend.block import activations


def frozen_block_forward(x: Tensor, units: tuple[Unit, ...], shortcut: Unit | Projection, *pooled: Pooled) -> tuple:
    """See `torch_backend.frozen_block_forward`."""
    *inner, out = activations(x, units, shortcut, *pooled)
    norms = [part.norm for part in (*units, shortcut) if isinstance(part, Unit)]
    return out, tuple(inner), tuple(frozen_stats(norm, x.dtype) for norm in norms)


def frozen_block_backward(dout: Tensor, kept: tuple, needs: tuple) -> BlockGrad:
    """See `torch_backend.frozen_block_backward`."""
    x, (out, inner, stats), units, shortcut, *pooled = kept
    units, shortcut = list(map(convolution.as_read, units)), convolution.as_read(shortcut)
    scales = [each[2] for each in stats]
    asked, grads, dx = grad_inputs(needs), [UnitGrad()] * len(units), None
    g = dz = torch.ops.aten.threshold_backward(dout, out, 0)
    shortcut_grad, shortcut_scale = UnitGrad(), scales[-1] if len(scales) > len(units) else None
    for i in reversed(range(len(units))):
        unit, scale = units[i], scales[i]
        if needs.units[i].weight:
            grads[i] = UnitGrad(_grad_weight(g, inner[i - 1] if i else x, unit[:2], scale))
        if not asked[i]:
            break
        scaled = unit._replace(weight=folded(unit.weight, scale))
        if i:
            g = convolution.grad_input_relu(g, *scaled[:2], inner[i - 1])
        else:
            weight = shortcut.weight if shortcut_scale is None else folded(shortcut.weight, shortcut_scale)
            added = shortcut._replace(weight=weight), dz
            if pooled:
                added = convolution.pooled_grad(dz, weight, x, *pooled)
            dx = convolution.grad_input_add(g, *scaled[:2], x, *added)
    read = shortcut_input(kept)
    if needs.shortcut.weight:
        conv = shortcut.weight, shortcut.geometry
        if shortcut_scale is None:
            dconv = convolution.grad_weight(dz, read, *conv, dtype=trained_dtype(shortcut))
        else:
            dconv = _grad_weight(dz, read, conv, shortcut_scale)
        shortcut_grad = UnitGrad(dconv)
    return BlockGrad(dx, tuple(grads), shortcut_grad)


def _grad_weight(g: Tensor, a: Tensor, conv: tuple[Tensor, Geometry], scale: Tensor) -> Tensor:
    """dW of norm(conv(a)), in the type of the scale."""
    return unfolded(convolution.grad_weight(g, a, *conv, dtype=scale.dtype), scale)
