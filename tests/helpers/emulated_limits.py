"""What a launch may ask of the machine, as the emulator counts it: the one table of the emulated tests' limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """A launch's kernel, and how many activations it reads and writes when every byte is moved once."""

    kernel: str
    reads: int
    writes: int


# Bytes moved over the bytes at the floor, which is every tensor moved once. In 16-bit types the partials of a reduction
# are 1 to 1.6% of an activation at the tests' shapes, and per-channel vectors less than 0.3%.
TRAFFIC_OVER_FLOOR = 1.03
# Partial sums that a launch leaves for a merge, over the 16-bit map that is summed: three float32 for each channel of a
# tile of 64 rows, of which the last may have few.
PARTIALS_OVER_SUMMED = 0.11

# Bytes that activations' loads and stores ask for, over the bytes of the 32-byte sectors they touch. The merge kernels
# and the stores of partials are exempt: they move a hundredth of what the others do, and are a few channels wide so
# that there are enough programs.
SECTOR_EFFICIENCY = 0.95
# Bytes that one thread moves with each load and store of activations: 16, but fewer in the first and the last row.
ACCESS_BYTES = 14
# Accesses to shared memory over those that it would take without bank conflicts.
WAVEFRONTS_OVER_IDEAL = 1.1


def wavefronts_over_ideal(report) -> float:
    """The worse ratio of shared memory's loads and stores, as `ptxsim` reports them; 1 where there are none."""
    accesses = (report.sld_wavefronts, report.sld_ideal), (report.sst_wavefronts, report.sst_ideal)
    return max((wavefronts / ideal for wavefronts, ideal in accesses if ideal), default=1.0)


# Warp instructions for each 16x8x16 product, with setup and epilogue, on the tiles named in the tests. Beside tensor
# cores there is room for 8 on sm_80 and for 4 on sm_90.
INSTRUCTIONS_PER_PRODUCT = {
    # measured, plus 3%
    "forward": {
        "plain": {80: 4.45, 90: 3.49},
        "prologue, moments": {80: 12.2, 90: 11.4},
        "prologue, moments, dilation": {80: 12.2, 90: 11.4},
        "prologue in steps, moments": {80: 7.53, 90: 6.71},
        "shortcut, moments": {80: 6.56, 90: 5.4},
        "inference": {80: 5.53, 90: 4.58},
        "flattened axis, moments": {80: 21.6, 90: 20.1},
    },
    # at the fewest channels: there the reduction is shortest and the epilogue weighs most
    "grad-input": {
        "none": {80: 4.6, 90: 3.8},
        "mask": {80: 6.2, 90: 5.3},
        "kept mask": {80: 5.5, 90: 4.65},
        "identity": {80: 5.0, 90: 4.15},
        "shortcut": {80: 4.6, 90: 4.0},
        "identity, block end": {80: 6.2, 90: 5.35},
        "identity, block end of a normed shortcut": {80: 6.85, 90: 6.0},
        "shortcut, block end": {80: 5.5, 90: 4.65},
        "shortcut, block end of a normed shortcut": {80: 6.1, 90: 5.2},
        # measured, plus 3%: a 1x1 convolution, as below
        "identity of every other pixel": {80: 16.3, 90: 16.1},
        "identity of every other pixel, block end": {80: 28.4, 90: 28.5},
    },
    # in splits of 18 steps; a 1x1 convolution has one product for each pair of loads and is bound by memory
    "grad-weight": {
        "plain": {80: 5.5, 90: 5.5},
        "activated": {80: 7.0, 90: 7.0},
        "1x1": {80: 7.0, 90: 7.0},
    },
    # measured, plus 3%: each element of dy and of x is gathered for few columns, with 32 instructions per element of y
    "stem's grad-weight": {80: 39.3, 90: 36.8},
}
# Thread instructions for each element of y, in 16-bit types at 64 channels: measured, plus 3%. While an H100's memory
# moves an element there is time for 24 to 28.
INSTRUCTIONS_PER_ELEMENT = {
    "pool_kernel": 30.5,
    "pool_backward_reduce_kernel": 22,
    "pool_backward_apply_kernel": 28.4,
    # with each ReLU and with all that is added
    "squeeze_kernel": 16.8,
    "excite_kernel": 18.1,
    "excite_backward_kernel": 22.3,
    "squeeze_backward_apply_kernel": 26.4,
}
