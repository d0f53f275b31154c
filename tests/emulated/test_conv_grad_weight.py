"""`kernels/conv_grad_weight.py` as compiled code: parity, and what it asks of memory, registers and tensor cores."""

from __future__ import annotations

import pytest
import torch

from resnet.kernels import conv_grad_weight as kernels
from resnet.kernels import tuning
from resnet.kernels.host import tiling
from resnet.kernels.host.shapes import ConvShape
from tests.helpers.blocks import name_of
from tests.helpers.emulated_limits import (
    INSTRUCTIONS_PER_PRODUCT,
    SECTOR_EFFICIENCY,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    wavefronts_over_ideal,
)
from tests.helpers.parity import assert_as_exact_as_eager
from tests.helpers.tf32 import as_tf32
from tests.kernels.test_conv_grad_weight import PROLOGUES, SHAPES, grad_weight, operands, reference

KERNEL = "conv_grad_weight_kernel"
# Whole tiles, with which the operands take their bulk paths: 3x3 at stages 1 and 2, and a shortcut's 1x1.
STAGES = {
    "64 channels": ConvShape(2, 24, 24, 64, 64, 3, 3, 1, 1),
    "128 channels": ConvShape(8, 12, 12, 128, 128, 3, 3, 1, 1),
    "dilation": ConvShape(2, 24, 24, 64, 64, 3, 3, 1, 2, 2),
    "stride 2": ConvShape(4, 24, 24, 64, 128, 3, 3, 2, 1),
    "shortcut": ConvShape(4, 24, 24, 64, 128, 1, 1, 2, 0),
}
TILE = tuning.Config(128, 64, 32, 8, 4)  # the one that the limits were measured with


def launch(emulate, shape: ConvShape, dtype: torch.dtype, prologue: str, **options):
    """(operands, dW, report of the GEMM)."""
    case = operands(shape, dtype, prologue)
    with emulate(**options) as launches:
        dw = grad_weight(shape, *case)
    (report,) = (r for r in launches if r.name == KERNEL)
    return case, dw, report


@pytest.mark.core
@pytest.mark.parametrize(
    "name, dtype, prologue",
    [
        ("3x3", torch.float16, "activated"),
        ("3x3", torch.bfloat16, "activated"),
        ("3x3", torch.float32, "activated"),
        ("3x3, stride 2", torch.float16, "activated"),
        ("3x3, stride 2", torch.bfloat16, "plain"),
        ("3x3, dilation", torch.float16, "activated"),
        ("3x3, dilation", torch.bfloat16, "plain"),
        ("3x3, dilation and stride", torch.bfloat16, "activated"),
        ("few channels, dilation", torch.float32, "activated"),
        ("1x1", torch.float16, "plain"),
        ("1x1, stride 2", torch.float32, "activated"),
        ("three to six channels", torch.float16, "activated"),
        ("stem", torch.float16, "plain"),
        ("stem, RGB", torch.bfloat16, "activated"),
        ("one channel, 1x1", torch.float32, "plain"),
    ],
    ids=name_of,
)
def test_grad_weight_is_as_exact_as_eager(emulate, name, dtype, prologue):
    shape = SHAPES[name]
    case, dw, _ = launch(emulate, shape, dtype, prologue)
    exact = reference(shape, *case, torch.float64)
    assert_as_exact_as_eager("dw", [dw], [reference(shape, *case, dtype)], [exact])


@pytest.mark.parametrize("name", ("3x3, whole tiles", "3x3, stride 2", "stem"))
@pytest.mark.parametrize("prologue", ("plain", "activated"))
def test_products_in_tf32_are_as_exact_as_cudnns(emulate, name, prologue):
    shape = SHAPES[name]
    dy, x, stats = operands(shape, torch.float32, prologue)
    with emulate() as launches:
        dw = grad_weight(shape, dy, x, stats, tf32=True)
    assert ".tf32" in launches[0].ptx
    used = x if stats is None else torch.relu(x.double() * stats[2].view(1, -1, 1, 1) + stats[3].view(1, -1, 1, 1))
    eager = reference(shape, as_tf32(dy), as_tf32(used.float()), None, torch.float64).float()
    assert_as_exact_as_eager("dw", [dw], [eager], [reference(shape, dy, x, stats, torch.float64)])


@pytest.fixture
def long_splits(monkeypatch):
    """Splits have 18 steps, as with a batch of 256; so few pixels would be cut into shorter ones."""
    monkeypatch.setattr(tiling, "MIN_STEPS", 18)
    kernels.plan.cache_clear()
    yield
    kernels.plan.cache_clear()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("prologue", ("plain", "activated"))
def test_whole_tiles_take_wide_accesses_and_tensor_cores_and_spill_nothing(
    emulate, monkeypatch, request, long_splits, name, prologue
):
    shape = STAGES[name]
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: (TILE,))
    if prologue == "activated" and shape.stride == 2:
        pytest.skip("a block's stride-2 convolution reads its input as it is")
    _, _, report = launch(emulate, shape, torch.float16, prologue, select=lambda *_: [0])
    assert min(report.gld_efficiency, report.gst_efficiency) >= SECTOR_EFFICIENCY, str(report)
    assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL, str(report)
    ptxas = report.ptxas()
    assert ptxas["spill_stores"] == ptxas["spill_loads"] == 0, ptxas
    assert report.mma > 0 and report.instr["cp.async"] > 0
    limits = INSTRUCTIONS_PER_PRODUCT["grad-weight"]["1x1" if shape.R == 1 else prologue]
    arch = request.node.callspec.params["emulate"]
    assert report.warp_instr <= limits[arch] * report.mma, str(report)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_bytes_moved_are_at_the_floor(emulate, prologue):
    """These are dy and x, read once each, and the partial results of this launch."""
    shape = ConvShape(4, 8, 8, 128, 128, 3, 3, 1, 1)
    (dy, x, _), dw, report = launch(emulate, shape, torch.float16, prologue)
    activations = sum(t.numel() * t.element_size() for t in (dy, x))
    splits = report.grid[1]
    assert report.unique_write_sectors * 32 == splits * dw.numel() * (4 if splits > 1 else 2)
    assert activations <= report.unique_read_sectors * 32 <= TRAFFIC_OVER_FLOOR * activations
