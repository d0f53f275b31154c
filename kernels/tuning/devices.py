"""What the model knows of a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Target:
    """What the model knows of a device."""

    shared_memory: int  # bytes that a program may have; a processor has 1 KiB more
    processors: int  # SMs, CUs
    products: int  # multiply-adds per clock and processor, of half precision on tensor cores
    clock: float  # GHz
    bandwidth: float  # GB/s
    asynchronous: bool = False  # tensor cores read shared memory themselves (wgmma, tcgen05): a stage more is held
    tensor_memory: bool = False  # which an operand that was computed goes through, from threads that hold a row each
    registers: int = 65536  # of 32 bits, per processor


SM_80 = Target(163 * 1024, 108, 1024, 1.41, 2039)
SM_90 = Target(227 * 1024, 132, 2048, 1.755, 3350, asynchronous=True)
SM_100 = Target(227 * 1024, 148, 4096, 1.85, 8000, asynchronous=True, tensor_memory=True)
GFX942 = Target(64 * 1024, 304, 1024, 2.1, 5300, registers=131072)
# In the interpreter and the emulator: the shared memory of the smallest supported NVIDIA GPU, else as SM_90.
ANY = Target(99 * 1024, 132, 2048, 1.755, 3350, asynchronous=True)


@cache
def target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return ANY
    from triton.runtime import driver

    device_index = torch.cuda.current_device() if device.index is None else device.index
    properties = driver.active.utils.get_device_properties(device_index)
    shared, processors = properties["max_shared_mem"], properties["multiprocessor_count"]
    clock = properties["sm_clock_rate"] / 1e6 or ANY.clock  # 0: a device with the host's memory need not tell
    bandwidth = 2 * properties["mem_clock_rate"] * properties["mem_bus_width"] / 8 / 1e6 or ANY.bandwidth
    if torch.version.hip:
        return Target(shared, processors, GFX942.products, clock, bandwidth, registers=GFX942.registers)
    major, minor = torch.cuda.get_device_capability(device)
    products = {(8, 0): 1024, (9, 0): 2048, (10, 0): 4096, (10, 3): 4096}.get((major, minor), 512)
    return Target(
        shared, processors, products, clock, bandwidth, asynchronous=major in (9, 10), tensor_memory=major == 10
    )
