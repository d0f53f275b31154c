"""The grad-input convolution as compiled code: parity, and what it asks of memory, registers and issue slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from resnet.kernels import conv_grad_input, tuning
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.host.arguments import FLAGS
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning import Config
from tests.helpers import grad_input_cases as cases
from tests.helpers.blocks import SIXTEEN_BIT, name_of
from tests.helpers.displaced import Displaced
from tests.helpers.emulated_limits import (
    INSTRUCTIONS_PER_PRODUCT,
    SECTOR_EFFICIENCY,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    wavefronts_over_ideal,
)
from tests.helpers.grad_input_cases import BLOCK_ENDS, MET, MET_END, SUMS, Case
from tests.helpers.parity import assert_as_exact_as_eager
from tests.helpers.tf32 import as_tf32

IDENTITY_END, IDENTITY_NORMED_END, SHORTCUT_END, SHORTCUT_NORMED_END = BLOCK_ENDS

# A few pixels of ResNet's first stage: 576 are four row tiles and a half.
STAGE = ConvShape(N=1, H=24, W=24, C=64, K=64, R=3, S=3, stride=1, padding=1)
OF_1X1 = (MET, MET_END)  # a bottleneck's first convolution is the one with a shortcut of another stride
PASSES = {  # activations read and written
    "none": (1, 1),
    "mask": (2, 1),
    "kept mask": (2, 1),
    "identity": (2, 1),
    MET: (1.25, 1),
    "shortcut": (2, 1),
    MET_END: (3.25, 1),
    IDENTITY_END: (4, 1),  # dy, g, out and y
    IDENTITY_NORMED_END: (5, 1),  # and z
    SHORTCUT_END: (4, 1),
    SHORTCUT_NORMED_END: (5, 1),
}


def launch(emulate, case: Case):
    with emulate() as launches:
        case.fused()
    return next(r for r in launches if r.name == "grad_input_kernel")


LAUNCHES = [
    *(
        (epilogue, replace(STAGE, padding=d, dilation=d))
        for epilogue in PASSES
        for d in (1, 2)
        if epilogue not in OF_1X1
    ),
    *((epilogue, replace(STAGE, R=1, S=1, padding=0)) for epilogue in OF_1X1),
]


@pytest.mark.parametrize("epilogue, shape", LAUNCHES, ids=cases.name_of_case)
def test_a_launch_is_at_the_floor_of_traffic_and_within_the_budget_of_instructions(
    emulate, monkeypatch, epilogue, shape
):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: (Config(128, 64, 64, 4, 3),))
    report = launch(emulate, Case.of(shape, epilogue, torch.float16))
    activation = 2 * STAGE.N * STAGE.H * STAGE.W * STAGE.C
    weights = 2 * shape.C * shape.K * (shape.R * shape.S + epilogue.startswith("shortcut"))
    reads, writes = PASSES[epilogue]
    for sectors, passes in (
        (report.unique_read_sectors, reads),
        (report.unique_read_sectors + report.unique_write_sectors, reads + writes),
    ):
        floor = passes * activation + weights
        assert floor <= 32 * sectors <= TRAFFIC_OVER_FLOOR * floor
    assert min(report.gld_efficiency, report.gst_efficiency) >= SECTOR_EFFICIENCY
    arch = int(report.ptx.split(".target sm_")[1][:2])
    assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL
    assert report.warp_instr <= INSTRUCTIONS_PER_PRODUCT["grad-input"][epilogue][arch] * report.mma
    assert report.instr["cp.async"] > 0
    used = report.ptxas()
    assert used["registers"] > 0 and used["spill_stores"] + used["spill_loads"] == 0, used


@pytest.mark.parametrize("epilogue, vectors", [("identity", (0, 0, 0)), (IDENTITY_NORMED_END, (0, 2, 3))])
def test_pixels_and_weights_are_moved_16_bytes_at_a_time(emulate, epilogue, vectors):
    """A value at a time is moved of vectors per channel alone: each norm's invstd, and each partial sum."""
    report = launch(emulate, Case.of(STAGE, epilogue, torch.float16))
    for accesses, count in zip((("cp.async",), ("ld", "global"), ("st", "global")), vectors):
        lines = [line for line in report.ptx.splitlines() if all(word in line for word in accesses) and "[" in line]
        wide = [line for line in lines if "0x10" in line or "v4.b32" in line]
        assert wide and len(lines) - len(wide) == count, accesses


# ---- results ---------------------------------------------------------------------------------------------------------

