"""How candidates are timed on a device, and which errors leave a candidate out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]
Clock = Callable[[Sequence[Run], torch.device], list[float]]
_ROUNDS = 5, 25  # repetitions of each candidate, at least and at most
_BUDGET = 200.0  # milliseconds that the timing of one key should take


def cuda_milliseconds(runs: Sequence[Run], device: torch.device) -> list[float]:
    """The device's time of one run of each, in turn, from a cold L2.

    The host may need longer to launch a run than the device to execute it. So each run is queued behind flushes of L2
    that last longer than its launches take: the device finds them waiting.
    """
    with torch.cuda.device(device):
        flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        flush_seconds = _device_seconds(lambda: [flush.zero_() for _ in range(8)]) / 8
        times = []
        for run in runs:
            flushes = 1 + math.ceil(2 * _host_seconds(run) / flush_seconds)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()  # an error that the run caused is raised here, as its own
            times.append(start.elapsed_time(end))
        return times


def _host_seconds(run: Run) -> float:
    """What the host takes to launch a run that has run before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def _device_seconds(run: Run) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


CLOCKS: dict[str, Clock] = {"cuda": cuda_milliseconds}  # by device type; on a device without a clock nothing is timed


def fails(run: Run, device: torch.device) -> Exception | None:
    """Why this device cannot run a candidate, after one run of it; None if it runs.

    It may not compile, find no engine, be refused at its launch, or lack memory: each is a RuntimeError or one of
    Triton's own. Any other error is raised, and so is one that the device does not recover from, such as an illegal
    address: after it no other candidate can run either.
    """
    try:
        run()
        synchronize(device)  # an error that the run caused on the device is raised here, as its own
    except Exception as error:
        if not _is_of_the_candidate(error):
            raise
        try:
            synchronize(device)  # CUDA repeats an error that lasts at each later call
        except RuntimeError:
            raise error from None
        return error
    return None


def _is_of_the_candidate(error: Exception) -> bool:
    try:
        from triton.errors import TritonError
    except ImportError:
        return isinstance(error, RuntimeError)
    return isinstance(error, RuntimeError | TritonError)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; an error of that is raised."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(candidates: Mapping[str, Run], clock: Clock, device: torch.device) -> dict[str, float]:
    """Milliseconds by name. The candidates take turns, so that a clock rate that drifts does not favour one."""
    runs = list(candidates.values())
    start = time.perf_counter()
    rounds = [clock(runs, device)]  # no warm-up: each has run once before
    round_milliseconds = 1e3 * (time.perf_counter() - start)
    few, many = _ROUNDS
    for _ in range(max(few, min(many, int(_BUDGET / max(round_milliseconds, 1e-3)))) - 1):
        rounds.append(clock(runs, device))
    return {name: statistics.median(times) for name, times in zip(candidates, zip(*rounds, strict=True), strict=True)}


def capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
