"""Plans: what a function of tensors allocated and launched, recorded once and replayed for arguments of the same kind.

    outputs = plan.run(function, arguments, environment)

`function` takes tensors, None and settings, and gives a list of tensors and None. What it does depends on the facts
that are in a plan's key: its settings; each tensor's shape, strides, type, device and alignment; the environment. So
the checks, tiles, grids and sizes that a call works out are those of the first call. The first call of a key runs the
function: kernels are compiled and choices timed. The second one is recorded. Later ones run the record, a Python
function of allocations and launches.

A record holds the calls of PyTorch's operators too. It is not kept where one of them, or anything else, is not known to
be the same each time; then every call runs the function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import facts, launcher
from .facts import Known
from .launcher import STREAM, Launch, Repetition

try:  # the code of PyTorch's compiler calls them: half of `torch.empty_strided`'s time, and the current device
    from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda

    _EMPTY = {"cpu": _empty_strided_cpu, "cuda": _empty_strided_cuda}
except ImportError:
    _EMPTY = {}

_MANY = 16  # plans that are kept for the same arguments; beyond that settings do not recur, and all are dropped

_SMALL = 2**20  # bytes of memory that shares an allocation
_ALIGNMENT = 512  # as PyTorch's allocator aligns

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_QUICKER = {torch.ops.aten.zeros_like.default: torch.zeros_like}  # the same by a shorter way
_NEVER_THE_SAME = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format, torch.layout)

_SEEN = object()  # in a plan's place: its function has run once
_NONE = object()  # in a plan's place: its function runs each time
_epoch = [0]
_recording = threading.local()


def forget() -> None:
    """Forget all plans."""
    _epoch[0] += 1


def run(
    function: Callable[..., list], arguments: Sequence, environment: tuple, known: Known | None = None
) -> list[Tensor | None]:
    """function(*arguments), replayed where that is known to do the same.

    Args:
        function: its effects on tensors are made by PyTorch's operators and by `launch`.
        arguments: tensors, None, and settings: numbers, texts and tuples of them.
        environment: everything else that the function depends on.
        known: the facts of the arguments, where the caller has them.
    """
    if known is None:
        known = facts.known_without_place(arguments) if facts.is_plain() else None
    if known is None or not launcher.is_plain():
        return function(*arguments)
    plans, addresses = known.facts.plans, known.addresses
    key = (function, launcher.active_driver(), _epoch[0], environment)
    plan = plans.get(key)
    if type(plan) is Plan:
        return function(*arguments) if any(plan.hooks) else plan(arguments, addresses)
    if plan is _NONE or getattr(_recording, "on", False):
        return function(*arguments)
    if plan is _SEEN:
        outputs, plans[key] = _record(function, arguments)
        return outputs
    if len(plans) >= _MANY:
        plans.clear()
    outputs = function(*arguments)
    plans[function, launcher.active_driver(), _epoch[0], environment] = _SEEN  # the first launch chooses the driver
    return outputs


# ---- recording ---------------------------------------------------------------------------------------------------


def _record(function: Callable[..., list], arguments: Sequence) -> tuple[list[Tensor | None], object]:
    recorder = _Recorder(arguments)
    _recording.on = True
    launcher.watch(recorder.launch)
    try:
        with recorder:
            outputs = function(*arguments)
    finally:
        launcher.watch(None)
        _recording.on = False
    return outputs, recorder.plan(outputs) or _NONE


class _Spoilt(Exception):
    """The record cannot be replayed."""


class _Recorder(TorchDispatchMode):
    """Writes a function's body: a line for each allocation, operator and launch, with a variable for each tensor.

    A variable stands for a tensor's memory. Views are not recorded: an address is the variable's and an offset, and a
    tensor that is needed as such is made from the variable by its strides.
    """

    def __init__(self, arguments: Sequence):
        super().__init__()
        self.spoilt = False
        self._paused = False
        self._names = [f"a{i}" for i in range(len(arguments))]
        self._inputs: dict[int, str] = {}
        self._owners: dict[int, list[tuple[str, Tensor]]] = {}  # variables by their storage
        self._alive: list[object] = [arguments]  # while they are, no other tensor has their address
        self._lines: list[tuple[str, tuple[str, ...]]] = []  # code, and the variables that it reads
        self._made: dict[str, tuple[int, Tensor]] = {}  # memory that is allocated: before which line, and as what
        self._tensors: set[str] = set()  # variables that are needed as tensors
        self._addressed: set[str] = set()  # variables whose addresses are needed
        self._constants: dict[str, object] = {
            "empty": torch.empty_strided,
            "as_strided": torch.as_strided,
        }
        self._hooks: list[list] = []
        self._compiled: list[object] = []
        self._device: torch.device | None = None
        for name, argument in zip(self._names, arguments):
            if isinstance(argument, Tensor):
                self.spoilt |= id(argument) in self._inputs  # which of the two is meant where it is used?
                self._inputs[id(argument)] = name
                self._own(name, argument)

    # ---- what happens ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused and not self.spoilt:
            try:
                self._operator(func, args, kwargs, result)
            except _Spoilt:
                self.spoilt = True
        return result

    def launch(self, make: Callable[[], Launch]) -> None:
        self._paused = True  # an interpreted kernel runs PyTorch's operators
        try:
            launch = make()
        finally:
            self._paused = False
        if not self.spoilt:
            try:
                self._launched(launch)
            except _Spoilt:
                self.spoilt = True

    def _operator(self, func, args, kwargs, result) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        if _NEVER_THE_SAME & set(func.tags) or not all(r is None or isinstance(r, Tensor) for r in results):
            raise _Spoilt
        self._alive += [args, results]
        known = [r for r in results if r is not None and _storage(r) in self._owners]
        new = [r for r in results if r is not None and not any(r is k for k in known)]
        if func in _ALLOCATIONS:
            self._allocated(result)
        elif new:
            if known:
                raise _Spoilt
            self._called(func, args, kwargs, result, results)
        elif func._schema.is_mutable:
            self._called(func, args, kwargs, (), ())

    def _allocated(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            raise _Spoilt
        self._made[self._variable(tensor)] = len(self._lines), tensor

    def _called(self, func, args, kwargs, result, results) -> None:
        read: list[str] = []
        written = [self._value(a, read) for a in args]
        written += [f"{key}={self._value(a, read)}" for key, a in kwargs.items()]
        call = f"{self._constant(_QUICKER.get(func, func))}({', '.join(written)})"
        names = ["_" if r is None else self._variable(r) for r in results]
        if isinstance(result, Tensor):
            call = f"{names[0]} = {call}"
        elif names:
            call = f"{', '.join(names)}, = {call}"
        self._lines.append((call, tuple(read)))

    def _launched(self, launch: Launch) -> None:
        device = launch.args[0].device
        if self._device not in (None, device):
            raise _Spoilt
        self._device = device
        call = launcher.repetition(launch)
        self._compiled.append(launch.compiled)
        hooks = getattr(launch.kernel, "pre_run_hooks", None)
        if hooks is not None and not any(hooks is known for known in self._hooks):
            self._hooks.append(hooks)
        self._alive.append(launch)
        read: list[str] = []
        before = ["stream" if value is STREAM else self._literal(value) for value in call.before]
        arguments = [self._argument(a, call, read) for a in call.arguments]
        if call.packed:
            arguments = [f"({', '.join(arguments)},)"]
        keywords = [f"{name}={self._literal(value)}" for name, value in call.keywords.items()]
        code = f"{self._constant(call.function)}({', '.join(before + arguments + keywords)})"
        self._lines.append((code, tuple(read)))

    # ---- how it is written ----

    def _own(self, name: str, tensor: Tensor) -> None:
        self._owners.setdefault(_storage(tensor), []).append((name, tensor))

    def _variable(self, tensor: Tensor) -> str:
        name = f"t{len(self._names)}"
        self._names.append(name)
        self._own(name, tensor)
        return name

    def _owner(self, tensor: Tensor) -> tuple[str, Tensor]:
        """The variable of a tensor's memory, and the tensor that it stands for."""
        if id(tensor) in self._inputs:
            return self._inputs[id(tensor)], tensor
        owners = self._owners.get(_storage(tensor), ())
        if len(owners) != 1 or owners[0][1].dtype != tensor.dtype:
            raise _Spoilt
        return owners[0]

    def _tensor(self, tensor: Tensor, read: list[str]) -> str:
        name, base = self._owner(tensor)
        read.append(name)
        self._tensors.add(name)
        offset = tensor.storage_offset() - base.storage_offset()
        if offset == 0 and tensor.shape == base.shape and tensor.stride() == base.stride():
            return name
        start = f"{name}.storage_offset() + {offset}" if name.startswith("a") else str(offset)
        return f"as_strided({name}, {tuple(tensor.shape)}, {tensor.stride()}, {start})"

    def _argument(self, value: object, call: Repetition, read: list[str]) -> str:
        if not isinstance(value, Tensor):
            return self._literal(value)
        if not call.takes_pointers:
            return self._tensor(value, read)
        name, base = self._owner(value)
        read.append(name)
        offset = (value.storage_offset() - base.storage_offset()) * value.element_size()
        if name not in self._addressed and name not in self._made and not name.startswith("a"):
            self._lines.append((f"p{name[1:]} = {name}.data_ptr()", (name,)))  # an operator has made it
        self._addressed.add(name)
        return f"p{name[1:]} + {offset}" if offset else f"p{name[1:]}"

    def _value(self, value: object, read: list[str]) -> str:
        """An argument of an operator."""
        if isinstance(value, Tensor):
            return self._tensor(value, read)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._value(v, read) for v in value)}]"
        if not isinstance(value, _CONSTANTS):
            raise _Spoilt
        return self._literal(value)

    def _literal(self, value: object) -> str:
        return repr(value) if value is None or type(value) in (bool, int) else self._constant(value)

    def _constant(self, value: object) -> str:
        for name, known in self._constants.items():
            if known is value:
                return name
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def plan(self, outputs: list[Tensor | None]) -> Plan | None:
        """The plan whose replay gives such outputs, None where it cannot."""
        if self.spoilt:
            return None
        try:
            returned, kept = self._returned(outputs)
        except _Spoilt:
            return None
        addresses = [f"p{name[1:]}" for name in self._inputs.values()]
        body = [f"[{', '.join(addresses)}] = addresses"]
        body += [f"{name} = arguments[{name[1:]}]" for name in sorted(self._tensors) if name.startswith("a")]
        last = {name: i for i, (_, names) in enumerate(self._lines) for name in names}
        places = self._workspace(set(last) - kept)
        if places:
            *_, end = places.values()
            body += [f"w = {self._empty((end[1],), (1,), torch.uint8, self._device)}", "w0 = w.data_ptr()"]
        for i, (code, names) in enumerate(self._lines):
            for name, (before, tensor) in self._made.items():
                if before == i and (name in last or name in kept):
                    body += self._allocation(name, tensor, places)
            body.append(code)
            done = [
                n for n in dict.fromkeys(names) if n.startswith("t") and last[n] == i and n not in kept | set(places)
            ]
            body += [f"del {name}" for name in done]
        body += [
            line
            for name, (before, tensor) in self._made.items()
            if before == len(self._lines) and name in kept
            for line in self._allocation(name, tensor, places)
        ]
        body.append(f"return [{', '.join(returned)}]")
        source = "def replay(arguments, addresses, stream):\n" + "".join(f"    {line}\n" for line in body)
        names = dict(self._constants)
        exec(compile(source, "<plan>", "exec"), names)
        return Plan(names["replay"], self._device, self._hooks, self._compiled)

    def _returned(self, outputs: list[Tensor | None]) -> tuple[list[str], set[str]]:
        """The outputs as they are written, and their variables. Memory of which one is all of is allocated as that."""
        owners = [None if t is None else self._owner(t)[0] for t in outputs]
        for name, tensor in zip(owners, outputs):
            if name in self._made and name not in self._tensors and owners.count(name) == 1:
                before, base = self._made[name]
                alone = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                if tensor.storage_offset() == 0 and alone.untyped_storage().nbytes() == base.untyped_storage().nbytes():
                    self._made[name] = before, tensor
                    self._owners[_storage(base)] = [(name, tensor)]
        read: list[str] = []
        return ["None" if t is None else self._tensor(t, read) for t in outputs], set(read)

    def _workspace(self, names: set[str]) -> dict[str, tuple[int, int]]:
        """Where small memory, of which addresses alone are needed, begins and ends in one that is shared."""
        places, end = {}, 0
        for name, (_, tensor) in self._made.items():
            size = tensor.untyped_storage().nbytes()
            if name in names and name not in self._tensors and size <= _SMALL and tensor.device == self._device:
                places[name] = end, end + -(-size // _ALIGNMENT) * _ALIGNMENT
                end = places[name][1]
        return places

    def _allocation(self, name: str, tensor: Tensor, places: dict[str, tuple[int, int]]) -> list[str]:
        if name in places:
            return [f"p{name[1:]} = w0 + {places[name][0]}"]
        code = f"{name} = {self._empty(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)}"
        return [code, f"p{name[1:]} = {name}.data_ptr()"] if name in self._addressed else [code]

    def _empty(self, shape: tuple, strides: tuple, dtype: torch.dtype, device: torch.device) -> str:
        quick = _EMPTY.get(device.type)
        # With a driver the device of the launches is the current one during a replay.
        is_current = device.type == "cpu" or (device == self._device and launcher.active_driver() is not None)
        if quick is None or not is_current:
            return f"empty({shape}, {strides}, dtype={self._constant(dtype)}, device={self._constant(device)})"
        return f"{self._constant(quick)}({shape}, {strides}, {self._constant(dtype)})"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Plan:
    """What is replayed, on the device on which it was recorded and on the stream of the moment."""

    def __init__(
        self, replay: Callable[..., list], device: torch.device | None, hooks: list[list], compiled: list[object]
    ):
        self._replay = replay
        self._index = None if device is None else device.index
        self.hooks = hooks  # lists, one for each kernel, of what Triton would call before a launch
        self._compiled = compiled  # the replay has their code's address, and from Triton 3.8 on it goes with them
        self._driver = launcher.active_driver()

    def __call__(self, arguments: Sequence, addresses: list[int]) -> list[Tensor | None]:
        driver = self._driver
        if driver is None:
            return self._replay(arguments, addresses, None)
        device = driver.get_current_device()
        if self._index is None or self._index == device:
            return self._replay(arguments, addresses, driver.get_current_stream(device))
        with torch.cuda.device(self._index):
            return self._replay(arguments, addresses, driver.get_current_stream(self._index))