PARITY = {
    "strided, two classes of rows": (ConvShape(2, 5, 4, 20, 17, 3, 3, 2, 1), "mask", torch.float16),
    "strided, kept mask": (ConvShape(2, 5, 4, 20, 17, 3, 3, 2, 1), "kept mask", torch.bfloat16),
    "few channels, identity": (ConvShape(2, 5, 7, 3, 6, 3, 3, 1, 1), "identity", torch.float16),
    "few channels, strided shortcut": (ConvShape(2, 5, 7, 3, 6, 3, 3, 2, 1), "shortcut", torch.bfloat16),
    "without taps": (ConvShape(1, 5, 4, 24, 40, 1, 1, 2, 0), "identity", torch.float32),
    "7x7": (ConvShape(2, 7, 5, 24, 17, 7, 7, 3, 2), "none", torch.float16),
    "ragged everywhere": (ConvShape(2, 5, 4, 20, 40, 3, 3, 1, 1), "shortcut", torch.float16),
    "dilation, mask": (ConvShape(2, 5, 7, 20, 40, 3, 3, 1, 2, 2), "mask", torch.bfloat16),
    "dilation, shortcut": (ConvShape(1, 8, 9, 20, 17, 3, 3, 1, 4, 4), "shortcut", torch.float32),
    "one pixel": (ConvShape(1, 1, 1, 3, 6, 3, 3, 1, 1), "mask", torch.float32),
    "ragged everywhere, block end": (ConvShape(2, 5, 4, 20, 40, 3, 3, 1, 1), IDENTITY_END, torch.float16),
    "few channels, block end": (ConvShape(2, 5, 7, 3, 6, 3, 3, 1, 1), IDENTITY_NORMED_END, torch.bfloat16),
    "strided, block end": (ConvShape(2, 5, 7, 20, 17, 3, 3, 2, 1), SHORTCUT_END, torch.bfloat16),
    "strided, block end, three sums": (ConvShape(2, 5, 4, 20, 40, 3, 3, 2, 1), SHORTCUT_NORMED_END, torch.float16),
    "without taps, block end": (ConvShape(1, 5, 4, 24, 40, 1, 1, 2, 0), SHORTCUT_NORMED_END, torch.float32),
    "dilation, block end": (ConvShape(1, 8, 9, 20, 17, 3, 3, 1, 4, 4), SHORTCUT_END, torch.float32),
    "one pixel, block end": (ConvShape(1, 1, 1, 3, 6, 3, 3, 1, 1), IDENTITY_NORMED_END, torch.float32),
    "float64, block end": (ConvShape(2, 5, 4, 20, 17, 3, 3, 2, 1), SHORTCUT_NORMED_END, torch.float64),
}


