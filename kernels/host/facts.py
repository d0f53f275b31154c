"""What is known of an operator's arguments before it runs, as far as checks, shapes and kernels depend on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

try:  # compares many tensors in one call; PyTorch keeps it for its compiler
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_TENSORS = (Tensor, Parameter)
_ADDRESS = Tensor.data_ptr
_SETTINGS = {type(None), bool, int, float, str, tuple}
_MANY = 4096  # facts that are kept; beyond that sizes do not recur, and all are dropped
_RECENT = 8  # facts that one place in the program compares with


class Facts:
    """Each tensor's shape, strides, type, device and alignment, and every other argument's value. One object for a key.

    The alignment is the address modulo 16: Triton compiles a kernel anew for an aligned pointer.
    """

    __slots__ = ("key", "passed", "plans", "recent")

    def __init__(self, key: tuple):
        self.key = key
        self.plans: dict[tuple, object] = {}  # what `plan` made for it
        self.passed: set[tuple] = set()  # what has checked these arguments and found nothing to refuse
        self.recent = Recent()  # for the arguments of the backward that follows


class Known(NamedTuple):
    """The facts of a call's arguments, and the addresses of its tensors in turn."""

    facts: Facts
    addresses: list[int]


_all: dict[tuple, Facts] = {}


class Recent:
    """The facts that one place in the program has seen last; the same ones are mostly next."""

    __slots__ = ("_next", "_seen")

    def __init__(self):
        self._seen: tuple[tuple[Callable, Facts], ...] = ()
        self._next: Recent | None = None

    @property
    def next(self) -> Recent:
        """The `Recent` of the operator that is called next at this place."""
        if self._next is None:
            self._next = Recent()
        return self._next

    def known(self, arguments: Sequence) -> Known | None:
        """None where an argument is neither a plain tensor with memory nor a setting."""
        for addresses, facts in self._seen:
            found = addresses(arguments)
            if found is not None:
                return Known(facts, found)
        found = known(arguments)
        if found is not None:
            matcher = _matcher(arguments, found)
            if matcher is not None:
                self._seen = ((matcher, found.facts), *self._seen[: _RECENT - 1])
        return found


@lru_cache(_MANY)
def _recent_with(address: int) -> Recent:
    """The `Recent` that all calls with a parameter at this address share."""
    return Recent()


def known_without_place(arguments: Sequence) -> Known | None:
    """`known` for calls through PyTorch's dispatcher, which has no place: a parameter's address stands for one."""
    kinds = tuple(map(type, arguments))
    if Parameter not in kinds:
        return known(arguments)
    return _recent_with(arguments[kinds.index(Parameter)].data_ptr()).known(arguments)


def known(arguments: Sequence) -> Known | None:
    """The facts of tensors and settings; None where an argument is neither a plain tensor with memory nor a setting."""
    key, addresses = [], []
    try:
        for argument in arguments:
            kind = type(argument)
            if kind is Parameter or kind is Tensor:
                address, device = argument.data_ptr(), argument.device
                if (address == 0 and device.type == "meta") or argument.is_neg():  # memory of the opposite sign
                    return None
                addresses.append(address)
                key.append((argument.shape, argument.stride(), argument.dtype, device, address & 15))
            elif kind in _SETTINGS:
                key.append(argument)
            else:
                return None
    except RuntimeError:  # a sparse tensor has no strides, what functorch wraps has no address
        return None
    key = tuple(key)
    facts = _all.get(key)
    if facts is None:
        if len(_all) >= _MANY:
            _all.clear()
        facts = _all[key] = Facts(key)
    return Known(facts, addresses)


def _matcher(arguments: Sequence, found: Known) -> Callable[[Sequence], list[int] | None] | None:
    """A function that gives the addresses of other arguments' tensors where their facts are those found, else None."""
    places = [i for i, argument in enumerate(arguments) if type(argument) in _TENSORS]
    others = [i for i, argument in enumerate(arguments) if type(argument) not in _TENSORS]
    if TensorGuards is None or len(places) < 2 or len(others) < 2:
        return None
    tensors_of, settings_of = itemgetter(*places), itemgetter(*others)
    tensors, settings = tensors_of(arguments), settings_of(arguments)
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]  # all have to be the same
    try:
        same = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except TypeError:  # PyTorch may change it
        return None
    count, kinds = len(arguments), tuple(map(type, settings))
    alignments = [address & 15 for address in found.addresses]

    def addresses(arguments: Sequence) -> list[int] | None:
        if len(arguments) != count:
            return None
        tensors, own = tensors_of(arguments), settings_of(arguments)
        if not same(*tensors) or tuple(map(type, own)) != kinds or own != settings:  # `same` asks for types, too
            return None
        found = list(map(_ADDRESS, tensors))
        return found if [address & 15 for address in found] == alignments else None

    return addresses if addresses(arguments) is not None else None


def function_mode() -> str | None:
    """The class name of a mode that may replace PyTorch's functions; None where there is none.

    The mode of `torch.set_default_device` does not count: every tensor that is made here is given its device.
    """
    kinds = map(type, _get_current_function_mode_stack())
    return next((kind.__name__ for kind in kinds if kind not in (DeviceContext, BaseTorchFunctionMode)), None)


def is_plain() -> bool:
    """Whether nobody watches, replaces or transforms PyTorch's operators now."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and function_mode() is not None)
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
