"""The stem on PyTorch's own operators: convolution, BatchNorm, ReLU and max-pool."""

from __future__ import annotations

from torch import Tensor

from resnet.operands import (
    ChainGrad,
    DeepStem,
    DeepStemKept,
    DeepStemOutput,
    Stem,
    StemGrad,
    StemKept,
    StemOutput,
    Unit,
    are_summed,
)
from resnet.torch_backend import batch_norm
from resnet.torch_backend.block import chain_backward, chain_forward, unit_grad
from resnet.torch_backend.convolution import convolve, convolve_backward
from resnet.torch_backend.inference import conv_batch_norm, stem_inference


def stem_forward(x: Tensor, unit: Unit) -> StemOutput:
    """The stem and what its backward needs. Running statistics are updated in place."""
    y = convolve(x, unit.weight, None, unit.geometry)
    out, tap, stats = batch_norm.forward_pool(y, unit.norm)
    return StemOutput(out, y, tap, stats)


def stem_backward(dout: Tensor, kept: StemKept, needs: Stem) -> StemGrad:
    """Gradients of `stem_forward`."""
    x, (out, y, tap, stats), (weight, geometry, norm, _) = kept
    grad = batch_norm.backward_pool(dout, y, out, tap, stats, norm, are_summed(norm, needs.unit.norm))
    dx, dconv = convolve_backward(grad.dx, x, weight, geometry, needs.x, needs.unit.weight)
    return StemGrad(dx, unit_grad(grad)._replace(conv=dconv))


def deep_stem_forward(x: Tensor, units: tuple[Unit, Unit, Unit]) -> DeepStemOutput:
    """The deep stem and what its backward needs. Running statistics are updated in place."""
    *before, last = units
    a, ys, stats = chain_forward(x, before)
    out, y, tap, last_stats = stem_forward(a, last)
    return DeepStemOutput(out, (*ys, y), tap, (*stats, last_stats))


def deep_stem_backward(dout: Tensor, kept: DeepStemKept, needs: DeepStem) -> ChainGrad:
    """Gradients of `deep_stem_forward`."""
    x, (out, ys, tap, stats), units = kept
    last, flags = units[-1].norm, needs.units[-1].norm
    norm = batch_norm.backward_pool(dout, ys[-1], out, tap, stats[-1], last, are_summed(last, flags))
    dys, grad = [norm.dx], unit_grad(norm)
    del norm
    return ChainGrad(*chain_backward(dys, grad, x, ys, stats, units, needs))


def deep_stem_inference(x: Tensor, units: tuple[Unit, Unit, Unit]) -> Tensor:
    """The deep stem with frozen statistics and without gradients."""
    for unit in units[:-1]:
        x = conv_batch_norm(x, unit).relu_()
    return stem_inference(x, units[-1])
