"""`kernels/conv_grad_weight_max_pool.py` against the stored dy of `batch_norm_max_pool` and PyTorch's grad-weight.

Interpreted where there is no GPU, compiled where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from resnet.kernels import conv_grad_weight_max_pool as kernels
from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.kernels.host.shapes import ConvShape
from resnet.norm import statistics_dtype
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, draw, name_of, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.parity import assert_as_exact_as_eager

# N, H, W, C, K, R, S, stride, padding
SHAPES = {
    "stem": ConvShape(2, 13, 10, 1, 20, 7, 7, 2, 3),
    "stem, RGB": ConvShape(1, 10, 13, 3, 70, 7, 7, 2, 3),
    "3x3": ConvShape(2, 5, 4, 3, 6, 3, 3, 1, 1),
    "no padding": ConvShape(1, 8, 7, 2, 17, 3, 3, 2, 0),
    "1x1": ConvShape(3, 5, 5, 9, 8, 1, 1, 1, 0),
    "one pixel": ConvShape(1, 1, 1, 3, 8, 7, 7, 2, 3),
    "many channels": ConvShape(1, 5, 5, 33, 18, 3, 3, 1, 1),
    "a wide window": ConvShape(1, 12, 9, 1, 8, 17, 15, 1, 8),
}


@dataclass
class Case:
    """What the backward of y = conv(x), BatchNorm, ReLU and max-pool has at hand."""

    shape: ConvShape
    dout: Tensor
    out: Tensor
    tap: Tensor
    y: Tensor
    stats: Tensor
    sums: Tensor | None
    x: Tensor

    @staticmethod
    def of(shape: ConvShape, dtype: torch.dtype, training: bool, seed: int = 0) -> Case:
        y = draw(shape.N, shape.K, shape.P, shape.Q, seed=seed, dtype=dtype)
        stats = draw(4, shape.K, seed=seed + 1, dtype=statistics_dtype(dtype))
        out, tap = batch_norm_max_pool(y, stats)
        dout = draw(*out.shape, seed=seed + 2, dtype=dtype)
        sums = batch_norm_max_pool_backward_reduce(dout, y, out, tap, stats) if training else None
        x = draw(shape.N, shape.C, shape.H, shape.W, seed=seed + 3, dtype=dtype)
        return Case(shape, dout, out, tap, y, stats, sums, x)

    def arguments(self) -> dict[str, object]:
        s = self.shape
        tensors = {name: getattr(self, name) for name in ("dout", "out", "tap", "y", "stats", "sums", "x")}
        return {**tensors, "kernel_size": (s.R, s.S), "stride": s.stride, "padding": s.padding}

    def dw(self, tf32: bool = False) -> Tensor:
        return kernels.conv_grad_weight_max_pool(**self.arguments(), tf32=tf32)

    def reference(self, dy: Tensor, dtype: torch.dtype) -> Tensor:
        s = self.shape
        return torch.nn.grad.conv2d_weight(self.x.to(dtype), (s.K, s.C, s.R, s.S), dy.to(dtype), s.stride, s.padding)


def assert_parity(shape: ConvShape, dtype: torch.dtype, training: bool) -> None:
    """Against the dy that `batch_norm_max_pool` would have stored."""
    fused, eager, exact = [], [], []
    for seed in (0, 4):
        case = Case.of(shape, dtype, training, seed)
        dy = batch_norm_max_pool_backward_apply(case.dout, case.y, case.out, case.tap, case.stats, case.sums)
        fused.append(case.dw())
        eager.append(case.reference(dy, dtype))
        exact.append(case.reference(dy, torch.float64))
    assert fused[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_eager("dw", fused, eager, exact)


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_exact_as_eager_for_every_shape(shape, training):
    assert_parity(shape, torch.float32, training)


@pytest.mark.core
@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_as_exact_as_eager_for_every_type(dtype, training):
    assert_parity(SHAPES["stem"], dtype, training)


def test_same_bits_twice():
    case = Case.of(SHAPES["stem, RGB"], torch.float16, training=True)
    assert torch.equal(case.dw(), case.dw())


def test_nan_in_the_pooled_gradient_reaches_the_channel_it_enters_and_no_other():
    case = Case.of(SHAPES["stem"], torch.float32, training=False)
    case.out[0, 3, 1, 1], case.tap[0, 3, 1, 1] = 1.0, 4
    case.dout[0, 3, 1, 1] = torch.nan
    finite = case.dw().isfinite().flatten(1)
    assert not finite[3].all() and finite[torch.arange(len(finite)) != 3].all()


def test_empty_batch_gives_zeros():
    shape = ConvShape(0, 8, 8, 1, 4, 7, 7, 2, 3)
    y, out = draw(0, 4, 4, 4), draw(0, 4, 2, 2)
    case = Case(shape, out, out, out.to(torch.uint8), y, draw(4, 4), None, draw(0, 1, 8, 8))
    assert torch.equal(case.dw(), torch.zeros(4, 1, 7, 7, device=DEVICE))


WRONG = {
    "x is not channels_last": (ValueError, "channels_last", {"x": draw(2, 3, 5, 4).contiguous()}),
    "dout has another type": (TypeError, "dout: expected .*torch.float32", {"dout": draw(2, 6, 3, 2).half()}),
    "out of another size": (ValueError, r"out: expected .*shape \(2, 6, 3, 2\)", {"out": draw(2, 6, 3, 3)}),
    "y of another size": (ValueError, r"y: expected .*shape \(2, 6, 5, 4\)", {"y": draw(2, 6, 5, 5)}),
    "tap is no byte": (TypeError, "tap: expected .*torch.uint8", {"tap": draw(2, 6, 3, 2)}),
    "stats of other channels": (ValueError, r"stats: .*\(4, 6\)", {"stats": draw(4, 5)}),
    "sums in half": (TypeError, "sums: expected .*torch.float32", {"sums": draw(2, 6).half()}),
    "stride 0": (ValueError, "positive", {"stride": 0}),
    "a window too large": (ValueError, "at most 30", {"kernel_size": (3, 31)}),
}


@pytest.mark.parametrize("error, message, wrong", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_by_name(error, message, wrong):
    case = Case.of(SHAPES["3x3"], torch.float32, training=True)
    with pytest.raises(error, match=message):
        kernels.conv_grad_weight_max_pool(**{**case.arguments(), **wrong})
