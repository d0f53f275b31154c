"""The stem on the Triton kernels: its convolution, then BatchNorm, ReLU and max-pool in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.kernels.conv_grad_weight import conv_grad_weight
from resnet.kernels.conv_grad_weight_max_pool import MAX_AXIS, conv_grad_weight_max_pool
from resnet.kernels.host.arguments import check_images
from resnet.norm import empty_grads
from resnet.operands import (
    ChainGrad,
    DeepStem,
    DeepStemKept,
    DeepStemOutput,
    KeptUnit,
    Stem,
    StemGrad,
    StemKept,
    StemOutput,
    Unit,
    UnitGrad,
    are_summed,
    grad_inputs,
    trained_dtype,
)
from resnet.torch_backend.convolution import chain_shapes, convolve_backward
from resnet.triton_backend import convolution
from resnet.triton_backend.batch_norm import applied_sums, frozen_stats, norm_stats
from resnet.triton_backend.block import chain_backward, chain_forward


def stem_forward(x: Tensor, unit: Unit) -> StemOutput:
    """See `torch_backend.stem_forward`."""
    y, moments, _, _ = convolution.forward(x, *convolution.as_read(unit)[:2], unit.norm.training)
    check_images(y)  # before the running statistics change
    stats = norm_stats(y, moments, unit.norm)
    out, tap = batch_norm_max_pool(y, stats)
    return StemOutput(out, y, tap, stats)


def stem_backward(dout: Tensor, kept: StemKept, needs: Stem) -> StemGrad:
    """See `torch_backend.stem_backward`. dy is written only where something reads it."""
    x, (out, y, tap, stats), unit = kept
    dtype = trained_dtype(unit)
    weight, geometry, _, _ = unit = convolution.as_read(unit)
    grad, used = _pooled_norm_grad(dout, out, y, tap, stats, unit, needs.unit)
    tf32, (stride, padding, dilation) = convolution.tf32(x), geometry
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
        return convolve_backward(stored_dy(), x, weight, geometry, False, True)[1].to(dtype)

    # dy is stored where grad-input needs it, where the window is too large or too sparse for the fused product, and for
    # float64: the compiler refuses the fused product of float64 at some shapes.
    stored = needs.x or max(weight.shape[2:]) > MAX_AXIS or dilation > 1 or x.dtype == torch.float64
    if stored:
        dy = stored_dy()
    if needs.x:
        dx = convolution.grad_input(dy, x, *unit[:2])
    if needs.unit.weight and stored:
        dconv = convolution.grad_weight(dy, x, *unit[:2], dtype=dtype)
    elif needs.unit.weight:
        variants = {"triton": fused, "epilogue": epilogue, "pytorch": pytorch}
        dconv = convolution.run_picked("grad_weight", y, x.shape[1], weight, geometry, ("max_pool", dtype), **variants)
    return StemGrad(dx, grad._replace(conv=dconv))


def _pooled_norm_grad(
    dout: Tensor, out: Tensor, y: Tensor, tap: Tensor, stats: Tensor, unit: KeptUnit, needs: Unit
) -> tuple[UnitGrad, Tensor | None]:
    """Gradients of the norm before the pool, and the sums as its apply pass takes them, if anything asks for them."""
    if not are_summed(unit.norm, needs.norm):
        return UnitGrad(), None
    dweight, dbias, zeros = empty_grads(unit.norm)
    sums = batch_norm_max_pool_backward_reduce(dout, y, out, tap, stats, dweight, dbias, zeros)
    return UnitGrad(None, dweight, dbias, sums[0], zeros), applied_sums(sums, y, unit.norm)


def deep_stem_forward(x: Tensor, units: tuple[Unit, Unit, Unit]) -> DeepStemOutput:
    """See `torch_backend.deep_stem_forward`."""
    units = tuple(map(convolution.as_read, units))
    size = chain_shapes(x.shape, units)[-1]
    check_images(torch.empty(size, device="meta", memory_format=torch.channels_last))  # before any statistics change
    ys, stats = chain_forward(x, units)
    out, tap = batch_norm_max_pool(ys[-1], stats[-1])
    return DeepStemOutput(out, ys, tap, stats)


def deep_stem_backward(dout: Tensor, kept: DeepStemKept, needs: DeepStem) -> ChainGrad:
    """See `torch_backend.deep_stem_backward`."""
    x, (out, ys, tap, stats), units = kept
    units, dys = tuple(map(convolution.as_read, units)), []
    grad, used = _pooled_norm_grad(dout, out, ys[-1], tap, stats[-1], units[-1], needs.units[-1])
    if grad_inputs(needs)[-1] or needs.units[-1].weight:
        dys.append(batch_norm_max_pool_backward_apply(dout, ys[-1], out, tap, stats[-1], used))

    def grad_input(dy: Tensor) -> Tensor:
        return convolution.grad_input(dy, x, *units[0][:2])

    return ChainGrad(*chain_backward(dys, grad, x, ys, stats, units, needs, grad_input))


def deep_stem_inference(x: Tensor, units: tuple[Unit, Unit, Unit]) -> Tensor:
    """See `torch_backend.deep_stem_inference`."""
    *before, last = map(convolution.as_read, units)
    for unit in before:
        x, _ = convolution.inference(x, unit, relu=True)
    return stem_inference(x, last)


def stem_inference(x: Tensor, unit: Unit) -> Tensor:
    """See `torch_backend.stem_inference`. The pool is ours: PyTorch's takes three times as long for such a map."""
    y = convolution.forward(x, *convolution.as_read(unit)[:2], moments=False).y
    return batch_norm_max_pool(y, frozen_stats(unit.norm, y.dtype))[0]
