"""BatchNorm, ReLU and max-pool, forward and backward, against PyTorch's operators one by one, judged in float64.

Interpreted where there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet import reference
from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.norm import statistics_dtype
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, draw, name_of, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.parity import assert_as_exact_as_eager

# N, C, H, W; out has half of H and W, rounded up
SHAPES = {
    "one pixel": (1, 6, 1, 1),
    "one row": (2, 3, 1, 5),
    "less than a window": (2, 4, 2, 2),
    "odd": (2, 3, 7, 5),
    "even": (2, 8, 6, 4),
    "ragged tiles and columns": (1, 100, 5, 6),
    "several partials": (3, 16, 10, 12),
}
per_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def stats_of(C: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(4, C) whose scales have both signs and whose numbers are powers of two: x * scale + shift is exact."""
    generator = torch.Generator().manual_seed(seed)
    stats = 2.0 ** torch.randint(-2, 2, (4, C), generator=generator)
    return (stats * torch.randint(0, 2, (4, C), generator=generator).mul(2).sub(1)).to(DEVICE, statistics_dtype(dtype))


def with_ties(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small integers: most windows have several maxima, and many have none above zero."""
    return draw(*shape, seed=seed, dtype=torch.float32).mul(2).round().to(dtype)


def eager(y: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, out, index) of PyTorch's operators; z as stored, index flat in a map."""
    z = reference.batch_norm_apply(y.to(stats.dtype), stats[2], stats[3], relu=False).to(y.dtype)
    return z, *F.max_pool2d(torch.relu(z), 3, 2, 1, return_indices=True)


def index_of(tap: Tensor, W: int) -> Tensor:
    """PyTorch's flat index of a tap."""
    p, q = (torch.arange(n, device=tap.device) for n in tap.shape[2:])
    return (2 * p[:, None] - 1 + tap.long() // 3) * W + 2 * q - 1 + tap.long() % 3


def eager_grad(dout: Tensor, z: Tensor, index: Tensor) -> Tensor:
    """g, behind pool and ReLU."""
    routed = torch.ops.aten.max_pool2d_with_indices_backward(
        dout, z.to(dout.dtype), [3, 3], [2, 2], [1, 1], [1, 1], False, index
    )
    return torch.where(z <= 0, 0, routed)


@pytest.mark.core
@per_dtype
@per_shape
def test_out_and_tap_equal_pytorchs_ties_included(shape, dtype):
    y, stats = with_ties(shape, dtype), stats_of(shape[1], dtype, seed=1)
    out, tap = batch_norm_max_pool(y, stats)
    _, expected, index = eager(y, stats)
    assert torch.equal(out, expected) and tap.dtype == torch.uint8
    passes = expected > 0  # elsewhere nothing passes the ReLU, and the place means nothing
    assert torch.equal(index_of(tap, shape[3])[passes], index[passes])
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.core
@pytest.mark.parametrize(
    "shape, dtype",
    [*((name, torch.float32) for name in SHAPES), *(("several partials", d) for d in DTYPES if d != torch.float32)],
    ids=name_of,
)
def test_sums_and_grad_as_exact_as_eager(shape, dtype):
    shape = SHAPES[shape]
    draws: dict[str, tuple[list, list, list]] = {name: ([], [], []) for name in ("sum g", "sum gx", "dy", "frozen dy")}
    for seed in range(2):
        y, stats = with_ties(shape, dtype, seed), stats_of(shape[1], dtype, seed)
        out, tap = batch_norm_max_pool(y, stats)
        dout = draw(*out.shape, seed=seed + 50, dtype=dtype)
        sums = batch_norm_max_pool_backward_reduce(dout, y, out, tap, stats)
        fused = (*sums, *(batch_norm_max_pool_backward_apply(dout, y, out, tap, stats, s) for s in (sums, None)))
        z, _, index = eager(y, stats)
        results = []
        for high in (stats.dtype, torch.float64):
            g = eager_grad(dout.to(high), z, index)
            mean, invstd, scale, _ = stats.to(high)
            summed = reference.batch_norm_backward_reduce(g, y.to(high), mean, invstd)
            grads = [
                reference.batch_norm_backward_apply(g, y.to(high), mean, invstd, scale, *summed, training)
                for training in (True, False)
            ]
            stored = high if high == torch.float64 else dtype
            results.append((*summed, *(grad.to(stored) for grad in grads)))
        for i, lists in enumerate(draws.values()):
            for values, result in zip(lists, (fused, *results)):
                values.append(result[i])
    for name, lists in draws.items():
        assert_as_exact_as_eager(name, *lists)


def test_weight_and_bias_gradients_are_the_sums_in_their_types():
    y, stats = with_ties((2, 6, 5, 4), torch.float32), stats_of(6, torch.float32, seed=0)
    out, tap = batch_norm_max_pool(y, stats)
    dweight, dbias = torch.empty(6, dtype=torch.bfloat16, device=DEVICE), torch.empty(6, device=DEVICE)
    sums = batch_norm_max_pool_backward_reduce(torch.ones_like(out), y, out, tap, stats, dweight, dbias)
    assert torch.equal(dbias, sums[0])
    assert torch.allclose(dweight.float(), sums[1], rtol=2**-7)


def test_nan_is_the_maximum_and_takes_the_gradient():
    y = torch.zeros(1, 2, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y[0, 0, 2, 2] = torch.nan
    y[0, 1, 0, 0] = torch.inf
    stats = torch.tensor([[0.0], [1.0], [1.0], [0.5]], device=DEVICE).repeat(1, 2)
    out, tap = batch_norm_max_pool(y, stats)
    _, expected, index = eager(y, stats)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num()) and torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(index_of(tap, 5), index)
    dy = batch_norm_max_pool_backward_apply(torch.ones_like(out), y, out, tap, stats, None)
    assert dy[0, 0, 2, 2] == expected[0, 0].isnan().sum()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
def test_same_bits_twice(dtype):
    y, stats = draw(3, 16, 9, 9, seed=0, dtype=dtype), stats_of(16, dtype, seed=0)
    results = []
    for _ in range(2):
        out, tap = batch_norm_max_pool(y, stats)
        sums = batch_norm_max_pool_backward_reduce(out, y, out, tap, stats)
        results.append((out, tap, sums, batch_norm_max_pool_backward_apply(out, y, out, tap, stats, sums)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_other_layout_is_refused_by_name():
    y = draw(2, 3, 4, 4, seed=0, dtype=torch.float32).contiguous()
    with pytest.raises(ValueError, match="channels_last"):
        batch_norm_max_pool(y, stats_of(3, torch.float32, seed=0))


def test_an_image_of_2_to_the_31_elements_is_refused():
    """Offsets within an image are 32 bits wide; the tensors are never made."""

    def activation(channels: int, size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        sizes = 1, channels, size, size
        return torch.empty(sizes, dtype=dtype, device="meta", memory_format=torch.channels_last)

    y, out, tap = activation(64, 5794), activation(64, 2897), activation(64, 2897, torch.uint8)
    stats = torch.empty(4, 64, device="meta")
    for launch in (
        lambda: batch_norm_max_pool(y, stats),
        lambda: batch_norm_max_pool_backward_reduce(out, y, out, tap, stats),
        lambda: batch_norm_max_pool_backward_apply(out, y, out, tap, stats, stats[:2]),
    ):
        with pytest.raises(ValueError, match="span less than 2\\^31 elements, got 2148507904 elements an image"):
            launch()
