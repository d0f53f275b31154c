"""A module whose forward one operator does: when it can, and how the operator is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from resnet import ops
from resnet.backends import implementation
from resnet.checks import check_activation
from resnet.functional import channels_last
from resnet.fusable import BlockParts, PreActivationParts, StemParts, hashable
from resnet.kernels.host.facts import Recent
from resnet.norm import VECTORS, Norm, held, norm_of

_warned: set[str] = set()


def warn_once(name: str, reason: str) -> None:
    # Global hooks beside a dispatch mode are a tool's, such as a FLOP counter's. It is to see every operator.
    if reason == GLOBAL_HOOKS and torch._C._len_torch_dispatch_stack():
        return
    message = f"{name} runs PyTorch's operators one by one: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


# As torch.compiler.assume_constant_result sets it, but without importing the compiler: a warning breaks no graph.
warn_once._dynamo_marked_constant = True

GLOBAL_HOOKS = "global module hooks are registered, which a fused operator would not call for the submodules"


def weight_shapes(convs: list[nn.Conv2d], fit: Callable[[list[tuple[int, ...]]], bool]) -> list[tuple[int, ...]]:
    """The shapes that weights should have: their own where these fit together, as PyTorch asks for no more, else those
    that their convolutions were made with.
    """
    own = [tuple(conv.weight.shape) for conv in convs]
    if all(len(shape) == 4 for shape in own) and fit(own):
        return own
    return [(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size) for conv in convs]


def is_of(norm: Norm, channels: int) -> bool:
    return all(v is None or v.shape == (channels,) for v in norm[: len(VECTORS)])


# Asked once: torch.compile of PyTorch 2.11 cannot trace the question.
_AUTOCAST_KINDS = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast would run eager's convolutions on x; None where it would not cast."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    if x.dtype != torch.float64 and kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def reason_not_to_take(tensors: Sequence) -> str | None:
    mode = ops.function_mode()
    if mode is not None:
        return f"a {mode} is in force, which may know PyTorch's own functions alone"
    kind = ops.wrapper(tensors)
    return kind and f"one of its tensors is a {kind}, which may know PyTorch's own operators alone"


def trained_statistics(norms: list[Norm]) -> str | None:
    for norm in norms:
        for statistic in () if norm.training else (norm.running_mean, norm.running_var):
            if statistic is not None and statistic.requires_grad:
                return "a norm's running statistics require grad, of which a fused operator has no gradient"
    return None


def records_gradient(arguments: list) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The operators take their inputs as they are; a device that has no autocast (meta) has none to disable."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in _AUTOCAST_KINDS else nullcontext()


Parts = BlockParts | PreActivationParts | StemParts
_KEPT = 1024  # states that are kept; beyond that they do not recur, and all are dropped
_fusable: dict[tuple, Recent] = {}  # states of modules that can be fused, and the facts of their arguments


class FusedModule:
    """`forward`, as `_run`, of a module that one operator can do the work of; the eager module is the next base.

    Each class has a `forward` whose `__wrapped__` is the eager one: `torch.jit.script` compiles the source of that.

    What can be fused and what has to be refused depends on the modules' settings and on facts of the tensors. Where
    the same ones have passed before, they are not looked at one by one.
    """

    def _eager(self, X: Tensor) -> Tensor:
        """The same by the modules, one by one."""
        return super().forward(X)

    def _run(self, X: Tensor, parts: Parts | str | None = None) -> Tensor:
        """The forward; `parts` where the caller has asked for them already."""
        compiling = torch.compiler.is_compiling()
        direct = not compiling and ops.is_direct()
        if isinstance(X, Proxy) or (not direct and ops.is_transformed_or_recorded()):
            return self._eager(X)
        watched = _has_any_global_hook()
        if parts is None:
            parts = self._parts()
        state = recent = None
        if not compiling and not watched:
            state = self._state(parts)
            try:
                recent = _fusable.get(state)
            except TypeError:  # a setting cannot be hashed
                state = hashable(state)
                recent = _fusable.get(state)
        if recent is None:
            reason = GLOBAL_HOOKS if watched else parts if isinstance(parts, str) else self._reason_not_to_fuse(parts)
            if reason is not None:
                warn_once(type(self).__name__, reason)
                return self._eager(X)
            recent = Recent()
            if state is not None:
                _remember(state, recent)
        if not isinstance(X, Tensor):
            check_activation(X, None)  # which refuses it
        elif not compiling and X.is_inference() and torch.is_grad_enabled():
            return self._eager(X)  # which refuses it where a gradient needs it, before a norm has seen it
        simple = direct and type(X) is Tensor and X.layout is torch.strided
        reason = None if simple else reason_not_to_take((X,))  # before a pool is called, for the arguments
        if reason is not None:
            warn_once(type(self).__name__, reason)
            return self._eager(X)
        pairs = self._norm_pairs(parts)
        norms = [norm_of(bn, None if conv is None else held(conv, "_parameters", "bias")) for bn, conv in pairs]
        dtype = autocast_dtype(X)
        x = X if dtype is None else X.to(dtype)
        flat = self._arguments(parts, X, x, norms, dtype is not None)
        known = recent.known(flat) if direct else None
        check = (recent, X.dtype, dtype)
        if known is None or check not in known.facts.passed:
            reason = None if known else reason_not_to_take(flat)
            reason = reason or self._check(parts, X, flat, norms, dtype is not None)
            if reason is not None:
                warn_once(type(self).__name__, reason)
                return self._eager(X)
            x = channels_last(x)
            if x is not flat[0]:
                flat[0] = x
                known = known and recent.known(flat)
            elif known is not None:
                known.facts.passed.add(check)
        reason = trained_statistics(norms)
        if reason is not None:
            warn_once(type(self).__name__, reason)
            return self._eager(X)
        # It raises what the operator would, before anything changes.
        backend = None if compiling else implementation(x)
        batch_statistics = False
        for i, norm in enumerate(norms):
            batch_statistics |= norm.training
            if (count := norm.num_batches_tracked) is None:  # the operator counts the batch, if anything does
                continue
            count.add_(1)
            if any(held(other, "_buffers", "num_batches_tracked") is count for other, _ in pairs[i + 1 :]):
                # The other will count the batch once more, and this average is over as many as there are now.
                norms[i] = norms[i]._replace(num_batches_tracked=count.clone())
                flat = self._arguments(parts, X, x, norms, dtype is not None)
                known = known and recent.known(flat)
        name = self._operator(parts)
        if not batch_statistics:
            form = self._without_statistics(parts, flat, backend)
            if form is None:
                return self._unrecorded(parts, X, flat)
            name += form
        if known is None or x.dtype == torch.float64:
            with without_autocast(x):
                out = ops.call(name, flat, known)
        elif dtype is None:
            out = ops.call(name, flat, known)
        else:
            kind = x.device.type
            torch.set_autocast_enabled(kind, False)  # the context manager takes 2 us longer
            try:
                out = ops.call(name, flat, known)
            finally:
                torch.set_autocast_enabled(kind, True)
        return self._excite(parts, X, x, recent.next, *out) if type(out) is tuple else out

    def _without_statistics(self, parts: Parts, flat: list, backend: ModuleType | None) -> str | None:
        """The end of the operator's name where the norms take no batch statistics; None for `_unrecorded`."""
        return "" if records_gradient(flat) else "_inference"


