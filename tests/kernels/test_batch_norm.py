"""Each launcher of BatchNorm's passes against the functional references, judged in float64.

Interpreted where there is no GPU, compiled where there is one. "Eager" is the reference in the type of the statistics,
rounded once to the stored type: the most exact that plain PyTorch does.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction

from resnet import reference
from resnet.kernels.batch_norm_add_relu import apply_kernel, batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import (
    NormedShortcut,
    backward_partials,
    batch_norm_backward_reduce,
    merge_sums,
)
from resnet.kernels.batch_norm_finalize import batch_norm_finalize, batch_norm_freeze
from resnet.kernels.batch_norm_statistics import batch_norm_statistics
from resnet.kernels.host.tiling import Tiling, tiling
from resnet.norm import statistics_dtype
from tests.conftest import DEVICE
from tests.helpers.batch_norm_launches import batch_stats
from tests.helpers.blocks import DTYPES, SIXTEEN_BIT, draw, name_of, same, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.parity import assert_draws_parity

DRAWS = 3
EPS = 1e-5

# How a matrix of M rows and C columns is cut, with a shape that is cut so. `test_shapes_are_cut_as_their_names_say`.
SHAPES = {
    "two rows, one channel": (2, 1, 1, 1),
    "one tile, padded columns": (1, 3, 3, 5),
    "one tile, six of eight columns": (2, 6, 3, 5),
    "one channel, several partials": (5, 1, 31, 29),
    "few channels, several partials": (1, 3, 41, 41),
    "whole tiles": (2, 64, 16, 16),
    "several tiles each, ragged": (3, 64, 10, 20),
    "two column tiles, ragged both ways": (1, 112, 13, 23),
    "a hundred channels": (1, 100, 3, 5),
}
RAGGED = SHAPES["several tiles each, ragged"]


def per_dtype(function: Callable) -> Callable:
    return pytest.mark.parametrize("dtype", DTYPES, ids=name_of)(function)


def per_pair(function: Callable) -> Callable:
    """Each shape in two types, and each type at the shape of most tiles: the two are independent in a kernel."""
    pairs = [(shape, DTYPES[(i + j) % 4]) for i, shape in enumerate(SHAPES.values()) for j in (0, 2)]
    pairs += [(RAGGED, dtype) for dtype in DTYPES if (RAGGED, dtype) not in pairs]
    names = {shape: name for name, shape in SHAPES.items()}
    ids = [f"{names[shape]}-{name_of(dtype)}" for shape, dtype in pairs]
    return pytest.mark.parametrize(("shape", "dtype"), pairs, ids=ids)(function)


def rows(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[2] * shape[3]


def draws_of_sums(shape: tuple[int, ...]) -> range:
    """Seeds enough for two dozen values of a per-channel result, below which luck decides between two roundings."""
    return range(max(DRAWS, 24 // shape[1]))


def vector(channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    return draw(channels, seed=seed, dtype=dtype)


def stats_like_training(channels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """stats (4, C) with means, spreads and signs of the scale as training has them."""
    mean, bias = vector(channels, seed + 1, dtype) * 0.3, vector(channels, seed + 2, dtype)
    invstd = vector(channels, seed + 3, dtype).abs() + 0.5
    scale = invstd * vector(channels, seed + 4, dtype)
    return torch.stack((mean, invstd, scale, bias - mean * scale))


def masked(dout: Tensor, out: Tensor) -> Tensor:
    return torch.where(out <= 0, 0, dout)


# ---- tiling ------------------------------------------------------------------------------------------------------


def test_shapes_are_cut_as_their_names_say():
    def cut(name: str) -> tuple[Tiling, int, int]:
        M, C = rows(SHAPES[name]), SHAPES[name][1]
        return tiling(M, C), M, C

    t, M, C = cut("one tile, padded columns")
    assert t.partials == 1 and t.BLOCK_M > M and t.BLOCK_C > C
    for name in ("one channel, several partials", "few channels, several partials"):
        t, M, _ = cut(name)
        assert t.partials > 2 and M % t.BLOCK_M
    t, M, C = cut("whole tiles")
    assert t.tiles > 1 and t.partials > 1 and M % t.rows == 0 and C % t.BLOCK_C == 0
    t, M, _ = cut("several tiles each, ragged")
    assert t.tiles > 2 and t.partials > 2 and M % t.BLOCK_M and M % t.rows > t.BLOCK_M
    t, M, C = cut("two column tiles, ragged both ways")
    assert t.partials > 1 and M % t.BLOCK_M and C > t.BLOCK_C and C % t.BLOCK_C


@pytest.mark.parametrize("C", [1, 3, 6, 8, 24, 64, 72, 100, 512, 2048])
@pytest.mark.parametrize("M", [1, 2, 255, 256, 4608, 600_000, 2**31])
def test_tiling_covers_the_rows_once_with_partials_that_one_program_can_merge(M, C):
    t = tiling(M, C)
    assert (t.partials - 1) * t.rows < M <= t.partials * t.rows
    assert t.partials <= 512
    assert t.rows >= min(M, 256)  # else the partials are no small part of the traffic
    for size in (t.BLOCK_M, t.BLOCK_C, t.num_warps):
        assert size & (size - 1) == 0


def test_a_merge_of_many_partials_has_no_more_groups_than_a_grid_takes(monkeypatch):
    """65,535 programs along the second axis. A convolution of 2^31 pixels in tiles of 64 rows leaves 2^25 partials."""
    grids = []
    for module in (batch_norm_finalize, merge_sums):
        monkeypatch.setitem(module.__globals__, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    T, rows, vector = 2**25, 64, torch.empty(1, device="meta")
    batch_norm_finalize(torch.empty((3, T, 1), device="meta"), rows, T * rows, None, None, vector, vector, 0.1, EPS)
    merge_sums(torch.empty((2, T, 1), device="meta"), None, None, None)
    assert len(grids) == 4 and all(grid[1:] <= (65535,) for grid in grids)


# ---- statistics --------------------------------------------------------------------------------------------------


@per_pair
def test_statistics_and_running_statistics_are_as_exact_as_eager(shape, dtype):
    results = []
    for seed in draws_of_sums(shape):
        x, C, acc = draw(*shape, seed=seed, dtype=dtype), shape[1], statistics_dtype(dtype)
        weight, bias = vector(C, seed + 10, acc), vector(C, seed + 20, acc)
        running = vector(C, seed + 30, acc), vector(C, seed + 40, acc).abs()
        mine, eagers, exacts = ([v.to(d, copy=True) for v in running] for d in (acc, acc, torch.float64))
        stats = batch_stats(x, weight, bias, *mine, 0.3, EPS)
        row = {}
        expected = []
        for d, updated in ((acc, eagers), (torch.float64, exacts)):
            F.batch_norm(x.to(d), *updated, None, None, True, 0.3, EPS)
            mean, var = reference.batch_norm_statistics(x.to(d))
            invstd = 1 / torch.sqrt(var + EPS)
            scale = invstd * weight.to(d)
            expected.append((mean, invstd, scale, bias.to(d) - mean * scale, *updated))
        for name, fused, eager, exact in zip(
            ("mean", "invstd", "scale", "shift", "running mean", "running var"), (*stats, *mine), *expected
        ):
            row[name] = fused, eager, exact
        results.append(row)
    assert_draws_parity(results)


def test_running_variance_is_unbiased_and_the_normalising_one_is_not():
    x = draw(2, 3, 2, 1)
    running = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    stats = batch_stats(x, None, None, *running, 1.0, 0.0)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(running[1], x.var((0, 2, 3), unbiased=True), rtol=8 * eps, atol=0)
    torch.testing.assert_close(1 / stats[1] ** 2, x.var((0, 2, 3), unbiased=False), rtol=8 * eps, atol=0)


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
def test_an_absent_weight_is_ones_and_an_absent_bias_zeros(absent):
    x, C = draw(*RAGGED), RAGGED[1]
    weight = None if absent in ("weight", "both") else vector(C, 1, torch.float32)
    bias = None if absent in ("bias", "both") else vector(C, 2, torch.float32)
    ones, zeros = torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)
    explicit = (ones if weight is None else weight, zeros if bias is None else bias)
    same(
        batch_stats(x, weight, bias, None, None, 0.1, EPS),
        batch_stats(x, *explicit, None, None, 0.1, EPS),
    )
    same(
        batch_norm_freeze(zeros + 0.5, ones, weight, bias, EPS),
        batch_norm_freeze(zeros + 0.5, ones, *explicit, EPS),
    )


def test_stats_do_not_depend_on_running_statistics_or_a_bias_of_the_convolution():
    x, C = draw(*RAGGED), RAGGED[1]
    running = vector(C, 1, torch.float32), vector(C, 2, torch.float32).abs()
    bare = batch_stats(x, None, None, None, None, 0.1, EPS)
    same(batch_stats(x, None, None, *running, 0.1, EPS, vector(C, 3, torch.float32)), bare)


def test_a_bias_of_the_convolution_moves_the_running_mean_and_nothing_else():
    x, C = draw(*RAGGED), RAGGED[1]
    conv_bias = vector(C, 3, torch.float32)
    with_bias, without = ([torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)] for _ in range(2))
    batch_stats(x, None, None, *with_bias, 0.25, EPS, conv_bias)
    batch_stats(x, None, None, *without, 0.25, EPS)
    # sums of numbers of the size of the bias, rounded three times
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        with_bias[0], without[0] + 0.25 * conv_bias, rtol=0, atol=3 * eps * conv_bias.abs().max().item()
    )
    same(with_bias[1], without[1])


@pytest.mark.core
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_running_statistics_in_half_precision_are_rounded_once(dtype):
    x, C = draw(*RAGGED, dtype=dtype), RAGGED[1]
    running = vector(C, 1, dtype), vector(C, 2, dtype).abs() + 0.5
    mine, exact = ([v.to(d, copy=True) for v in running] for d in (dtype, torch.float64))
    batch_stats(x, None, None, *mine, 0.1, EPS)
    F.batch_norm(x.double(), *exact, None, None, True, 0.1, EPS)
    for name, fused, expected in zip(("running mean", "running var"), mine, exact):
        # half an ulp, and of the float32 before it an error that can only tip a value over to its other neighbour
        bound = (0.5 + 2**-6) * torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
        assert ((fused.double() - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("mean", [0, 1, 100, 1e4])
def test_running_statistics_and_output_are_as_exact_as_eager_at_any_mean(mean):
    """Eager in its own layout, NCHW, where PyTorch's CPU sums in float64."""
    results = []
    for seed in range(2):
        x, C = draw(2, 16, 20, 10, seed=seed) + mean, 16
        mine, eager, exact = (
            [torch.zeros(C, dtype=d, device=DEVICE), torch.ones(C, dtype=d, device=DEVICE)]
            for d in (torch.float32, torch.float32, torch.float64)
        )
        stats = batch_stats(x, None, None, *mine, 0.1, EPS)
        out = batch_norm_add_relu(x, stats, relu=False)
        plain = F.batch_norm(x.contiguous(), *eager, None, None, True, 0.1, EPS)
        judge = F.batch_norm(x.double(), *exact, None, None, True, 0.1, EPS)
        names = ("running mean", "running var", "out")
        results.append(dict(zip(names, zip((*mine, out), (*eager, plain), (*exact, judge)))))
    assert_draws_parity(results)


