"""The residual block on the Triton kernels.

A block of two units launches, in this order (training, identity shortcut; the passes over an activation of each):

    forward   conv1 + statistics 2, conv2 with bn1 and ReLU in its prologue + statistics 2, bn2 + add + ReLU 3
    backward  ReLU' + bn2 reduce 4, bn2 apply' 3, conv2 grad-input + ReLU' + bn1 reduce 3, conv2 grad-weight 2,
              bn1 apply' 3, conv1 grad-input + shortcut's gradient 3, conv1 grad-weight 2

Where the block before is linked to this one (`BlockBefore`), conv1 grad-input also does that one's reduce, in 5 passes.
A third unit launches what conv2 does. A shortcut's convolution is part of conv1's launches where both have the same
input and stride and as many channels; its own norm is part of the last norm's. A pool before it is PyTorch's, whose
gradient conv1 grad-input adds. A small kernel after every reduction merges its partials. Each convolution is one of up
to three ways: see `convolution`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import NormedShortcut, batch_norm_backward_reduce, merge_sums
from resnet.kernels.conv_forward import Shortcut
from resnet.norm import empty_grads
from resnet.operands import (
    BlockBefore,
    BlockGrad,
    KeptUnit,
    Pooled,
    Projection,
    Unit,
    UnitGrad,
    grad_inputs,
    shortcut_input,
    shortcut_reached,
    trained_dtype,
)
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import applied_sums, norm_stats


def rides(shortcut: Unit | Projection, first: Unit) -> bool:
    """Whether the shortcut is a convolution that may be part of the first one's launch, of the same input."""
    weight = shortcut.weight
    return weight is not None and shortcut.geometry[0] == first.geometry[0] and weight.shape[0] == first.weight.shape[0]


def block_forward(
    x: Tensor, units: tuple[Unit, ...], shortcut: Unit | Projection, pooled: Pooled | None = None
) -> tuple:
    """See `torch_backend.block_forward`."""
    (first, *rest), shortcut = map(convolution.as_read, units), convolution.as_read(shortcut)
    normed = isinstance(shortcut, Unit)
    z_training = normed and shortcut.norm.training
    riding = shortcut.weight if pooled is None and rides(shortcut, first) else None
    y, moments, z, z_moments = convolution.forward(
        x,
        *first[:2],
        first.norm.training,
        shortcut=riding,
        shortcut_moments=riding is not None and z_training,
    )
    if riding is None and shortcut.weight is not None:
        read = x if pooled is None else pooled.map
        z, z_moments, *_ = convolution.forward(read, shortcut.weight, shortcut.geometry, z_training)
    ys, stats = chain_forward(y, rest, norm_stats(y, moments, first.norm))
    if normed:
        z_stats = norm_stats(z, z_moments, shortcut.norm)
        out = batch_norm_add_relu(ys[-1], stats[-1], z, z_stats[2], z_stats[3])
        return out, ys, stats, (z, z_stats)
    out = batch_norm_add_relu(ys[-1], stats[-1], x if z is None else z, shortcut_shift=_dense(shortcut.bias))
    return out, ys, stats, ()