def _remember(state: tuple, recent: Recent) -> None:
    if len(_fusable) >= _KEPT:
        _fusable.clear()
    _fusable[state] = recent


def _weights(convs: list[nn.Conv2d], x: Tensor, cast: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights as autocast multiplies them where it casts, and the parameters that such copies were made of.

    On a GPU the copies of channels_last weights are one launch.
    """
    weights, masters, sources, copies = [], [], [], []
    for conv in convs:
        weight, master = held(conv, "_parameters", "weight"), None
        if cast and weight.dtype != x.dtype and (type(weight) is nn.Parameter or not ops.wrapper((weight,))):
            master, source = weight, weight.detach()
            # A 1x1 weight keeps its strides: where they are others, PyTorch copies one weight after the other.
            alike = source.is_contiguous(memory_format=torch.channels_last)
            layout = torch.preserve_format if alike else torch.channels_last
            weight = torch.empty_like(source, dtype=x.dtype, memory_format=layout)
            sources += (source,)
            copies += (weight,)
        weights += (weight,)
        masters += (master,)
    if copies:
        torch._foreach_copy_(copies, sources)
    return weights, masters


def unit_arguments(
    x: Tensor, convs: list[nn.Conv2d], norms: list[Norm], cast: bool
) -> tuple[list, list[Tensor], list[Tensor | None]]:
    """x and the units of those convolutions that have a norm, flat; and `_weights` of all."""
    weights, masters = _weights(convs, x, cast)
    flat = [x]
    for conv, norm, weight, master in zip(convs, norms, weights, masters):
        geometry = conv.stride[0], conv.padding[0], conv.dilation[0]  # `geometry_of`, without a call
        flat += (weight, geometry, *norm, master)
    return flat, weights, masters