@pytest.mark.parametrize("pixels", [1, 7, 40, 1000])
def test_a_mean_whose_square_is_infinite_has_a_variance(pixels):
    """In lanes without a row, too, of which a few pixels leave many."""
    x, C = 1e21 + 1e16 * draw(2, 16, pixels, 1), 16
    running = torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)
    batch_stats(x, None, None, *running, 1.0, EPS)
    exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    for mine, expected in zip(running, exact):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=0)


def partials_of(x: Tensor, rows: int) -> Tensor:
    """(3, T, C) of a matrix x (M, C): what a convolution's tiles of `rows` rows would leave."""
    tiles = x.double().split(rows)
    mean = torch.stack([tile.mean(0) for tile in tiles])
    m2 = torch.stack([(tile - m).square().sum(0) for tile, m in zip(tiles, mean)])
    return torch.stack([mean, m2, mean - mean.float()]).float()


@pytest.mark.parametrize("T", [1, 5, 512, 513, 1300])
def test_any_number_of_partials_is_merged_as_exactly_as_eager(T):
    rows, C = 4, 3
    M = (T - 1) * rows + 2  # the last one ragged
    x = draw(M, C)
    mine = [torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)]
    stats = batch_norm_finalize(partials_of(x, rows), rows, M, None, None, *mine, 1.0, EPS)
    exact = x.double().mean(0), x.double().var(0)
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=0, atol=ulp * x.abs().max().item())
    torch.testing.assert_close(mine[1].double(), exact[1], rtol=4 * ulp, atol=0)
    same(stats[0], mine[0])


