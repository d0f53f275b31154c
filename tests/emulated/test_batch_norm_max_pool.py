"""The kernels of BatchNorm, ReLU and max-pool as compiled code: parity, and what it asks of the machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resnet import reference
from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool, out_size
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.norm import statistics_dtype
from tests.helpers.blocks import SIXTEEN_BIT, draw, name_of
from tests.helpers.emulated_limits import (
    INSTRUCTIONS_PER_ELEMENT,
    SECTOR_EFFICIENCY,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    wavefronts_over_ideal,
)
from tests.helpers.pairs import each_pair_compiled
from tests.helpers.parity import assert_as_exact_as_eager

FLOATS = (*SIXTEEN_BIT, torch.float32)
# (reads, writes) in passes over y. One over `out` is a quarter; `tap`, a byte per element, counts separately.
FLOORS = {"pool_kernel": (1, 0.25), "pool_backward_reduce_kernel": (1.5, 0), "pool_backward_apply_kernel": (1.5, 1)}
TRAFFIC_SHAPE = (8, 64, 24, 24)
per_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)


def run(emulate, shape, dtype):
    """(y, stats, dout), (out, tap, sums, dy) and the reports of the kernels that move activations."""
    C = shape[1]
    y, stats = draw(*shape, seed=0, dtype=dtype), draw(4, C, seed=1, dtype=statistics_dtype(dtype))
    dout = draw(shape[0], C, out_size(shape[2]), out_size(shape[3]), seed=2, dtype=dtype)
    with emulate() as launches:
        out, tap = batch_norm_max_pool(y, stats)
        sums = batch_norm_max_pool_backward_reduce(dout, y, out, tap, stats)
        dy = batch_norm_max_pool_backward_apply(dout, y, out, tap, stats, sums)
    return (y, stats, dout), (out, tap, sums, dy), {r.name: r for r in launches if r.name in FLOORS}


def expected(y, stats, dout, out, tap):
    """(sums, dy) of the formulas in the type of `stats`, for the taps that the kernel chose."""
    W = y.shape[3]
    p, q = (torch.arange(n) for n in tap.shape[2:])
    index = (2 * p[:, None] - 1 + tap.long() // 3) * W + 2 * q - 1 + tap.long() % 3
    g = torch.where(out > 0, dout, 0).to(stats.dtype)
    values = y.to(stats.dtype)
    g = torch.ops.aten.max_pool2d_with_indices_backward(g, values, [3, 3], [2, 2], [1, 1], [1, 1], False, index)
    mean, invstd, scale, _ = stats
    sums = reference.batch_norm_backward_reduce(g, values, mean, invstd)
    dy = reference.batch_norm_backward_apply(g, values, mean, invstd, scale, *sums, training=True)
    return torch.stack(sums), dy.to(y.dtype)


@each_pair_compiled(dtype=FLOATS, shape=((2, 64, 12, 12), (2, 3, 7, 5), (1, 100, 5, 9), (2, 1, 6, 6)))
def test_pooled_output_sums_and_gradient_are_as_exact_as_eager(emulate, shape, dtype):
    (y, stats, dout), (out, tap, sums, dy), _ = run(emulate, shape, dtype)
    high = stats.double()
    z = reference.batch_norm_apply(y, stats[2], stats[3], relu=False).to(dtype)
    exact = F.max_pool2d(torch.relu(reference.batch_norm_apply(y.double(), high[2], high[3], relu=False)), 3, 2, 1)
    assert_as_exact_as_eager("out", [out], [F.max_pool2d(torch.relu(z), 3, 2, 1)], [exact])
    eager = expected(y, stats, dout, out, tap)
    judge = expected(y.double(), high, dout.double(), out, tap)
    for name, got, own, best in zip(("sums", "dy"), (sums, dy), eager, judge):
        assert_as_exact_as_eager(name, [got], [own], [best])


@per_dtype
def test_bytes_moved_are_at_the_floor(emulate, dtype):
    (y, *_), (_, tap, *_), reports = run(emulate, TRAFFIC_SHAPE, dtype)
    size = y.numel() * y.element_size()
    assert reports.keys() == FLOORS.keys()
    for name, report in reports.items():
        floor = sum(FLOORS[name]) * size + tap.numel()
        assert report.dram_bytes <= TRAFFIC_OVER_FLOOR * floor, f"{name}: {report.dram_bytes / floor:.3f} of the floor"


@each_pair_compiled(dtype=FLOATS, C=(32, 64, 96, 128))
def test_sectors_are_used_in_full(emulate, C, dtype):
    """At these C a pixel fills whole sectors of 32 bytes, in `tap` too, so windows two pixels apart share none."""
    *_, reports = run(emulate, (2, C, 12, 12), dtype)
    for name, report in reports.items():
        assert report.gld_efficiency >= SECTOR_EFFICIENCY, f"{name}: {report}"
        if name != "pool_backward_reduce_kernel":  # which stores its partials only, a hundredth of what it reads
            assert report.gst_efficiency >= SECTOR_EFFICIENCY, f"{name}: {report}"


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_shared_memory_has_no_bank_conflicts_and_instructions_stay_within_the_limit(emulate, dtype):
    (y, *_), _, reports = run(emulate, (4, 64, 48, 48), dtype)
    for name, report in reports.items():
        assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL, name
        instructions = 32 * report.warp_instr / y.numel()
        assert instructions <= INSTRUCTIONS_PER_ELEMENT[name], f"{name}: {instructions:.1f}"
