"""Winograd's convolution is the same convolution as PyTorch's, and inference takes it where it may."""

import pytest
import torch
from torch.nn import functional as F

from resnet import inference, winograd
from resnet.norm import Norm
from tests.parity import assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("products_keep_up")

# N, C, K, H, W
SHAPES = {
    "whole tiles": (3, 16, 24, 8, 6),
    "tiles that leave the map": (2, 16, 8, 7, 5),
    "one row": (2, 8, 8, 1, 9),
    "one column": (2, 8, 8, 6, 1),
    "one pixel": (3, 8, 8, 1, 1),
    "one channel": (2, 1, 1, 4, 4),
    "many channels": (8, 256, 256, 6, 6),
    "chunks of four and three images": (7, 256, 128, 14, 14),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def _draw(N, C, K, H, W, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, H, W, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(K, C, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last) / C**0.5
    return x, weight, torch.randn(K, generator=generator)


def _norm(bias):
    K = len(bias)
    return Norm(torch.linspace(-1, 1, K), torch.ones(K), bias / 3, torch.linspace(0.5, 2, K), bias, False, 0.1, 1e-5)


def _eager(x, weight, norm):
    y = F.conv2d(x, weight, norm.conv_bias, padding=1)
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@shapes
def test_it_is_as_exact_as_pytorch(shape):
    fused, eager, exact = [], [], []
    for seed in range(3):
        x, weight, bias = _draw(*shape, seed=seed)
        fused.append(winograd.convolve(x, winograd.transform(weight), bias))
        eager.append(F.conv2d(x, weight, bias, padding=1))
        exact.append(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    assert_as_exact_as_eager("y", fused, eager, exact)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in fused)


def test_an_output_depends_on_its_own_window_alone():
    x, weight, bias = _draw(1, 8, 8, 9, 10)
    transformed = winograd.transform(weight)
    before = winograd.convolve(x, transformed, bias)
    for row, column in ((0, 0), (3, 4), (4, 5), (8, 9)):
        z = x.clone()
        z[:, :, row, column] = float("inf")
        changed = torch.nonzero((winograd.convolve(z, transformed, bias) != before).any(1)[0])
        assert changed[:, 0].sub(row).abs().max() == 1 and changed[:, 1].sub(column).abs().max() == 1


def test_a_weight_in_nchw_is_read_right():
    _, weight, _ = _draw(1, 8, 16, 2, 2)
    assert torch.equal(winograd.transform(weight.contiguous()), winograd.transform(weight))


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((2, 128, 128, 12, 12), 1, True),
        ((2, 128, 128, 13, 13), 1, False),  # too much of the tiles lies outside the map
        ((8, 256, 256, 7, 7), 1, True),
        ((8, 256, 256, 5, 5), 1, False),
        ((1, 128, 128, 12, 12), 1, False),
        ((2, 64, 128, 12, 12), 1, False),
        ((8, 128, 128, 12, 12), 2, False),
    ],
)
def test_it_is_taken_where_it_pays(shape, stride, expected):
    x, weight, _ = _draw(*shape)
    assert winograd.pays(x, weight, stride, 1) == expected
    assert not winograd.pays(x, weight, stride, 0)
    assert not winograd.pays(x, weight[..., :1, :1], stride, 1)


@pytest.fixture
def taken(monkeypatch):
    """The shapes of the inputs that Winograd's convolution is given."""
    given, convolve = [], winograd.convolve

    def spy(x, transformed, bias):
        given.append(tuple(x.shape))
        return convolve(x, transformed, bias)

    monkeypatch.setattr(winograd, "convolve", spy)
    return given


def test_inference_takes_it_and_sees_every_change_of_the_weight(taken):
    x, weight, bias = _draw(4, 128, 128, 10, 8)
    norm = _norm(bias)
    for change in (lambda w: None, lambda w: w.data[5, 6, 1, 2].add_(1), lambda w: w.mul_(-2), lambda w: None):
        change(weight)
        got = inference.conv_batch_norm(x, weight, norm, 1, 1, bias)
        torch.testing.assert_close(got, _eager(x, weight, norm) + bias.view(-1, 1, 1), rtol=1e-4, atol=1e-4)
    assert taken == [tuple(x.shape)] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_what_is_not_finite_is_as_eager_has_it(taken, value):
    """3e38: a sum of two overflows, where the product with a small weight does not."""
    x, weight, bias = _draw(4, 128, 128, 10, 8)
    x[2, 7, 3:5, 4] = value
    weight *= 1e-3
    norm = _norm(bias)
    expected = _eager(x, weight, norm)
    assert expected.isfinite().all() == (value == 3e38)
    torch.testing.assert_close(
        inference.conv_batch_norm(x, weight, norm, 1, 1), expected, rtol=1e-4, atol=1e-4, equal_nan=True
    )
    assert taken
