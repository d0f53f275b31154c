"""Tile configurations of the implicit GEMMs: one table, a model that ranks it for a launch, and the choice among them.

    config = tuning.gemm_config("forward", shape, x, launch, precision="ieee", prologue=True)

The first launch of a key times up to 8 candidates (`choices`), later ones look the answer up. A key holds the
operation, the channels and the window, the type, every switch that the kernel is compiled with, and the number of
pixels rounded up to a power of two, so that another batch size is seldom another key.

The model is a lower bound of a launch's time, good for ranking, in clocks of a processor (SM, CU):

    time = max(bytes / bandwidth, programs of a processor * steps * clocks of a step) + latency of its waves
    step = max(products / tensor rate, instructions / 4, shared memory's bytes / 128, L2's bytes / 40)

Configurations that need more shared memory or registers than there are, or are wider than the matrix, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import choices
from .geometry import ConvShape


@dataclass(frozen=True)
class Config:
    """A GEMM's tile: BLOCK_M rows by BLOCK_N columns, BLOCK_K of the reduction per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}, {self.num_warps} warps, {self.num_stages} stages"


@cache
def _config(text: str) -> Config:
    """The inverse of str."""
    return Config(*map(int, re.findall(r"\d+", text)))


# ---- the table -------------------------------------------------------------------------------------------------

