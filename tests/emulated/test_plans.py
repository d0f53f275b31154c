"""Replayed launches of compiled code: they are seen, and what Triton compiles for is held in a plan's key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import resnet
from resnet import BasicBlock, Residual
from resnet.kernels.batch_norm_add_relu import apply_kernel
from resnet.kernels.host import plan
from tests.helpers.blocks import GATED, averaged, draw, snapshot, step, trio
from tests.helpers.replays import replays
from tests.helpers.written_blocks import PreActivated


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
@pytest.mark.parametrize(
    "block",
    [(Residual, 8, 8), (BasicBlock, 8, 8, GATED), (PreActivated, 8, 8)],
    ids=["textbook", "gates", "pre-activation"],
)
def test_replayed_launches_are_those_of_a_first_call_and_each_kind_of_input_has_its_own(emulate, block, name):
    plan.forget()
    t = trio(*block)
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


@pytest.mark.parametrize("emulate", [80], ids=["sm_80"], indirect=True)
def test_replayed_launches_read_how_many_batches_an_average_is_over(emulate):
    plan.forget()
    t, x = trio(Residual, 8, 8).each(averaged), draw(2, 8, 4, 3)
    with emulate(), resnet.backend("triton"):
        for seed in range(4):
            with replays() as calls:
                step(t.fused, x + seed)
            step(t.eager, x + seed)
            torch.testing.assert_close(snapshot(t.fused), snapshot(t.eager), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("emulate", [80], ids=["sm_80"], indirect=True)
def test_who_watches_launches_sees_them_though_they_were_replayed_before(emulate, monkeypatch):
    plan.forget()
    block, x = trio(Residual, 8, 8).fused, draw(2, 8, 4, 3)
    run, seen = JITFunction.run, []

    def watched(function, *args, **kwargs):
        seen.append(function)
        return run(function, *args, **kwargs)

    def count() -> tuple[int, int]:
        """Launches of a step, and those that were seen."""
        before = len(launches)
        seen.clear()
        step(block, x)
        return len(launches) - before, len(seen)

    with emulate() as launches, resnet.backend("triton"):
        for _ in range(3):
            launched, _ = count()
        with monkeypatch.context() as changes:
            changes.setattr(JITFunction, "run", watched)
            assert count() == (launched, launched)
        assert count() == (launched, 0)
        apply_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(apply_kernel))
        try:
            assert count() == (launched, 1)
        finally:
            apply_kernel.pre_run_hooks.clear()
        assert count() == (launched, 0)
