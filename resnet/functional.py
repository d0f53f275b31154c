"""The fused operations as functions: they check, bring the layout to channels_last, and call the operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F  # noqa: F401, a name in the source of the reference, which TorchScript compiles

from resnet import backends, ops, reference, torch_backend
from resnet.checks import check_activation, check_norm, check_shortcut, check_values_per_channel
from resnet.kernels.host.facts import Recent, known
from resnet.norm import Norm, number
from resnet.torch_backend.batch_norm import EAGER_DTYPES, are_few, eager, is_eager_as_good


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, H, W) with channels_last strides, converted only where its memory is not NHWC already.

    With one channel or one pixel both layouts are the same bytes and `contiguous` leaves the strides as they are, from
    which convolutions then conclude that their output should be NCHW; those strides are set here without a copy.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, C, H, W = x.shape
    if (C == 1 or (H == 1 and W == 1)) and not torch.compiler.is_compiling():
        x = x.as_strided(x.shape, (C * H * W, 1, C * W, C))
    return x


def batch_norm_add_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(x) + shortcut) in one pass over the activations, and one for the statistics.

    Semantics of `torch.nn.functional.batch_norm`, followed by the add and `torch.relu`; statistics and per-channel
    maths are float32 (float64 for float64). Differentiable in x, weight, bias and shortcut; once, where a kernel runs.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; any layout, channels_last is not converted.
        running_mean, running_var: (C,), updated in place when `training`; both or neither, needed otherwise.
        weight, bias: (C,) or None, of x's type or float32.
        shortcut: x's shape, type and device, or None.
        training: normalise by the statistics of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        relu: whether a ReLU ends it.

    Returns:
        (N, C, H, W) of x's type, channels_last.

    Raises:
        ValueError, TypeError: a shape, type or device that does not fit, or one value per channel in training.
        RuntimeError: on double backward through a kernel.
    """
    norm = Norm(weight, bias, running_mean, running_var, None, training, number(momentum), number(eps))
    out = unchecked(x, shortcut, norm, relu)
    if out is not None:
        return out
    tensors = x, running_mean, running_var, weight, bias, shortcut
    if ops.is_transformed_or_recorded() or any(isinstance(t, Proxy) for t in tensors) or ops.wrapper(tensors):
        return reference.batch_norm_add_relu(*tensors, training, momentum, eps, relu)
    return checked(x, shortcut, norm, relu)


batch_norm_add_relu.__wrapped__ = reference.batch_norm_add_relu  # what torch.jit.script compiles


def unchecked(x: Tensor, shortcut: Tensor | None, norm: Norm, relu: bool) -> Tensor | None:
    """`checked`, where a quick look tells that PyTorch's operators take these as they are; else None."""
    if torch.compiler.is_compiling() or not ops.is_direct() or not _needs_no_check(x, shortcut, norm):
        return None
    if backends.implementation(x) is not torch_backend:
        return None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if relu and (not norm.training or are_few(x)):
        return eager(x, norm, shortcut)
    flat = (x, shortcut, *norm, relu)
    return ops.call("batch_norm_add_relu", flat, known(flat))


def checked(
    x: Tensor,
    shortcut: Tensor | None,
    norm: Norm,
    relu: bool,
    name: str = "batch_norm",
    recent: Recent | None = None,
) -> Tensor:
    """relu(batch_norm(x) + shortcut), for arguments that a user gave: see `batch_norm_add_relu`.

    Errors call the norm by `name`. What `recent` knows to have passed is not checked again.

    The batch is counted once nothing can be refused any more: where the momentum is made of the count, here and in
    `unchecked`, as the operator wants it to be counted already.
    """
    flat, direct = (x, shortcut, *norm, relu), not torch.compiler.is_compiling() and ops.is_direct()
    found = recent.known(flat) if direct and recent is not None else None
    if found is not None and _CHECKED in found.facts.passed:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return ops.call("batch_norm_add_relu", flat, found)
    check_activation(x, None)
    check_norm(norm, x, x.shape[1], name)
    check_values_per_channel(norm, tuple(x.shape), name)
    if shortcut is not None:
        check_activation(shortcut, x.shape[1], "shortcut")
        check_shortcut(shortcut, x)
        shortcut = channels_last(shortcut)
    x = channels_last(x)
    backend = None
    if not torch.compiler.is_compiling():  # else the operator asks for the backend, each time that it runs
        backend = backends.implementation(x)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if backend is torch_backend and relu and is_eager_as_good(x, norm):
        return eager(x, norm, shortcut)
    if x is not flat[0] or shortcut is not flat[1]:
        flat, found = (x, shortcut, *norm, relu), None
    elif found is not None:
        found.facts.passed.add(_CHECKED)
    if found is None and direct:
        found = known(flat)
    return ops.call("batch_norm_add_relu", flat, found)


_CHECKED = ("batch_norm_add_relu",)


def _needs_no_check(x: Tensor, shortcut: Tensor | None, norm: Norm) -> bool:
    """Whether PyTorch's operators take these as they are, and the checks would find nothing: told by a quick look.

    It knows tensors of one type, float32 or float64, that are on the CPU and channels_last, as most are there.
    """
    if type(x) is not Tensor or not x.is_cpu or norm.running_mean is None or norm.running_var is None:
        return False
    shape, dtype = x.shape, x.dtype
    if norm.conv_bias is not None or norm.group:  # of which PyTorch's operators know nothing
        return False
    if dtype not in EAGER_DTYPES or len(shape) != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if shortcut is not None and not (
        type(shortcut) is Tensor
        and shortcut.is_cpu
        and shortcut.shape == shape
        and shortcut.dtype is dtype
        and shortcut.is_contiguous(memory_format=torch.channels_last)
    ):
        return False
    N, C, H, W = shape
    if N == 0 or C < 2 or H * W < 2:  # empty, or of strides that channels_last leaves open
        return False
    if type(norm.momentum) is not float or type(norm.eps) is not float or norm.eps <= 0:  # refused, or to be looked at
        return False
    channels = shape[1:2]
    for v in norm[:4]:
        if v is not None and not (
            isinstance(v, Tensor) and v.dtype is dtype and v.is_cpu and v.shape == channels and v.is_contiguous()
        ):
            return False
    for count in (norm.num_batches_tracked, norm.counted):
        if count is not None and not (
            isinstance(count, Tensor) and count.is_cpu and count.dtype is torch.int64 and count.dim() == 0
        ):
            return False
    return True
