"""`FusedBatchNorm2d`: an `nn.BatchNorm2d` that adds a shortcut and ends in a ReLU, for blocks written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from resnet import ops
from resnet.checks import check_activation, check_shortcut
from resnet.functional import channels_last, checked, unchecked
from resnet.fusable import passed_over
from resnet.norm import VECTORS, Norm, norm_of
from resnet.reference import BatchNormAddRelu2d, batch_norm_add_relu  # noqa: F401, in the source that TorchScript compiles


class FusedBatchNorm2d(BatchNormAddRelu2d):
    """relu(batch_norm(x) + shortcut) in one pass over the activations, and one for the statistics.

    An `nn.BatchNorm2d` in all its modes, with the same parameters, buffers and `state_dict`: what follows it in a block
    is part of its call. Semantics of `nn.BatchNorm2d`, followed by the add and `torch.relu`. Differentiable in x,
    weight, bias and shortcut; once, where a kernel runs. Under transforms of `torch.func`, and in what is exported,
    scripted or traced, PyTorch's own operators run; `torch.compile` keeps the fused one. `torch.fx` records the module
    as one node, as it does `nn.BatchNorm2d`.

    `nn.SyncBatchNorm.convert_sync_batchnorm` puts a plain `nn.SyncBatchNorm` in its place, without a word: the ReLU is
    then missing, and a call with a shortcut fails. To share statistics use this library's blocks and stems, or write an
    `nn.BatchNorm2d`, the add and the ReLU in the block, and convert that.

    Args:
        *args, **kwargs: those of `nn.BatchNorm2d`.
        relu: whether a ReLU ends it.
    """

    @classmethod
    def of(cls, bn: nn.BatchNorm2d, relu: bool = True) -> FusedBatchNorm2d:
        """One that takes over from `bn`: with the very same parameters and buffers, and its mode and settings.

        An optimizer that was made for `bn` goes on. `bn` is left as it is.

        Raises:
            TypeError: `bn` is not exactly an `nn.BatchNorm2d`. A subclass may do anything: `nn.SyncBatchNorm` takes its
                statistics from all processes, and a lazy one is an `nn.BatchNorm2d` after its first forward.
            ValueError: `bn` has hooks or a forward of its own, which would not be called or would see another output.
        """
        _check_takes_over(cls, bn)
        fused = cls.__new__(cls)
        # A dict or set of its own for each of the module's: what is registered later is registered in one of the two.
        vars(fused).update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(bn).items()})
        fused.relu = relu
        return fused

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """relu(batch_norm(input) + shortcut).

        Args:
            input: (N, C, H, W), float16, bfloat16, float32 or float64; any layout, channels_last is not converted. The
                parameters and the running statistics are of its type or float32.
            shortcut: input's shape, type and device, or None. Under autocast it may be of another type; PyTorch's
                operators then add it and apply the ReLU.

        Returns:
            (N, C, H, W) of input's type, channels_last; of the wider type where the shortcut's is another.

        Raises, before anything has changed, the count of batches included:
            ValueError, TypeError: a shape, type or device that does not fit, or one value per channel in training.
            RuntimeError: on double backward through a kernel.
        """
        norm = norm_of(self)
        out = unchecked(input, shortcut, norm, self.relu)
        if out is not None:
            return out
        for proxy in (input, shortcut):
            if isinstance(proxy, Proxy):
                return self._recorded(proxy.tracer, input, shortcut)
        if ops.is_transformed_or_recorded() or ops.wrapper((input, shortcut)):
            return super().forward(input, shortcut)
        check_activation(input, _channels(norm))
        if shortcut is None or not _is_promoted(input, shortcut):
            return checked(input, shortcut, norm, self.relu)
        check_activation(shortcut, input.shape[1], "shortcut")
        check_shortcut(shortcut, input, cast=True)
        z = checked(input, None, norm, False) + channels_last(shortcut)
        return z.relu() if self.relu else z

    forward.__wrapped__ = BatchNormAddRelu2d.forward  # what torch.jit.script compiles

    def _recorded(self, tracer: Tracer, *args: object) -> Proxy | Tensor:
        """One node, which follows the module's mode and counts; as eager's, the module alone cannot be traced."""
        path = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", path, args, {}) if path else super().forward(*args)


def _check_takes_over(cls: type, bn: nn.Module) -> None:
    """TypeError or ValueError where the fused module would not do what `bn` does."""
    if type(bn) is not nn.BatchNorm2d:
        reasons = {
            nn.SyncBatchNorm: ", whose statistics are those of all processes",
            nn.LazyBatchNorm2d: ", which is initialized by its first forward; run a forward pass first",
        }
        got = f"{type(bn).__name__}{reasons.get(type(bn), '')}"
        raise TypeError(f"{cls.__name__}.of: expected exactly an nn.BatchNorm2d, got a {got}")
    hooks = [name for name, value in vars(bn).items() if name.endswith("_hooks") and value]
    found = ", ".join(hooks) or passed_over(bn)
    if found is not None:
        raise ValueError(
            f"{cls.__name__}.of: expected a BatchNorm2d without hooks or a forward of its own, got one with {found}"
        )


def _is_promoted(x: Tensor, shortcut: Tensor) -> bool:
    """Whether autocast made x of another type than the shortcut: eager's sum is then of the wider one."""
    return torch._C._is_any_autocast_enabled() and isinstance(shortcut, Tensor) and shortcut.dtype != x.dtype


def _channels(norm: Norm) -> int | None:
    """The channels for which the norm's vectors are made; None where there are none, or where they disagree."""
    shapes = {tuple(v.shape) for v in norm[: len(VECTORS)] if v is not None}
    shape = shapes.pop() if len(shapes) == 1 else ()
    return shape[0] if len(shape) == 1 else None
