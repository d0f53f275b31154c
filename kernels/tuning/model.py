"""The model that ranks a GEMM's tiles for a launch: a lower bound of its time, in clocks of a processor (SM, CU).

    time = max(bytes / bandwidth, programs of a processor * steps * clocks of a step + latency of its waves)
    step = max(products / tensor rate, instructions / 4, shared memory's bytes / 128, L2's bytes / 40)

Configurations that need more shared memory or registers than there are, or are wider than the matrix, are left out.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import NamedTuple

import torch

from ..host.shapes import ConvShape
from .devices import ANY, Device
from .table import MAX_ACCUMULATORS, TABLE, Config


def bucket(count: int) -> int:
    """The count rounded up to a power of two, for a key in which another batch size is seldom another key."""
    return 1 << max(count - 1, 0).bit_length()


# ---- the launch --------------------------------------------------------------------------------------------------


class Epilogue(Enum):
    """What grad-input does to a tile before it stores it: see `conv_grad_input`."""

    NONE = auto()
    RELU_MASK = auto()
    IDENTITY_GRAD = auto()
    SHORTCUT_GRAD = auto()

    def __repr__(self) -> str:  # it stands in the key of a remembered choice
        return str(self)


class Gemm(NamedTuple):
    """What a launch's best tile depends on: the key of its choice."""

    operation: str  # a key of TABLE
    pixels: int  # rows of the forward and of grad-input, reduction of grad-weight; a power of two
    C: int
    K: int
    R: int
    S: int
    stride: int
    padding: int
    dtype: torch.dtype
    switches: tuple[tuple[str, object], ...]  # what else the kernel is compiled for, by name

    def switch(self, name: str, default: object = None) -> object:
        return dict(self.switches).get(name, default)

    @property
    def kind(self) -> str:
        """The kind of product: a key of TABLE[operation]."""
        if self.dtype == torch.float32:
            return "tf32" if self.switch("precision") == "tf32" else "float32"
        return "float64" if self.dtype == torch.float64 else "16-bit"

    @property
    def reduces_pixels(self) -> bool:
        return self.operation.startswith("grad_weight")

    @property
    def dy_moves(self) -> bool:
        """Whether in grad-weight x stands still from tap to tap, so that its prologue is computed once."""
        return bool(self.switch("prologue")) and self.stride == 1 and not self.switch("flat")

    @property
    def problem(self) -> tuple[int, int, int, int]:
        """(rows, columns, taps, reduction).

        The forward and grad-input have rows x columns sums over taps x reduction. Grad-weight has rows x columns sums
        over the reduction for each tap; its rows are the channels of the operand that does not move from tap to tap.
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
            taps = max(1, taps // self.stride**2)  # that a pixel meets, on average
        return (rows, columns, 1, taps * reduction) if self.switch("flat") else (rows, columns, taps, reduction)


def gemm(operation: str, shape: ConvShape, dtype: torch.dtype, **switches: object) -> Gemm:
    """The key of a launch.

    Args:
        operation: a key of TABLE.
        switches: everything else that the kernel is compiled for, always in the same order. The model reads
            `precision` ("tf32", "ieee"), `flat`, `prologue`, `shortcut`, `epilogue`, `masked` and `out`.
    """
    pixels = shape.N * shape.H * shape.W if operation == "grad_input" else shape.M
    window = shape.R, shape.S, shape.stride, shape.padding
    return Gemm(operation, bucket(pixels), shape.C, shape.K, *window, dtype, tuple(switches.items()))


# ---- the bound ---------------------------------------------------------------------------------------------------

_SIZES = {"16-bit": 2, "tf32": 4, "float32": 4, "float64": 8}  # bytes
_TIMED = 8  # candidates of a key, at most
_REGISTERS = 255  # of a thread, on every device
_RESERVED = 1024  # bytes beside each block's shared memory, on every device: what NVIDIA's system takes
L2 = 40  # bytes per clock that a processor gets of the L2 cache
_LATENCY = 800  # clocks from a load to its data, between those of L2 and of memory
_START = 3 * _LATENCY  # clocks of a program before its first product and after its last one


def shared_bytes(config: Config, gemm: Gemm, device: Device) -> int:
    """Bytes of the pipeline's tiles, with the one that a prologue recomputes. The epilogue's tiles take their place."""
    size = _SIZES[gemm.kind]
    rows = config.BLOCK_M + config.BLOCK_N
    if gemm.operation == "grad_weight":
        moving = config.BLOCK_N * _taps_at_once(config, gemm)
        rows = config.BLOCK_M + moving
        if gemm.switch("out"):  # the mask lies beside dy
            rows += moving if gemm.dy_moves else config.BLOCK_M
    stages = config.num_stages if device.asynchronous else max(config.num_stages - 1, 1)
    recomputed = config.BLOCK_M if gemm.reduces_pixels and gemm.switch("prologue") else 0
    return max((stages * rows + recomputed) * config.BLOCK_K * size, config.BLOCK_M * config.BLOCK_N * size)


def _taps_at_once(config: Config, gemm: Gemm) -> int:
    """Taps of one grad-weight program: each has an accumulator, and all share the operand that stands still."""
    accumulators = config.BLOCK_M * config.BLOCK_N * max(_SIZES[gemm.kind], 4) / 4 / (32 * config.num_warps)
    return gemm.S if not gemm.switch("flat") and accumulators * gemm.S <= MAX_ACCUMULATORS else 1


def _registers(config: Config, gemm: Gemm) -> float:
    """Registers of a thread, fitted to compiled kernels. Accumulators count twice, for the epilogue that sums them."""
    size, threads = _SIZES[gemm.kind], 32 * config.num_warps
    accumulators = config.BLOCK_M * config.BLOCK_N * max(size, 4) / 4 / threads
    if gemm.reduces_pixels:
        accumulators *= 0.625 * _taps_at_once(config, gemm)
    chunks = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size / 16 / threads
    operand = config.BLOCK_M * config.BLOCK_K * size / 4 / threads if gemm.switch("prologue") else 0
    return 40 + 2 * accumulators + 3 * chunks + operand


def _seconds(config: Config, gemm: Gemm, device: Device) -> tuple[float, float]:
    """(modelled time, bytes that are loaded from L2). The second decides between equal times."""
    rows, columns, taps, reduction = gemm.problem
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    size, warps = _SIZES[gemm.kind], config.num_warps
    asynchronous = device.asynchronous and M >= 64 and warps % 4 == 0 and gemm.kind in ("16-bit", "tf32")

    tiles = -(-rows // M) * -(-columns // N)
    steps = taps * -(-reduction // K)
    splits = at_once = 1
    if gemm.reduces_pixels:  # the reduction is split until the device is full
        at_once = _taps_at_once(config, gemm)
        tiles *= -(-taps // at_once)
        steps //= taps
        splits = max(1, min(steps // 4, 2 * device.processors // tiles))
        steps = -(-steps // splits)
    programs = tiles * splits

    products = M * N * K * at_once
    loaded = (M + N * at_once) * K * size
    if gemm.kind == "float32":
        tensor, instructions = 0, products / 32
    else:
        rate = device.products / {"16-bit": 1, "tf32": 2, "float64": 16}[gemm.kind]
        tensor = products / (rate if asynchronous or not device.asynchronous else rate / 2)
        instructions = 0 if asynchronous else products / {"16-bit": 2048, "tf32": 1024, "float64": 256}[gemm.kind]
    across = min(warps, max(1, N // 32))  # warps along N; the others lie along M
    fragments = 0 if asynchronous else (M * across + N * at_once * (warps // across or 1)) * K * size
    instructions += fragments / 512 + 16 * loaded / 512 + 20 * warps  # ldmatrix, cp.async with its address, the loop
    if gemm.switch("prologue"):
        instructions += 7 * M * K / 32
    shared = (loaded + (loaded if asynchronous else fragments)) / 128

    resident = max(
        1,
        min(
            (device.shared_memory + _RESERVED) // (shared_bytes(config, gemm, device) + _RESERVED),
            int(device.registers / (32 * warps * min(_registers(config, gemm), _REGISTERS))),
            device.warps * device.warp // (32 * warps),
        ),
    )
    step = max(tensor, instructions / 4, shared, loaded / L2)
    per_processor = -(-programs // device.processors)
    waves = -(-per_processor // resident)
    # A wave of few programs waits for its loads: each program has num_stages - 1 steps under way.
    together = min(per_processor, resident)
    step = max(step, _LATENCY / max(config.num_stages - 1, 1) / together)
    clocks = per_processor * steps * step + waves * _START
    moved = (rows * columns + rows * reduction + columns * reduction * taps) * size
    if gemm.reduces_pixels:
        moved = (gemm.K + gemm.C) * reduction * size + 2 * splits * rows * columns * taps * 4
    return max(clocks / device.clock / 1e9, moved / device.bandwidth / 1e9), programs * steps * loaded


def _fits(config: Config, gemm: Gemm, device: Device) -> bool:
    """Whether it runs without spilling, and is not twice as wide as the matrix or more."""
    rows, columns, _, reduction = gemm.problem
    narrow = all(
        block == 16 or block < 2 * length
        for block, length in ((config.BLOCK_M, rows), (config.BLOCK_N, columns), (config.BLOCK_K, reduction))
    )
    shared = shared_bytes(config, gemm, device)
    registers = _registers(config, gemm) <= _REGISTERS and _epilogue_fits(config, gemm)
    return narrow and shared <= device.shared_memory and registers and _prologue_fits(config, gemm, device)


def _prologue_fits(config: Config, gemm: Gemm, device: Device) -> bool:
    """Whether the forward's prologue does not spill where a thread computes a whole row of its tile.

    Where every step has the same channels, a thread holds their scale and shift through the loop, beside the row in
    float32. A row of float16 is computed in pairs, which take less; bfloat16 has no such arithmetic.
    """
    held = gemm.operation == "forward" and gemm.switch("prologue") and gemm.C <= config.BLOCK_K
    row = config.BLOCK_M * config.BLOCK_K // (32 * config.num_warps)
    return not (device.tensor_memory and held and gemm.dtype == torch.bfloat16) or row < 64


def _epilogue_fits(config: Config, gemm: Gemm) -> bool:
    """Whether what is fused fits: a kernel spills where a thread holds more values than these.

    The forward holds a shortcut's second product beside the masks of ragged channels. Grad-weight holds accumulators,
    what moves from tap to tap, and what its prologue recomputes. The stem's grad-weight holds masks of ragged channels
    beside a large tile, which is too much in float32. Grad-input holds up to 64 accumulators beside the tiles that its
    epilogue loads, and up to 16 values of dout that the shortcut's mask brings into registers.
    """
    epilogue = gemm.switch("epilogue", Epilogue.NONE)
    threads = 32 * config.num_warps
    accumulators, operand = config.BLOCK_M * config.BLOCK_N // threads, config.BLOCK_M * config.BLOCK_K // threads
    rows, columns, *_ = gemm.problem
    if gemm.operation == "forward":
        whole = gemm.C % config.BLOCK_K == 0 == columns % config.BLOCK_N  # no channel needs a mask
        return not gemm.switch("shortcut") or whole or accumulators + operand <= 80
    if gemm.operation == "grad_weight":
        whole = rows % config.BLOCK_M == 0 == columns % config.BLOCK_N
        taps = _taps_at_once(config, gemm)
        values = taps * (accumulators + config.BLOCK_N * config.BLOCK_K // threads)
        return values + (operand if gemm.switch("prologue") else 0) <= (170 if whole else 150)
    if gemm.operation == "grad_weight_max_pool":
        return gemm.kind != "float32" or accumulators < 16 or rows % config.BLOCK_M == 0
    masked = epilogue is Epilogue.SHORTCUT_GRAD and gemm.switch("masked")
    return epilogue is Epilogue.NONE or (accumulators <= 64 and (not masked or operand <= 16))


@cache
def candidates(gemm: Gemm, device: Device = ANY) -> tuple[Config, ...]:
    """At most 8 configurations that can run on the device, the best one by the model first."""
    table = TABLE[gemm.operation][gemm.kind]
    fitting = [config for config in table if _fits(config, gemm, device)] or [table[-1]]
    return tuple(sorted(fitting, key=lambda config: _seconds(config, gemm, device))[:_TIMED])
