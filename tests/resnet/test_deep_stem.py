"""A stem of three convolutions, one operator, beside the eager one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet
from tests.conftest import DEVICE
from tests.helpers.blocks import (
    SIXTEEN_BIT,
    deep_stems,
    draw,
    infer,
    keep_norms_constant,
    name_of,
    same,
    snapshot,
    step,
)
from tests.helpers.fused_cases import assert_exact, assert_trios_parity, fused_alone, train_and_eval

pytestmark = fused_alone


@train_and_eval
@pytest.mark.parametrize("shape", [(2, 3, 13, 10), (3, 3, 2, 5), (2, 3, 1, 3)], ids=name_of)
def test_a_deep_stem_gives_eagers_values_in_float64(any_backend, shape, train):
    t, x = deep_stems(dtype=torch.float64, train=train), draw(*shape, dtype=torch.float64)
    assert_exact(t, x)
    assert_exact(t.each(nn.Module.eval), x, infer)


@train_and_eval
def test_a_deep_stem_is_as_exact_as_eager(any_backend, train):
    assert_trios_parity([deep_stems(seed=seed, train=train) for seed in range(3)], (4, 3, 13, 10))


@train_and_eval
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_deep_stem_of_a_16_bit_type_on_pytorchs_operators_is_as_exact_as_eager(dtype, train):
    """There are values enough: two maxima of a window a rounding apart send the gradient either way by chance."""
    assert_trios_parity([deep_stems(seed=seed, dtype=dtype, train=train) for seed in range(6)], (8, 3, 64, 64))


TRAINED = {
    "all": ("",),
    "the last norm": ("bn1",),
    "the last convolution": ("conv1.6",),
    "the second norm": ("conv1.4",),
    "the first convolution": ("conv1.0",),
}


@pytest.mark.parametrize("wants_dx", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_what_is_frozen_changes_no_other_gradient(any_backend, trained, wants_dx):
    t, x = deep_stems(dtype=torch.float64), draw(2, 3, 9, 7, dtype=torch.float64).requires_grad_(wants_dx)
    grads = []
    for stem in (t.fused, t.exact):
        for name, p in stem.named_parameters():
            p.requires_grad_(name.startswith(trained))
        leaves = [p for p in stem.parameters() if p.requires_grad] + [x] * wants_dx
        grads.append(torch.autograd.grad(stem(x).square().sum(), leaves))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


FROZEN = {
    "all": lambda m: m.eval(),
    "the first": lambda m: m.conv1[1].eval(),
    "the last": lambda m: m.bn1.eval(),
    "all, and no vector is trained": keep_norms_constant,
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_a_deep_stem_of_frozen_statistics_gives_eagers_values(any_backend, frozen):
    assert_exact(deep_stems(dtype=torch.float64).each(frozen), draw(2, 3, 9, 7, dtype=torch.float64))


def test_own_convolutions_give_eagers_values():
    with resnet.backend("triton"), resnet.convolution("triton"):
        t, x = deep_stems(dtype=torch.float64), draw(2, 3, 9, 7, dtype=torch.float64)
        assert_exact(t, x)
        assert_exact(t.each(nn.Module.eval), x, infer)


def test_a_second_step_of_a_deep_stem_gives_the_same_bits(any_backend):
    stem, x = deep_stems().fused, draw(2, 3, 13, 10)
    state = snapshot(stem)
    first = step(stem, x)
    stem.load_state_dict(state)
    same(first, step(stem, x))


def test_a_deep_stem_keeps_the_convolutions_and_two_maps_of_the_pooled_size():
    stem, saved = deep_stems().fused, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = stem(draw(2, 3, 32, 32).requires_grad_())
    weights = {p.data_ptr() for p in stem.parameters()}
    maps = [t for t in saved if t.dim() == 4 and t.data_ptr() not in weights]
    assert out.data_ptr() in [t.data_ptr() for t in maps]
    of_floats, of_bytes = ([t.shape[1:3] for t in maps if t.dtype == kind] for kind in (torch.float32, torch.uint8))
    assert sorted(of_floats) == [(3, 32), (4, 16), (4, 16), (8, 8), (8, 16)] and of_bytes == [(8, 8)]


def test_a_deep_stem_under_autocast_trains_its_own_weights():
    t = deep_stems()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outs = [stem(draw(2, 3, 32, 32)) for stem in (t.fused, t.eager)]
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outs, atol=0.1, rtol=0.1)
    for out in outs:
        out.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in t.fused.parameters())


def test_bad_input_is_refused_before_anything_changes():
    stem = deep_stems().fused
    before = snapshot(stem)
    for bad, error in ((draw(2, 4, 9, 7), ValueError), (draw(2, 3, 9, 7, dtype=torch.float64), TypeError)):
        with pytest.raises(error):
            stem(bad)
    stem.conv1[3].double()
    with pytest.raises(TypeError, match=r"conv1\.3\.weight"):
        stem(draw(2, 3, 9, 7))
    stem.conv1[3].float()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stem(draw(1, 3, 2, 2))
    same(before, snapshot(stem))
