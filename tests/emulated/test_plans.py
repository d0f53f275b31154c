"""Replayed launches of compiled code: they are seen, and what Triton compiles for is held in a plan's key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet
from resnet import Residual
from resnet.kernels.host import plan
from tests.helpers.blocks import draw, snapshot, step, trio


def misaligned(t: Tensor) -> Tensor:
    """The same values, one element from where a vector begins."""
    t = t.contiguous(memory_format=torch.channels_last)
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return memory.as_strided(t.shape, t.stride()).copy_(t)


OTHERS = {
    "misaligned": misaligned,
    "one image": lambda x: x[:1],
    "sixteen images": lambda x: draw(16, *x.shape[1:], seed=3),
    "one row": lambda x: x[:, :, :1],
}


@pytest.mark.parametrize("emulate", [80], ids=["sm_80"], indirect=True)
@pytest.mark.parametrize("name", OTHERS)
def test_replayed_launches_are_those_of_a_first_call_and_each_kind_of_input_has_its_own(emulate, name):
    plan.forget()
    t = trio(Residual, 8, 8)
    x, counts = draw(2, 8, 4, 3), []
    inputs = [x, x, x, OTHERS[name](x), x, OTHERS[name](x), OTHERS[name](x)]
    with emulate() as launches, resnet.backend("triton"):
        for images in inputs:
            before = len(launches)
            got = step(t.fused, images)
            counts.append([launch.name for launch in launches[before:]])
            torch.testing.assert_close(got, step(t.eager, images), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(snapshot(t.fused), snapshot(t.eager), rtol=1e-4, atol=1e-4)
    assert counts[0] == counts[1] == counts[2] == counts[4]
    assert counts[3] == counts[5] == counts[6]