@pytest.mark.core
@pytest.mark.parametrize("shape, epilogue, dtype", PARITY.values(), ids=PARITY)
def test_results_are_as_exact_as_eager_and_the_same_bits_twice(emulate, monkeypatch, shape, epilogue, dtype):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)
    with emulate(dtype=dtype):
        cases.assert_parity(shape, epilogue, dtype)
        case = Case.of(shape, epilogue, dtype)
        for a, b in zip(case.fused(), case.fused(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("epilogue", ["none", IDENTITY_NORMED_END])
@pytest.mark.parametrize("tile", [(32, 16, 32, 4, 2), (64, 64, 32, 4, 3)], ids=["mma", "wgmma on sm_90"])
def test_products_in_tf32_are_as_exact_as_cudnns(emulate, monkeypatch, tile, epilogue):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: (tuning.Config(*tile),))
    case = Case.of(ConvShape(1, 5, 4, 20, 40, 3, 3, 1, 1), epilogue, torch.float32)
    with emulate() as launches:
        fused = case.fused(tf32=True)
    assert ".tf32" in launches[0].ptx
    eager = replace(case, weight=as_tf32(case.weight), dy=as_tf32(case.dy)).plain(torch.float64)
    assert len(fused) == len(eager)
    for name, *sides in zip(("dx", *SUMS), fused, [t.float() for t in eager], case.plain(torch.float64)):
        assert_as_exact_as_eager(name, *([side] for side in sides))


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_the_gradient_of_a_block_s_end_is_that_of_the_two_launches_that_it_replaces(
    emulate, monkeypatch, epilogue, dtype
):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)
    case = Case.of(ConvShape(2, 5, 4, 20, 17, 3, 3, 1, 1), epilogue, dtype)
    branch, out, y, stats, shortcut = case.epilogue
    expected = torch.empty_like(out)
    with emulate():
        g, *sums = case.fused()
        dx = replace(case, epilogue=branch).fused()[0]
        expected_sums = batch_norm_backward_reduce(dx, y, out, stats, shortcut=shortcut, g=expected)
    torch.testing.assert_close(g, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(sums), expected_sums, rtol=1e-5, atol=1e-4)  # float32, in another order


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_nan_passes_the_recomputed_relu_and_beyond_the_last_row_nothing_is_summed(emulate, monkeypatch, dtype):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)
    case = Case.of(ConvShape(2, 5, 4, 20, 17, 1, 1, 1, 0), "mask", dtype)
    y1, stats = case.epilogue
    stats.fill_(1)
    y1[0, :3, 1, 2] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    case.dy.fill_(1)
    case.weight.fill_(1)
    case.weight[:, 5:] = float("inf")  # 0 * inf is NaN
    with emulate():
        g, sum_g, _ = case.fused()
    assert g[0, :3, 1, 2].tolist() == [17, 17, 0]
    assert sum_g[:5].tolist() == (17 * (~(y1 + 1 <= 0)).sum((0, 2, 3))[:5]).tolist()
    assert (sum_g[5:] == float("inf")).all()


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_nan_passes_the_relu_of_a_block_s_end_and_beyond_the_last_row_nothing_is_summed(
    emulate, monkeypatch, dtype, epilogue
):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)
    case = Case.of(ConvShape(2, 5, 4, 20, 17, 1, 1, 1, 0), epilogue, dtype)
    out = case.epilogue.out
    out[0, :4, 1, 2] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0], dtype=dtype)
    for t in filter(torch.is_tensor, case.branch):
        t.zero_()
    for x, stats in case.norms:
        x.fill_(1)
        stats.fill_(-1)  # xhat is -2
    case.dy.fill_(1)
    case.weight.fill_(1)
    case.weight[:, 5:] = float("inf")  # 0 * inf is NaN
    with emulate():
        g, *sums = case.fused()
    sums = torch.stack(sums)
    assert g[0, :4, 1, 2].tolist() == [17, 17, 0, 0]
    passed = 17 * (~(out <= 0)).sum((0, 2, 3))[:5]
    for total, xhat in zip(sums, (1, -2, -2)):
        assert total[:5].tolist() == (xhat * passed).tolist()
        assert (total[5:] == xhat * float("inf")).all()


# ---- beyond 2^31 elements --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", ["identity", IDENTITY_END, SHORTCUT_NORMED_END])
def test_images_are_reached_beyond_2_to_the_31_elements(emulate, epilogue):
    """There are 2^20 images of 2^12 elements, of which only the last one is in memory.

    Each of them is a row tile. T, by which the planes of partial sums lie apart, is 1, since only their last row is in
    memory, too.
    """
    shape = ConvShape(N=1, H=8, W=8, C=64, K=64, R=3, S=3, stride=1, padding=1)
    case = Case.of(shape, epilogue, torch.float16)
    N, dx = 2**20, torch.empty_like(case.branch.g)

    def displaced(tensor: torch.Tensor) -> Displaced:
        return Displaced(tensor, (N - 1) * tensor.numel())

    end = [None] * 6  # a, y1, stats, z, z_stats, partial
    if case.norms:
        partial = torch.empty(1 + len(case.norms), 1, shape.C)
        end[0], end[5] = displaced(case.epilogue.out), Displaced(partial, (N - 1) * shape.C)
        for i, (x, stats) in enumerate(case.norms):
            end[1 + 2 * i : 3 + 2 * i] = displaced(x), stats
    with emulate(bounds="storage", select=lambda kernel, grid: [grid[0] - 1]):
        conv_grad_input.grad_input_kernel[(N,)](
            *(displaced(case.dy), case.weight, displaced(dx), *end),
            *(displaced(case.branch.g), getattr(case.branch, "weight", None)),
            *(N, 8, 8, 8, 8, 1),
            DILATION=1,
            SHORTCUT_K=shape.K,
            BRANCH_STRIDE=1,
            ACC=tl.float32,
            PRECISION="ieee",
            **shape.constants(),
            **Config(64, 64, 32, 4, 2).options(),
            **FLAGS,
        )
    exact = case.plain(torch.float64)[0]
    torch.testing.assert_close(dx.double(), exact, rtol=2**-10, atol=2**-10)
    if case.norms:
        sums = torch.stack(cases.sums_of(dx, case.norms))
        torch.testing.assert_close(partial[:, 0], sums, rtol=1e-5, atol=1e-4)  # float32, in another order
