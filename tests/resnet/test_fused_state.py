"""`state_dict`s, checkpoints and copies of `FusedResidual` and `FusedStem`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet import FusedResidual, Residual, SmallStem, Stem
from tests.helpers.blocks import FUSED, draw, randomize, same, saved_and_loaded, snapshot, step, trio
from tests.helpers.fused_cases import (
    BLOCKS,
    STRIDED,
    assert_trios_parity,
    images,
    inference_trio,
    kinds,
    train_and_eval,
)


@pytest.mark.parametrize(
    ("kind", "args"),
    [*((Residual, args) for args in BLOCKS.values()), (Stem, (1, 4)), (SmallStem, (1, 4))],
    ids=[*BLOCKS, "stem", "small stem"],
)
def test_eager_and_fused_state_dicts_are_alike_and_load_strictly_both_ways(kind, args):
    eager, fused = kind(*args), FUSED[kind](*args)
    randomize(eager)
    assert [(k, v.shape, v.dtype) for k, v in eager.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in fused.state_dict().items()
    ]
    assert [n for n, _ in eager.named_parameters()] == [n for n, _ in fused.named_parameters()]
    assert isinstance(fused, kind) and [type(m) for m in fused.children()] == [type(m) for m in eager.children()]
    fused.load_state_dict(eager.state_dict(), strict=True)
    same(snapshot(fused), snapshot(eager))
    back = kind(*args)
    back.load_state_dict(fused.state_dict(), strict=True)
    same(snapshot(back), snapshot(eager))


def test_first_weights_of_a_seed_are_eagers():
    blocks = []
    for kind in (Residual, FusedResidual):
        torch.manual_seed(3)
        blocks.append(kind(*STRIDED).state_dict())
    same(*blocks)


@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "copied"])
@train_and_eval
def test_a_checkpoint_with_nchw_weights_is_as_exact_as_eager(any_backend, train, assign):
    trios = [trio(Residual, *STRIDED, seed=seed, train=train) for seed in range(3)]
    for t in trios:
        t.fused.to(memory_format=torch.channels_last)
        t.fused.load_state_dict(copy.deepcopy(t.eager.state_dict()), assign=assign, strict=True)
        assert t.fused.conv1.weight.is_contiguous() == assign, "the layout that this test is about"
    assert_trios_parity(trios, (2, 4, 6, 5))
    x = draw(2, 4, 30, 25)
    with torch.no_grad():
        t = trios[0].each(nn.Module.eval)
        torch.testing.assert_close(t.fused(x), t.eager(x), rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
def test_a_copy_gives_the_same_bits_and_changes_alone(any_backend, duplicate, kind):
    fused = inference_trio(kind).fused
    x = images(kind)
    with torch.no_grad():
        before = fused(x)  # fills what may be kept between calls
        twin = duplicate(fused)
        assert type(twin) is type(fused)
        assert torch.equal(twin(x), before)
        for p in twin.parameters():
            p.mul_(-0.7)
        assert not torch.equal(twin(x), before)
        assert torch.equal(fused(x), before)
    same(step(duplicate(fused).train(), x), step(copy.deepcopy(fused).train(), x))
