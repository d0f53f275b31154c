"""No register is spilled at ResNet's channel counts, each in every type: the gate's share has a count in one only.

Any two of device, type, shape and launch meet. `benchmarks.compiled.report --all` compiles all together.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from benchmarks.compiled import binaries, launches
from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.kernels.tuning import DEVICES
from tests.helpers import batch_norm_launches, squeeze_excite_launches
from tests.helpers.pairs import pairwise

COMPILED_FOR = ("sm_80", "sm_90")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

per_device = pytest.mark.parametrize("device", COMPILED_FOR)


def assert_nothing_is_spilled(device: str, made: Callable[..., object], **options: tuple) -> None:
    """What `made` launches with each type and each of the options, pairwise, where these meet the device."""
    with launches.record(DEVICES[device].target) as recorded:
        for case in pairwise(device=COMPILED_FOR, dtype=DTYPES, **options):
            if case.pop("device") == device:
                made(**case)
    recorded = launches.unite(recorded)
    figures = binaries.read([(launch, device) for launch in recorded])
    assert figures
    for launch, found in zip(recorded, figures, strict=True):
        assert not found.error and found.registers > 0, f"{launch.kernel} {launch.specialisation}: {found}"
        assert found.spills == found.stack == 0, f"{launch.kernel} {launch.specialisation}: {found}"


@per_device
@pytest.mark.parametrize(
    ("kinds", "shapes"),
    [
        (batch_norm_launches, [(1, C, 8, 8) for C in (64, 128, 256, 512)]),
        # Tiles of 32 columns where the images are few, and of 64.
        (squeeze_excite_launches, [(N, C, 16, 16) for N, C in ((2, 8), (2, 64), (256, 64), (2, 100), (2, 512))]),
    ],
    ids=["batch norm", "squeeze-and-excitation"],
)
def test_no_launch_spills(device, kinds: ModuleType, shapes):
    def made(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
        kinds.LAUNCHES[kind](kinds.Case.of(shape, dtype))

    assert_nothing_is_spilled(device, made, shape=tuple(shapes), kind=tuple(kinds.LAUNCHES))


@per_device
def test_no_launch_of_the_stem_spills(device):
    def made(dtype: torch.dtype, C: int) -> None:
        y, pooled = (batch_norm_launches.Case.of((1, C, size, size), dtype) for size in (6, 3))
        out, tap = batch_norm_max_pool(y.x, y.stats)
        batch_norm_max_pool_backward_reduce(pooled.dout, y.x, out, tap, y.stats)
        batch_norm_max_pool_backward_apply(pooled.dout, y.x, out, tap, y.stats, y.sums)

    assert_nothing_is_spilled(device, made, C=(8, 64, 100))
