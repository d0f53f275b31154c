"""The residual block with pre-activation on the Triton kernels.

A block of two convolutions launches, in this order (training, identity shortcut; passes over an activation of each):

    forward   statistics of x 1, conv1 with norm1 and ReLU in its prologue + statistics 2,
              conv2 with norm2 and ReLU in its prologue + x 3
    backward  conv2 grad-input + ReLU' + norm2 reduce 3, conv2 grad-weight 2, norm2 apply' 3,
              conv1 grad-input + ReLU' + norm1 reduce 3, conv1 grad-weight 2, norm1 apply' + dout 4

A third convolution launches what conv2 does, but for the sum. Where a shortcut's convolution reads relu(norm1(x)), this
is stored, since a prologue would compute it twice. The convolution is then part of conv1's launches if it has the same
stride and as many channels. One that reads x is a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.batch_norm_statistics import batch_norm_statistics
from resnet.norm import Norm, empty_grads
from resnet.operands import PreActivationGrad, Projection, Unit, UnitGrad, pre_activation_inputs, trained_dtype
from resnet.torch_backend.pre_activation import bias_grad, parts_of
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import applied_sums, frozen_stats, norm_stats
from resnet.triton_backend.block import chain_forward, rides


def pre_activation_forward(
    x: Tensor, norm: Norm, units: Sequence[Unit], conv: Projection, shortcut: Projection, activated: bool
) -> tuple:
    """See `torch_backend.pre_activation_forward`."""
    (first, *rest), conv, shortcut = map(convolution.as_read, units), *map(convolution.as_read, (conv, shortcut))
    x_stats = norm_stats(x, batch_norm_statistics(x) if norm.training else None, norm)
    a = batch_norm_add_relu(x, x_stats) if activated else x
    riding = shortcut.weight if activated and shortcut.bias is None and rides(shortcut, first) else None
    y, moments, skip, _ = convolution.forward(
        a, *first[:2], first.norm.training, None if activated else x_stats, shortcut=riding
    )
    ys, stats = chain_forward(y, rest, norm_stats(y, moments, first.norm))
    if riding is None:
        skip = a if shortcut.weight is None else convolution.forward_add(a, shortcut)
    return convolution.forward_add(ys[-1], conv, stats[-1], skip), ys, (x_stats, *stats)


def pre_activation_backward(dout: Tensor, kept: tuple, needs: tuple) -> PreActivationGrad:
    """See `torch_backend.pre_activation_backward`."""
    maps, norms, convs = parts_of(kept)
    convs, shortcut = tuple(map(convolution.as_read, convs)), convolution.as_read(kept.shortcut)
    asked, weights = pre_activation_inputs(needs), [part.weight for part in (*needs.units, needs.conv)]
    wanted = [needs.x, *(above or weight for above, weight in zip(asked, weights))]  # of what each norm reads
    grads, dweights, dshortcut, dy = [UnitGrad()] * len(maps), [None] * len(maps), None, dout
    for i in reversed(range(len(maps))):
        x, stats, conv, projects = maps[i], kept.stats[i], convs[i], i == 0 and kept.activated
        if asked[i]:
            vectors = empty_grads(norms[i])
            if projects:
                g = convolution.grad_input_add(dy, conv.weight, conv.geometry, x, shortcut, dout)
                sums = batch_norm_backward_reduce(g, x, None, stats, True, *vectors)
            else:
                g, sums = convolution.grad_input_mask(dy, conv.weight, conv.geometry, x, stats, vectors)
            grads[i], used = UnitGrad(None, *vectors[:2], sums[0], vectors[2]), applied_sums(sums, g, norms[i])
        if weights[i]:
            dweights[i] = convolution.grad_weight(dy, x, conv.weight, conv.geometry, stats, dtype=trained_dtype(conv))
        if wanted[i]:
            added = _shortcut_grad(dout, x, shortcut) if i == 0 and not projects else None
            dy = batch_norm_backward_apply(g, x, stats, used, dx=g, added=added)
    if needs.shortcut.weight:
        projection = shortcut.weight, shortcut.geometry, kept.stats[0] if kept.activated else None
        dshortcut = convolution.grad_weight(dout, kept.x, *projection, dtype=trained_dtype(shortcut))
    sum_g = bias_grad(dout, needs)
    return PreActivationGrad(
        dy if needs.x else None,
        grads[0],
        tuple(grad._replace(conv=dweight) for grad, dweight in zip(grads[1:], dweights)),
        UnitGrad(dweights[-1], sum_g=sum_g),
        UnitGrad(dshortcut, sum_g=sum_g),
    )


def _shortcut_grad(dout: Tensor, x: Tensor, shortcut: Projection) -> Tensor:
    """What x receives by a shortcut that reads it."""
    return dout if shortcut.weight is None else convolution.grad_input(dout, x, shortcut.weight, shortcut.geometry)


def pre_activation_inference(
    x: Tensor, norm: Norm, units: Sequence[Unit], conv: Projection, shortcut: Projection, activated: bool
) -> Tensor:
    """See `torch_backend.pre_activation_inference`. Each norm but the first is part of the convolution before it."""
    units, conv, shortcut = tuple(map(convolution.as_read, units)), *map(convolution.as_read, (conv, shortcut))
    a, stats = x, frozen_stats(norm, x.dtype)
    if activated:
        a, stats = batch_norm_add_relu(x, stats), None
    skip = x if shortcut.weight is None else convolution.forward_add(a, shortcut)
    for unit in units:
        a, _ = convolution.inference(a, unit, relu=True, stats=stats)
        stats = None
    return convolution.forward_add(a, conv, skip=skip)