def chain_forward(
    x: Tensor, units: Sequence[Unit], before: Tensor | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The convolutions of a chain of units, whose weights are as the kernels read them, and the stats of their norms.

    With `before`, stats (4, C), x is itself the convolution of a unit, and both have its results first.
    """
    ys, stats = ([], []) if before is None else ([x], [before])
    for unit in units:
        x, moments, *_ = convolution.forward(x, *unit[:2], unit.norm.training, stats[-1] if stats else None)
        ys.append(x)
        stats.append(norm_stats(x, moments, unit.norm))
    return tuple(ys), tuple(stats)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def block_backward(
    dout: Tensor, kept: tuple, needs: tuple, before: BlockBefore | None = None, partial: Tensor | None = None
) -> BlockGrad:
    """See `torch_backend.block_backward`.

    Args:
        before: of the block whose output x is, where that is linked to this one.
        partial: from the block after, where this one is linked to it; dout is g then.
    """
    x, (out, ys, stats, projected), units, shortcut, *pooled = kept
    units, shortcut = list(map(convolution.as_read, units)), convolution.as_read(shortcut)
    asked, last = grad_inputs(needs), len(units) - 1
    normed, z_vectors = None, (None,) * 3
    if projected:
        z_vectors = empty_grads(shortcut.norm)
        normed = NormedShortcut(*projected, *z_vectors)
    vectors, dys = empty_grads(units[last].norm), []
    needs_dy, needs_dshortcut = asked[last] or needs.units[last].weight, needs.x or needs.shortcut.weight
    if partial is None:
        g = torch.empty_like(dout) if needs_dy or needs_dshortcut else None
        sums = batch_norm_backward_reduce(dout, ys[last], out, stats[last], True, *vectors, shortcut=normed, g=g)
    else:
        g, sums = dout, merge_sums(partial, *vectors, *(z_vectors if projected else ()))
    shortcut_grad = UnitGrad(None, *z_vectors[:2], sums[0], z_vectors[2])
    used, z_used = applied_sums(sums, dout, units[last].norm), None
    if projected and shortcut_reached(needs):
        z_used = applied_sums(sums, dout, shortcut.norm, plane=2)
    dz = torch.empty_like(dout) if projected and needs_dshortcut else None
    if needs_dy or dz is not None:
        into = None if dz is None or g is dout else g  # which nothing else reads then
        dys.append(batch_norm_backward_apply(g, ys[last], stats[last], used, False, into, normed, z_used, dz))
    g = g if dz is None else dz

    def grad_input(dy: Tensor) -> Tensor:
        added = convolution.pooled_grad(g, shortcut.weight, x, *pooled) if pooled else (shortcut, g)
        return convolution.grad_input_add(dy, *units[0][:2], x, *added, before)

    grad, handed = UnitGrad(None, *vectors[:2], sums[0], vectors[2]), None
    dx, grads = chain_backward(dys, grad, x, ys, stats, units, needs, grad_input)
    if before is not None:
        dx, handed = dx
    if needs.shortcut.weight:
        read, conv = shortcut_input(kept), (shortcut.weight, shortcut.geometry)
        dconv = convolution.grad_weight(g, read, *conv, dtype=trained_dtype(shortcut))
        shortcut_grad = shortcut_grad._replace(conv=dconv)
    return BlockGrad(dx, grads, shortcut_grad, handed)


def chain_backward(
    dys: list[Tensor],
    grad: UnitGrad,
    x: Tensor,
    ys: tuple[Tensor, ...],
    stats: tuple[Tensor, ...],
    units: Sequence[KeptUnit],
    needs: tuple,
    grad_input: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, tuple[UnitGrad, ...]]:
    """Gradients of x and of the units of a chain, whose weights are as the kernels read them.

    Args:
        dys: the gradient of the last convolution, which is taken out; nothing where nobody asks for it.
        grad: those of the last norm.
        grad_input: of the first convolution's dy, gives dx.
    """
    asked, grads, dx = grad_inputs(needs), [UnitGrad()] * len(units), None
    dy = dys.pop() if dys else None
    for i in reversed(range(len(units))):
        unit, grads[i] = units[i], grad
        if i and asked[i]:
            vectors = empty_grads(units[i - 1].norm)
            inner, sums = convolution.grad_input_mask(dy, *unit[:2], ys[i - 1], stats[i - 1], vectors)
            grad, used = UnitGrad(None, *vectors[:2], sums[0], vectors[2]), applied_sums(sums, inner, units[i - 1].norm)
        elif i == 0 and needs.x:
            dx = grad_input(dy)
        if needs.units[i].weight:
            before = (ys[i - 1], *unit[:2], stats[i - 1]) if i else (x, *unit[:2])
            grads[i] = grads[i]._replace(conv=convolution.grad_weight(dy, *before, dtype=trained_dtype(unit)))
        if i == 0 or not asked[i]:
            break
        if asked[i - 1] or needs.units[i - 1].weight:
            dy = batch_norm_backward_apply(inner, ys[i - 1], stats[i - 1], used, dx=inner)
    return dx, tuple(grads)


def activations(
    x: Tensor, units: tuple[Unit, ...], shortcut: Unit | Projection, pooled: Pooled | None = None
) -> Iterator[Tensor]:
    """See `torch_backend.block.activations`. A launch for each convolution, in which the shortcut's rides if it can."""
    (first, *rest), shortcut = map(convolution.as_read, units), convolution.as_read(shortcut)
    skip, riding = x, None
    if isinstance(shortcut, Unit):
        skip, _ = convolution.inference(x if pooled is None else pooled.map, shortcut)
    elif rides(shortcut, first):
        riding = Shortcut(shortcut.weight, _dense(shortcut.bias))
    elif shortcut.weight is not None:
        skip = convolution.forward_add(x, shortcut)
    a, z = convolution.inference(x, first, shortcut=riding, relu=True)
    yield a
    if z is not None:
        skip = z
    *middle, last = rest
    for unit in middle:
        a, _ = convolution.inference(a, unit, relu=True)
        yield a
    yield convolution.inference(a, last, skip=skip, relu=True)[0]


def block_inference(*block: object) -> Tensor:
    """See `torch_backend.block_inference`."""
    return deque(activations(*block), maxlen=1).pop()  # one of them is held at a time
