"""What every command of the package does alike: errors are one line, and a signal leaves what Ctrl-C leaves."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch

# Signals that ask a process to end, beside Ctrl-C: a scheduler sends SIGTERM, a terminal that is closed SIGHUP.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class ConfigError(ValueError):
    """A setting cannot be used; the message, one line, names it and what was expected."""


class RunError(Exception):
    """A command failed after it had begun; the message, one line, says why."""


class Ended(KeyboardInterrupt):
    """Raised in place of the process's death where a signal of ENDING arrives; its argument is the signal's number."""


class Parser(argparse.ArgumentParser):
    """An error is one line, without the page of usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(text: object) -> str:
    """The text with what would break the line, or cannot be printed, escaped: paths may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def say(text: str) -> None:
    """Print a line to stderr; nothing where stderr cannot be written, as on a closed terminal."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=sys.stderr, flush=True)


def say_amid(text: str) -> None:
    """`say` for a signal's handler, which may interrupt a write to stderr: Python refuses a second `print` then."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"\n{one_line(text)}\n".encode())


def put(text: str) -> None:
    """Print the text to stdout and flush it; RunError where stdout cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise RunError(f"standard output: cannot be written ({error.strerror or error})") from error


def ended_by(stop: KeyboardInterrupt | signal.Signals) -> int:
    """The exit status of a command that a signal ended, as a shell gives it: 130 for Ctrl-C."""
    if isinstance(stop, KeyboardInterrupt):
        stop = stop.args[0] if isinstance(stop, Ended) else signal.SIGINT
    return 128 + stop


_NO_MEMORY = "can't allocate memory"


def run(parser: Parser, work: Callable[[], int], refused: tuple[type[Exception], ...] = ()) -> int:
    """The exit status of a command: that of `work`, or of its error, which becomes one line on stderr.

    2, by SystemExit as argparse gives it, for what cannot be used: ConfigError and types in `refused`. 1 for what went
    wrong on the way: RunError, OSError, too little memory. 128 and the signal's number after Ctrl-C or one of ENDING.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed when Python began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the process lives
    try:
        with _ending_raises():
            status = work()
            sys.stdout.flush()
            return status
    except (ConfigError, *refused) as error:
        parser.error(str(error))
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        return _failed(parser, str(error))
    except RuntimeError as error:  # a CPU's allocator has no type of its own
        if _NO_MEMORY not in str(error):
            raise
        return _failed(parser, f"too little memory: {str(error).splitlines()[0].partition(_NO_MEMORY + ': ')[2]}")
    except KeyboardInterrupt as error:
        say("interrupted; what was written before is as it was")
        return ended_by(error)
    finally:
        _drop_output()


def _failed(parser: Parser, reason: str) -> int:
    say(f"{parser.prog}: error: {reason}")
    return 1


def _drop_output() -> None:
    """Point stdout and stderr at os.devnull where they cannot be written (a closed pipe, a full disk).

    Else Python would try to flush them at its exit, and make the status 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _ending_raises() -> Iterator[None]:
    """Inside, a signal of ENDING raises Ended, unless the process ignores it, as under `nohup`, or handles it."""
    if threading.current_thread() is not threading.main_thread():  # where Python takes no handlers
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Ended(number)

    taken = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def settings_are_read() -> Iterator[None]:
    """Around what reads the environment at import: its ValueError ends a command of this repository with one line.

    `python -m` imports a command's package before its own module, so that this cannot be done there.
    """
    try:
        yield
    except ValueError as error:
        name = sys.orig_argv[-len(sys.argv)].removeprefix("-m") if sys.argv else ""
        if name.partition(".")[0] not in ("resnet", "benchmarks"):
            raise
        say(f"python -m {name}: error: {error}")
        raise SystemExit(2) from None
