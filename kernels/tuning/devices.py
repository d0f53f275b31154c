"""The GPUs that kernels are tuned and compiled for: what the model and the limits of compiled kernels know of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU. A processor is an SM or a CU, a warp is what AMD calls a wave, and a register has 32 bits."""

    name: str
    backend: str  # these two as Triton names them
    arch: int | str
    processors: int
    shared_memory: int  # bytes that a block may have
    products: int  # multiply-adds of 16-bit types per clock and processor, on tensor cores
    clock: float  # GHz
    bandwidth: float  # GB/s
    asynchronous: bool = False  # tensor cores read shared memory themselves (wgmma, tcgen05), which holds a stage more
    tensor_memory: bool = False  # a computed operand goes through it, from threads that hold a row each
    warp: int = 32  # threads
    warps: int = 64  # that a processor can hold
    blocks: int = 32  # that a processor can hold
    registers: int = 65536  # of a processor
    register_step: int = 8  # a warp gets a multiple of it for each thread
    max_registers: int = 255  # of a thread
    shared_reserved: int = KIB  # bytes that the system takes beside each block's

    @property
    def target(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp)

    @property
    def properties(self) -> dict[str, int]:
        """As Triton's driver gives them."""
        return {
            "max_shared_mem": self.shared_memory,
            "max_num_regs": self.registers,
            "multiprocessor_count": self.processors,
            "warpSize": self.warp,
        }

    def occupancy(self, registers: int, warps: int, shared: int) -> float:
        """Resident warps over the most that there can be.

        Args:
            registers: of a thread.
            warps: of a block.
            shared: bytes of a block.
        """
        step = self.register_step
        by_registers = self.registers // self.warp // (max(1, -(-registers // step)) * step) // warps
        by_shared = (self.shared_memory + self.shared_reserved) // max(1, shared + self.shared_reserved)
        return min(by_registers, by_shared, self.blocks, self.warps // warps) * warps / self.warps


SM_75 = Device("sm_75", "cuda", 75, 40, 64 * KIB, 512, 1.59, 320, warps=32, blocks=16)  # T4: FMA products alone
SM_80 = Device("sm_80", "cuda", 80, 108, 163 * KIB, 1024, 1.41, 2039)
SM_86 = Device("sm_86", "cuda", 86, 82, 99 * KIB, 512, 1.695, 936, warps=48, blocks=16)  # RTX 3090
SM_89 = Device("sm_89", "cuda", 89, 128, 99 * KIB, 512, 2.52, 1008, warps=48, blocks=24)  # RTX 4090
SM_90 = Device("sm_90", "cuda", 90, 132, 227 * KIB, 2048, 1.755, 3350, asynchronous=True)
SM_100 = Device("sm_100", "cuda", 100, 148, 227 * KIB, 4096, 1.85, 8000, asynchronous=True, tensor_memory=True)
SM_120 = Device("sm_120", "cuda", 120, 170, 99 * KIB, 512, 2.41, 1792, warps=48, blocks=24)  # RTX 5090
GFX942 = Device(  # MI300X: four SIMDs a CU, each with eight waves and 512 registers a lane, the accumulators' included
    *("gfx942", "hip", "gfx942", 304, 64 * KIB, 1024, 2.1, 5300),
    warp=64,
    warps=4 * 8,
    blocks=16,
    registers=4 * 512 * 64,
    max_registers=512,
    shared_reserved=0,
)
DEVICES = {d.name: d for d in (SM_75, SM_80, SM_86, SM_89, SM_90, SM_100, SM_120, GFX942)}

# In the interpreter and the emulator: the shared memory of the smallest supported NVIDIA GPU, else as SM_90.
ANY = replace(SM_90, name="any", shared_memory=99 * KIB)


@cache
def device_facts(device: torch.device) -> Device:
    """What the driver says of a device, and for the rest the facts of its generation; ANY where it is not a GPU."""
    if device.type != "cuda":
        return ANY
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    properties = driver.active.utils.get_device_properties(index)
    said = {
        "shared_memory": properties["max_shared_mem"],
        "processors": properties["multiprocessor_count"],
        "clock": properties["sm_clock_rate"] / 1e6 or ANY.clock,  # 0: a device with the host's memory need not tell
        "bandwidth": 2 * properties["mem_clock_rate"] * properties["mem_bus_width"] / 8 / 1e6 or ANY.bandwidth,
    }
    if torch.version.hip:
        return replace(GFX942, **said)
    major, minor = torch.cuda.get_device_capability(device)
    by_major = {7: SM_75, 9: SM_90, 10: SM_100, 12: SM_120}
    generation = DEVICES.get(f"sm_{major}{minor}") or by_major.get(major, SM_80)
    large = (major, minor) in ((8, 0), (9, 0), (10, 0), (10, 3))  # the others' tensor cores are slower
    return replace(generation, products=generation.products if large else 512, **said)
