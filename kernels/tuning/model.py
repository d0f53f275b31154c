"""The model that ranks a GEMM's tiles for a launch, in clocks of a processor (SM, CU).

    time  = max(bytes / bandwidth, L2's bytes / 40, waves)
    wave  = the longer of one program's time alone and what its programs keep the processor busy for together
    busy  = steps * step + epilogue
    alone = steps * hypot(step, latency / (stages - 1)) + epilogue
    step  = max(products / tensor rate, instructions / 4, shared memory's bytes / 128) + prologue + rounding

A processor that holds one large program stands still while that waits for its loads and while it runs its epilogue.
With several small ones the others go on. So a tile is good not for its products per byte alone, but also for the number
of programs that fit beside each other, and for waves that come out even. That is what the times on an H100 say, and
what the constants are fitted to: see docs/performance.md.

Configurations that need more shared memory or registers than there are, or are at least twice as wide as the matrix (16
is always allowed), are left out.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from functools import cache
from typing import NamedTuple

import torch

from ..host.shapes import ConvShape
from ..host.tiling import pooled_steps, reduction_splits
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
    KEPT_MASK = auto()
    IDENTITY_GRAD = auto()
    SHORTCUT_GRAD = auto()
    BLOCK_END = auto()

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
    dilation: int
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
    def pooled(self) -> bool:
        """Whether dy is computed from a max-pool's windows. Each load of windows serves the products of four pixels."""
        return self.operation == "grad_weight_max_pool"

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
            `precision` ("tf32", "ieee"), `flat`, `prologue`, `shortcut` and `epilogue`.
    """
    pixels = shape.N * shape.H * shape.W if operation == "grad_input" else shape.M
    window = shape.R, shape.S, shape.stride, shape.padding, shape.dilation
    return Gemm(operation, bucket(pixels), shape.C, shape.K, *window, dtype, tuple(switches.items()))


# ---- the time ----------------------------------------------------------------------------------------------------

_SIZES = {"16-bit": 2, "tf32": 4, "float32": 4, "float64": 8}  # bytes
_MOST = 8  # candidates of a key
_REGISTERS = 255  # of a thread, on every device
_RESERVED = 1024  # bytes beside each block's shared memory, on every device: what NVIDIA's system takes
_ROWS_AT_ONCE = 64  # of a product whose operands tensor cores read from shared memory
_SHARES = 9 / 16, 49 / 64  # of a key's pixels that are launched where maps are 3 * 2^k or 7 * 2^k wide, of 2^n images

L2 = 40  # bytes per clock that a processor gets of the L2 cache
# Fitted to the times of 49 launches on an H100, with some 16 tiles each.
_LATENCY = 2000  # clocks from a load to its data while all processors load
_EPILOGUE = 50  # instructions for each accumulator, of all that a program does before and after its steps
_PROLOGUE = 7  # instructions for each element, counted in compiled code
_ROUNDING = 2  # the same, to TensorFloat-32
_OVERLAP = 4  # exponent that joins the two bounds of a wave: 1 would add them, infinity would take the larger
_GATHER = 16  # instructions for each element that has an address of its own
_MERGE = 5e-6  # seconds of the kernel that adds the splits of a reduction


def shared_bytes(config: Config, gemm: Gemm, device: Device) -> int:
    """Bytes of the pipeline's tiles, with the one that a prologue recomputes. The epilogue's tiles take their place."""
    size = _SIZES[gemm.kind]
    rows = config.BLOCK_M + config.BLOCK_N * _taps_at_once(config, gemm)
    stages = config.num_stages if device.asynchronous else max(config.num_stages - 1, 1)
    stored = gemm.reduces_pixels or (device.backend == "cuda" and not device.asynchronous)  # else it is in registers
    recomputed = config.BLOCK_M if stored and gemm.switch("prologue") else 0
    return max((stages * rows + recomputed) * config.BLOCK_K * size, config.BLOCK_M * config.BLOCK_N * size)


def _taps_at_once(config: Config, gemm: Gemm) -> int:
    """Taps of one grad-weight program: each has an accumulator, and all share the operand that stands still. Else 1."""
    if not gemm.reduces_pixels or gemm.switch("flat"):
        return 1
    accumulators = config.BLOCK_M * config.BLOCK_N * max(_SIZES[gemm.kind], 4) / 4 / (32 * config.num_warps)
    return gemm.S if accumulators * gemm.S <= MAX_ACCUMULATORS else 1


def _registers(config: Config, gemm: Gemm) -> float:
    """Registers of a thread, fitted to compiled kernels. Accumulators count twice, for the epilogue that sums them."""
    size, threads = _SIZES[gemm.kind], 32 * config.num_warps
    accumulators = config.BLOCK_M * config.BLOCK_N * max(size, 4) / 4 / threads
    if gemm.reduces_pixels:
        accumulators *= 0.625 * _taps_at_once(config, gemm)
    chunks = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size / 16 / threads
    operand = config.BLOCK_M * config.BLOCK_K * size / 4 / threads if gemm.switch("prologue") else 0
    return 40 + 2 * accumulators + 3 * chunks + operand


def _resident(config: Config, gemm: Gemm, device: Device) -> int:
    """Programs that a processor holds at once. Registers are as compiled kernels have them, not the most they need."""
    size, threads = _SIZES[gemm.kind], 32 * config.num_warps
    accumulators = _area(config, gemm) * max(size, 4) / 4 / threads
    chunks = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size / 16 / threads
    computed = 8 if gemm.pooled else 1 / 4 if gemm.switch("prologue") else 0  # registers for each byte
    operand = config.BLOCK_M * config.BLOCK_K * size * computed / threads
    registers = min(40 + accumulators + 1.5 * chunks + operand, _REGISTERS)
    shared = shared_bytes(config, gemm, device)
    by_shared = (device.shared_memory + _RESERVED) // (shared + _RESERVED)
    return max(1, min(by_shared, int(device.registers / (threads * registers)), device.warps * device.warp // threads))


def _area(config: Config, gemm: Gemm) -> int:
    """Accumulators of a program."""
    return config.BLOCK_M * config.BLOCK_N * _taps_at_once(config, gemm)


def _grid(config: Config, gemm: Gemm, share: float) -> tuple[int, int, int]:
    """(programs, steps of each, splits of the reduction) where this share of the key's pixels is launched."""
    rows, columns, taps, reduction = gemm.problem
    if not gemm.reduces_pixels:
        programs = math.ceil(rows * share / config.BLOCK_M) * -(-columns // config.BLOCK_N)
        shortcut = -(-gemm.C // config.BLOCK_K) if gemm.switch("shortcut") else 0
        return programs, taps * -(-reduction // config.BLOCK_K) + shortcut, 1
    tiles = -(-rows // config.BLOCK_M) * -(-columns // config.BLOCK_N) * -(-taps // _taps_at_once(config, gemm))
    steps = math.ceil(reduction * share / config.BLOCK_K)
    if gemm.pooled:
        steps = math.ceil(steps / 4)  # each of four products
        each = pooled_steps(tiles, steps)
        splits = -(-steps // each)
        return tiles * splits, 4 * each, splits
    activations = int(gemm.pixels * share * (gemm.stride**2 * gemm.C + gemm.K) * _SIZES[gemm.kind])
    splits = reduction_splits(tiles, steps, activations, 4 * rows * columns * taps)
    return tiles * splits, -(-steps // splits), splits


def _loaded(config: Config, gemm: Gemm) -> int:
    """Bytes that a step loads."""
    return (config.BLOCK_M + config.BLOCK_N * _taps_at_once(config, gemm)) * config.BLOCK_K * _SIZES[gemm.kind]


def _step(config: Config, gemm: Gemm, device: Device) -> float:
    """Clocks that a step keeps a processor busy."""
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    size, warps, prologue = _SIZES[gemm.kind], config.num_warps, bool(gemm.switch("prologue"))
    at_once = _taps_at_once(config, gemm)
    asynchronous = device.asynchronous and M >= _ROWS_AT_ONCE and warps % 4 == 0 and gemm.kind in ("16-bit", "tf32")
    products, loaded = _area(config, gemm) * K, _loaded(config, gemm)
    instructions = 16 * loaded / 512 + 20 * warps  # cp.async with its address, the loop
    rounded = 0  # elements, to TensorFloat-32
    if asynchronous:  # every 64 rows read all columns again; a prologue of the forward leaves its rows in registers
        rows = 0 if prologue and not gemm.reduces_pixels else M * at_once
        read = (rows + N * at_once * (M // _ROWS_AT_ONCE)) * K * size
        if gemm.kind == "tf32":
            rounded = (M + N * at_once) * K
            read += 2 * N * at_once * K * size  # the columns, to registers and back; the rows stay there
    else:  # ldmatrix
        across = min(warps, max(1, N // 32))  # warps along N; the others lie along M
        read = (M * across + N * at_once * (warps // across or 1)) * K * size
        instructions += read / 512
        if gemm.kind == "tf32":
            rounded = read // size
    tensor = 0
    if gemm.kind == "float32":
        instructions += products / 32
    else:
        rate = device.products / {"16-bit": 1, "tf32": 2, "float64": 16}[gemm.kind]
        tensor = products / (rate if asynchronous or not device.asynchronous else rate / 2)
        if not asynchronous:
            instructions += products / {"16-bit": 2048, "tf32": 1024, "float64": 256}[gemm.kind]
    if gemm.switch("flat"):
        instructions += _GATHER * (M + N) * K / 32
    recomputed = M * K * size * (3 if gemm.reduces_pixels else 2) if prologue else 0  # to registers, and back
    step = max(tensor, instructions / 4, (loaded + read + recomputed) / 128)
    # The product reads the registers that the prologue and the rounding write, so neither overlaps it.
    return step + ((_PROLOGUE * M * K if prologue else 0) + _ROUNDING * rounded) / 32 / 4


def _launch_time(config: Config, gemm: Gemm, device: Device, share: float) -> tuple[float, float]:
    """(modelled seconds, bytes that are loaded from L2) where this share of the key's pixels is launched."""
    programs, steps, splits = _grid(config, gemm, share)
    step, resident = _step(config, gemm, device), _resident(config, gemm, device)
    epilogue = _EPILOGUE * _area(config, gemm) / 32 / 4 * (2 if gemm.switch("shortcut") else 1)
    busy = steps * step + epilogue
    alone = steps * math.hypot(step, _LATENCY / max(config.num_stages - 1, 1)) + epilogue

    def wave(together: int) -> float:
        return (alone**_OVERLAP + (together * busy) ** _OVERLAP) ** (1 / _OVERLAP)

    waves, rest = divmod(programs / device.processors, resident)
    clocks = waves * wave(resident) + (wave(math.ceil(rest)) if rest else 0)
    loaded = programs * steps * _loaded(config, gemm)
    clocks = max(clocks, loaded / device.processors / L2)

    rows, columns, taps, reduction = gemm.problem
    if gemm.reduces_pixels:
        moved = (gemm.K + gemm.C) * reduction * share  # the partial results stay in L2
    else:
        moved = rows * share * (columns + reduction) + columns * reduction * taps
    seconds = max(clocks / device.clock, moved * _SIZES[gemm.kind] / device.bandwidth) / 1e9
    return seconds + (_MERGE if splits > 1 else 0), loaded


def _time(config: Config, gemm: Gemm, device: Device) -> tuple[float, float]:
    """The same, summed over the sizes that share the key. The bytes decide between equal times."""
    seconds, loaded = zip(*(_launch_time(config, gemm, device, share) for share in _SHARES))
    return sum(seconds), sum(loaded)


def _fits(config: Config, gemm: Gemm, device: Device) -> bool:
    """Whether it runs without spilling, and is not twice as wide as the matrix or more."""
    rows, columns, _, reduction = gemm.problem
    narrow = all(
        block == 16 or block < 2 * length
        for block, length in ((config.BLOCK_M, rows), (config.BLOCK_N, columns), (config.BLOCK_K, reduction))
    )
    shared = shared_bytes(config, gemm, device)
    registers = _registers(config, gemm) <= _REGISTERS and _epilogue_fits(config, gemm, device)
    return narrow and shared <= device.shared_memory and registers and _prologue_fits(config, gemm, device)


def _prologue_fits(config: Config, gemm: Gemm, device: Device) -> bool:
    """Whether the forward's prologue does not spill where a thread computes a whole row of its tile.

    Where every step has the same channels, a thread holds their scale and shift through the loop, beside the row in
    float32. A row of float16 is computed in pairs, which take less; bfloat16 has no such arithmetic.
    """
    held = gemm.operation == "forward" and gemm.switch("prologue") and gemm.C <= config.BLOCK_K
    row = config.BLOCK_M * config.BLOCK_K // (32 * config.num_warps)
    return not (device.tensor_memory and held and gemm.dtype == torch.bfloat16) or row < 64


def _epilogue_fits(config: Config, gemm: Gemm, device: Device) -> bool:
    """Whether what is fused fits: a kernel spills where a thread holds more values than these.

    The forward holds a shortcut's second product beside the masks of ragged channels. Grad-weight holds accumulators,
    what moves from tap to tap (more of it where tensor cores take operands from registers alone), and what its prologue
    recomputes. The stem's grad-weight holds masks of ragged channels beside a large tile, which is too much in float32.
    Grad-input holds up to 64 accumulators beside the tiles that its epilogue loads (32 in a tile of more columns than
    rows whose ReLU's mask has scale, shift and mean of each column). With a stride, a shortcut's second product of the
    same tiles leaves room for up to 32 values of g; so do pixels of which another shortcut meets some. The sums of a
    block's end leave room for 32 accumulators where channels need masks; in a tile of more columns than rows, beside a
    shortcut's product without a stride; and where TensorFloat-32's are in tensor memory.
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
        most = 150 if not whole else 224 if device.asynchronous else 192
        values = taps * (accumulators + config.BLOCK_N * config.BLOCK_K // threads)
        values += operand if gemm.switch("prologue") else 0
        if gemm.switch("prologue") and not gemm.dy_moves and gemm.kind != "16-bit":  # it is computed for each tap
            most = {"tf32": 95, "float32": 95, "float64": 47 if whole else 39}[gemm.kind]
        return values <= most
    if gemm.operation == "grad_weight_max_pool":
        return gemm.kind != "float32" or accumulators < 16 or rows % config.BLOCK_M == 0
    wide, shortcut = config.BLOCK_N > config.BLOCK_M, gemm.switch("shortcut_channels", 0) > 0
    strided = (gemm.stride > 1 and shortcut) or gemm.switch("branch_stride", 1) > 1
    crowded = epilogue is Epilogue.RELU_MASK and wide
    if epilogue is Epilogue.BLOCK_END:
        whole = columns % config.BLOCK_N == 0 == gemm.K % config.BLOCK_K
        crowded = not whole or (shortcut and wide and not strided) or (device.tensor_memory and gemm.kind == "tf32")
    return epilogue is Epilogue.NONE or (accumulators <= (32 if crowded else 64) and (not strided or operand <= 32))


@cache
def candidates(gemm: Gemm, device: Device = ANY) -> tuple[Config, ...]:
    """At most 8 configurations that can run on the device, the best one by the model first."""
    table = TABLE[gemm.operation][gemm.kind]
    fitting = [config for config in table if _fits(config, gemm, device)] or [table[-1]]
    return tuple(sorted(fitting, key=lambda config: _time(config, gemm, device))[:_MOST])
