"""What a compiled kernel may ask of a device: the one table of limits that the gate asserts, and of what is exempt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from benchmarks.compiled.launches import VECTOR, RecordedLaunch

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from benchmarks.compiled.binaries import Figures

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A compilation target, and what its unit of scheduling (an SM, a CU) holds.

    Registers are 32 bits wide and counted per thread of a warp: an SM has 65536 of them, that is 2048 for the 32 lanes
    of a warp, and one SIMD of a gfx942 CU 512 for the 64 lanes of a wave.
    """

    name: str
    backend: str
    arch: int | str
    warp: int  # threads
    units: int  # SMs, CUs
    registers: int  # per lane, of all warps together
    register_step: int  # in which a warp's registers are handed out
    max_registers: int  # per thread
    warps: int  # resident
    blocks: int  # resident
    shared: int  # bytes
    shared_block: int  # bytes, the most that one block may have
    shared_reserved: int  # bytes of each block that the system takes
    vector: int = VECTOR  # bytes of a bulk access that are asked for

    @property
    def target(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp)

    @property
    def properties(self) -> dict[str, int]:
        """As Triton's driver gives them."""
        return {
            "max_shared_mem": self.shared_block,
            "max_num_regs": self.registers * self.warp,
            "multiprocessor_count": self.units,
            "warpSize": self.warp,
        }

    def occupancy(self, registers: int, warps: int, shared: int) -> float:
        """Resident warps over the most that there can be, for blocks of `warps` warps with `shared` bytes."""
        step = self.register_step
        by_registers = self.registers // (max(1, -(-registers // step)) * step) // warps
        by_shared = self.shared // max(1, shared + self.shared_reserved)
        return min(by_registers, by_shared, self.blocks, self.warps // warps) * warps / self.warps


_NVIDIA = {"backend": "cuda", "warp": 32, "registers": 2048, "register_step": 8, "max_registers": 255, "warps": 64}
DEVICES = {
    device.name: device
    for device in (
        Device(
            "sm_80",
            arch=80,
            units=108,
            blocks=32,
            shared=164 * KIB,
            shared_block=163 * KIB,
            shared_reserved=KIB,
            **_NVIDIA,
        ),
        Device(
            "sm_90",
            arch=90,
            units=132,
            blocks=32,
            shared=228 * KIB,
            shared_block=227 * KIB,
            shared_reserved=KIB,
            **_NVIDIA,
        ),
        Device(
            "sm_100",
            arch=100,
            units=148,
            blocks=32,
            shared=228 * KIB,
            shared_block=227 * KIB,
            shared_reserved=KIB,
            **_NVIDIA,
        ),
        Device(  # MI300X: four SIMDs a CU, each with 512 registers a lane (the accumulators' included) and eight waves
            *("gfx942", "hip", "gfx942"),
            warp=64,
            units=304,
            registers=4 * 512,
            register_step=8,
            max_registers=512,
            warps=4 * 8,
            blocks=16,
            shared=64 * KIB,
            shared_block=64 * KIB,
            shared_reserved=0,
            vector=8,  # tiles are cut for warps of 32 threads: over waves of 64 a thread is left half a vector
        ),
    )
}

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
    return {
        n: min(elements.get(n, VECTOR) * t.itemsize, device.vector, launch.smallest_tile * t.itemsize // threads)
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
    if figures.shared > device.shared_block:
        yield "shared", f"{figures.shared} bytes of shared memory, of which {device.name} has {device.shared_block}"
    elif figures.occupancy < (least := OCCUPANCY[bound]):
        yield "occupancy", f"{figures.occupancy:.1%} of the warps are resident, expected {least:.1%}"
    for name, least in bulk_tensors(launch, device).items():
        for what, widths in (("loads", figures.loads.get(name)), ("stores", figures.stores.get(name))):
            if widths and min(widths) < least:
                yield "width", f"{what} of {name} are {min(widths)} bytes wide, expected {least}"
    if figures.half_products and not figures.tensor:
        yield "tensor", "a product of halves without a tensor-core instruction"
