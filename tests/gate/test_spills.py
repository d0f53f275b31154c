"""No register is spilled at ResNet's channel counts, each in every type: the gate's share has a count in one only.

Each is compiled for one of two devices, and each type for both.
"""

import torch

from benchmarks.compiled import binaries, launches
from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.kernels.tuning import DEVICES
from tests.helpers import squeeze_excite_launches
from tests.helpers.batch_norm_launches import LAUNCHES, Case
from tests.helpers.pairs import each_pair

DEVICE = ("sm_80", "sm_90")
DTYPE = (torch.float16, torch.bfloat16, torch.float32)


def assert_nothing_is_spilled(recorded: list[launches.RecordedLaunch], device: str) -> None:
    recorded = launches.unite(recorded)
    figures = binaries.read([(launch, device) for launch in recorded])
    assert figures
    for launch, found in zip(recorded, figures, strict=True):
        assert not found.error and found.registers > 0, f"{launch.kernel} {launch.specialisation}: {found}"
        assert found.spills == found.stack == 0, f"{launch.kernel} {launch.specialisation}: {found}"


@each_pair(device=DEVICE, dtype=DTYPE, C=(64, 128, 256, 512))
def test_batch_norm(device, dtype, C):
    case = Case.of((1, C, 8, 8), dtype)
    with launches.record(DEVICES[device].target) as recorded:
        for launch in LAUNCHES.values():
            launch(case)
    assert_nothing_is_spilled(recorded, device)


@each_pair(device=DEVICE, dtype=DTYPE, C=(8, 64, 100))
def test_batch_norm_and_max_pool(device, dtype, C):
    y, dout = Case.of((1, C, 6, 6), dtype), Case.of((1, C, 3, 3), dtype).dout
    with launches.record(DEVICES[device].target) as recorded:
        out, tap = batch_norm_max_pool(y.x, y.stats)
        batch_norm_max_pool_backward_reduce(dout, y.x, out, tap, y.stats)
        batch_norm_max_pool_backward_apply(dout, y.x, out, tap, y.stats, y.sums)
    assert_nothing_is_spilled(recorded, device)


@each_pair(device=DEVICE, dtype=DTYPE, maps=((2, 8), (2, 64), (256, 64), (2, 100), (2, 512)))
def test_batch_norm_squeeze_and_excitation(device, dtype, maps):
    """Tiles of 32 columns where the images are few, and of 64."""
    case = squeeze_excite_launches.Case.of((*maps, 16, 16), dtype)
    with launches.record(DEVICES[device].target) as recorded:
        for launch in squeeze_excite_launches.LAUNCHES.values():
            launch(case)
    assert_nothing_is_spilled(recorded, device)
