"""What a compiled kernel may ask of a device: the limits that the gate asserts, and what is exempt from them."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from benchmarks.compiled.launches import VECTOR, RecordedLaunch
from resnet.kernels.tuning import Device

if TYPE_CHECKING:
    from benchmarks.compiled.binaries import Figures

KIB = 1024


# Resident warps over the most possible. Kernels that only move memory hide its latency by warps. A GEMM hides it by the
# stages of its pipeline, so one warp for each of an SM's four schedulers will do. float64, whose values fill two
# registers each, is there to check gradients with.
OCCUPANCY = {"memory": 0.25, "tensor cores": 4 / 64, "float64": 4 / 64}

# Bytes of each thread that ptxas may choose to spill. It spills a few values, with registers left, where the next step
# of registers would cost a resident block. It does not know of the shared memory, which may allow fewer blocks anyway.
TRADED = 32

# A tensor takes bandwidth that counts if it has so many bytes or more, and so large a part of the launch's largest one.
# Vectors per channel and most partials of a reduction have less.
BULK = 64 * KIB
BULK_PART = 1 / 32

# Bulk accesses that may be narrower than 16 bytes: (kernel, argument, least elements, why). VECTORS stands for as many
# elements as make 16 bytes in the launch's widest bulk type.
VECTORS = 0
NARROWER = (
    ("pool_*", "tap", VECTORS, "its elements are bytes: a thread takes one for each in a vector of wider ones"),
    ("*", "*partial", 1, "a program leaves one value for each of its columns, and has no more columns than threads"),
    ("merge_splits_kernel", "dw", 1, "the same"),
)


def bulk_tensors(launch: RecordedLaunch, device: Device) -> dict[str, int]:
    """The least bytes that an access has to have, by argument, for large tensors whose rows are whole vectors.

    It is no more than the launch's smallest tile has for each thread.
    """
    least = max([BULK, *(BULK_PART * t.nbytes for t in launch.tensors.values())])
    bulk = {n: t for n, t in launch.tensors.items() if t.nbytes >= least and t.aligned}
    widest = max((t.itemsize for t in bulk.values()), default=1)
    elements = {
        n: count or VECTOR // widest
        for n in bulk
        for kernel, argument, count, _ in NARROWER
        if fnmatch(launch.kernel, kernel) and fnmatch(n, argument)
    }
    threads = launch.options.get("num_warps", 4) * device.warp
    vector = VECTOR * 32 // device.warp  # tiles are for warps of 32: in a wave of 64 a thread gets half
    return {
        n: min(elements.get(n, VECTOR) * t.itemsize, vector, launch.smallest_tile * t.itemsize // threads)
        for n, t in bulk.items()
    }


def _is_traded(device: Device, figures: Figures) -> bool:
    more = figures.registers + device.register_step
    costs = device.occupancy(more, figures.warps, 0) < device.occupancy(figures.registers, figures.warps, 0)
    return device.backend == "cuda" and figures.stack <= TRADED and more <= device.max_registers and costs


def problems(device: Device, launch: RecordedLaunch, figures: Figures) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong) of one compiled specialisation, for each limit that it breaks."""
    if figures.error:
        yield "error", figures.error
        return
    if (figures.spills or figures.stack) and not _is_traded(device, figures):
        yield "spill", f"{figures.spills} spills, {figures.stack} bytes of stack for each thread"
    bound = "tensor cores" if figures.products else "float64" if launch.itemsize == 8 else "memory"
    if figures.shared > device.shared_memory:
        yield "shared", f"{figures.shared} bytes of shared memory, of which {device.name} has {device.shared_memory}"
    elif figures.occupancy < (least := OCCUPANCY[bound]):
        yield "occupancy", f"{figures.occupancy:.1%} of the warps are resident, expected {least:.1%}"
    for name, least in bulk_tensors(launch, device).items():
        for what, widths in (("loads", figures.loads.get(name)), ("stores", figures.stores.get(name))):
            if widths and min(widths) < least:
                yield "width", f"{what} of {name} are {min(widths)} bytes wide, expected {least}"
    if not figures.tensor and (figures.sixteen_bit_products or "PRECISION=tf32" in launch.features):
        yield "tensor", "a product of 16-bit values, or in TF32, without a tensor-core instruction"
