"""The residual block with pre-activation on PyTorch's own operators, in as few passes as they allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet.norm import KeptNorm, Norm, statistics_dtype
from resnet.operands import KeptUnit, PreActivationGrad, Projection, Unit, UnitGrad, pre_activation_inputs
from resnet.torch_backend import batch_norm
from resnet.torch_backend.block import add_shortcut_grad, unit_grad
from resnet.torch_backend.convolution import convolve, convolve_backward
from resnet.torch_backend.inference import conv_batch_norm


def pre_activation_forward(
    x: Tensor, norm: Norm, units: Sequence[Unit], conv: Projection, shortcut: Projection, activated: bool
) -> tuple:
    """The block in training: the fields of a `pre_activation_kind`'s output. x and the results are channels_last.

    Running statistics are updated in place.
    """
    a, x_stats = batch_norm.forward(x, norm)
    skip, ys, stats = _projected(a if activated else x, shortcut), [], [x_stats]
    for unit in units:
        ys.append(convolve(a, unit.weight, None, unit.geometry))
        a, unit_stats = batch_norm.forward(ys[-1], unit.norm, into=a if a.shape == ys[-1].shape else None)
        stats.append(unit_stats)
    return _projected(a, conv).add_(skip), tuple(ys), tuple(stats)


def _projected(x: Tensor, part: Projection) -> Tensor:
    if part.weight is None:
        return x
    bias = None if part.bias is None else part.bias.to(x.dtype)  # under autocast it is a parameter of another type
    return convolve(x, part.weight, bias, part.geometry)


def parts_of(kept: tuple) -> tuple[tuple[Tensor, ...], tuple[KeptNorm, ...], tuple[KeptUnit | Projection, ...]]:
    """What each convolution's norm reads, these norms, and the convolutions, by what a block keeps."""
    norms = kept.norm, *(unit.norm for unit in kept.units)
    return (kept.x, *kept.ys), norms, (*kept.units, kept.conv)


def pre_activation_backward(dout: Tensor, kept: tuple, needs: tuple) -> PreActivationGrad:
    """Gradients of `pre_activation_forward` from dout (N, K, P, Q) channels_last; relu(norm(y)) is computed again."""
    maps, norms, convs = parts_of(kept)
    asked, weights = pre_activation_inputs(needs), [part.weight for part in (*needs.units, needs.conv)]
    shortcut, dshortcut, dy = kept.shortcut, None, dout
    grads, dweights = [UnitGrad()] * len(maps), [None] * len(maps)
    for i in reversed(range(len(maps))):
        projects = i == 0 and kept.activated
        if not (asked[i] or weights[i] or (projects and needs.shortcut.weight)):
            continue
        a = batch_norm.recompute(maps[i], kept.stats[i])
        da, dweights[i] = convolve_backward(dy, a, convs[i].weight, convs[i].geometry, asked[i], weights[i])
        if projects:
            flags = asked[i], needs.shortcut.weight
            da, dshortcut = convolve_backward(dout, a, shortcut.weight, shortcut.geometry, *flags, da)
        if asked[i]:
            norm = batch_norm.backward(da, maps[i], a, kept.stats[i], norms[i], consume=True)
            dy, grads[i] = norm.dx, unit_grad(norm)
            del norm
        del a, da  # before the next ones are made
    dx = dy if needs.x else None
    if not kept.activated:
        dshortcut = add_shortcut_grad(dx, dout, kept, shortcut.weight, needs)
    sum_g = bias_grad(dout, needs)
    return PreActivationGrad(
        dx,
        grads[0],
        tuple(grad._replace(conv=dweight) for grad, dweight in zip(grads[1:], dweights)),
        UnitGrad(dweights[-1], sum_g=sum_g),
        UnitGrad(dshortcut, sum_g=sum_g),
    )


def bias_grad(dout: Tensor, needs: tuple) -> Tensor | None:
    """(K,), the gradient of what is added per channel to the sum, where a bias asks for it."""
    if not (needs.conv.bias or needs.shortcut.bias):
        return None
    return torch.sum(dout, (0, 2, 3), dtype=statistics_dtype(dout.dtype))


def pre_activation_inference(
    x: Tensor, norm: Norm, units: Sequence[Unit], conv: Projection, shortcut: Projection, activated: bool
) -> Tensor:
    """The block with frozen statistics and without gradients: out (N, K, P, Q)."""
    a, _ = batch_norm.forward(x, norm)
    skip = _projected(a if activated else x, shortcut)
    for unit in units:
        a = conv_batch_norm(a, unit).relu_()
    return _projected(a, conv).add_(skip)
