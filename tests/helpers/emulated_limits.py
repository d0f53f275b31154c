"""What a launch may ask of the machine, as the emulator counts it: the one table of the emulated tests' limits."""

from __future__ import annotations

# Of the bytes at the floor, all tensors moved once. In half precision the partials of a reduction are 1 to 1.6% of an
# activation at the tests' shapes, and per-channel vectors less than 0.3%.
TRAFFIC_OVER_FLOOR = 1.03
LAUNCH_OVER_FLOOR = 1.06  # of a block's single launch: where it leaves moments of its row tiles, these are a twentieth

# Bytes that activations' loads and stores ask for, of the 32-byte sectors they touch. The merge kernels are exempt, as
# are the stores of partials: they move a hundredth of what the others do, a few channels wide to have programs enough.
SECTOR_EFFICIENCY = 0.95
# Of each load and store of activations by one thread: 16, less the few that the first and the last row do without.
ACCESS_BYTES = 14
# Of shared memory: what bank conflicts add.
WAVEFRONTS_OVER_IDEAL = 1.1


def wavefronts_over_ideal(report) -> float:
    """Of the loads or of the stores of shared memory, the worse, as `ptxsim` reports them; 1 where there are none."""
    accesses = (report.sld_wavefronts, report.sld_ideal), (report.sst_wavefronts, report.sst_ideal)
    return max((wavefronts / ideal for wavefronts, ideal in accesses if ideal), default=1.0)


# Warp instructions for each 16x8x16 product, setup and epilogue included, on the tiles named in the tests. Tensor cores
# leave room for 8 on sm_80 and for 4 on sm_90.
INSTRUCTIONS_PER_PRODUCT = {
    # measured, plus 3%
    "forward": {
        "plain": {80: 4.45, 90: 3.49},
        "prologue, moments": {80: 12.2, 90: 11.4},
        "prologue in steps, moments": {80: 7.53, 90: 6.71},
        "shortcut, moments": {80: 6.56, 90: 5.4},
        "inference": {80: 5.53, 90: 4.58},
        "flattened axis, moments": {80: 21.6, 90: 20.1},
    },
    # at the fewest channels and so the shortest reduction, for which the epilogue weighs most
    "grad-input": {
        "none": {80: 4.6, 90: 3.8},
        "mask": {80: 6.2, 90: 5.3},
        "residual": {80: 5.4, 90: 4.6},
        "shortcut": {80: 5.8, 90: 4.8},
        "shortcut, gradient masked before": {80: 4.6, 90: 4.0},
    },
    # in splits of 18 steps; a 1x1 convolution has one product per pair of loads, and is bound by memory
    "grad-weight": {
        "plain": {80: 5.5, 90: 5.5},
        "activated": {80: 7.0, 90: 7.0},
        "1x1": {80: 7.0, 90: 7.0},
    },
    # measured, plus 3%: a gather for each element of dy and of x, for few columns; 32 instructions per element of y
    "stem's grad-weight": {80: 39.3, 90: 36.8},
}
# Thread instructions for each element of y, in half precision at 64 channels: measured, plus 3%. The memory of an H100
# leaves room for 24 to 28.
INSTRUCTIONS_PER_ELEMENT = {"pool_kernel": 30.5, "pool_backward_reduce_kernel": 22, "pool_backward_apply_kernel": 28.4}