@pytest.mark.parametrize("count", [1, 3, 2**24 + 1, 2**31 + 1])
@per_dtype
def test_an_average_over_batches_counted_on_the_device_is_as_exact_as_eagers(dtype, count):
    C, acc = RAGGED[1], statistics_dtype(dtype)
    batches = torch.tensor(count, device=DEVICE)
    results = []
    for seed in range(DRAWS):
        x = draw(*RAGGED, seed=seed, dtype=dtype)
        start = [vector(C, seed + 1, dtype), vector(C, seed + 2, dtype).abs()]
        mine, eager, exact = ([v.to(d, copy=True) for v in start] for d in (dtype, acc, torch.float64))
        batch_stats(x, None, None, *mine, 0.7, EPS, None, batches)
        F.batch_norm(x.to(acc), *eager, None, None, True, 1.0 / count, EPS)
        F.batch_norm(x.double(), *exact, None, None, True, 1.0 / count, EPS)
        eager = [v.to(dtype) for v in eager]
        results.append(dict(zip(("running mean", "running var"), zip(mine, eager, exact))))
    assert_draws_parity(results)
    assert batches == count


@pytest.mark.parametrize("channels", [3, 300])
def test_a_batch_is_counted_once_whatever_the_channels(channels):
    counted = torch.full((), 2**40, dtype=torch.int64, device=DEVICE)
    moments = batch_norm_statistics(draw(2, channels, 3, 3))
    batch_norm_finalize(*moments, None, None, None, None, 0.1, EPS, counted=counted)
    assert counted == 2**40 + 1


