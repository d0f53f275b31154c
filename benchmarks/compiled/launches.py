"""Launches recorded instead of run: what real calls ask Triton to compile, for a device that is not here.

    with record(target) as launches:
        net(x).sum().backward()          # nothing is compiled or run; results are uninitialised memory

A recorded launch holds what a compilation depends on (argument types, constants, divisibility, options) and the sizes
of the tensors that were passed. `tuning.every_candidate` says which of a GEMM's tiles are launched.
"""

from __future__ import annotations

import ast
import importlib
import math
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

VECTOR = 16  # bytes of the widest access that every device has


@dataclass(frozen=True)
class TensorArgument:
    """What the gate needs to know of a tensor that was passed. A row of it is a run of neighbouring elements."""

    itemsize: int
    nbytes: int  # of the largest one that was passed
    aligned: bool  # in every launch its rows were whole 16-byte vectors

    @staticmethod
    def of(t: Tensor) -> TensorArgument:
        channels_last = t.dim() == 4 and t.stride(1) == 1
        row = t.shape[1] if channels_last else t.shape[-1] if t.dim() and t.stride(-1) == 1 else 1
        aligned = row * t.element_size() % VECTOR == 0 and t.data_ptr() % VECTOR == 0
        return TensorArgument(t.element_size(), t.numel() * t.element_size(), aligned)

    def merged(self, other: TensorArgument) -> TensorArgument:
        return TensorArgument(self.itemsize, max(self.nbytes, other.nbytes), self.aligned and other.aligned)


