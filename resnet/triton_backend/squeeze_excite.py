"""The chain and the tail of a block with squeeze-and-excitation on the Triton kernels.

Between both PyTorch computes the gates. A chain of two units and its tail launch, in this order (training, identity
shortcut; the passes over an activation of each):

    forward   conv1 + statistics 2, conv2 with bn1 and ReLU in its prologue + statistics 2, squeeze 1,
              bn2 + gate + add + ReLU 3
    backward  ReLU' + gate' and each image's sums 4, bn2' with the gate and the squeeze 3,
              conv2 grad-input + ReLU' + bn1 reduce 3, conv2 grad-weight 2, bn1 apply' 3,
              conv1 grad-input + shortcut's gradient 3, conv1 grad-weight 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.kernels.batch_norm_excite import batch_norm_excite
from resnet.kernels.batch_norm_excite_backward import batch_norm_excite_backward
from resnet.kernels.batch_norm_squeeze import batch_norm_squeeze
from resnet.kernels.batch_norm_squeeze_backward import (
    batch_norm_squeeze_backward_apply,
    batch_norm_squeeze_backward_reduce,
)
from resnet.kernels.host.arguments import check_images
from resnet.norm import empty_grads
from resnet.operands import (
    POINTWISE,
    ChainGrad,
    ExciteGrad,
    ExciteKept,
    Projection,
    Unit,
    UnitGrad,
    are_summed,
    grad_inputs,
)
from resnet.torch_backend.convolution import chain_shapes
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import applied_sums
from resnet.triton_backend.block import chain_backward, chain_forward


def squeeze_forward(x: Tensor, units: tuple[Unit, ...], relu: bool, added: bool) -> tuple:
    """See `torch_backend.squeeze_forward`."""
    units = tuple(map(convolution.as_read, units))
    size = chain_shapes(x.shape, units)[-1]
    check_images(torch.empty(size, device="meta", memory_format=torch.channels_last))  # before any statistics change
    (*ys, y), (*inner_stats, stats) = chain_forward(x, units)
    return y, *batch_norm_squeeze(y, stats, relu), stats, tuple(ys), tuple(inner_stats)


def squeeze_backward(g: Tensor, dpooled: Tensor, dlink: Tensor, kept: tuple, needs: tuple) -> ChainGrad:
    """See `torch_backend.squeeze_backward`."""
    x, ys, stats, link, units, relu, added = kept
    units, y, grad, used, dys = tuple(map(convolution.as_read, units)), ys[-1], UnitGrad(), None, []
    if are_summed(units[-1].norm, needs.units[-1].norm):
        dweight, dbias, zeros = empty_grads(units[-1].norm)
        sums = batch_norm_squeeze_backward_reduce(dlink, link, dpooled, y, dweight, dbias, zeros)
        grad, used = UnitGrad(None, dweight, dbias, sums[0], zeros), applied_sums(sums, y, units[-1].norm)
    if grad_inputs(needs)[-1] or needs.units[-1].weight:
        dys.append(batch_norm_squeeze_backward_apply(g, y, stats[-1], dlink, dpooled, used, relu))

    def grad_input(dy: Tensor) -> Tensor:
        if added:
            return convolution.grad_input_add(dy, *units[0][:2], x, Projection(None, None, POINTWISE), g)
        return convolution.grad_input(dy, x, *units[0][:2])

    return ChainGrad(*chain_backward(dys, grad, x, ys, stats, units, needs, grad_input))


def excite_forward(
    y: Tensor, stats: Tensor, link: Tensor, gate: Tensor, shortcut: Tensor | None, inner_relu: bool, relu: bool
) -> Tensor:
    """See `torch_backend.excite_forward`."""
    return batch_norm_excite(y, stats, gate, shortcut, inner_relu, relu)


def excite_backward(dout: Tensor, kept: ExciteKept) -> ExciteGrad:
    """See `torch_backend.excite_backward`."""
    return ExciteGrad(*batch_norm_excite_backward(dout, kept.y, kept.out, kept.stats, kept.gate, kept.inner_relu))
