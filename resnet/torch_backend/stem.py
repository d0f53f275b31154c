"""The stem on PyTorch's own operators: convolution, BatchNorm, ReLU and max-pool."""

from __future__ import annotations

from torch import Tensor

from resnet.operands import Stem, StemGrad, StemKept, StemOutput, Unit, UnitGrad, are_summed
from resnet.torch_backend import batch_norm
from resnet.torch_backend.convolution import convolve, convolve_backward


def stem_forward(x: Tensor, unit: Unit) -> StemOutput:
    """The stem and what its backward needs. Running statistics are updated in place."""
    y = convolve(x, unit.weight, None, unit.stride, unit.padding)
    out, tap, stats = batch_norm.forward_pool(y, unit.norm)
    return StemOutput(out, y, tap, stats)


def stem_backward(dout: Tensor, kept: StemKept, needs: Stem) -> StemGrad:
    """Gradients of `stem_forward`."""
    x, (out, y, tap, stats), (weight, stride, padding, norm, _) = kept
    grad = batch_norm.backward_pool(dout, y, out, tap, stats, norm, are_summed(norm, needs.unit.norm))
    dx, dconv = convolve_backward(grad.dx, x, weight, stride, padding, needs.x, needs.unit.weight)
    return StemGrad(dx, UnitGrad(dconv, grad.dweight, grad.dbias, grad.sum_g))
