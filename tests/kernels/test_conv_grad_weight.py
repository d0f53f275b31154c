"""`kernels/conv_grad_weight.py` against PyTorch's own grad-weight of the same type, judged in float64.

Interpreted where there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from resnet.kernels import conv_grad_weight as kernels
from resnet.kernels import tuning
from resnet.kernels.host import tiling
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning import Config
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, SIXTEEN_BIT, draw, name_of, staircase, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.parity import assert_as_exact_as_eager

# N, H, W, C, K, R, S, stride, padding, dilation: each leaves ragged tiles of pixels; most of channels too.
SHAPES = {
    "3x3": ConvShape(2, 7, 5, 20, 17, 3, 3, 1, 1),
    "3x3, whole tiles": ConvShape(1, 8, 8, 64, 64, 3, 3, 1, 1),
    "3x3, stride 2": ConvShape(2, 7, 6, 24, 40, 3, 3, 2, 1),
    "3x3, no padding": ConvShape(2, 5, 7, 16, 16, 3, 3, 1, 0),
    "3x3, wide padding": ConvShape(1, 2, 3, 17, 5, 3, 3, 1, 2),
    "3x3, dilation": ConvShape(2, 7, 5, 20, 17, 3, 3, 1, 2, 2),
    "3x3, dilation and stride": ConvShape(1, 9, 8, 20, 17, 3, 3, 2, 1, 3),
    "few channels, dilation": ConvShape(2, 6, 5, 3, 6, 3, 3, 1, 2, 2),
    "1x1": ConvShape(2, 5, 6, 70, 33, 1, 1, 1, 0),
    "1x1, stride 2": ConvShape(2, 7, 7, 20, 40, 1, 1, 2, 0),
    "1x1, padding": ConvShape(1, 3, 4, 16, 20, 1, 1, 2, 1),
    "7x7": ConvShape(1, 4, 3, 16, 8, 7, 7, 1, 3),
    "three to six channels": ConvShape(2, 6, 5, 3, 6, 3, 3, 1, 1),
    "stem": ConvShape(2, 13, 11, 1, 20, 7, 7, 2, 3),
    "stem, RGB": ConvShape(1, 9, 12, 3, 16, 7, 7, 2, 3),
    "one channel, 1x1": ConvShape(3, 4, 4, 1, 1, 1, 1, 1, 0),
    "one pixel": ConvShape(1, 1, 1, 18, 4, 3, 3, 1, 1),
    "wider than high kernel": ConvShape(1, 6, 6, 16, 4, 1, 3, 1, 1),
}
PROLOGUES = ("plain", "activated")


def operands(shape: ConvShape, dtype: torch.dtype, prologue: str, seed: int = 0) -> tuple[Tensor, ...]:
    """(dy, x, stats or None)."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dy = draw(shape.N, shape.K, shape.P, shape.Q, seed=seed, dtype=dtype)
    x = draw(shape.N, shape.C, shape.H, shape.W, seed=seed + 2, dtype=dtype)
    stats = draw(4, shape.C, seed=seed + 3, dtype=acc)
    return dy, x, stats if prologue == "activated" else None


def grad_weight(shape: ConvShape, dy: Tensor, x: Tensor, stats: Tensor | None, tf32: bool = False) -> Tensor:
    size, geometry = (shape.R, shape.S), (shape.stride, shape.padding, shape.dilation)
    return kernels.conv_grad_weight(dy, x, size, *geometry, stats=stats, tf32=tf32)


def reference(shape: ConvShape, dy: Tensor, x: Tensor, stats: Tensor | None, dtype: torch.dtype):
    """PyTorch's grad-weight in `dtype` of the operands as they would have been stored."""
    if stats is not None:
        scale, shift = stats[2:].view(2, -1, 1, 1).double()
        x = torch.relu((x.double() * scale + shift).to(x.dtype))
    weight, stride = (shape.K, shape.C, shape.R, shape.S), shape.stride
    if shape.R == shape.S == 1 and shape.padding == 0:  # of few channels oneDNN's strided one is unsafe
        x, stride = x[:, :, ::stride, ::stride], 1
    return torch.nn.grad.conv2d_weight(x.to(dtype), weight, dy.to(dtype), stride, shape.padding, shape.dilation)


