"""What a user may choose: the backend of the fused operations, and the convolutions among them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from threading import RLock
from typing import ClassVar, NamedTuple

VARIANTS = ("triton", "epilogue", "pytorch")  # each falls back on the next one where it does not exist


def check_importable() -> None:
    """RuntimeError unless Triton can be imported: where it cannot, the PyTorch backend works without it."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"backend 'triton' needs the package triton, which cannot be imported here ({error}); it is made for "
            "Linux; backends 'auto' on the CPU and 'torch' do without"
        ) from error


def check_launchable() -> None:
    """RuntimeError unless Triton can launch: a driver for a GPU is active, or the kernels are interpreted."""
    check_importable()
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from resnet.kernels.batch_norm_add_relu import apply_kernel

    if isinstance(apply_kernel, InterpretedFunction):
        return
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        raise RuntimeError(
            "backend 'triton' needs a GPU that Triton supports, and none was found; to run the kernels on the CPU "
            "in Triton's interpreter (slow), set TRITON_INTERPRET=1 in the environment before Python starts; for "
            "speed on the CPU use backend 'auto' or 'torch'"
        ) from error


class _Inside(NamedTuple):
    """What the scopes around have chosen, None where none of them has, and the scopes, the innermost last."""

    backend: str | None
    convolution: str | None
    scopes: tuple[_Scope, ...]

    @classmethod
    def of(cls, scopes: tuple[_Scope, ...]) -> _Inside:
        names: dict[str, str | None] = {"backend": None, "convolution": None}
        for scope in scopes:
            names |= scope.names
        return cls(**names, scopes=scopes)


_OUTSIDE = _Inside.of(())
_inside: ContextVar[_Inside] = ContextVar("resnet", default=_OUTSIDE)


class _Scope:
    """A context manager whose names count in this context (a thread, a coroutine), from entry to exit.

    A scope may end before one that was entered later, as in two generators, or in a context that it was not entered in.
    So an exit takes out the scope itself: a token of `contextvars` would bring back what was there before it.
    """

    names: dict[str, str]  # by choice, "backend" or "convolution"

    def __enter__(self) -> _Scope:
        _inside.set(_Inside.of((*_inside.get().scopes, self)))
        return self

    def __exit__(self, *_) -> None:
        scopes = _inside.get().scopes
        for i in reversed(range(len(scopes))):
            if scopes[i] is self:
                _inside.set(_Inside.of(scopes[:i] + scopes[i + 1 :]))
                return


class both(_Scope):
    """A scope of what `in_force` gave: work that began with these choices goes on with them."""

    def __init__(self, chosen: tuple[str, str]):
        self.names = dict(zip(_Inside._fields, chosen))


class _Call(NamedTuple):
    """A choice for the process, made where a choice's object was constructed."""

    made: Callable[[], object | None]  # its object, None once that is gone
    name: str


_changing = RLock()  # not Lock: a finalizer may choose while its own thread is about to


class _Choice(_Scope):
    """A setter for the process, and a scope. Its start value comes from the environment.

    A constructor does not know whether a `with` follows. So it chooses for the process, and `__enter__` takes that
    back. For it, the calls are kept that may be taken back, and the last one that may not.

    Raises:
        ValueError: an unknown name.
    """

    allowed: ClassVar[tuple[str, ...]]
    everywhere: ClassVar[str]  # what the last call has chosen
    _calls: ClassVar[list[_Call]]

    def __init_subclass__(cls, names: tuple[str, ...], variable: str):
        cls.allowed = names
        cls._set([_Call(lambda: None, cls._checked(os.environ.get(variable) or "auto", variable))])

    @classmethod
    def _checked(cls, name: str, source: str) -> str:
        if name not in cls.allowed:
            raise ValueError(f"{source}: expected one of {', '.join(map(repr, cls.allowed))}, got {name!r}")
        return name

    @classmethod
    def _set(cls, calls: list[_Call]) -> None:
        """Keep these calls. Those before one that cannot be taken back any more will not count again."""
        final = max(i for i, call in enumerate(calls) if call.made() is None)
        cls._calls, cls.everywhere = calls[final:], calls[-1].name

    def __init__(self, name: str):
        cls = type(self)
        cls._checked(name, cls.__name__)
        self.names = {cls.__name__: name}
        with _changing:
            cls._set([*cls._calls, _Call(weakref.ref(self), name)])

    def __enter__(self) -> _Choice:
        cls = type(self)
        with _changing:
            cls._set([call for call in cls._calls if call.made() is not self])
        return super().__enter__()


class backend(_Choice, names=("auto", "triton", "torch"), variable="FUSED_RESIDUAL_BACKEND"):
    """Choose what runs the fused operations: a setter for the process, or a context manager for one context.

    `"auto"` (the default, or what `FUSED_RESIDUAL_BACKEND` says at import): Triton for tensors on a GPU, PyTorch for
    tensors on the CPU. `"triton"`: the Triton kernels wherever the tensors are. `"torch"`: PyTorch's operators.

        resnet.backend("torch")            # from now on, in all threads
        with resnet.backend("triton"):     # in this block, for this thread or coroutine, and first of all
            ...

    The object may be kept, entered later, and entered again. A backward runs on the backend of its forward.

    Raises:
        ValueError: an unknown name.
        RuntimeError: `"triton"` where there is neither a GPU nor Triton's interpreter.
    """

    def __init__(self, name: str):
        if name == "triton":
            check_launchable()
        super().__init__(name)


class convolution(_Choice, names=("auto", *VARIANTS), variable="FUSED_RESIDUAL_CONV"):
    """Choose what runs the convolutions of the fused operations on the Triton backend; used as `backend` is.

    `"pytorch"`: PyTorch's convolution (cuDNN), and BatchNorm's kernels before and after it. `"epilogue"`: a Triton
    convolution that also does what follows it (BatchNorm's statistics or sums, ReLU, the add); what precedes it is a
    pass of its own. `"triton"`: what precedes it too is done by the convolution, as it loads its input. `"auto"` (the
    default, or what `FUSED_RESIDUAL_CONV` says at import): the first call of each shape, type, device and direction
    times all three, and the fastest is remembered (`python -m resnet.kernels.tuning`); on the CPU nothing is timed,
    and "auto" is "triton".

    Where a convolution has nothing before it, "triton" is "epilogue"; where the Triton kernels do not cover it
    (groups, or a dilation and a stride), all of them are "pytorch".

    Raises:
        ValueError: an unknown name.
    """


def current_convolution() -> str:
    """The choice in force here: "auto", "triton", "epilogue" or "pytorch"."""
    return _inside.get().convolution or convolution.everywhere


def current_backend() -> str:
    """The choice in force here: "auto", "triton" or "torch"."""
    return _inside.get().backend or backend.everywhere


def in_force() -> tuple[str, str]:
    """The backend and the convolution that are in force here."""
    inside = _inside.get()
    return inside.backend or backend.everywhere, inside.convolution or convolution.everywhere