@pytest.mark.parametrize("planes", [2, 3])
@pytest.mark.parametrize("T", [1, 5, 512, 513, 1300])
def test_any_number_of_partial_sums_is_merged(T, planes):
    """The third plane is of a shortcut's norm, whose gradients are written beside the others."""
    partial = draw(planes, T, 3)
    vectors = torch.ones(planes - 1, 3, 3, device=DEVICE)
    sums = merge_sums(partial, *vectors.flatten(0, 1))
    exact = partial.double().sum(1)
    torch.testing.assert_close(sums.double(), exact, rtol=0, atol=1e-6 * T**0.5)
    for (dweight, dbias, dconv_bias), total in zip(vectors, sums[1:], strict=True):
        assert not dconv_bias.any()
        same(torch.stack((dbias, dweight)), torch.stack((sums[0], total)))
    same(merge_sums(partial), sums)


@per_dtype
def test_a_constant_channel_has_variance_zero(dtype):
    x = torch.full(RAGGED, 3.0, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    mean, invstd, *_ = batch_stats(x, None, None, None, None, 0.1, 0.25)
    assert (mean == 3).all() and (invstd == 2).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_the_statistics_of_its_channel_only(bad):
    x = draw(*RAGGED)
    clean = batch_stats(x, None, None, None, None, 0.1, EPS)
    x[1, 5, 7, 3] = bad
    stats = batch_stats(x, None, None, None, None, 0.1, EPS)
    assert not stats[:, 5].isfinite().any()
    others = torch.arange(RAGGED[1], device=DEVICE) != 5
    same(stats[:, others], clean[:, others])


# ---- freeze ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv_bias", [False, True], ids=["", "conv_bias"])
@pytest.mark.parametrize("C", [1, 3, 300])
@per_dtype
def test_freeze_is_as_exact_as_eager(dtype, C, conv_bias):
    acc = statistics_dtype(dtype)
    results = []
    for seed in range(DRAWS):
        given = [vector(C, seed + 10 * i, dtype) for i in range(5)]  # vectors may be in half precision as well
        mean, var, weight, bias, shift = given[0], given[1].abs() + 0.1, *given[2:]
        stats = batch_norm_freeze(mean, var, weight, bias, EPS, shift if conv_bias else None, acc)

        def expected(d, mean=mean, var=var, weight=weight, bias=bias, shift=shift):
            m = mean.to(d) - shift.to(d) if conv_bias else mean.to(d)
            invstd = 1 / torch.sqrt(var.to(d) + EPS)
            scale = invstd * weight.to(d)
            return m, invstd, scale, bias.to(d) - m * scale

        names = ("mean", "invstd", "scale", "shift")
        results.append(dict(zip(names, zip(stats, expected(acc), expected(torch.float64)))))
    assert_draws_parity(results)


# ---- apply -------------------------------------------------------------------------------------------------------

SHORTCUTS = {
    "no shortcut": (False, False, False),
    "shortcut": (True, False, False),
    "scaled": (True, True, False),
    "shifted": (True, False, True),
    "scaled and shifted": (True, True, True),
}


def apply_case(
    shape: tuple[int, ...], dtype: torch.dtype, options: tuple[bool, bool, bool], relu: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(fused, eager, exact) of one call."""
    C, acc = shape[1], statistics_dtype(dtype)
    x, stats = draw(*shape, seed=seed, dtype=dtype), stats_like_training(C, acc, seed)
    candidates = (draw(*shape, seed=seed + 5, dtype=dtype), vector(C, seed + 6, acc), vector(C, seed + 7, acc))
    extra = [t if given else None for t, given in zip(candidates, options)]

    def plain(d: torch.dtype) -> Tensor:
        cast = [None if t is None else t.to(d) for t in extra]
        return reference.batch_norm_apply(x.to(d), stats[2].to(d), stats[3].to(d), *cast, relu=relu)

    return batch_norm_add_relu(x, stats, *extra, relu=relu), plain(acc).to(dtype), plain(torch.float64)


@per_pair
def test_apply_is_as_exact_as_eager(shape, dtype):
    for options in (SHORTCUTS["no shortcut"], SHORTCUTS["shortcut"]):
        assert_draws_parity([{"out": apply_case(shape, dtype, options, True, seed)} for seed in range(DRAWS)])


@pytest.mark.core
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("options", SHORTCUTS.values(), ids=SHORTCUTS)
@per_dtype
def test_every_form_of_the_shortcut_is_as_exact_as_eager(dtype, options, relu):
    assert_draws_parity([{"out": apply_case((2, 6, 5, 7), dtype, options, relu, seed)} for seed in range(DRAWS)])


def test_apply_takes_a_single_row():
    fused, eager, exact = apply_case((1, 64, 1, 1), torch.float32, SHORTCUTS["shortcut"], True)
    assert_draws_parity([{"out": (fused, eager, exact)}])


@pytest.mark.core
@pytest.mark.parametrize("shortcut", [False, True], ids=["no shortcut", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_relu_keeps_nan_and_infinity_as_torch_relu_does(dtype, shortcut):
    x = draw(2, 3, 4, 5, dtype=dtype)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype, device=DEVICE)
    x[0, :, 1, 2] = bad
    stats = torch.ones((4, 3), dtype=statistics_dtype(dtype), device=DEVICE)
    out = batch_norm_add_relu(x, stats, torch.zeros_like(x) if shortcut else None)
    same(out, torch.relu(x + 1))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_positive_sum_that_rounds_to_zero_has_no_gradient(dtype):
    if isinstance(apply_kernel, InterpretedFunction) and dtype == torch.bfloat16:
        pytest.skip("the interpreter reads bfloat16's subnormals as zeros")
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    x = torch.full((1, 2, 1, 2), tiny, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    stats = torch.tensor([[0.0, 0], [1, 1], [0.25, 1], [0, 0]], device=DEVICE)
    out = batch_norm_add_relu(x, stats)
    assert (out[:, 0] == 0).all() and (out[:, 1] > 0).all()
    for mask in (out, None):
        sums = batch_norm_backward_reduce(torch.ones_like(x), x, mask, stats)
        assert sums[0].tolist() == [0, 2]


# ---- backward ----------------------------------------------------------------------------------------------------


def backward_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dout, x, out, stats), out = relu(x * scale + shift)."""
    x, stats = draw(*shape, seed=seed, dtype=dtype), stats_like_training(shape[1], statistics_dtype(dtype), seed)
    return draw(*shape, seed=seed + 8, dtype=dtype), x, batch_norm_add_relu(x, stats), stats


@per_pair
def test_backward_reduce_is_as_exact_as_eager(shape, dtype):
    assert_backward_reduce_parity(shape, dtype, relu=True)


@per_dtype
def test_backward_reduce_without_relu_is_as_exact_as_eager(dtype):
    assert_backward_reduce_parity(RAGGED, dtype, relu=False)


def assert_backward_reduce_parity(shape: tuple[int, ...], dtype: torch.dtype, relu: bool) -> None:
    results = []
    for seed in draws_of_sums(shape):
        dout, x, out, stats = backward_inputs(shape, dtype, seed)
        g = masked(dout, out) if relu else dout
        expected = [
            reference.batch_norm_backward_reduce(*(t.to(d) for t in (g, x, stats[0], stats[1])))
            for d in (stats.dtype, torch.float64)
        ]
        sums = batch_norm_backward_reduce(dout, x, out, stats, relu)
        results.append(dict(zip(("sum g", "sum g * xhat"), zip(sums, *expected))))
    assert_draws_parity(results)


@per_pair
def test_backward_apply_is_as_exact_as_eager(shape, dtype):
    assert_backward_apply_parity(shape, dtype, training=True, relu=True)


@pytest.mark.parametrize("training, relu", [(True, False), (False, True), (False, False)])
@per_dtype
def test_backward_apply_without_relu_or_batch_statistics_is_as_exact_as_eager(dtype, training, relu):
    for shape in ((2, 6, 5, 7), RAGGED):
        assert_backward_apply_parity(shape, dtype, training, relu)


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "frozen"])
@per_dtype
def test_what_is_added_to_a_gradient_is_rounded_with_it(dtype, training):
    for shape in ((2, 6, 5, 7), RAGGED):
        assert_backward_apply_parity(shape, dtype, training, relu=True, adds=True)


