"""BatchNorm + add + ReLU on the Triton kernels. Same functions as `torch_batch_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import batch_norm as kernels
from kernels import batch_norm_max_pool as pool_kernels
from resnet.norm import Norm, NormGrad, statistics_dtype


def forward(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, stats): see `torch_batch_norm.forward`."""
    stats = _stats(x, norm)
    return kernels.apply(x, stats, shortcut, shortcut_shift=shortcut_shift, relu=relu, out=into), stats


def _stats(x: Tensor, norm: Norm) -> Tensor:
    if norm.training:
        return kernels.statistics(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.momentum,
            norm.eps,
            norm.conv_bias,
        )
    return kernels.freeze(
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.eps,
        norm.conv_bias,
        statistics_dtype(x.dtype),
    )


def recompute(x: Tensor, stats: Tensor) -> Tensor:
    """relu(x * scale + shift), bit-equal to what `forward` gave."""
    return kernels.apply(x, stats)


def backward(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    norm: Norm,
    relu: bool = True,
    shortcut: bool = False,
    consume: bool = False,
) -> NormGrad:
    """Gradients of `forward`, as `torch_batch_norm.backward`. Without a shortcut x gives out's sign."""
    mask = out if shortcut else None
    dweight = None if norm.weight is None else torch.empty_like(norm.weight)
    dbias = None if norm.bias is None else torch.empty_like(norm.bias)
    sums = kernels.backward_reduce(dout, x, mask, stats, relu, dweight, dbias)
    g = torch.empty_like(x, memory_format=torch.channels_last) if shortcut and relu else None
    dx = kernels.backward_apply(
        dout, x, mask, stats, sums if norm.training else None, relu, g, dx=dout if consume else None
    )
    return NormGrad(dx, dweight, dbias, sums[0], g)


def forward_pool(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """(out, tap, stats): see `torch_batch_norm.forward_pool`."""
    stats = _stats(x, norm)
    return *pool_kernels.apply_pool(x, stats), stats


def backward_pool(dout: Tensor, x: Tensor, out: Tensor, tap: Tensor, stats: Tensor, norm: Norm) -> NormGrad:
    """Gradients of `forward_pool`."""
    dweight = None if norm.weight is None else torch.empty_like(norm.weight)
    dbias = None if norm.bias is None else torch.empty_like(norm.bias)
    sums = pool_kernels.backward_reduce(dout, x, out, tap, stats, dweight, dbias)
    dx = pool_kernels.backward_apply(dout, x, out, tap, stats, sums if norm.training else None)
    return NormGrad(dx, dweight, dbias, sums[0], None)
