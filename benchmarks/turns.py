"""Taking turns: what is compared runs round by round, so that what drifts touches all of it alike."""

from __future__ import annotations

import gc
import glob
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

# ---- clocks ---------------------------------------------------------------------------------------------------


class CudaClock:
    """Seconds on the GPU's clock: a CUDA event after all work queued so far. Each reading waits for that work."""

    __name__ = "CudaClock"  # pytest-benchmark writes a timer's name

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:  # summed up here, since the float32 of one long interval would not resolve a kernel
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


class HostClock:
    """Seconds of the host's own work. Each reading calls `wait`, which lets queued work end, and leaves that out."""

    __name__ = "HostClock"

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._waited = 0.0

    def __call__(self) -> float:
        reached = time.perf_counter()
        seconds = reached - self._waited
        self._wait()
        self._waited += time.perf_counter() - reached
        return seconds


def clock(device: torch.device) -> Callable[[], float]:
    """A clock for work on `device`, in seconds."""
    return CudaClock() if device.type == "cuda" else time.perf_counter


def cpu_seconds() -> tuple[float, float]:
    """(time on a CPU, time ready to run without one), summed over this process' threads; zeros where not on Linux."""
    ran = waited = 0.0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        try:
            with open(path) as f:
                figures = f.read().split()
        except OSError:  # the thread has ended meanwhile
            continue
        ran += int(figures[0]) / 1e9
        waited += int(figures[1]) / 1e9
    return ran, waited


# ---- turns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of those that take turns: a function without arguments, and the context that it runs in."""

    run: Callable[[], None]
    scope: Callable[[], AbstractContextManager]

    def seconds(self, calls: int, now: Callable[[], float]) -> float:
        """Seconds per call, over `calls` calls. The context is entered and left off the clock."""
        with self.scope():
            start = now()
            for _ in range(calls):
                self.run()
            return (now() - start) / calls

    def warm_seconds(self, now: Callable[[], float]) -> float:
        """Seconds per call, roughly: the mean of two calls, after one that may compile."""
        self.seconds(1, now)
        return self.seconds(2, now)


class SideFailed(Exception):
    """A side raised an error in its turn; the error is the cause, and `index` says which side."""

    def __init__(self, index: int) -> None:
        super().__init__(f"side {index} failed in its turn")
        self.index = index


@dataclass
class Turns:
    """One side's turns; lists are in the order of the rounds."""

    seconds: list[float] = field(default_factory=list)  # per call
    started: list[float] = field(default_factory=list)  # seconds from the beginning of the first round
    ran: float = 0.0  # `cpu_seconds` of all its turns
    waited: float = 0.0

    @property
    def waited_share(self) -> float:
        """The part of the time in which its threads could have run, but other work had the CPUs."""
        return self.waited / (self.ran + self.waited) if self.waited else 0.0


def calls_per_turn(target: float, warm_seconds: Sequence[float]) -> int:
    """How many calls make a turn last about `target` seconds, averaged over sides that take `warm_seconds` a call.

    The same for all sides, so that a round's length is bounded however much they differ. From 1 to 200, since one call
    on a busy machine may take 100 times as long as the next.
    """
    return min(200, max(1, math.ceil(target * len(warm_seconds) / max(sum(warm_seconds), 1e-7))))


def order(number: int, sides: int) -> list[int]:
    """Which side runs when in round `number`, counted from 0.

    Every second round is the mirror image of the one before it, which cancels a steady drift. After two rounds the
    sides move up by one, so that none is always first, last, or next after the same other.
    """
    first = number // 2 % sides
    forward = [*range(first, sides), *range(first)]
    return forward if number % 2 == 0 else forward[::-1]


def take_turns(
    sides: Sequence[Side], *, calls: int, rounds: int, now: Callable[[], float], budget: float = 0.0
) -> list[Turns]:
    """In each round every side is timed once, for `calls` calls. Returns the sides' turns, in the order of `sides`.

    There are at least `rounds` rounds, and more until `budget` seconds have passed; one before them, of a call each,
    is not counted.

    Raises:
        SideFailed: a side raised an error.
    """
    turns = [Turns() for _ in sides]
    with _collected_between_rounds() as collect:
        for index in range(len(sides)):
            _turn(sides, index, 1, now)
        start = time.perf_counter()
        while len(turns[0].seconds) < rounds or time.perf_counter() - start < budget:
            collect()
            for index in order(len(turns[0].seconds), len(sides)):
                own = turns[index]
                ran, waited = cpu_seconds()
                own.started.append(time.perf_counter() - start)
                own.seconds.append(_turn(sides, index, calls, now))
                ran_then, waited_then = cpu_seconds()
                own.ran += ran_then - ran
                own.waited += waited_then - waited
    return turns


PAIR_SECONDS = 0.05  # a side of a pair is called as often as lasts about so long, both equally often


def paired(sides: Sequence[Side], pairs: int, device: torch.device) -> tuple[int, list[Turns]]:
    """(calls per side of a pair, the sides' turns), after a warm-up that compiles and chooses how often each is called.

    Raises:
        SideFailed: a side raised an error.
    """
    now = clock(device)
    calls = calls_per_turn(PAIR_SECONDS, [side.warm_seconds(now) for side in sides])
    return calls, take_turns(sides, calls=calls, rounds=pairs, now=now)


def _turn(sides: Sequence[Side], index: int, calls: int, now: Callable[[], float]) -> float:
    try:
        return sides[index].seconds(calls, now)
    except Exception as error:
        raise SideFailed(index) from error


@contextmanager
def _collected_between_rounds() -> Iterator[Callable[[], object]]:
    """Automatic garbage collection is off, since it would strike whichever side is running; gives what collects.

    What exists already is left out of the collections, which makes them short.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
