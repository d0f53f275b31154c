"""A memory sanitizer for kernels under Triton's interpreter: it watches every launch of every test.

Each tensor argument of a launch gets an address space of its own with terabytes of nothing on either side, so no stray
pointer can land in another tensor, nor in the rest of its storage. These rules hold for each launch:

    Every access is to an element of the tensor that the pointer was made from.
    If a tensor is written, each of its elements is written once (`WRITES_OTHERWISE` lists exceptions on purpose).
    No program reads what another program of the launch writes.
    The order of the programs does not matter. They run shuffled; the first launches of each kind run once more in
    order, which has to give the same bits.

A launch that breaks one of these raises MemoryFault, before a stray access is made. Tensors on the device `meta` have
addresses and no memory: their elements load as zero and stores to them go nowhere (`watching` uses them for large
offsets).
"""

from __future__ import annotations

import inspect
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

# (kernel, argument): why its elements are not each written once in a launch
WRITES_OTHERWISE: dict[tuple[str, str], str] = {}

_SPACE_BITS = 44  # of one argument's address space; its tensor begins in the middle
READS, WRITES, UPDATES = "reads", "writes", "updates"
_REPLAYS = 2  # launches of each kind that run in both orders

Grid = tuple[int, int, int]
Program = tuple[int, int, int]


class MemoryFault(AssertionError):
    """A kernel did to memory what it must not do."""


class _CutShort(Exception):
    """The launch has made the accesses that were wanted of it."""


@dataclass
class Memory:
    """What one launch stored to one storage: `writer[byte // itemsize]` is the program, counted from 1; 0 for none."""

    nbytes: int
    itemsize: int
    writer: np.ndarray | None = None


@dataclass
class Argument:
    """A tensor argument: where the kernel sees it, and what the kernel did with it."""

    name: str
    tensor: Tensor
    base: int  # address of the first element
    memory: Memory | None  # None: on the device meta
    keeps: bool  # whether the accesses are recorded
    stores: int = 0  # elements stored
    atomic: bool = False
    accesses: dict[str, list[np.ndarray]] = field(default_factory=lambda: {READS: [], WRITES: [], UPDATES: []})

    def __post_init__(self):
        t = self.tensor
        self.itemsize = t.element_size()
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0
        self.nbytes = elements * self.itemsize
        self.origin = t.storage_offset() * self.itemsize  # of the first byte in the storage
        # True for the elements between the first and the last that are not the tensor's; None where all are its own.
        self.holes = None
        if elements != t.numel():
            self.holes = np.ones(elements, bool)
            torch.from_numpy(self.holes).as_strided(t.shape, t.stride()).fill_(False)

    @property
    def needs_a_look(self) -> bool:
        """Whether a read between the first and the last element is recorded, or may be wrong all the same."""
        return self.keeps or self.holes is not None or (self.memory is not None and self.memory.writer is not None)

    def __str__(self) -> str:
        t = self.tensor
        return f"{self.name} ({str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}, strides {t.stride()})"

    def element(self, offset: int) -> str:
        """Where a byte offset is, in words."""
        index, last = offset // self.itemsize, self.nbytes // self.itemsize - 1
        if index < 0:
            return f"{-index} elements before the first of {self}"
        if index > last:
            return f"{index - last} elements past the last of {self}"
        between = ", between its strides" if self.holes is not None and self.holes[index] else ""
        return f"element {index} of {self}{between}"


