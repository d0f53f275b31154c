"""The stem on the Triton kernels: its convolution, then BatchNorm, ReLU and max-pool in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool, check_pooled
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.kernels.conv_grad_input import conv_grad_input
from resnet.kernels.conv_grad_weight import conv_grad_weight
from resnet.kernels.conv_grad_weight_max_pool import MAX_WINDOW, conv_grad_weight_max_pool
from resnet.kernels.host.shapes import conv_shape
from resnet.norm import empty_grads
from resnet.operands import Stem, StemGrad, StemKept, StemOutput, Unit, UnitGrad, are_summed, trained_dtype
from resnet.torch_backend.convolution import convolve_backward
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import applied_sums, frozen_stats, norm_stats


def stem_forward(x: Tensor, unit: Unit) -> StemOutput:
    """See `torch_backend.stem_forward`."""
    y, moments, _, _ = convolution.forward(x, *convolution.as_read(unit)[:3], unit.norm.training)
    check_pooled(y)  # before the running statistics change
    stats = norm_stats(y, moments, unit.norm)
    out, tap = batch_norm_max_pool(y, stats)
    return StemOutput(out, y, tap, stats)


def stem_backward(dout: Tensor, kept: StemKept, needs: Stem) -> StemGrad:
    """See `torch_backend.stem_backward`. dy is written only where something reads it."""
    x, (out, y, tap, stats), unit = kept
    dtype = trained_dtype(unit)
    weight, stride, padding, norm, _ = unit = convolution.as_read(unit)
    grad, used = UnitGrad(), None
    if are_summed(norm, needs.unit.norm):
        dweight, dbias, zeros = empty_grads(norm)
        sums = batch_norm_max_pool_backward_reduce(dout, y, out, tap, stats, dweight, dbias, zeros)
        grad, used = UnitGrad(None, dweight, dbias, sums[0], zeros), applied_sums(sums, y, norm)
    tf32 = convolution.tf32(x)
    dx = dconv = None

    def fused() -> Tensor:
        return conv_grad_weight_max_pool(
            dout, out, tap, y, stats, used, x, weight.shape[2:], stride, padding, tf32, dtype
        )

    def stored_dy() -> Tensor:
        return batch_norm_max_pool_backward_apply(dout, y, out, tap, stats, used)

    def epilogue() -> Tensor:
        return conv_grad_weight(stored_dy(), x, weight.shape[2:], stride, padding, tf32=tf32, dtype=dtype)

    def pytorch() -> Tensor:
        return convolve_backward(stored_dy(), x, weight, stride, padding, False, True)[1].to(dtype)

    # dy is stored where grad-input needs it, where the window is too large for the fused product, and for float64: the
    # compiler refuses the fused product of float64 at some shapes.
    stored = needs.x or max(weight.shape[2:]) > MAX_WINDOW or x.dtype == torch.float64
    if stored:
        dy = stored_dy()
    if needs.x:
        dx = convolution.run_picked(
            "grad_input",
            dy,
            weight,
            (stride,),
            epilogue=lambda: conv_grad_input(dy, weight, conv_shape(x, weight, stride, padding), tf32=tf32),
            pytorch=lambda: convolve_backward(dy, x, weight, stride, padding, True, False)[0],
        )
    if needs.unit.weight and stored:
        dconv = convolution.grad_weight(dy, x, *unit[:3], dtype=dtype)
    elif needs.unit.weight:
        key = (stride, "max_pool", dtype)
        dconv = convolution.run_picked("grad_weight", y, weight, key, triton=fused, epilogue=epilogue, pytorch=pytorch)
    return StemGrad(dx, grad._replace(conv=dconv))


def stem_inference(x: Tensor, unit: Unit) -> Tensor:
    """See `torch_backend.stem_inference`. The pool is ours: PyTorch's takes three times as long for such a map."""
    y = convolution.forward(x, *convolution.as_read(unit)[:3], moments=False).y
    return batch_norm_max_pool(y, frozen_stats(unit.norm, y.dtype))[0]