def assert_backward_apply_parity(
    shape: tuple[int, ...], dtype: torch.dtype, training: bool, relu: bool, adds: bool = False
) -> None:
    results = []
    for seed in range(DRAWS):
        dout, x, out, stats = backward_inputs(shape, dtype, seed)
        g = masked(dout, out) if relu else dout
        sums = batch_norm_backward_reduce(dout, x, out, stats, relu)
        eager, exact = (
            reference.batch_norm_backward_apply(*(t.to(d) for t in (g, x, *stats[:3], *sums)), training)
            for d in (stats.dtype, torch.float64)
        )
        added = draw(*shape, seed=seed + 100, dtype=dtype) if adds else None
        if adds:
            eager, exact = eager + added, exact + added
        dx = batch_norm_backward_apply(dout, x, stats, sums if training else None, relu, added=added)
        results.append({"dx": (dx, eager.to(dtype), exact)})
    assert_draws_parity(results)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_gradients_of_weight_and_bias_are_the_sums_rounded_to_their_types(dtype):
    dout, x, out, stats = backward_inputs(RAGGED, dtype)
    dweight = torch.empty(RAGGED[1], dtype=dtype, device=DEVICE)
    dbias = torch.empty(RAGGED[1], dtype=torch.float32, device=DEVICE)
    sums = batch_norm_backward_reduce(dout, x, out, stats, True, dweight, dbias)
    same(dweight, sums[1].to(dtype))
    same(dbias, sums[0])


