"""`FusedSequential`: an `nn.Sequential` in which a residual block's backward begins in that of the block after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from resnet.fusable import passed_over
from resnet.registration import link

# Of each class of fused blocks the forward, which is one operator and hands its output to nobody else.
_LINKABLE: dict[type[nn.Module], Callable] = {}
_CALL, _SEQUENTIAL_FORWARD = nn.Module.__call__, nn.Sequential.forward


def linkable(cls: type[nn.Module]) -> type[nn.Module]:
    """Let blocks of exactly this class be linked; it decorates one whose forward is `FusedBlock`'s."""
    _LINKABLE[cls] = cls.forward
    return cls


def holds_blocks(module: nn.Module) -> bool:
    """Whether fused blocks, or sequences of them, are among its modules."""
    kinds = set(map(type, module._modules.values()))
    return FusedSequential in kinds or not _LINKABLE.keys().isdisjoint(kinds)


def run_in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The modules one after the other, with the blocks among them linked where nobody can see that."""
    if not is_watched(x):
        return run_linked(modules, x, None)[0]
    for module in modules:
        x = module(x)
    return x


def is_watched(x: Tensor) -> bool:
    """Whether each module has to be called as it is, for somebody who follows the calls or the tensors."""
    if torch.compiler.is_compiling() or isinstance(x, Proxy) or nn.Sequential.forward is not _SEQUENTIAL_FORWARD:
        return True
    return _has_any_global_hook() or _top_saved_tensors_default_hooks(True) is not None


def run_linked(modules: Iterable[nn.Module], x: Tensor, before: object) -> tuple[Tensor, object]:
    """The modules one after the other, where blocks that follow each other are linked; and the last one's node.

    `before` is the node of a block that gave x to nobody but these modules. A node is None where its module is no
    block, or where somebody may have seen what it gave.
    """
    for module in modules:
        unseen = _is_unseen(module)  # asked before the call: a hook may remove itself
        if unseen and type(module) is FusedSequential:
            x, before = run_linked(module._modules.values(), x, before)
            continue
        x = module(x)
        node = x.grad_fn if unseen else None
        link(node, before)
        before = node
    return x, before


def _is_unseen(module: nn.Module) -> bool:
    """Whether a call of the module is its class's own forward, and the class a block's or `FusedSequential`."""
    kind = type(module)
    forward = _FUSED_FORWARD if kind is FusedSequential else _LINKABLE.get(kind)
    if forward is None or kind.forward is not forward or kind.__call__ is not _CALL:
        return False
    return passed_over(module) is None


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` of fused residual blocks, or of others of its kind, which saves them passes in training.

    (N, C, H, W) -> as the modules in turn make of it. Nothing but memory traffic differs from `nn.Sequential`: on the
    Triton backend the last convolution of a block's backward gives the block before what its backward begins with, the
    gradient behind its ReLU and the sums of its BatchNorm, where that would read two maps again. A block is only
    linked to its neighbour where nobody can see what passes between them: neither has hooks, none are registered for
    all modules, and saved tensors have no hooks, as those of activation checkpointing are. `torch.compile` and tools
    that trace or export take it as an `nn.Sequential`.

    `resnet.fuse` makes these of a model's `nn.Sequential`s of blocks, and `resnet18(block=FusedResidual)` has them.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_watched(input) else run_linked(self._modules.values(), input, None)[0]

    forward.__wrapped__ = nn.Sequential.forward


_FUSED_FORWARD = FusedSequential.forward
