"""What `FusedStem` has and a block has not, beside the eager stem. test_fused_*.py has the tests of both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet import Stem
from tests.helpers.blocks import SIXTEEN_BIT, draw, name_of, step, trio
from tests.helpers.fused_cases import assert_exact, assert_trios_parity, train_and_eval
from tests.helpers.parity import assert_as_exact_as_eager

SHAPES = {"even": (2, 1, 12, 8), "odd, three channels": (2, 3, 9, 7), "tiny": (3, 1, 3, 2)}


@train_and_eval
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_stems_output_gradients_and_statistics_are_as_exact_as_eager(any_backend, shape, dtype, train):
    stems = [trio(Stem, shape[1], 4, seed=seed, dtype=dtype, train=train) for seed in range(3)]
    assert_trios_parity(stems, shape)


@train_and_eval
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_stem_of_a_16_bit_type_is_as_exact_as_eager(any_backend, dtype, train):
    """There are values enough: two maxima of a window a rounding apart send the gradient either way by chance."""
    assert_trios_parity([trio(Stem, 1, 4, dtype=dtype, train=train)], (8, 1, 48, 40))


@train_and_eval
@pytest.mark.parametrize("size", [(3, 1, 1), (2, 1, 9), (2, 5, 2), (1, 8, 8), (1, 3, 601)], ids=name_of)
def test_a_stem_gives_eagers_values_on_odd_sizes(any_backend, size, train):
    n, h, w = size
    assert_exact(trio(Stem, 3, 4, dtype=torch.float64, train=train), draw(n, 3, h, w))


SCALES = {
    "above zero": (0.3, 1.2),
    "below zero": (-1.2, -0.3),
    "of both signs": (0.7, -0.7),
    "zero": (0.0, 1.0),
}


@train_and_eval
@pytest.mark.parametrize("width", [9, 271], ids="{} pixels wide".format)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_a_stem_gives_eagers_values_with_scales(any_backend, scales, width, train):
    def change(stem):
        stem[1].weight.data = torch.tensor(scales).to(stem[1].weight)

    assert_exact(trio(Stem, 1, 2, dtype=torch.float64, train=train).each(change), draw(2, 1, 7, width))


def test_an_infinite_scale_of_a_stem_gives_eagers_values(any_backend):
    """A window's maximum is NaN where any of its pixels is, as a zero is that meets the scale."""

    def change(stem):
        conv, bn, *_ = stem
        for vector, value in ((conv.weight, 1.0), (conv.bias, 0.0), (bn.running_mean, -1.0), (bn.weight, torch.inf)):
            nn.init.constant_(vector, value)

    t = trio(Stem, 1, 2, train=False).each(change)
    x = torch.zeros_like(draw(2, 1, 7, 15))
    x[:, :, :, 4] = 1.0
    # CUDA's eager subtracts the mean first, and makes Inf where the CPU's, and ours, makes NaN.
    torch.testing.assert_close(t.fused(x).cpu(), t.eager.cpu()(x.cpu()), equal_nan=True)


def test_a_kernel_too_large_for_the_fused_grad_weight_is_as_exact_as_eager(any_backend):
    modules, conv = trio(Stem, 1, 4), nn.Conv2d(1, 4, 31, 2, 15)
    gradients = []
    for module in modules.all:
        module[0] = copy.deepcopy(conv).to(module[1].weight)
        module(draw(2, 1, 12, 10).to(module[1].weight)).square().sum().backward()
        gradients.append([module[0].weight.grad])
    eager, fused, exact = gradients
    assert_as_exact_as_eager("d 0.weight", fused, eager, exact)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0], ids=["above zero", "below zero", "zero"])
def test_ties_in_a_stems_pool_go_where_eager_sends_them(any_backend, value):
    """In constant images every window of the pool is one tie."""

    def change(stem):
        nn.init.constant_(stem[0].weight, 0.0)
        nn.init.constant_(stem[0].bias, value)
        stem[1].running_mean.zero_()
        nn.init.ones_(stem[1].weight)
        nn.init.zeros_(stem[1].bias)

    t = trio(Stem, 1, 3, dtype=torch.float64, train=False).each(change)
    assert_exact(t, draw(2, 1, 9, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@train_and_eval
def test_nan_and_inf_pass_a_stem_as_in_eager(any_backend, train, value):
    t = trio(Stem, 1, 3, train=train)
    x = draw(2, 1, 20, 21)
    x[1, 0, 10, 5] = value
    got, expected = step(t.fused, x), step(t.eager, x)
    if train:  # exact zeros, where eager's gradient is a sum with NaN
        del got["d 0.bias"], expected["d 0.bias"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(t.fused.eval()(x), t.eager.eval()(x), rtol=1e-4, atol=1e-4, equal_nan=True)