# The last of each is so small that it is always a candidate. A product needs 16 of every dimension.
_NARROW = (  # for few channels, or few pixels
    Config(64, 32, 64, 4, 4),
    Config(64, 16, 32, 4, 3),
    Config(32, 32, 32, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_FORWARD = (  # none spills with prologue and moments, or with shortcut and moments
    Config(128, 64, 32, 4, 4),
    Config(128, 64, 64, 4, 3),  # this one and the next issue the fewest instructions where K is 64
    Config(256, 64, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
    *_NARROW,
)
_GRAD_INPUT = (
    Config(128, 64, 64, 4, 3),
    Config(128, 64, 32, 4, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 3),
    Config(64, 128, 64, 8, 3),
    Config(64, 64, 64, 4, 3),
    Config(256, 64, 32, 8, 3),
    Config(128, 64, 32, 8, 4),  # these two hold little of dout per thread, for the shortcut's mask
    Config(64, 64, 32, 4, 4),
    *_NARROW,
)
_TF32 = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 4, 3),
    Config(64, 128, 32, 4, 3),
    Config(64, 64, 32, 4, 3),
    Config(64, 64, 16, 4, 3),
    Config(128, 32, 32, 4, 3),
    Config(64, 32, 32, 4, 3),
    Config(32, 32, 32, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_SINGLE = (  # exact float32: no tensor cores, every thread holds BLOCK_K of its operands in registers
    Config(64, 64, 16, 4, 3),
    Config(64, 32, 16, 4, 3),
    Config(32, 64, 16, 4, 3),
    Config(32, 32, 32, 4, 3),
    Config(32, 32, 16, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_DOUBLE = (
    Config(64, 32, 16, 4, 2),
    Config(32, 32, 16, 4, 2),
    Config(32, 16, 16, 2, 2),
    Config(16, 16, 16, 2, 2),
)
_PIXELS_REDUCED = (  # rows and columns are channels, the reduction is long
    Config(128, 64, 32, 8, 4),
    Config(128, 64, 64, 8, 3),
    Config(64, 64, 32, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(64, 32, 64, 4, 3),
    Config(64, 16, 64, 4, 3),
    Config(32, 32, 32, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_SMALL = (Config(64, 64, 16, 4, 2), Config(64, 32, 16, 4, 2), Config(32, 32, 16, 4, 2), Config(16, 16, 16, 4, 2))
# Their prologue gathers the gradients of BLOCK_K windows, for their four pixels: nothing to pipeline.
_POOLED = (
    Config(64, 64, 16, 4, 1),
    Config(64, 64, 32, 8, 1),
    Config(32, 32, 16, 4, 1),
    Config(16, 16, 16, 4, 1),
)
_POOLED_SINGLE = (
    Config(64, 64, 16, 8, 1),
    Config(64, 32, 16, 8, 1),
    Config(32, 32, 16, 8, 1),
    Config(16, 16, 16, 4, 1),
)
_POOLED_DOUBLE = (Config(32, 32, 16, 4, 1), Config(16, 16, 16, 4, 1))
TABLE: dict[str, dict[str, tuple[Config, ...]]] = {
    "forward": {"half": _FORWARD, "tf32": _TF32, "single": _SINGLE, "double": _DOUBLE},
    "grad_input": {"half": _GRAD_INPUT, "tf32": _TF32, "single": _SINGLE, "double": _DOUBLE[1:]},
    "grad_weight": {"half": _PIXELS_REDUCED, "tf32": _SMALL, "single": _SMALL, "double": _SMALL},
    "grad_weight_max_pool": {
        "half": _POOLED,
        "tf32": _POOLED_SINGLE,
        "single": _POOLED_SINGLE,
        "double": _POOLED_DOUBLE,
    },
}
MOST_ROWS = max(config.BLOCK_M for kinds in TABLE.values() for table in kinds.values() for config in table)
MAX_ACCUMULATORS = 100  # registers of a thread for which grad-weight takes a whole row of taps at once


# ---- the launch --------------------------------------------------------------------------------------------------


class Gemm(NamedTuple):
    """What a launch's best tile depends on: the key of its choice."""

    operation: str  # of TABLE
    pixels: int  # rows of the forward and of grad-input, reduction of grad-weight; a power of two
    C: int
    K: int
    R: int
    S: int
    stride: int
    padding: int
    dtype: torch.dtype
    switches: tuple[tuple[str, object], ...]  # of the kernel's compilation, by name

    def switch(self, name: str, default: object = None) -> object:
        return dict(self.switches).get(name, default)

    @property
    def kind(self) -> str:
        """Of product: a key of TABLE's tables."""
        if self.dtype == torch.float32:
            return "tf32" if self.switch("precision") == "tf32" else "single"
        return "double" if self.dtype == torch.float64 else "half"

    @property
    def reduces_pixels(self) -> bool:
        return self.operation.startswith("grad_weight")

    @property
    def dy_moves(self) -> bool:
        """Of grad-weight: x stands still from tap to tap, so that its prologue is computed once."""
        return bool(self.switch("prologue")) and self.stride == 1 and not self.switch("flat")

    @property
    def problem(self) -> tuple[int, int, int, int]:
        """(rows, columns, taps, reduction): rows x columns of sums over taps x reduction; of grad-weight, taps of them.

        The rows of grad-weight are the channels of the operand that does not move from tap to tap.
        """
        rows, columns, taps, reduction = self.pixels, self.K, self.R * self.S, self.C
        if self.reduces_pixels:
            rows, columns, reduction = self.K, self.C, self.pixels
            if self.switch("flat"):
                return rows, columns * taps, 1, reduction
            if self.dy_moves:
                rows, columns = columns, rows
        elif self.operation == "grad_input":
            columns, reduction = self.C, self.K
            taps = max(1, taps // self.stride**2)  # of a pixel, on average
        return (rows, columns, 1, taps * reduction) if self.switch("flat") else (rows, columns, taps, reduction)


def gemm(operation: str, shape: ConvShape, dtype: torch.dtype, **switches: object) -> Gemm:
    """The key of a launch. Of the switches the model reads `precision` ("tf32", "ieee"), `flat` and `prologue`.

    Args:
        operation: of TABLE.
        switches: everything else that the kernel is compiled for, always in the same order.
    """
    pixels = shape.N * shape.H * shape.W if operation == "grad_input" else shape.M
    window = shape.R, shape.S, shape.stride, shape.padding
    return Gemm(operation, choices.bucket(pixels), shape.C, shape.K, *window, dtype, tuple(switches.items()))


# ---- the devices -------------------------------------------------------------------------------------------------


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

    def shared_bytes(self, config: Config, gemm: Gemm) -> int:
        """Of the pipeline's tiles, with one that a prologue recomputes; the epilogue's take their place."""
        size = _SIZES[gemm.kind]
        rows = config.BLOCK_M + config.BLOCK_N
        if gemm.operation == "grad_weight":
            moving = config.BLOCK_N * _taps_at_once(config, gemm)
            rows = config.BLOCK_M + moving
            if gemm.switch("out"):  # the mask lies beside dy
                rows += moving if gemm.dy_moves else config.BLOCK_M
        stages = config.num_stages if self.asynchronous else max(config.num_stages - 1, 1)
        recomputed = config.BLOCK_M if gemm.reduces_pixels and gemm.switch("prologue") else 0
        return max((stages * rows + recomputed) * config.BLOCK_K * size, config.BLOCK_M * config.BLOCK_N * size)


_SIZES = {"half": 2, "tf32": 4, "single": 4, "double": 8}

SM_80 = Target(163 * 1024, 108, 1024, 1.41, 2039)
SM_90 = Target(227 * 1024, 132, 2048, 1.755, 3350, asynchronous=True)
SM_100 = Target(227 * 1024, 148, 4096, 1.85, 8000, asynchronous=True, tensor_memory=True)
GFX942 = Target(64 * 1024, 304, 1024, 2.1, 5300, registers=131072)
# In the interpreter and the emulator: the shared memory of the smallest supported NVIDIA GPU, else as SM_90.
ANY = Target(99 * 1024, 132, 2048, 1.755, 3350, asynchronous=True)


@cache
def _target(device: torch.device) -> Target:
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


# ---- the model -------------------------------------------------------------------------------------------------

_TIMED = 8  # candidates per key
_REGISTERS = 255  # of a thread
_THREADS = 2048  # of a processor
L2 = 40  # bytes per clock that a processor gets of the L2 cache
_LATENCY = 800  # clocks from a load to its data, of L2 and memory between them
_START = 3 * _LATENCY  # clocks of a program before its first product and after its last


def _taps_at_once(config: Config, gemm: Gemm) -> int:
    """Of grad-weight: accumulators of a program that share the operand which stands still."""
    accumulators = config.BLOCK_M * config.BLOCK_N * max(_SIZES[gemm.kind], 4) / 4 / (32 * config.num_warps)
    return gemm.S if not gemm.switch("flat") and accumulators * gemm.S <= MAX_ACCUMULATORS else 1


def _registers(config: Config, gemm: Gemm) -> float:
    """Of a thread, fitted to compiled kernels: accumulators twice where the epilogue rounds and sums them."""
    size, threads = _SIZES[gemm.kind], 32 * config.num_warps
    accumulators = config.BLOCK_M * config.BLOCK_N * max(size, 4) / 4 / threads
    if gemm.reduces_pixels:
        accumulators *= 0.625 * _taps_at_once(config, gemm)
    chunks = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size / 16 / threads
    operand = config.BLOCK_M * config.BLOCK_K * size / 4 / threads if gemm.switch("prologue") else 0
    return 40 + 2 * accumulators + 3 * chunks + operand


def _seconds(config: Config, gemm: Gemm, target: Target) -> tuple[float, float]:
    """(modelled time, bytes asked of L2): the second decides where the first is equal."""
    rows, columns, taps, reduction = gemm.problem
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    size, warps = _SIZES[gemm.kind], config.num_warps
    asynchronous = target.asynchronous and M >= 64 and warps % 4 == 0 and gemm.kind in ("half", "tf32")

    tiles = -(-rows // M) * -(-columns // N)
    steps = taps * -(-reduction // K)
    splits = at_once = 1
    if gemm.reduces_pixels:  # the reduction is split until the device is full
        at_once = _taps_at_once(config, gemm)
        tiles *= -(-taps // at_once)
        steps //= taps
        splits = max(1, min(steps // 4, 2 * target.processors // tiles))
        steps = -(-steps // splits)
    programs = tiles * splits

    products = M * N * K * at_once
    loaded = (M + N * at_once) * K * size
    if gemm.kind == "single":
        tensor, instructions = 0, products / 32
    else:
        rate = target.products / {"half": 1, "tf32": 2, "double": 16}[gemm.kind]
        tensor = products / (rate if asynchronous or not target.asynchronous else rate / 2)
        instructions = 0 if asynchronous else products / {"half": 2048, "tf32": 1024, "double": 256}[gemm.kind]
    across = min(warps, max(1, N // 32))  # warps along N, the rest along M
    fragments = 0 if asynchronous else (M * across + N * at_once * (warps // across or 1)) * K * size
    instructions += fragments / 512 + 16 * loaded / 512 + 20 * warps  # by ldmatrix, cp.async with its address, loop
    if gemm.switch("prologue"):
        instructions += 7 * M * K / 32
    shared = (loaded + (loaded if asynchronous else fragments)) / 128

    resident = max(
        1,
        min(
            (target.shared_memory + 1024) // (target.shared_bytes(config, gemm) + 1024),
            int(target.registers / (32 * warps * min(_registers(config, gemm), _REGISTERS))),
            _THREADS // (32 * warps),
        ),
    )
    step = max(tensor, instructions / 4, shared, loaded / L2)
    per_processor = -(-programs // target.processors)
    waves = -(-per_processor // resident)
    # A wave of few programs waits for its loads: each has num_stages - 1 steps under way.
    together = min(per_processor, resident)
    step = max(step, _LATENCY / max(config.num_stages - 1, 1) / together)
    clocks = per_processor * steps * step + waves * _START
    moved = (rows * columns + rows * reduction + columns * reduction * taps) * size
    if gemm.reduces_pixels:
        moved = (gemm.K + gemm.C) * reduction * size + 2 * splits * rows * columns * taps * 4
    return max(clocks / target.clock / 1e9, moved / target.bandwidth / 1e9), programs * steps * loaded


def _fits(config: Config, gemm: Gemm, target: Target) -> bool:
    """Whether it runs without spilling, and is not twice as wide as the matrix or more."""
    rows, columns, _, reduction = gemm.problem
    narrow = all(
        block == 16 or block < 2 * length
        for block, length in ((config.BLOCK_M, rows), (config.BLOCK_N, columns), (config.BLOCK_K, reduction))
    )
    shared = target.shared_bytes(config, gemm)
    registers = _registers(config, gemm) <= _REGISTERS and _epilogue_fits(config, gemm)
    return narrow and shared <= target.shared_memory and registers and _prologue_fits(config, gemm, target)


def _prologue_fits(config: Config, gemm: Gemm, target: Target) -> bool:
    """Whether the forward's prologue does not spill where a thread computes a row of its tile.

    Of channels that are the same in each step it holds scale and shift through the loop, beside a row in float32:
    bfloat16, unlike float16, has no arithmetic of pairs to keep it shorter.
    """
    held = gemm.operation == "forward" and gemm.switch("prologue") and gemm.C <= config.BLOCK_K
    row = config.BLOCK_M * config.BLOCK_K // (32 * config.num_warps)
    return not (target.tensor_memory and held and gemm.dtype == torch.bfloat16) or row < 64


def _epilogue_fits(config: Config, gemm: Gemm) -> bool:
    """Whether what is fused fits: a kernel spills where it meets more values per thread than these.

    Grad-input: 64 accumulators beside the tiles that its epilogue loads, and 16 of dout that the shortcut's mask brings
    into registers. The forward: a shortcut's second product beside the masks of ragged channels. Grad-weight:
    accumulators, what moves from tap to tap, and what its prologue recomputes. The stem's in float32: masks of ragged
    channels beside a large tile.
    """
    epilogue = gemm.switch("epilogue", "NoneType")
    threads = 32 * config.num_warps
    accumulators, operand = config.BLOCK_M * config.BLOCK_N // threads, config.BLOCK_M * config.BLOCK_K // threads
    rows, columns, *_ = gemm.problem
    if gemm.operation == "forward":
        whole = gemm.C % config.BLOCK_K == 0 == columns % config.BLOCK_N  # of channels, which need no masks then
        return not gemm.switch("shortcut") or whole or accumulators + operand <= 80
    if gemm.operation == "grad_weight":
        whole = rows % config.BLOCK_M == 0 == columns % config.BLOCK_N
        taps = _taps_at_once(config, gemm)
        values = taps * (accumulators + config.BLOCK_N * config.BLOCK_K // threads)
        return values + (operand if gemm.switch("prologue") else 0) <= (170 if whole else 150)
    if gemm.operation == "grad_weight_max_pool":
        return gemm.kind != "single" or accumulators < 16 or rows % config.BLOCK_M == 0
    masked = epilogue == "ShortcutGrad" and gemm.switch("masked")
    return epilogue == "NoneType" or (accumulators <= 64 and (not masked or operand <= 16))


@cache
def candidates(gemm: Gemm, target: Target = ANY) -> tuple[Config, ...]:
    """At most 8 configurations that can run on the device, the best one by the model first."""
    table = TABLE[gemm.operation][gemm.kind]
    fitting = [config for config in table if _fits(config, gemm, target)] or [table[-1]]
    return tuple(sorted(fitting, key=lambda config: _seconds(config, gemm, target))[:_TIMED])


# ---- the choice ------------------------------------------------------------------------------------------------

_every: Target | None = None


@contextmanager
def every_candidate(target: Target = ANY) -> Iterator[None]:
    """Inside, each launch first runs once with every candidate that a device like `target` would time.

    For whoever records launches, to compile and count all that can be chosen.
    """
    global _every
    previous, _every = _every, target
    try:
        yield
    finally:
        _every = previous


def gemm_config(
    operation: str, shape: ConvShape, x: Tensor, run: Callable[[Config], object], **switches: object
) -> Config:
    """The configuration to launch with; see `gemm` for the arguments.

    Args:
        x: an operand: type and device.
        run: launches once with a configuration, changing nothing that it reads.
    """
    key = gemm(operation, shape, x.dtype, **switches)
    if _every is None:
        name = choices.remembered(key, x.device)
        if name is not None:
            return _config(name)
    return best(key, candidates(key, _every or _target(x.device)), run, x.device)


def best(key: tuple, candidates: Sequence[Config], run: Callable[[Config], object], device: torch.device) -> Config:
    """The fastest of `candidates` on the device, as `choices` remembers or times it; on the CPU the first."""
    if _every is not None:
        for config in candidates:
            run(config)
        return candidates[0]
    return _config(choices.choose(key, {str(config): partial(run, config) for config in candidates}, device))
