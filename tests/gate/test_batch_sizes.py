"""What a changed batch size compiles: launches are recorded, nothing runs."""

import torch

import resnet
from benchmarks.compiled.launches import record
from resnet import FusedResidual, FusedStem
from resnet.kernels.tuning import DEVICES


def specialisations(batch: int) -> set[tuple[str, str]]:
    device = DEVICES["sm_90"]
    with record(device.target, device.properties) as launches, resnet.backend("triton"):
        for module, channels, size in (
            (FusedStem(1, 64), 1, 92),
            (FusedResidual(64, 64), 64, 23),
            (FusedResidual(64, 128, True, 2), 64, 23),
        ):
            x = torch.empty(batch, channels, size, size, dtype=torch.float16, requires_grad=channels > 1)
            module.half()(x).sum().backward()
            with torch.no_grad():
                module.eval()(x)
    return {(launch.kernel, launch.specialisation) for launch in launches}


def test_another_batch_size_of_the_same_power_of_two_compiles_nothing_anew():
    """Of 48 images, unlike 40, the numbers of pixels and steps are multiples of 16."""
    assert specialisations(40) == specialisations(48) != set()
