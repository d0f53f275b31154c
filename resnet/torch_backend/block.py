"""The residual block on PyTorch's own operators, in as few passes as they allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from resnet.norm import NormGrad
from resnet.operands import (
    BlockGrad,
    KeptUnit,
    Pooled,
    Projection,
    Unit,
    UnitGrad,
    grad_inputs,
    shortcut_input,
    shortcut_reached,
)
from resnet.torch_backend import batch_norm
from resnet.torch_backend.convolution import add_projected, convolve, convolve_backward, out_size
from resnet.torch_backend.inference import conv_batch_norm, fold_shortcut


def _convolve(x: Tensor, part: Unit) -> Tensor:
    return convolve(x, part.weight, None, part.geometry)


def block_forward(
    x: Tensor, units: tuple[Unit, ...], shortcut: Unit | Projection, pooled: Pooled | None = None
) -> tuple:
    """The block in training: the fields of a `BlockKind.output`. x (N, C, H, W) and the results are channels_last.

    Running statistics are updated in place.
    """
    *units, last = units
    a, ys, stats = chain_forward(x, units)
    y = _convolve(a, last)
    into = a if a.shape == y.shape else None
    if isinstance(shortcut, Unit):
        z = _convolve(x if pooled is None else pooled.map, shortcut)
        out, last_stats, z_stats = batch_norm.forward_normed(y, last.norm, z, shortcut.norm, into)
        kept = z, z_stats
    else:
        skip = x if shortcut.weight is None else convolve(x, shortcut.weight, None, shortcut.geometry)
        out, last_stats = batch_norm.forward(y, last.norm, skip, shortcut.bias, into=into)
        kept = ()
    return out, (*ys, y), (*stats, last_stats), kept


def chain_forward(x: Tensor, units: Sequence[Unit]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(a, ys, stats) of units with a ReLU after each: the last ReLU's output, the convolutions, each norm's stats."""
    ys, stats = [], []
    for unit in units:
        ys.append(_convolve(x, unit))
        x, unit_stats = batch_norm.forward(ys[-1], unit.norm)
        stats.append(unit_stats)
    return x, ys, stats


def block_backward(dout: Tensor, kept: tuple, needs: tuple) -> BlockGrad:
    """Gradients of `block_forward` from dout (N, K, P, Q) channels_last; relu(bn(y)) is computed again from y."""
    x, (out, ys, stats, projected), units, shortcut, *_ = kept
    norm = batch_norm.backward(dout, ys[-1], out, stats[-1], units[-1].norm, shortcut=True)
    dys, grad, dshortcut, shortcut_grad = [norm.dx], unit_grad(norm), norm.g, UnitGrad(sum_g=norm.sum_g)
    del norm
    if projected and shortcut_reached(needs):
        z, z_stats = projected
        z_norm = batch_norm.backward(dshortcut, z, None, z_stats, shortcut.norm, relu=False)
        dshortcut, shortcut_grad = z_norm.dx, UnitGrad(None, z_norm.dweight, z_norm.dbias, z_norm.sum_g)
    dx, grads = chain_backward(dys, grad, x, ys, stats, units, needs)
    dconv = add_shortcut_grad(dx, dshortcut, kept, shortcut.weight, needs)
    return BlockGrad(dx, grads, shortcut_grad._replace(conv=dconv))


def add_shortcut_grad(dx: Tensor | None, dz: Tensor, kept: tuple, weight: Tensor | None, needs: tuple) -> Tensor | None:
    """dx += the gradient of x by way of the shortcut, from dz, that of what it gives. Returns the gradient of `weight`.

    `weight` is that of its convolution, None without one; dx is None where nobody needs it.
    """
    pooled, added, dweight = getattr(kept, "pooled", None), dz, None
    if weight is not None:
        flags, to = (needs.x, needs.shortcut.weight), dx if pooled is None else None
        added, dweight = convolve_backward(dz, shortcut_input(kept), weight, kept.shortcut.geometry, *flags, to)
    if needs.x and added is not dx:
        dx.add_(added if pooled is None else pool_backward(added, kept.x, pooled))
    return dweight


def unit_grad(norm: NormGrad) -> UnitGrad:
    """A unit's gradients as far as its norm gives them."""
    return UnitGrad(None, norm.dweight, norm.dbias, norm.sum_g)


def chain_backward(
    dys: list[Tensor],
    grad: UnitGrad,
    x: Tensor,
    ys: tuple[Tensor, ...],
    stats: tuple[Tensor, ...],
    units: tuple[KeptUnit, ...],
    needs: tuple,
) -> tuple[Tensor | None, tuple[UnitGrad, ...]]:
    """Gradients of x and of the units of a chain.

    Args:
        dys: the gradient of the last convolution alone. It is popped, so that its memory is free once it was read.
        grad: those of the last norm.
    """
    asked, grads, dx, dy = grad_inputs(needs), [UnitGrad()] * len(units), None, dys.pop()
    for i in reversed(range(len(units))):
        unit, flags = units[i], (asked[i], needs.units[i].weight)
        a = ys[i - 1] if i else x
        if i and any(flags):
            a = batch_norm.recompute(a, stats[i - 1])
        da, dconv = convolve_backward(dy, a, unit.weight, unit.geometry, *flags)
        grads[i] = grad._replace(conv=dconv)
        if i == 0:
            dx = da
        elif not asked[i]:
            break
        else:
            norm = batch_norm.backward(da, ys[i - 1], a, stats[i - 1], units[i - 1].norm, consume=True)
            dy, grad = norm.dx, unit_grad(norm)
            del norm
        del a, da  # before the next ones are made
    return dx, tuple(grads)


def pool_backward(dmap: Tensor, x: Tensor, pooled: Pooled) -> Tensor:
    """The gradient of x (N, C, H, W) from that of its pooled map."""
    _, size, stride = pooled
    whole = [out_size(pixels, size, stride, 0) for pixels in x.shape[2:]]
    ceil_mode = list(dmap.shape[2:]) != whole  # the last windows reach beyond the map
    dx = torch.ops.aten.avg_pool2d_backward(dmap, x, [size] * 2, [stride] * 2, [0, 0], ceil_mode, True, None)
    return dx.contiguous(memory_format=torch.channels_last)


def activations(
    x: Tensor, units: tuple[Unit, ...], shortcut: Unit | Projection, pooled: Pooled | None = None
) -> Iterator[Tensor]:
    """What each unit gives with frozen statistics, its ReLU included: the last one out (N, K, P, Q)."""
    a = x
    for unit in units[:-1]:
        a = conv_batch_norm(a, unit).relu_()
        yield a
    read, weight, bias = x if pooled is None else pooled.map, shortcut.weight, None
    if isinstance(shortcut, Projection):
        bias = shortcut.bias
    elif (folded := fold_shortcut(read, shortcut)) is not None:
        weight, bias = folded
    else:
        yield conv_batch_norm(a, units[-1]).add_(conv_batch_norm(read, shortcut)).relu_()
        return
    out = conv_batch_norm(a, units[-1], bias)
    yield (out.add_(read) if weight is None else add_projected(out, read, weight, shortcut.geometry)).relu_()


def block_inference(*block: object) -> Tensor:
    """The block with frozen statistics and without gradients, by the arguments of `activations`: out (N, K, P, Q)."""
    return deque(activations(*block), maxlen=1).pop()  # one of them is held at a time