@dataclass
class RecordedLaunch:
    """One specialisation of a kernel: what a compilation depends on, and the tensors it was launched with."""

    module: str
    kernel: str
    signature: dict[str, str]  # type of each argument; "constexpr" for one that is compiled in
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]
    tensors: dict[str, TensorArgument]
    cases: list[str] = field(default_factory=list)

    @property
    def features(self) -> list[str]:
        """Each argument as it is specialised, and each option."""
        described = []
        for i, (name, kind) in enumerate(self.signature.items()):
            if kind == "constexpr":
                described.append(f"{name}={self.constants[i,]}")
            else:
                known = "".join(f"/{value}" for _, value in self.attributes.get((i,), ()))  # divisible by, bits of size
                described.append(f"{name}:{kind}{known}")
        return described + [f"{name}={value}" for name, value in sorted(self.options.items())]

    @cached_property
    def specialisation(self) -> str:
        return " ".join(self.features)

    @property
    def _blocks(self) -> dict[str, int]:
        return {n: self.constants[i,] for i, n in enumerate(self.signature) if n.startswith("BLOCK")}

    @property
    def tile(self) -> str:
        """The configuration: the tile's sizes and the launch options."""
        sizes = [f"{n}={size}" for n, size in self._blocks.items()]
        return " ".join(sizes + [f"{n}={v}" for n, v in sorted(self.options.items()) if n.startswith("num_")])

    @property
    def smallest_tile(self) -> int:
        """Elements of the smallest tile that two of the BLOCK sizes span, or the one there is."""
        return math.prod(sorted(self._blocks.values())[:2])

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the largest tensor."""
        return max(self.tensors.values(), key=lambda t: t.nbytes).itemsize

    def function(self) -> JITFunction:
        return _unwrapped(getattr(importlib.import_module(self.module), self.kernel))


class Driver:
    """Stands for the driver of a device that is not here. Each target has a name of its own, so launch caches too."""

    def __init__(self, target: GPUTarget, properties: dict[str, int]):
        self._target, self._properties = target, properties
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"recording {self._target}"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_device_properties(self, device: object) -> dict[str, int]:
        return self._properties


def unite(launches: Iterable[RecordedLaunch]) -> list[RecordedLaunch]:
    """One launch per kernel and specialisation, with the tensors and cases of all that had it."""
    united: dict[tuple[str, str, str], RecordedLaunch] = {}
    for launch in launches:
        first = united.setdefault((launch.module, launch.kernel, launch.specialisation), launch)
        if first is not launch:
            first.tensors = {n: t.merged(launch.tensors[n]) for n, t in first.tensors.items()}
            first.cases += [case for case in launch.cases if case not in first.cases]
    return list(united.values())


def _key(function: JITFunction, passed: dict[str, object]) -> tuple:
    """What a record depends on: of a tensor, Triton asks for its type and alignment."""

    def fact(value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride(), value.data_ptr() % VECTOR
        return repr(value)  # 1 and True are different constants

    return function, *((name, fact(value)) for name, value in passed.items())


@contextmanager
def record(target: GPUTarget, properties: dict[str, int] | None = None) -> Iterator[list[RecordedLaunch]]:
    """Inside, no Triton kernel runs: each launch, as it would be for `target`, is appended to the list that this gives.

    A launch that repeats an earlier one is appended as the same record. Code that asks Triton's driver for the device's
    properties is told `properties`.

    Raises:
        RuntimeError: the kernels are interpreted in this process, which leaves nothing to compile.
    """
    from triton import knobs
    from triton.runtime import driver, jit

    if knobs.runtime.interpret:
        raise RuntimeError("launches cannot be recorded while kernels are interpreted: unset TRITON_INTERPRET")
    launches: list[RecordedLaunch] = []
    recorded: dict[tuple, RecordedLaunch] = {}
    passed: dict[str, object] = {}
    run = jit.JITFunction.run

    def remember(function: JITFunction, *args, grid, warmup, **kwargs):
        passed.clear()
        passed.update(zip(function.arg_names, args))
        passed.update(kwargs)
        key = _key(function, passed)
        if key in recorded:  # Triton would take 20 times as long to specialise it again
            launches.append(recorded[key])
            return None
        count = len(launches)
        result = run(function, *args, grid=grid, warmup=warmup, **kwargs)
        recorded.update((key, launch) for launch in launches[count:])
        return result

    def append(*, fn, compile, **_) -> bool:
        function = fn.jit_function
        own = set(function.arg_names)
        launches.append(
            RecordedLaunch(
                module=function.module,
                kernel=function.fn.__qualname__,
                signature=dict(compile["signature"]),
                constants=dict(compile["constants"]),
                attributes=dict(compile["configs"][0]),
                options={n: v for n, v in passed.items() if n not in own},
                tensors={n: TensorArgument.of(v) for n, v in passed.items() if n in own and isinstance(v, Tensor)},
            )
        )
        return True  # Triton then neither compiles nor launches

    before, hook = driver._active, knobs.runtime.jit_cache_hook
    driver.set_active(Driver(target, properties or {}))
    knobs.runtime.jit_cache_hook, jit.JITFunction.run = append, remember
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook, jit.JITFunction.run = hook, run
        driver._active = before


# ---- what there is to launch -------------------------------------------------------------------------------------


def _unwrapped(value: object) -> JITFunction | None:
    """The `@triton.jit` function that a module's variable holds, inside an autotuner or heuristics too."""
    from triton.runtime.jit import JITFunction

    while not isinstance(value, JITFunction) and hasattr(value, "run") and hasattr(value, "fn"):
        value = value.fn
    return value if isinstance(value, JITFunction) else None


def jit_functions(package: ModuleType) -> dict[str, JITFunction]:
    """All `@triton.jit` functions that are defined in the modules of a package, by "module.name"."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    found = filter(None, (_unwrapped(value) for module in modules for value in list(vars(module).values())))
    inside = f"{package.__name__}."
    return {f"{f.module}.{f.fn.__qualname__}": f for f in found if f.module.startswith(inside)}


def _called(function: JITFunction) -> Iterator[JITFunction]:
    """The `@triton.jit` functions that this one's source names."""
    scope = function.fn.__globals__
    for node in ast.walk(function.parse()):
        value = None
        if isinstance(node, ast.Name):
            value = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(scope.get(node.value.id), node.attr, None)
        callee = _unwrapped(value)
        if callee is not None:
            yield callee


def not_reached(package: ModuleType, launches: Iterable[RecordedLaunch]) -> list[str]:
    """The `@triton.jit` functions of a package that no recorded launch runs, neither directly nor through another."""
    left = jit_functions(package)
    reached = [launch.function() for launch in launches]
    while reached:
        function = reached.pop()
        if left.pop(f"{function.module}.{function.fn.__qualname__}", None) is not None:
            reached += _called(function)
    return sorted(left)
