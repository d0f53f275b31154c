"""BatchNorm, the add and ReLU on the Triton kernels. Same functions as `torch_backend.batch_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.collectives import merge_sums
from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.batch_norm_finalize import batch_norm_finalize, batch_norm_freeze, batch_norm_merge
from resnet.kernels.batch_norm_statistics import Moments, batch_norm_statistics
from resnet.norm import VECTORS, KeptNorm, Norm, NormGrad, empty_grads, statistics_dtype
from resnet.torch_backend.batch_norm import stats_of_moments


def forward(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out, stats): see `torch_backend.batch_norm.forward`."""
    stats = norm_stats(x, batch_norm_statistics(x) if norm.training else None, norm)
    return batch_norm_add_relu(x, stats, shortcut, shortcut_shift=shortcut_shift, relu=relu), stats


def dense(norm: Norm) -> Norm:
    """The norm with its vectors as the kernels read them: copies of those that are views with strides."""
    return norm._replace(**{name: v.contiguous() for name, v in zip(VECTORS, norm) if v is not None})


def batch_stats(moments: Moments, norm: Norm) -> Tensor:
    """stats (4, C) from the batch's moments; updates the running statistics in place.

    With a group the processes' moments are merged by PyTorch's operators. How many rows the others have is not known
    on the host, where a launch would need it.
    """
    if norm.group:
        mean, m2, rest = batch_norm_merge(*moments)
        mean = mean.double() + rest.nan_to_num(0.0, 0.0, 0.0)  # its digits count; that of an infinite mean is NaN
        return stats_of_moments(mean, m2 / moments.M, moments.M, norm)
    vectors, counted = dense(norm), norm.counted
    if counted is not None and (counted.shape, counted.dtype, counted.device) != ((), torch.int64, moments[0].device):
        counted.add_(1)
        counted = None
    stats = batch_norm_finalize(
        *moments,
        vectors.weight,
        vectors.bias,
        vectors.running_mean,
        vectors.running_var,
        norm.momentum,
        norm.eps,
        vectors.conv_bias,
        norm.num_batches_tracked,
        counted,
    )
    for given, updated in ((norm.running_mean, vectors.running_mean), (norm.running_var, vectors.running_var)):
        if given is not updated:
            given.copy_(updated)
    return stats


def frozen_stats(norm: Norm, dtype: torch.dtype) -> Tensor:
    """stats (4, C) from the running statistics, for activations of `dtype`."""
    norm = dense(norm)
    return batch_norm_freeze(
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.eps,
        norm.conv_bias,
        statistics_dtype(dtype),
    )


def norm_stats(y: Tensor, moments: Moments | None, norm: Norm) -> Tensor:
    """stats (4, K) of y's norm; with batch statistics the running ones are updated."""
    return frozen_stats(norm, y.dtype) if moments is None else batch_stats(moments, norm)


def applied_sums(sums: Tensor, x: Tensor, norm: KeptNorm, plane: int = 1) -> Tensor | None:
    """The sums over x's rows as the apply pass of a norm takes them: None with frozen statistics.

    It reads sum g and the sum in `plane`. With a group these two are those of all its processes.
    """
    if not norm.training or not norm.group:
        return sums if norm.training else None
    read, merged = slice(0, plane + 1, plane), sums.clone()
    merged[read] = merge_sums(sums[read], x.numel() // x.shape[1], norm.group)
    return merged


def backward(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    norm: KeptNorm,
    relu: bool = True,
    shortcut: bool = False,
) -> NormGrad:
    """Gradients of `forward`, as `torch_backend.batch_norm.backward`. Without a shortcut x gives out's sign."""
    dweight, dbias, zeros = empty_grads(norm)
    g = torch.empty_like(x, memory_format=torch.channels_last) if shortcut and relu else None
    sums = batch_norm_backward_reduce(dout, x, out if shortcut else None, stats, relu, dweight, dbias, zeros, g=g)
    if g is not None:
        dout, relu = g, False
    dx = batch_norm_backward_apply(dout, x, stats, applied_sums(sums, x, norm), relu)
    return NormGrad(dx, dweight, dbias, sums[0], g, zeros)
