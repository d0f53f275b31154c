"""Kernels with a planted fault each, recorded, compiled and judged: the gate names every one of them."""

import sys

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from kernels import binaries, launches, limits
from kernels.limits import DEVICES

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="the kernels are interpreted; run make gate")


@triton.jit
def copy_kernel(x, y, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if ORDER == "strided":  # neighbouring threads, elements apart
        offsets = offsets * 3
    tl.store(y + offsets, tl.load(x + offsets))


@triton.jit
def dot_kernel(a, b, c, CAST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def judged(device, kernel, *args, **options):
    with launches.record(DEVICES[device].target) as recorded:
        kernel[(1,)](*args, **options)
    (figures,) = binaries.read([(recorded[0], device)])
    return figures, {kind for kind, _ in limits.problems(DEVICES[device], recorded[0], figures)}


@pytest.fixture
def matrix():
    return torch.empty(512, 512, dtype=torch.float16)


@pytest.mark.parametrize("device", DEVICES)
def test_a_narrow_bulk_access_is_caught(device, matrix):
    assert "width" in judged(device, copy_kernel, matrix, matrix, ORDER="strided", BLOCK=2048)[1]
    assert not judged(device, copy_kernel, matrix, matrix, ORDER="plain", BLOCK=2048)[1]


@pytest.mark.parametrize("device", DEVICES)
def test_spilled_registers_are_caught(device):
    x = torch.empty(128, 128, dtype=torch.float64)
    figures, kinds = judged(device, dot_kernel, x, x, x, CAST=False, BLOCK=128, num_warps=1)
    assert "spill" in kinds, figures


@pytest.mark.parametrize("device", DEVICES)
def test_tensor_cores_are_seen_and_missed(device, matrix):
    figures, kinds = judged(device, dot_kernel, matrix, matrix, matrix, CAST=False, BLOCK=64)
    assert figures.products == ["f16"] and figures.tensor and "tensor" not in kinds
    figures.tensor = {}
    launch = launches.Launch("", "", {}, {}, {}, {}, {})
    assert "tensor" in {kind for kind, _ in limits.problems(DEVICES[device], launch, figures)}


def test_shared_memory_beyond_the_device_is_caught():
    x = torch.empty(256, 256, dtype=torch.float32)
    with launches.record(DEVICES["gfx942"].target):
        pass
    figures = binaries.Figures(shared=65 * 1024, warps=4, occupancy=1.0)
    launch = launches.Launch("", "", {}, {}, {}, {}, {"x": launches.TensorArgument.of(x)})
    assert {kind for kind, _ in limits.problems(DEVICES["gfx942"], launch, figures)} == {"shared"}
    assert not list(limits.problems(DEVICES["sm_80"], launch, figures))


def test_a_kernel_that_no_launch_reaches_is_named(matrix):
    import tests.gate

    with launches.record(DEVICES["sm_80"].target) as recorded:
        copy_kernel[(1,)](matrix, matrix, ORDER="plain", BLOCK=2048)
    assert f"{sys.modules[__name__].__name__}.dot_kernel" in launches.not_reached(tests.gate, recorded)