@per_pair
def test_a_mask_recomputed_from_x_is_bit_equal_to_the_stored_output(shape, dtype):
    dout, x, out, stats = backward_inputs(shape, dtype)
    sums = batch_norm_backward_reduce(dout, x, out, stats)
    same(batch_norm_backward_reduce(dout, x, None, stats), sums)
    for used in (sums, None):
        same(
            batch_norm_backward_apply(dout, x, stats, used),
            batch_norm_backward_apply(masked(dout, out), x, stats, used, relu=False),
        )


@pytest.mark.parametrize("stored", [True, False], ids=["mask from out", "mask from x"])
@per_pair
def test_the_gradient_of_the_shortcut_is_dout_behind_the_mask(shape, dtype, stored):
    dout, x, out, stats = backward_inputs(shape, dtype)
    g, mask = torch.empty_like(x), out if stored else None
    same(batch_norm_backward_reduce(dout, x, mask, stats, g=g), batch_norm_backward_reduce(dout, x, mask, stats))
    same(g, masked(dout, out))


@pytest.mark.parametrize("normed", [False, True], ids=["two sums", "three sums"])
@per_pair
def test_a_launch_s_partials_are_merged_to_its_sums_wherever_its_gradient_goes(shape, dtype, normed):
    """Bit for bit, also where the gradient takes the place of what it is made of."""
    dout, x, out, stats = backward_inputs(shape, dtype)
    shortcut = NormedShortcut(draw(*shape, seed=20, dtype=dtype), stats_like_training(shape[1], stats.dtype, 21))
    shortcut = shortcut if normed else None
    sums = batch_norm_backward_reduce(dout, x, out, stats, shortcut=shortcut)
    g = dout.clone(memory_format=torch.channels_last)
    partial = backward_partials(g, x, out, stats, shortcut=shortcut, g=g)
    assert partial.shape[::2] == (2 + normed, shape[1]) and partial.dtype == stats.dtype
    same(merge_sums(partial), sums)
    same(g, masked(dout, out))


@per_pair
def test_the_third_sum_is_as_exact_as_eager(shape, dtype):
    results = []
    for seed in draws_of_sums(shape):
        dout, x, out, stats = backward_inputs(shape, dtype, seed)
        z, z_stats = draw(*shape, seed=seed + 20, dtype=dtype), stats_like_training(shape[1], stats.dtype, seed + 20)
        eager, exact = (
            reference.batch_norm_backward_reduce(*(t.to(d) for t in (masked(dout, out), z, *z_stats[:2])))[1]
            for d in (stats.dtype, torch.float64)
        )
        sums = batch_norm_backward_reduce(dout, x, out, stats, shortcut=NormedShortcut(z, z_stats))
        results.append({"sum g * zhat": (sums[2], eager, exact)})
    assert_draws_parity(results)


