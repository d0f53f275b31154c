"""What one BatchNorm brings to a fused operation, and what its backward gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet.collectives import group_of
from resnet.schema import Alike, Updated


class Norm(NamedTuple):
    """A BatchNorm over C channels, with the semantics of `torch.nn.functional.batch_norm`.

    `conv_bias` belongs to the convolution that made the input and was left out of it: with batch statistics it only
    shifts the running mean (its gradient is zero), with frozen ones it is part of the shift.

    `num_batches_tracked`, in which this batch is counted already, makes the running statistics averages over as many
    batches. It stays a tensor: a number would have to come from the device, and a CUDA graph would keep it. `counted`
    is a count that the operator adds this batch to. There is one of the two at most.

    `group` names a process group. With batch statistics those of all its processes are taken, as of one batch.
    """

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    running_mean: Updated  # (C,), when training
    running_var: Updated  # (C,), when training
    conv_bias: Tensor | None  # (C,)
    training: bool  # normalise by batch statistics
    momentum: float
    eps: float
    num_batches_tracked: Tensor | None = None  # () int64: the momentum is 1 over it, and `momentum` is not used
    counted: Updated = None  # a count of any type: 1 is added when training
    group: str = ""  # when training; "" for this process alone

    def kept(self) -> KeptNorm:
        return KeptNorm(self.weight, self.bias, self.conv_bias, self.training, self.eps, self.group)


class KeptNorm(NamedTuple):
    """What backward asks of a `Norm`: the statistics that were used are kept beside it."""

    weight: Tensor | None  # (C,)
    bias: Alike  # (C,)
    conv_bias: Alike  # (C,)
    training: bool
    eps: float
    group: str = ""


VECTORS = Norm._fields[:5]  # (C,) each, where they are there


class NormGrad(NamedTuple):
    dx: Tensor  # (N, C, H, W)
    dweight: Tensor | None  # (C,)
    dbias: Tensor | None  # (C,)
    sum_g: Tensor | None  # (C,), in the type of the statistics: the gradient of whatever was added per channel
    g: Tensor | None  # (N, C, H, W): dout where the ReLU passes it, for the shortcut; None where that is dout itself
    conv_bias: Tensor | None = None  # (C,) zeros, or None: see `UnitGrad`


def held(module: nn.Module, kind: str, name: str) -> Tensor | None:
    """getattr(module, name) for what is mostly found among the module's "_parameters" or "_buffers"."""
    found = module.__dict__[kind]
    return found[name] if name in found else getattr(module, name)


_SETTINGS = ("training", "track_running_stats", "momentum", "eps")


def _settings_of(bn: nn.Module) -> dict[str, object]:
    """The `_SETTINGS` of a norm, as far as it has them, for torch.compile: on Python 3.13.0 it does not notice that an
    item of `__dict__` has changed (CPython's issue 125608).
    """
    return {name: getattr(bn, name) for name in _SETTINGS if hasattr(bn, name)}


def number(setting: object) -> object:
    """A momentum or an eps as `F.batch_norm` takes it: a tensor () without a gradient stands for its value."""
    if isinstance(setting, Tensor) and setting.dim() == 0 and not setting.requires_grad:
        return setting.item()
    return setting


def norm_of(bn: nn.Module, conv_bias: Tensor | None = None) -> Norm:
    """The settings with which `nn.BatchNorm2d.forward` would call `F.batch_norm` now; changes nothing.

    Those of an `nn.SyncBatchNorm` are the same, and the group of processes with which it would share its statistics. A
    `FrozenBatchNorm2d` is a norm in evaluation, whatever its mode; those of transformers have the usual eps and do not
    say it.

    This batch is not counted yet, in `num_batches_tracked` either.
    """
    own = _settings_of(bn) if torch.compiler.is_compiling() else bn.__dict__
    if "momentum" not in own:
        vectors = [held(bn, "_buffers", name) for name in VECTORS[:4]]
        return Norm(*vectors, conv_bias, False, 0.0, number(own.get("eps", 1e-5)))
    training, momentum, eps, count, counted = own["training"], own["momentum"], own["eps"], None, None
    mean, var = held(bn, "_buffers", "running_mean"), held(bn, "_buffers", "running_var")
    tracked = not training or own["track_running_stats"]
    if training and tracked:
        counted = held(bn, "_buffers", "num_batches_tracked")
    if momentum is None:
        momentum, count, counted = 0.0, counted, None
    elif type(momentum) is not float:
        momentum = number(momentum)
    if type(eps) is not float:
        eps = number(eps)
    return Norm(
        held(bn, "_parameters", "weight"),
        held(bn, "_parameters", "bias"),
        mean if tracked else None,
        var if tracked else None,
        conv_bias,
        training or mean is None,
        momentum,
        eps,
        count,
        counted,
        group_of(bn) if training and type(bn) is nn.SyncBatchNorm else "",
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Per-channel maths is float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_grads(norm: KeptNorm) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Uninitialised gradients of a norm's weight and bias and, under batch statistics, of the convolution's bias."""
    conv_bias = norm.conv_bias if norm.training else None
    return tuple(None if v is None else v.new_empty(v.shape) for v in (norm.weight, norm.bias, conv_bias))
