"""`kernels/conv_grad_weight_max_pool.py` as compiled code: parity, and what it asks of the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet.kernels.batch_norm_max_pool_backward import batch_norm_max_pool_backward_apply
from resnet.kernels.host import tiling
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning.model import candidates
from tests.helpers.blocks import SIXTEEN_BIT, name_of
from tests.helpers.emulated_limits import (
    INSTRUCTIONS_PER_PRODUCT,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    wavefronts_over_ideal,
)
from tests.helpers.parity import assert_as_exact_as_eager
from tests.helpers.tf32 import as_tf32
from tests.kernels.test_conv_grad_weight_max_pool import SHAPES, Case

KERNEL = "conv_grad_weight_max_pool_kernel"


def launch(emulate, shape: ConvShape, dtype: torch.dtype, training: bool, tf32: bool = False):
    """(case, dy as it would have been stored, dW, report of the GEMM)."""
    with emulate() as launches:
        case = Case.of(shape, dtype, training)
        dy = batch_norm_max_pool_backward_apply(case.dout, case.y, case.out, case.tap, case.stats, case.sums)
        dw = case.dw(tf32)
    (report,) = (r for r in launches if r.name == KERNEL)
    return case, dy, dw, report


@pytest.mark.core
@pytest.mark.parametrize(
    "name, dtype, training",
    [
        pytest.param("stem", torch.float16, True, id="stem-float16-train"),
        pytest.param("stem", torch.bfloat16, False, id="stem-bfloat16-eval"),
        pytest.param("3x3", torch.float16, False, id="3x3-float16-eval"),
        pytest.param("3x3", torch.float32, True, id="3x3-float32-train"),
    ],
)
def test_grad_weight_through_the_pool_is_as_exact_as_eager(emulate, name, dtype, training):
    case, dy, dw, _ = launch(emulate, SHAPES[name], dtype, training)
    assert_as_exact_as_eager("dw", [dw], [case.reference(dy, dtype)], [case.reference(dy, torch.float64)])


def test_products_in_tf32_are_as_exact_as_cudnns(emulate):
    case, dy, dw, report = launch(emulate, SHAPES["stem"], torch.float32, training=True, tf32=True)
    assert ".tf32" in report.ptx
    eager = replace(case, x=as_tf32(case.x)).reference(as_tf32(dy), torch.float64).float()
    assert_as_exact_as_eager("dw", [dw], [eager], [case.reference(dy, torch.float64)])


@pytest.mark.parametrize("C", (1, 3), ids="{} channels".format)
def test_y_is_read_once_on_tensor_cores_without_a_spill(emulate, C):
    """dout, out, tap and x are read once too, whatever the number of the kernel's columns.

    A launch of fewer pixels takes as long as its loads, whatever it reads: there a smaller tile ends sooner.
    """
    case, _, _, report = launch(emulate, ConvShape(4, 96, 96, C, 64, 7, 7, 2, 3), torch.float16, training=True)
    tensors = (case.y, case.dout, case.out, case.tap, case.x, case.stats, case.sums)
    floor = sum(t.numel() * t.element_size() for t in tensors)
    assert 32 * report.unique_read_sectors <= TRAFFIC_OVER_FLOOR * floor
    assert report.mma > 0 and report.grid[:2] == (C, 1)
    ptxas = report.ptxas()
    assert ptxas["spill_stores"] == ptxas["spill_loads"] == 0, ptxas


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
@pytest.mark.parametrize("C", (1, 3), ids="{} channels".format)
def test_shared_memory_has_no_bank_conflicts_and_instructions_stay_within_the_limit(
    emulate, request, monkeypatch, C, dtype
):
    """The programs have as many steps, and so the tile, as on a device that is full."""
    monkeypatch.setattr(tiling, "POOLED_PROGRAMS", 2 * C)
    candidates.cache_clear()
    request.addfinalizer(candidates.cache_clear)
    *_, report = launch(emulate, ConvShape(1, 96, 96, C, 64, 7, 7, 2, 3), dtype, training=True)
    assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL
    limit = INSTRUCTIONS_PER_PRODUCT["stem's grad-weight"][request.node.callspec.params["emulate"]]
    assert report.warp_instr <= limit * report.mma, f"{report.warp_instr / report.mma:.2f} of {limit}"
