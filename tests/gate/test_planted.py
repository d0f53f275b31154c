"""Kernels with a planted fault each, recorded, compiled and judged: the gate names every one of them."""

import pytest
import torch

from benchmarks.compiled import binaries, launches, limits
from benchmarks.compiled.report import JUDGED
from resnet.kernels.tuning import DEVICES
from tests import gate
from tests.gate.planted_kernels import copy_kernel, dot_kernel


def judged(device, kernel, *args, **options):
    with launches.record(DEVICES[device].target) as recorded:
        kernel[(1,)](*args, **options)
    (figures,) = binaries.read([(recorded[0], device)])
    return figures, {kind for kind, _ in limits.problems(DEVICES[device], recorded[0], figures)}


@pytest.fixture
def matrix():
    return torch.empty(512, 512, dtype=torch.float16)


@pytest.mark.parametrize("device", JUDGED)
def test_a_narrow_bulk_access_is_caught(device, matrix):
    assert "width" in judged(device, copy_kernel, matrix, matrix, ORDER="strided", BLOCK=2048)[1]
    assert not judged(device, copy_kernel, matrix, matrix, ORDER="plain", BLOCK=2048)[1]


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100"])
def test_spilled_registers_are_caught(device):
    x = torch.empty(64, 64)
    figures, kinds = judged(device, dot_kernel, x, x, x, BLOCK=64, num_warps=1, maxnreg=64)  # accumulators: 128
    assert "spill" in kinds, figures


@pytest.mark.parametrize("device", JUDGED)
def test_tensor_cores_are_seen_and_missed(device, matrix):
    figures, kinds = judged(device, dot_kernel, matrix, matrix, matrix, BLOCK=64)
    assert figures.products == ["f16"] and figures.tensor and "tensor" not in kinds
    figures.tensor = {}
    for products, precision in (("f16", "ieee"), ("f32", "tf32")):
        figures.products = [products]
        launch = launches.RecordedLaunch("", "", {"PRECISION": "constexpr"}, {(0,): precision}, {}, {}, {})
        assert "tensor" in {kind for kind, _ in limits.problems(DEVICES[device], launch, figures)}


def test_shared_memory_beyond_the_device_is_caught():
    x = torch.empty(256, 256, dtype=torch.float32)
    figures = binaries.Figures(shared=65 * 1024, warps=4, occupancy=1.0)
    launch = launches.RecordedLaunch("", "", {}, {}, {}, {}, {"x": launches.TensorArgument.of(x)})
    assert {kind for kind, _ in limits.problems(DEVICES["gfx942"], launch, figures)} == {"shared"}
    assert not list(limits.problems(DEVICES["sm_80"], launch, figures))


def test_a_kernel_that_no_launch_reaches_is_named(matrix):
    with launches.record(DEVICES["sm_80"].target) as recorded:
        copy_kernel[(1,)](matrix, matrix, ORDER="plain", BLOCK=2048)
    assert launches.not_reached(gate, recorded) == ["tests.gate.planted_kernels.dot_kernel"]
