"""One step, kernel by kernel: how long each took, beside the least that the device's ceilings allow.

The least is a model, not a measurement: each tensor that a launch is given moved once, at the bandwidth of a large
copy, or its multiply-adds at the rate of a large product, whichever takes longer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# The products, by the tensor whose elements are each a sum over a window's C * R * S values, or go into so many sums.
_PRODUCTS = {
    "conv_forward_kernel": "y",
    "grad_input_kernel": "dy",
    "conv_grad_weight_kernel": "dy",
    "conv_grad_weight_max_pool_kernel": "y",
}


@dataclass(frozen=True)
class Launch:
    """A launch of one of this library's kernels."""

    kernel: str
    bytes: int  # of the tensors that it was given
    operations: int
    what: str  # shape and tile

    def least_microseconds(self, ceilings: dict[str, float]) -> float:
        return 1e6 * max(self.bytes / ceilings["bytes_per_second"], self.operations / ceilings["operations_per_second"])


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are made and noted, in their order."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def noted(kernel: JITFunction, *args: object, **options: object) -> object:
        launches.append(describe(kernel.__name__, dict(zip(kernel.arg_names, args)) | options))
        return run(kernel, *args, **options)

    JITFunction.run = noted
    try:
        yield launches
    finally:
        JITFunction.run = run


def describe(kernel: str, arguments: dict[str, object]) -> Launch:
    tensors = {t.data_ptr(): t for t in arguments.values() if isinstance(t, Tensor)}
    blocks = [f"{name}={arguments[name]}" for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in arguments]
    blocks += [f"{name}={arguments[name]}" for name in ("num_warps", "num_stages") if name in arguments]
    largest = max(tensors.values(), key=Tensor.numel)
    operations = 0
    if kernel in _PRODUCTS:
        window = math.prod(int(arguments[name]) for name in ("C", "R", "S"))
        operations = 2 * arguments[_PRODUCTS[kernel]].numel() * window
        blocks.insert(0, f"{arguments['R']}x{arguments['S']}")
    shape = "x".join(map(str, largest.shape))
    return Launch(kernel, sum(t.nbytes for t in tensors.values()), operations, " ".join([shape, *blocks]))


def profiled(step: Callable[[], object]) -> list[tuple[str, float]]:
    """(kernel, microseconds) of everything that the device did in one step, in its order."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def table(
    events: list[tuple[str, float]], launches: list[Launch], ceilings: dict[str, float]
) -> list[dict[str, object]]:
    """A row for each kernel of the step, this library's with the least that it could take.

    Raises:
        ValueError: the launches that were recorded are not those that were profiled.
    """
    waiting = iter(launches)
    own = {launch.kernel for launch in launches}
    rows = []
    for name, microseconds in events:
        row: dict[str, object] = {"kernel": name[:100], "microseconds": microseconds}
        if name in own:
            launch = next(waiting, None)
            if launch is None or launch.kernel != name:
                raise ValueError(f"recorded {launch and launch.kernel} where the device ran {name}")
            row |= {
                "what": launch.what,
                "least_microseconds": launch.least_microseconds(ceilings),
                "bytes": launch.bytes,
                "operations": launch.operations,
            }
        rows.append(row)
    return rows


def totals(rows: list[dict[str, object]]) -> dict[str, tuple[int, float]]:
    """(count, microseconds) by kernel, the longest first."""
    counts, times = Counter(row["kernel"] for row in rows), Counter()
    for row in rows:
        times[row["kernel"]] += row["microseconds"]
    return {kernel: (counts[kernel], time) for kernel, time in times.most_common()}


def largest_gaps(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The ten launches that lie farthest above their least; of equal launches one, with how many there are."""
    same: dict[tuple[str, str], list[dict[str, object]]] = {}
    for row in rows:
        if "least_microseconds" in row:
            same.setdefault((row["kernel"], row["what"]), []).append(row)
    merged = [
        group[0]
        | {
            "count": len(group),
            "microseconds": sum(row["microseconds"] for row in group) / len(group),
            "least_microseconds": sum(row["least_microseconds"] for row in group) / len(group),
        }
        for group in same.values()
    ]
    gap = lambda row: row["count"] * (row["microseconds"] - row["least_microseconds"])  # noqa: E731
    return sorted(merged, key=gap, reverse=True)[:10]
