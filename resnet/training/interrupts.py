"""Signals that ask a run to end: it finishes the step at hand, and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from resnet.kernels.host.command import ENDING, say_amid


class Interrupt(threading.Event):
    """Set by the first signal that asks the run to end; `number` is that signal's, or 0."""

    number = 0


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """An event that the first Ctrl-C sets, in place of an exception amid a step; the second raises as usual.

    A signal of ENDING sets it too. One that is ignored stays so, as `nohup` has SIGHUP and a script's `&` has Ctrl-C.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield interrupt
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    usual = {n: h for n, h in usual.items() if h not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        interrupt.number = number
        interrupt.set()
        restore()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        say_amid(f"stopping after this step; {name} again to stop at once, without a checkpoint")

    for number in usual:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
