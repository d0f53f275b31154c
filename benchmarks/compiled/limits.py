"""What a compiled kernel may ask of a device: the one table of limits that the gate asserts, and of what is exempt."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from benchmarks.compiled.launches import VECTOR, RecordedLaunch
from resnet.kernels.tuning import Device

if TYPE_CHECKING:
    from benchmarks.compiled.binaries import Figures

KIB = 1024


# Resident warps over the most possible. Kernels that only move memory hide its latency by warps; a GEMM hides it by the
# stages of its pipeline, and one warp for each of an SM's four schedulers will do. Float64, whose values fill two
# registers each, is there to check gradients with.
OCCUPANCY = {"memory": 0.25, "tensor cores": 4 / 64, "float64": 4 / 64}

# Bytes a thread that ptxas may spill of its own accord: with registers left it gives up a few values, where one
# step of registers more would cost a resident block (of shared memory it does not know).
TRADED = 32

# A tensor of so many bytes, and so large a part of the launch's largest, is one that bandwidth is spent on: not a
# vector per channel, nor the partials that a reduction leaves.
BULK = 64 * KIB
BULK_PART = 1 / 32

# Bulk accesses that may be narrower than 16 bytes: (kernel, argument, elements that they have at least, why).
# VECTORS: as many as make 16 bytes of the launch's widest bulk type.
VECTORS = 0
NARROWER = (
    ("pool_*", "tap", VECTORS, "a byte an element beside halves or floats: it is in the vectors of its neighbours"),
    ("*", "partial", 1, "a program leaves one value for each of its columns, which are no more than its threads"),
    ("merge_splits_kernel", "dw", 1, "likewise"),
)


def bulk_tensors(launch: RecordedLaunch, device: Device) -> dict[str, int]:
    """Bytes that an access has to have at least, by argument: for large tensors of rows of whole vectors.

    No more than the launch's smallest tile has for each thread.
    """
    least = max([BULK, *(BULK_PART * t.nbytes for t in launch.tensors.values())])
    bulk = {n: t for n, t in launch.tensors.items() if t.nbytes >= least and t.aligned}
    widest = max((t.itemsize for t in bulk.values()), default=1)
    elements = {n: count or VECTOR // widest for kernel, n, count, _ in NARROWER if fnmatch(launch.kernel, kernel)}
    threads = launch.options.get("num_warps", 4) * device.warp
    vector = VECTOR * 32 // device.warp  # tiles are cut for warps of 32 threads: a wave of 64 leaves each half a vector
    return {
        n: min(elements.get(n, VECTOR) * t.itemsize, vector, launch.smallest_tile * t.itemsize // threads)
        for n, t in bulk.items()
    }


def _is_traded(device: Device, figures: Figures) -> bool:
    more = figures.registers + device.register_step
    costs = device.occupancy(more, figures.warps, 0) < device.occupancy(figures.registers, figures.warps, 0)
    return device.backend == "cuda" and figures.stack <= TRADED and more <= device.max_registers and costs


def problems(device: Device, launch: RecordedLaunch, figures: Figures) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong), of one compiled specialisation."""
    if figures.error:
        yield "error", figures.error
        return
    if (figures.spills or figures.stack) and not _is_traded(device, figures):
        yield "spill", f"{figures.spills} spills, {figures.stack} bytes of stack a thread"
    bound = "tensor cores" if figures.products else "float64" if launch.itemsize == 8 else "memory"
    if figures.shared > device.shared_memory:
        yield "shared", f"{figures.shared} bytes of shared memory, of which {device.name} has {device.shared_memory}"
    elif figures.occupancy < (least := OCCUPANCY[bound]):
        yield "occupancy", f"{figures.occupancy:.1%} of the warps are resident, expected {least:.1%}"
    for name, least in bulk_tensors(launch, device).items():
        for what, widths in (("loads", figures.loads.get(name)), ("stores", figures.stores.get(name))):
            if widths and min(widths) < least:
                yield "width", f"{what} of {name} are {min(widths)} bytes wide, expected {least}"
    if figures.half_products and not figures.tensor:
        yield "tensor", "a product of halves without a tensor-core instruction"