def assert_parity(shape: ConvShape, dtype: torch.dtype, prologue: str) -> None:
    """Over several draws where dW has so few elements that eager may be exact by chance."""
    fused, eager, exact = [], [], []
    for seed in range(0, 1 if shape.K * shape.C * shape.R * shape.S > 64 else 40, 4):
        case = operands(shape, dtype, prologue, seed)
        dw = grad_weight(shape, *case)
        assert dw.shape == (shape.K, shape.C, shape.R, shape.S) and dw.is_contiguous(memory_format=torch.channels_last)
        fused.append(dw)
        eager.append(reference(shape, *case, dtype))
        exact.append(reference(shape, *case, torch.float64))
    assert_as_exact_as_eager("dw", fused, eager, exact)


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_exact_as_eager_for_every_shape(shape, prologue):
    assert_parity(shape, torch.float32, prologue)


@pytest.mark.core
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", ["3x3", "3x3, stride 2"])
def test_as_exact_as_eager_for_every_type(shape, dtype, prologue):
    assert_parity(SHAPES[shape], dtype, prologue)


@st.composite
def shapes(draw_from) -> ConvShape:
    R, S = draw_from(st.sampled_from([(1, 1), (3, 3), (7, 7), (2, 3)]))
    padding, dilation = draw_from(st.integers(0, R // 2 + 1)), draw_from(st.integers(1, 2))
    size = st.integers(max(1, dilation * (max(R, S) - 1) + 1 - 2 * padding), 13)
    channels = st.sampled_from([1, 2, 5, 15, 16, 17, 31, 40])
    stride = draw_from(st.integers(1, 3))
    N, H, W, C, K = (draw_from(s) for s in (st.integers(1, 3), size, size, channels, channels))
    return ConvShape(N, H, W, C, K, R, S, stride, padding, dilation)


@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(PROLOGUES))
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_as_exact_as_eager_for_any_shape(shape, dtype, prologue):
    assert_parity(shape, dtype, prologue)


@pytest.mark.parametrize("prologue", ["plain", "activated"])  # where x moves, and where dy does
def test_every_split_and_tile_is_added_once(monkeypatch, prologue):
    """Small tiles: several of every axis of dW, several splits, and a last split of fewer steps than the others."""
    shape = ConvShape(2, 5, 7, 20, 24, 3, 3, 1, 1)
    config = Config(16, 16, 16, num_warps=1, num_stages=2)
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: (config,))
    monkeypatch.setattr(tiling, "MIN_STEPS", 2)
    kernels.plan.cache_clear()
    launch = kernels.plan(shape, config, 4, activated=False)
    assert launch.splits > 1 and launch.tiles > 9 and launch.splits * launch.steps * 16 > launch.pixels + 16
    assert_parity(shape, torch.float32, prologue)
    kernels.plan.cache_clear()