@pytest.mark.core
@pytest.mark.parametrize("stored", [True, False], ids=["mask from out", "mask from x"])
@per_dtype
def test_a_nan_output_passes_its_gradient_and_minus_infinity_stops_it(dtype, stored):
    x = draw(2, 3, 4, 5, dtype=dtype)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype, device=DEVICE)
    x[0, :, 1, 2] = bad
    stats = torch.ones((4, 3), dtype=statistics_dtype(dtype), device=DEVICE)
    out = batch_norm_add_relu(x, stats)
    mask = out if stored else None
    dout, g = torch.ones_like(x), torch.empty_like(x)
    counted = batch_norm_backward_reduce(dout, x, mask, stats, g=g)[0]
    dx = batch_norm_backward_apply(dout, x, stats, None)
    assert g[0, :, 1, 2].tolist() == dx[0, :, 1, 2].tolist() == [1, 1, 0]
    assert counted.tolist() == (~(out <= 0)).sum((0, 2, 3)).tolist()


# ---- all of them -------------------------------------------------------------------------------------------------


def everything(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Every launcher once, on the same draws."""
    acc, C = statistics_dtype(dtype), shape[1]
    x, shortcut, dout = (draw(*shape, seed=seed, dtype=dtype) for seed in range(3))
    running = vector(C, 3, acc), vector(C, 4, acc).abs()
    stats = batch_stats(x, vector(C, 5, acc), vector(C, 6, acc), *running, 0.1, EPS, vector(C, 7, acc))
    frozen = batch_norm_freeze(*running, None, None, EPS, None, acc)
    out = batch_norm_add_relu(x, stats, shortcut)
    g = torch.empty_like(x)
    sums = batch_norm_backward_reduce(dout, x, out, stats, g=g)
    dx = batch_norm_backward_apply(g, x, stats, sums, relu=False)
    return [*running, stats, frozen, out, sums, dx, g]


@per_pair
def test_a_second_run_gives_the_same_bits(shape, dtype):
    for first, second in zip(everything(shape, dtype), everything(shape, dtype)):
        same(first, second)


@per_dtype
def test_a_result_goes_where_it_is_wanted_and_may_replace_the_gradient_it_is_made_of(dtype):
    dout, x, out, stats = backward_inputs(RAGGED, dtype)
    given = torch.empty_like(x)
    assert batch_norm_add_relu(x, stats, out=given) is given
    same(given, out)
    sums = batch_norm_backward_reduce(dout, x, out, stats)
    expected = batch_norm_backward_apply(dout, x, stats, sums)
    assert batch_norm_backward_apply(dout, x, stats, sums, dx=dout) is dout
    same(dout, expected)


def test_inputs_are_only_read():
    dout, x, out, stats = backward_inputs(RAGGED, torch.float32)
    sums = batch_norm_backward_reduce(dout, x, out, stats)
    inputs = {"dout": dout, "x": x, "out": out, "stats": stats, "sums": sums}
    before = {name: t.clone() for name, t in inputs.items()}
    batch_stats(x, stats[0], stats[1], None, None, 0.1, EPS, stats[2])
    batch_norm_add_relu(x, stats, out, stats[0], stats[1])
    batch_norm_backward_reduce(dout, x, out, stats, g=torch.empty_like(x))
    batch_norm_backward_apply(dout, x, stats, sums)
    for name, t in inputs.items():
        same(t, before[name])


@pytest.mark.core
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 130), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_is_as_exact_as_eager(shape, dtype):
    x, dout, acc = draw(*shape, dtype=dtype), draw(*shape, seed=8, dtype=dtype), statistics_dtype(dtype)
    stats = batch_stats(x, None, None, None, None, 0.1, EPS)
    out = batch_norm_add_relu(x, stats, dout)
    behind = torch.empty_like(x)
    sums = batch_norm_backward_reduce(dout, x, out, stats, g=behind)
    dx = batch_norm_backward_apply(behind, x, stats, sums, relu=False)

    def plain(d: torch.dtype) -> tuple[Tensor, ...]:
        mean, var = reference.batch_norm_statistics(x.to(d))
        given = stats.to(d)
        g = masked(dout, out).to(d)
        return (
            mean,
            1 / torch.sqrt(var + EPS),
            reference.batch_norm_apply(x.to(d), given[2], given[3], dout.to(d)).to(dtype if d == acc else d),
            *reference.batch_norm_backward_reduce(g, x.to(d), given[0], given[1]),
            reference.batch_norm_backward_apply(g, x.to(d), *given[:3], *sums.to(d), True).to(dtype if d == acc else d),
        )

    names = ("mean", "invstd", "out", "sum g", "sum g * xhat", "dx")
    fused = (stats[0], stats[1], out, *sums, dx)
    assert_draws_parity([dict(zip(names, zip(fused, plain(acc), plain(torch.float64))))])


# ---- what is rejected ----------------------------------------------------------------------------------------------


LAUNCHERS = {
    "apply": batch_norm_add_relu,
    "backward_reduce": batch_norm_backward_reduce,
    "backward_apply": batch_norm_backward_apply,
}


def calls_with(place: str, t: Tensor) -> None:
    """The launcher named before the colon, with t in the place of the argument behind it."""
    launcher, argument = place.split(": ")
    x = draw(2, 3, 4, 5)
    given: dict[str, Tensor] = {"x": x, "stats": torch.ones((4, 3), device=DEVICE)}
    if launcher == "backward_reduce":
        given |= {"dout": x, "out": x}
    if launcher == "backward_apply":
        given |= {"dout": x, "sums": torch.ones((2, 3), device=DEVICE)}
    LAUNCHERS[launcher](**given | {argument: t})


ACTIVATIONS = [
    *("apply: shortcut", "apply: out", "backward_reduce: dout", "backward_reduce: out", "backward_reduce: g"),
    *(f"backward_apply: {name}" for name in ("dout", "dx", "dshortcut", "added")),
]
OTHERS = ["apply: x", "backward_reduce: x", "backward_apply: x", *ACTIVATIONS]
WRONG_LAYOUTS = {
    "NCHW": lambda x: x.contiguous(memory_format=torch.contiguous_format),
    "a slice": lambda x: x[:, :, :, ::2],
    "expanded": lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 5),
    "three axes": lambda x: x[0],
}


@pytest.mark.parametrize("layout", WRONG_LAYOUTS.values(), ids=WRONG_LAYOUTS)
def test_a_layout_that_is_not_dense_nhwc_is_rejected_with_its_strides(layout):
    x = layout(draw(2, 3, 4, 5))
    got = re.escape(f"got shape {tuple(x.shape)}, strides {x.stride()}")
    for place in OTHERS:
        with pytest.raises(ValueError, match=f"expected a dense channels_last tensor.*{got}"):
            calls_with(place, x)
    with pytest.raises(ValueError, match=f"expected a dense channels_last tensor.*{got}"):
        batch_stats(x, None, None, None, None, 0.1, EPS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool], ids=name_of)
def test_a_type_that_no_kernel_takes_is_rejected_by_name(dtype):
    x = draw(2, 3, 4, 5).to(dtype)
    for place in ("apply: x", "backward_reduce: x", "backward_apply: x"):
        with pytest.raises(TypeError, match=f"expected float16, bfloat16, float32 or float64, got {dtype}"):
            calls_with(place, x)


@pytest.mark.parametrize("place", ACTIVATIONS)
def test_an_activation_unlike_x_is_rejected_by_name_before_it_is_read_or_written(place):
    name = place.split(": ")[1]
    for wrong, error in (
        (draw(2, 3, 4, 4), ValueError),  # smaller: its end would be passed
        (draw(1, 3, 8, 5), ValueError),  # as many elements, another shape
        (draw(2, 3, 4, 5, dtype=torch.float16), TypeError),
        (draw(2, 3, 4, 5).to("meta"), ValueError),
    ):
        with pytest.raises(error, match=rf"^{name}: expected .* shape \(2, 3, 4, 5\), torch.float32 on .*; got shape"):
            calls_with(place, wrong)


@pytest.mark.parametrize(
    ("place", "vectors"),
    [("apply: stats", 4), ("backward_reduce: stats", 4), ("backward_apply: stats", 4), ("backward_apply: sums", 2)],
)
def test_vectors_of_another_shape_or_type_are_rejected_by_name(place, vectors):
    name = place.split(": ")[1]
    for wrong, error in (
        (torch.ones(vectors, 2, device=DEVICE), ValueError),
        (torch.ones(vectors - 1, 3, device=DEVICE), ValueError),
        (torch.ones(3, vectors, device=DEVICE).T, ValueError),
        (torch.ones(vectors, 3, dtype=torch.float64, device=DEVICE), TypeError),
    ):
        with pytest.raises(
            error, match=rf"^{name}: expected a contiguous tensor, shape \({vectors}, 3\), torch.float32"
        ):
            calls_with(place, wrong)