class Launch:
    """One launch under watch."""

    def __init__(
        self, executor, names: list[str], choose: Callable[[Grid], Sequence[Program]], partial: bool, limit: int | None
    ):
        self.kernel = executor.fn.__name__
        self.names = iter(names)
        self.choose = choose
        self.partial = partial  # not all programs run
        self.arguments: list[Argument] = []
        self.memories: dict[int, Memory] = {}
        self.fault: MemoryFault | None = None
        self.grid: Grid = (0, 0, 0)
        self.order: Sequence[Program] = ()
        self.program = 0  # the one that runs, counted from 1 in `order`
        self.left = limit  # accesses until the launch is cut short; None where it runs to its end

    # ---- what the interpreter asks ----

    def place(self, t: Tensor) -> int:
        """The address that the kernel gets for t."""
        memory = None
        if t.device.type != "meta":
            storage = t.untyped_storage()
            memory = self.memories.setdefault(storage.data_ptr(), Memory(storage.nbytes(), t.element_size()))
            memory.itemsize = min(memory.itemsize, t.element_size())
        aligned = 0 if memory is None else t.data_ptr() % 64
        base = (len(self.arguments) + 1 << _SPACE_BITS) + (1 << _SPACE_BITS - 1) + aligned
        self.arguments.append(Argument(next(self.names), t, base, memory, self.partial))
        return base

    def begin(self, grid: Sequence[int]) -> tuple[int]:
        """The grid to loop over in place of `grid`."""
        self.grid = (*grid, *(1,) * (3 - len(grid)))
        self.order = self.choose(self.grid)
        return (len(self.order),)

    def access(self, verb: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """(addresses in memory, the lanes that have one), after a check that the kernel may use every address."""
        if self.left is not None:
            if not self.left:
                raise _CutShort
            self.left -= 1
        live = pointers if mask.all() else pointers[mask]
        if not live.size:
            return pointers, mask
        low, high = int(live.min()), int(live.max())
        space = low >> _SPACE_BITS
        if high >> _SPACE_BITS != space:  # made from several tensors, or far astray
            real, lanes = pointers.copy(), mask.copy()
            spaces = pointers >> np.uint64(_SPACE_BITS)
            for space in np.unique(spaces[mask]):
                here = mask & (spaces == space)
                real[here], lanes[here] = self.access(verb, pointers[here], mask[here], itemsize)
            return real, lanes
        if not 1 <= space <= len(self.arguments):
            self.fail(f"{verb} an address that was made from none of its tensors")
        argument = self.arguments[space - 1]
        inside = argument.base <= low and high <= argument.base + argument.nbytes - itemsize
        if not inside or verb != READS or argument.needs_a_look:
            self._look(verb, argument, (live - np.uint64(argument.base)).view(np.int64), itemsize)
        if argument.memory is None:
            return pointers, np.zeros_like(mask)
        return pointers - np.uint64(argument.base - argument.tensor.data_ptr() & 2**64 - 1), mask

    # ---- what it did ----

    def accessed(self, name: str, verb: str) -> np.ndarray:
        """The elements of an argument that were read, written or updated, counted from its first, in order."""
        (argument,) = (a for a in self.arguments if a.name == name)
        return np.unique(np.concatenate([np.zeros(0, np.int64), *argument.accesses[verb]]))

    # ---- the checks ----

    def fail(self, message: str) -> None:
        where = self.order[self.program - 1] if self.program else "all"
        self.fault = MemoryFault(f"{self.kernel}, program {where} of {self.grid}: {message}")
        raise self.fault

    def _look(self, verb: str, argument: Argument, offsets: np.ndarray, itemsize: int) -> None:
        """Every check of an access to elements of one argument, at these offsets in bytes."""
        stray = (offsets < 0) | (offsets > argument.nbytes - itemsize)
        if argument.holes is not None and not stray.any():
            stray = argument.holes[offsets // argument.itemsize]
        if stray.any():
            first = argument.element(int(offsets[stray][0]))
            self.fail(f"{verb} {np.count_nonzero(stray)} elements outside its tensor, the first {first}")
        if self.partial:
            argument.accesses[verb].append(offsets.ravel() // argument.itemsize)
        memory = argument.memory
        if memory is None:
            return
        index = (offsets + argument.origin) // memory.itemsize
        if verb == READS:
            if memory.writer is not None:
                writer = memory.writer[index]
                self._fail_where((writer != 0) & (writer != self.program), "reads", argument, offsets, writer)
        elif verb == UPDATES:
            argument.atomic = True
        else:
            if memory.writer is None:
                memory.writer = np.zeros(memory.nbytes // memory.itemsize, np.int32)
            if not self._otherwise(argument):
                writer = memory.writer[index]
                self._fail_where(writer != 0, "writes again", argument, offsets, writer)
            memory.writer[index] = self.program
            argument.stores += index.size

    def _fail_where(self, wrong: np.ndarray, what: str, argument: Argument, offsets: np.ndarray, writer: np.ndarray):
        if wrong.any():
            first = argument.element(int(offsets[wrong][0]))
            self.fail(f"{what} what program {self.order[writer[wrong][0] - 1]} wrote, {first}")

    def _otherwise(self, argument: Argument) -> bool:
        return argument.atomic or (self.kernel, argument.name) in WRITES_OTHERWISE

    def finish(self) -> None:
        """Check that each element of a tensor that was written was written by one lane."""
        self.program = 0
        for argument in self.arguments:
            if not argument.stores or self.partial or self._otherwise(argument):
                continue
            memory = argument.memory
            writer = memory.writer[argument.origin // memory.itemsize :][: argument.nbytes // memory.itemsize]
            missing = writer[:: argument.itemsize // memory.itemsize] == 0
            if argument.holes is not None:
                missing &= ~argument.holes
            if missing.any():
                first = argument.element(int(np.argmax(missing)) * argument.itemsize)
                self.fail(f"{np.count_nonzero(missing)} elements stay unwritten, the first {first}")
            if argument.stores > argument.tensor.numel():
                self.fail(f"several lanes of one store write the same element of {argument}")


class _Native:
    """Stands in for the interpreter's compiled module: every access to memory passes here."""

    def __init__(self, native):
        self._native = native

    def __getattr__(self, name: str):
        return getattr(self._native, name)

    def load(self, pointers, mask, other, dtype):
        return self._native.load(*_launch.access(READS, pointers, mask, dtype.itemsize), other, dtype)

    def store(self, pointers, value, mask):
        pointers, mask = _launch.access(WRITES, pointers, mask, value.dtype.itemsize)
        return self._native.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, semantic):
        pointers, mask = _launch.access(UPDATES, pointers, mask, value.dtype.itemsize)
        return self._native.atomic_rmw(operation, pointers, value, mask, semantic)

    def atomic_cas(self, pointers, compare, value, semantic):
        pointers, _ = _launch.access(UPDATES, pointers, np.ones(pointers.shape, bool), value.dtype.itemsize)
        return self._native.atomic_cas(pointers, compare, value, semantic)


# ---- policies: which programs run, in which order, how often ---------------------------------------------------


def every_program(grid: Grid) -> list[Program]:
    return list(np.ndindex(*grid))


@dataclass
class Shuffled:
    """Runs all programs in a random order, a new one for each launch; the first of each kind run again in order."""

    random: random.Random = field(default_factory=lambda: random.Random(0))
    seen: Counter = field(default_factory=Counter)

    def run(self, executor, launch: Callable[..., Launch], tensors: dict[str, Tensor]) -> None:
        kind = (executor.fn.__name__, *((name, t.dtype) for name, t in tensors.items()))
        self.seen[kind] += 1
        before = None
        if self.seen[kind] <= _REPLAYS:
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}.values()
            before = [s.clone() for s in storages]
        first = launch(self._shuffled)
        if before is not None and math.prod(first.grid) > 1:
            after = [s.clone() for s in storages]
            for storage, bytes_ in zip(storages, before):
                storage.copy_(bytes_)
            launch(every_program)
            for storage, bytes_ in zip(storages, after):
                if not torch.equal(_bytes(storage), _bytes(bytes_)):
                    names = [n for n, t in tensors.items() if t.untyped_storage().data_ptr() == storage.data_ptr()]
                    raise MemoryFault(
                        f"{first.kernel}, grid {first.grid}: {' and '.join(names)} depends on the order of the programs"
                    )

    def _shuffled(self, grid: Grid) -> list[Program]:
        programs = every_program(grid)
        last = programs[-1:]
        self.random.shuffle(programs)
        return programs[::-1] if programs[-1:] == last else programs  # two would stay in order half the time


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass
class Chosen:
    """Runs some programs of each launch and records their accesses."""

    choose: Callable[[Grid], Sequence[Program]]
    limit: int | None
    launches: list[Launch] = field(default_factory=list)

    def run(self, executor, launch: Callable[..., Launch], tensors: dict[str, Tensor]) -> None:
        self.launches.append(launch(self.choose, partial=True, limit=self.limit))


_policy: Shuffled | Chosen = Shuffled()
_launch: Launch | None = None  # the one under way


@contextmanager
def watching(choose: Callable[[Grid], Sequence[Program]], limit: int | None = None) -> Iterator[list[Launch]]:
    """Launches run only the programs that `choose(grid)` gives. Yields the launches with what they accessed.

    A launch ends after `limit` loads and stores.
    """
    global _policy
    before, _policy = _policy, Chosen(choose, limit)
    try:
        yield _policy.launches
    finally:
        _policy = before


# ---- the interpreter under watch -------------------------------------------------------------------------------


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an argument is made of, in the order in which the interpreter converts them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif hasattr(value, "base"):  # a TensorDescriptor
        yield from _tensors(name, value.base)


@contextmanager
def sanitized_interpreter() -> Iterator[None]:
    """Watch every launch of the interpreter."""
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    builder, executor_type = interpreter.interpreter_builder, interpreter.GridExecutor
    convert, call = interpreter._implicit_cvt, executor_type.__call__
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def placed(value):
        converted = convert(value)
        if isinstance(value, Tensor):
            converted.handle.data = np.array([_launch.place(value)], np.uint64)
        return converted

    def indexed(i: int, *_) -> None:
        _launch.program = i + 1
        set_grid_idx(*_launch.order[i])

    def watched(executor, *args, **kwargs):
        known = inspect.getfullargspec(executor.fn).args
        bound = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
        tensors = dict(
            leaf for name, value in bound.items() if name not in executor.constexprs for leaf in _tensors(name, value)
        )
        grid = executor.grid

        def launch(
            choose: Callable[[Grid], Sequence[Program]], partial: bool = False, limit: int | None = None
        ) -> Launch:
            global _launch
            outer, _launch = _launch, Launch(executor, list(tensors), choose, partial, limit)
            mine = _launch
            executor.grid = lambda meta: mine.begin(grid(meta) if callable(grid) else grid)
            try:
                call(executor, *args, **kwargs)
                mine.finish()
            except InterpreterError:
                if mine.fault is not None:
                    raise mine.fault from None
                if mine.left != 0:
                    raise
            finally:
                executor.grid, _launch = grid, outer
            return mine

        _policy.run(executor, launch, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", _Native(interpreter._interpreter))
        patch.setattr(interpreter, "_implicit_cvt", placed)
        patch.setattr(executor_type, "__call__", watched)
        # The tensors are on the CPU or on no device at all: there is nothing to copy.
        patch.setattr(executor_type, "_init_args_hst", lambda _, args, kwargs: (args, kwargs))
        patch.setattr(executor_type, "_restore_args_dev", lambda *_: None)
        patch.setattr(builder, "set_grid_dim", lambda *_: set_grid_dim(*_launch.grid))
        patch.setattr(builder, "set_grid_idx", indexed)
        yield


@pytest.fixture(scope="session", autouse=True)
def sanitizer():
    """Every launch of the session is watched, where kernels are interpreted on the CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        yield
        return
    with sanitized_interpreter():
        yield
