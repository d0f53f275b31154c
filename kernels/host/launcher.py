"""Launches, and how one is repeated without what Triton does anew for each. The one place that knows Triton's inside.

A launch by `kernel[grid](...)` binds the arguments, looks at each one's type, alignment and divisibility, makes a key
of that, looks the compiled kernel up, and passes it all to the driver's launcher. `repetition` keeps the compiled
kernel and gives its launcher alone. So it may be used only while all that a key holds is known to be the same.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction

_KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")  # versions whose sources were read for this module
_OWN_RUN = JITFunction.run

_thread = threading.local()  # watcher: see `watch`; compiles: whether launches are compiled and not made


def _one_at_a_time(function: Callable) -> Callable:
    """The function, for one thread at a time."""
    lock = threading.RLock()

    @functools.wraps(function)
    def alone(*arguments: object) -> object:
        with lock:
            return function(*arguments)

    return alone


if sys.version_info[:2] == (3, 11):
    # Its `ast.parse` counts the depth of all threads in one place, and raises SystemError where two of them parse at
    # once. Triton parses a kernel in each thread that compiles it. After an error it keeps half of a cache key.
    JITCallable.parse = _one_at_a_time(JITCallable.parse)


class Launch(NamedTuple):
    """A launch that has been made."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, object]
    compiled: object  # as Triton returns it: the compiled kernel, None where the kernel is interpreted


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """`kernel[grid](*args, **constants)` on the device of args[0], a tensor. The thread's watcher, if any, makes it."""
    watcher = getattr(_thread, "watcher", None)
    if compiles_only():
        with torch.cuda.device_of(args[0]):
            kernel.warmup(*args, grid=grid, **constants)
    elif watcher is None:
        _launch(kernel, grid, args, constants)
    else:
        watcher(lambda: Launch(kernel, grid, args, constants, _launch(kernel, grid, args, constants)))


def _launch(kernel: JITFunction, grid: tuple[int, ...], args: tuple, constants: dict[str, object]) -> object:
    with torch.cuda.device_of(args[0]):
        return kernel[grid](*args, **constants)


def watch(watcher: Callable[[Callable[[], Launch]], None] | None) -> None:
    """From now on this thread's launches are made by `watcher`, which gets each as a function; None ends it."""
    _thread.watcher = watcher


def is_watched() -> bool:
    """Whether this thread's launches are recorded."""
    return getattr(_thread, "watcher", None) is not None


def compile_ahead(runs: Iterable[Callable[[], object]]) -> None:
    """Compile what the functions launch, side by side in threads, and launch none of it.

    All else that they do is done, with tensors that no kernel has written. An error of a compilation is left for the
    launch, which meets it again.
    """
    if compiles_only():
        for run in runs:
            run()
    else:
        _own_context().run(_compile_ahead, runs)


def _own_context() -> Context:
    """A copy of the caller's context without its `AsyncCompileMode`: Triton refuses a second one inside it.

    Our own mode is set in the copy alone, so that Ctrl-C cannot leave it behind.
    """
    context = Context()
    for variable, value in copy_context().items():
        if not isinstance(value, triton.AsyncCompileMode):
            context.run(variable.set, value)
    return context


def compiles_only() -> bool:
    """Whether this thread is in `compile_ahead`."""
    return getattr(_thread, "compiles", False)


def _compile_ahead(runs: Iterable[Callable[[], object]]) -> None:
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        _thread.compiles = True
        try:
            compile_ahead(runs)
        finally:
            _thread.compiles = False


def is_plain() -> bool:
    """Whether a launch now does nothing else: it is made, no hook is called, and `JITFunction.run` is Triton's own."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        not compiles_only()
        and JITFunction.run is _OWN_RUN
        and not (enter is not None and getattr(enter, "calls", True))
        and not (leave is not None and getattr(leave, "calls", True))
    )


def active_driver() -> object | None:
    """Triton's driver, None before the first launch and where kernels are interpreted. A repetition belongs to it."""
    return driver._active


class Repetition(NamedTuple):
    """function(*before, *arguments, **keywords), the arguments as one tuple where `packed`."""

    function: Callable
    before: tuple  # STREAM stands for the stream
    arguments: tuple  # those of the launch, in the function's order
    keywords: dict[str, object]
    packed: bool
    takes_pointers: bool  # an integer may stand for a tensor


STREAM = object()


def repetition(launch: Launch) -> Repetition:
    """How to make a launch once more with other tensors of the same types and alignments."""
    compiled = launch.compiled
    names = getattr(launch.kernel, "arg_names", ())
    values = dict(zip(names, launch.args)) | launch.constants
    run = getattr(compiled, "run", None)
    if run is None or not triton.__version__.startswith(_KNOWN) or any(name not in values for name in names):
        return Repetition(launch.kernel[launch.grid], (), launch.args, launch.constants, False, False)
    gx, gy, gz = (*launch.grid, 1, 1)[:3]
    arguments = tuple(values[name] for name in names)
    takes_pointers = type(run).__module__.startswith("triton.backends.")
    if takes_pointers and _calls_the_driver_alone(run):
        # fmt: off
        before = (
            gx, gy, gz, STREAM, compiled.function, run.launch_cooperative_grid, run.launch_pdl,
            compiled.packed_metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature,
        )
        # fmt: on
        return Repetition(run.launch, before, arguments, {}, True, True)
    before = (gx, gy, gz, STREAM, compiled.function, compiled.packed_metadata, None, None, None)
    return Repetition(run, before, arguments, {}, False, takes_pointers)


def _calls_the_driver_alone(run: object) -> bool:
    """Whether Triton's launcher for NVIDIA does no more for this kernel than call its function in C, as since 3.7."""
    return (
        type(run).__name__ == "CudaLauncher"
        and hasattr(run, "arg_annotations")
        and hasattr(run, "kernel_signature")
        and run.global_scratch_size == 0
        and run.profile_scratch_size == 0
        and not getattr(run, "gsan_enabled", False)
    )