def test_splits_reach_no_further_than_offsets_of_32_bits(monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_SPAN", 30_000)
    kernels.plan.cache_clear()
    shape = ConvShape(9, 9, 9, 16, 16, 3, 3, 2, 1)
    assert kernels.plan(shape, Config(64, 64, 32, 4, 3), 4, activated=False).splits > 1
    assert_parity(shape, torch.float32, "plain")
    monkeypatch.setattr(kernels, "_MAX_SPAN", 4096)
    with pytest.raises(ValueError, match="32-bit"):
        assert_parity(shape, torch.float32, "plain")
    kernels.plan.cache_clear()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
def test_same_bits_twice(dtype):
    shape = SHAPES["3x3"]
    case = operands(shape, dtype, "activated")
    assert torch.equal(grad_weight(shape, *case), grad_weight(shape, *case))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_nan_and_inf_reach_the_gradients_they_enter_and_no_other_channel(prologue, bad):
    shape = SHAPES["3x3"]
    dy, x, stats = operands(shape, torch.float32, prologue)
    dy[0, 3, 2, 2] = x[1, 5, 3, 3] = bad
    if stats is not None:
        stats[2, 5] = 2.0  # Inf stays positive through the ReLU
    finite = grad_weight(shape, dy, x, stats).isfinite()
    expected = torch.ones_like(finite)
    expected[3], expected[:, 5] = False, False
    assert torch.equal(finite, expected)


def test_padding_is_zero_after_the_activation():
    """relu(shift) at padded pixels would make all taps of a one-pixel map alive."""
    shape = ConvShape(1, 1, 1, 16, 4, 3, 3, 1, 1)
    dy, x, stats = operands(shape, torch.float32, "activated")
    stats[3] = 5.0
    for stride in (1, 2):  # dy moves, x moves
        dw = kernels.conv_grad_weight(dy, x, (3, 3), stride, 1, stats=stats)
        expected = torch.zeros_like(dw)
        expected[:, :, 1, 1] = dy[0, :, 0, 0, None] * torch.relu(x[0, :, 0, 0] * stats[2] + stats[3])
        torch.testing.assert_close(dw, expected)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_long_reduction_is_accumulated_in_float32(dtype):
    shape = ConvShape(1, 17, 32, 16, 8, 1, 1, 1, 0)
    dy = torch.ones(1, 8, 17, 32, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x = staircase(shape.M, dtype).view(1, 1, 17, 32).expand(1, 16, 17, 32).contiguous(memory_format=torch.channels_last)
    dw = grad_weight(shape, dy, x, None)
    assert torch.equal(dw, x[:, :1].double().sum().to(dtype).expand(dw.shape))


def test_empty_batch_gives_zeros():
    dy, x = draw(0, 6, 4, 4), draw(0, 3, 4, 4)
    dw = kernels.conv_grad_weight(dy, x, (3, 3), 1, 1)
    assert torch.equal(dw, torch.zeros(6, 3, 3, 3, device=DEVICE)) and dw.is_contiguous(
        memory_format=torch.channels_last
    )


WRONG = {
    "x is not channels_last": (ValueError, "channels_last", {"x": draw(2, 20, 7, 5).contiguous()}),
    "dy is not channels_last": (ValueError, "dy: .*channels_last", {"dy": draw(2, 17, 7, 5).contiguous()}),
    "dy has another type": (TypeError, "dy: expected .*torch.float32", {"dy": draw(2, 17, 7, 5).half()}),
    "dy has another size": (ValueError, r"dy: expected .*shape \(2, 17, 7, 5\)", {"dy": draw(2, 17, 7, 4)}),
    "integers": (
        TypeError,
        "float16",
        {"x": torch.ones(2, 20, 7, 5).int().contiguous(memory_format=torch.channels_last)},
    ),
    "stride 0": (ValueError, "positive", {"stride": 0}),
    "negative padding": (ValueError, "padding", {"padding": -1}),
    "dilation 0": (ValueError, "positive", {"dilation": 0}),
    "taps too far apart": (ValueError, "dilation: 10000000 is too large", {"dilation": 10**7, "padding": 10**7}),
    "stats of other channels": (ValueError, r"stats: .*\(4, 20\)", {"stats": draw(4, 19)}),
    "stats in half": (TypeError, "stats: expected .*torch.float32", {"stats": draw(4, 20).half()}),
}


@pytest.mark.parametrize("error, message, wrong", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_by_name(error, message, wrong):
    right = {"dy": draw(2, 17, 7, 5), "x": draw(2, 20, 7, 5), "kernel_size": (3, 3), "stride": 1, "padding": 1}
    with pytest.raises(error, match=message):
        kernels.conv_grad_weight(**{**right, **wrong})
