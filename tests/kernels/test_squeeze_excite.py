"""BatchNorm with squeeze-and-excitation, forward and backward, against PyTorch's operators, judged in float64.

Interpreted where there is no GPU, compiled where there is one. "Eager" is the formula in the type of the statistics,
rounded once to the stored type. The gates are drawn here, except where the gradient goes through the whole tail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction

from resnet import reference
from resnet.kernels.batch_norm_excite import batch_norm_excite
from resnet.kernels.batch_norm_excite_backward import batch_norm_excite_backward
from resnet.kernels.batch_norm_squeeze import batch_norm_squeeze, squeeze_kernel
from resnet.kernels.batch_norm_squeeze_backward import (
    batch_norm_squeeze_backward_apply,
    batch_norm_squeeze_backward_reduce,
)
from resnet.kernels.host.tiling import elements_of, image_tiling, tiling
from resnet.norm import statistics_dtype
from tests.conftest import DEVICE
from tests.helpers.batch_norm_launches import EPS, batch_stats
from tests.helpers.blocks import DTYPES, SIXTEEN_BIT, draw, name_of, same, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.pairs import each_pair
from tests.helpers.parity import assert_draws_parity
from tests.helpers.squeeze_excite_launches import LAUNCHES, Case

# N, C, H, W. `test_shapes_are_cut_as_their_names_say`.
SHAPES = {
    "one pixel": (2, 6, 1, 1),
    "one image, one channel, several tiles": (1, 1, 41, 37),
    "one tile, padded columns": (2, 3, 5, 7),
    # with fewer than 32 columns NumPy would add the interpreted tile's rows one after the other
    "several tiles, ragged": (3, 32, 10, 20),
    "several column tiles": (2, 64, 8, 8),
    "several tiles, padded columns": (2, 100, 5, 6),
    "several column tiles, the last ragged": (1, 300, 3, 3),
    "split rows, the last split ragged": (1, 40, 31, 29),
}
RAGGED = SHAPES["several tiles, ragged"]
INNER = {"inner relu": True, "no inner relu": False}
OUTER = {"outer relu": True, "no outer relu": False}
SHORTCUT = {"shortcut": True, "no shortcut": False}
TRAINING = {"batch statistics": True, "frozen": False}

per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
per_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def stats_of(C: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(4, C) with means and spreads as training has them, and scales and shifts that are powers of two of both signs.

    y * scale + shift then has one rounding, with or without a fused multiply-add: masks are equal everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    affine = 2.0 ** torch.randint(-2, 2, (2, C), generator=generator)
    affine *= torch.randint(0, 2, (2, C), generator=generator).mul(2).sub(1)
    mean, spread = draw(2, C, seed=seed).cpu()
    return torch.stack((0.3 * mean, spread.abs() + 0.5, *affine)).to(DEVICE, statistics_dtype(dtype))


def per_map(x: Tensor) -> Tensor:
    """(N, C) or (C,) beside (N, C, H, W)."""
    return x[..., None, None]


def activated(y: Tensor, stats: Tensor, inner: bool) -> Tensor:
    return reference.batch_norm_apply(y.to(stats.dtype), stats[2], stats[3], relu=inner)


def stopped(y: Tensor, stats: Tensor, inner: bool) -> Tensor:
    """Where the inner ReLU stops the gradient: where what it gives is zero as stored."""
    return activated(y, stats, False).to(y.dtype) <= 0 if inner else torch.zeros_like(y, dtype=torch.bool)


def xhat_of(y: Tensor, stats: Tensor) -> Tensor:
    return (y.to(stats.dtype) - per_map(stats[0])) * per_map(stats[1])


def seeds(values: int) -> range:
    """Seeds enough for two dozen values of a result, below which luck decides between two roundings."""
    return range(max(2, -(-24 // values)))


def test_shapes_are_cut_as_their_names_say():
    def cut(name: str) -> tuple:
        N, C, H, W = SHAPES[name]
        return image_tiling(N, H * W, C, elements_of(C)), tiling(H * W, C, elements_of(C)), H * W, C

    for t in cut("one tile, padded columns")[:2]:
        assert t.BLOCK_M > 35 and t.BLOCK_C > 3
    for name in ("one image, one channel, several tiles", "several tiles, ragged", "several tiles, padded columns"):
        *both, M, C = cut(name)
        for t in both:
            assert M > t.BLOCK_M and M % t.BLOCK_M
            assert (C % t.BLOCK_C != 0) == ("padded" in name)
    t, _, _, C = cut("several column tiles")
    assert C >= 2 * t.BLOCK_C
    for t in cut("several column tiles, the last ragged")[:2]:
        assert t.BLOCK_C < 300 and 300 % t.BLOCK_C
    t, _, M, _ = cut("split rows, the last split ragged")
    assert t.partials > 2 and M % t.rows and M % t.BLOCK_M


@pytest.mark.parametrize("pixels", [1, 49, 3136, 2**20])
@pytest.mark.parametrize("C", [1, 3, 8, 16, 24, 64, 100, 2048])
def test_an_images_tiles_cover_its_rows_and_few_images_have_more_programs(C, pixels):
    few, many = (image_tiling(N, pixels, C, elements_of(C)) for N in (1, 2048))
    for t in (few, many):
        assert (t.partials - 1) * t.rows < pixels <= t.partials * t.rows
        for size in (t.BLOCK_M, t.BLOCK_C, t.num_warps):
            assert size & (size - 1) == 0
    assert many.partials == 1 and (few.partials > 1) == (pixels >= 16 * few.BLOCK_M)
    assert few.BLOCK_C == many.BLOCK_C or (few.BLOCK_C, many.BLOCK_C) == (32, 64)


# ---- forward -----------------------------------------------------------------------------------------------------


@pytest.mark.core
@each_pair(shape=SHAPES, dtype=DTYPES, inner=INNER)
def test_pooled_and_what_backward_needs_of_it_are_as_exact_as_eager(shape, dtype, inner):
    results = []
    for seed in seeds(shape[0] * shape[1]):
        y, stats = draw(*shape, seed=seed, dtype=dtype), stats_of(shape[1], dtype, seed)
        pooled, link = batch_norm_squeeze(y, stats, inner)
        stop = stopped(y, stats, inner)

        def plain(s: Tensor, stored: torch.dtype, y: Tensor = y, stop: Tensor = stop) -> tuple[Tensor, ...]:
            maps = activated(y, s, inner), (~stop).to(s.dtype), torch.where(stop, 0, xhat_of(y, s))
            h, passed, xhat = (m.mean((2, 3)) for m in maps)
            return h.to(stored), passed, xhat

        names = "pooled", "passed", "mean of xhat"
        eager, exact = plain(stats, dtype), plain(stats.double(), torch.float64)
        results.append(dict(zip(names, zip((pooled, *link[:2]), eager, exact))))
    assert_draws_parity(results)


@pytest.mark.core
@each_pair(shape=SHAPES, dtype=DTYPES, inner=INNER, relu=OUTER, add=SHORTCUT)
def test_out_is_as_exact_as_eager(shape, dtype, inner, relu, add):
    results = []
    for seed in seeds(shape[1]):
        y, shortcut = (draw(*shape, seed=seed + i, dtype=dtype) for i in (0, 50))
        stats, gate = stats_of(shape[1], dtype, seed), draw(*shape[:2], seed=seed + 60, dtype=dtype)
        out = batch_norm_excite(y, stats, gate, shortcut if add else None, inner, relu)
        assert out.is_contiguous(memory_format=torch.channels_last)

        def plain(s: Tensor, y: Tensor = y, gate: Tensor = gate, shortcut: Tensor = shortcut) -> Tensor:
            z = per_map(gate.to(s.dtype)) * activated(y, s, inner)
            z = z + shortcut.to(s.dtype) if add else z
            return torch.relu(z) if relu else z

        results.append({"out": (out, plain(stats).to(dtype), plain(stats.double()))})
    assert_draws_parity(results)


# ---- backward ----------------------------------------------------------------------------------------------------


@pytest.mark.core
@each_pair(shape=SHAPES, dtype=DTYPES, inner=INNER, relu=OUTER)
def test_the_gates_gradient_and_the_sums_of_an_image_are_as_exact_as_eager(shape, dtype, inner, relu):
    results = []
    for seed in seeds(shape[0] * shape[1]):
        y, dout, out = (draw(*shape, seed=seed + i, dtype=dtype) for i in (0, 50, 60))
        stats, gate = stats_of(shape[1], dtype, seed), draw(*shape[:2], seed=seed + 70, dtype=dtype)
        stored_g, dgate, dlink = batch_norm_excite_backward(dout, y, out if relu else None, stats, gate, inner)
        g = torch.where(out <= 0, 0, dout) if relu else dout
        if relu:
            same(stored_g, g)
        else:
            assert stored_g is None
        stop = stopped(y, stats, inner)

        def plain(
            s: Tensor, stored: torch.dtype, y: Tensor = y, g: Tensor = g, stop: Tensor = stop
        ) -> tuple[Tensor, ...]:
            known = g.to(s.dtype)
            passed = torch.where(stop, 0, known)
            maps = known * activated(y, s, inner), passed, passed * xhat_of(y, s)
            dgate, sum_g, sum_gx = (m.sum((2, 3)) for m in maps)
            return dgate.to(stored), sum_g, sum_gx

        names = "dgate", "sum g", "sum g * xhat"
        eager, exact = plain(stats, dtype), plain(stats.double(), torch.float64)
        results.append(dict(zip(names, zip((dgate, *dlink[:2]), eager, exact))))
    assert_draws_parity(results)


@dataclass
class HandedOver:
    """What forward and the excitation's backward leave for the norm's."""

    g: Tensor
    y: Tensor
    stats: Tensor
    gate: Tensor
    dpooled: Tensor
    link: Tensor
    dlink: Tensor
    inner: bool

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, inner: bool = True, seed: int = 0) -> HandedOver:
        y, g = (draw(*shape, seed=seed + i, dtype=dtype) for i in (0, 50))
        gate, dpooled = (draw(*shape[:2], seed=seed + i, dtype=dtype) for i in (70, 80))
        stats = stats_of(shape[1], dtype, seed)
        _, link = batch_norm_squeeze(y, stats, inner)
        _, _, dlink = batch_norm_excite_backward(g, y, None, stats, gate, inner)
        return HandedOver(g, y, stats, gate, dpooled, link, dlink, inner)

    def sums(self, *grads: Tensor) -> Tensor:
        return batch_norm_squeeze_backward_reduce(self.dlink, self.link, self.dpooled, self.y, *grads)

    def dy(self, sums: Tensor | None) -> Tensor:
        return batch_norm_squeeze_backward_apply(self.g, self.y, self.stats, self.dlink, self.dpooled, sums, self.inner)


@pytest.mark.core
@each_pair(shape=SHAPES, dtype=DTYPES, inner=INNER, training=TRAINING)
def test_sums_and_the_gradient_of_the_norms_input_are_as_exact_as_eager(shape, dtype, inner, training):
    results = []
    for seed in seeds(shape[1]):
        given = HandedOver.of(shape, dtype, inner, seed)
        sums = given.sums()
        dy = given.dy(sums if training else None)
        assert dy.is_contiguous(memory_format=torch.channels_last)
        stop = stopped(given.y, given.stats, inner)

        def plain(s: Tensor, stored: torch.dtype, given: HandedOver = given, stop: Tensor = stop) -> tuple[Tensor, ...]:
            y, g, gate = (t.to(s.dtype) for t in (given.y, given.g, given.gate))
            dh = per_map(gate) * g + per_map(given.dpooled.to(s.dtype)) / (y.shape[2] * y.shape[3])
            dh = torch.where(stop, 0, dh)
            summed = reference.batch_norm_backward_reduce(dh, y, *s[:2])
            grad = reference.batch_norm_backward_apply(dh, y, *s[:3], *summed, training)
            return *summed, grad.to(stored)

        names = "sum dh", "sum dh * xhat", "dy"
        eager, exact = plain(given.stats, dtype), plain(given.stats.double(), torch.float64)
        results.append(dict(zip(names, zip((*sums, dy), eager, exact))))
    assert_draws_parity(results)


@pytest.mark.parametrize("N", [1, 130, 600])
def test_the_sums_of_any_number_of_images_are_merged(N):
    given = HandedOver.of((N, 3, 1, 2), torch.float32)
    exact = (given.dlink[2] * given.dlink[:2].double() + given.dpooled * given.link[:2].double()).sum(1)
    torch.testing.assert_close(given.sums().double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())


def tail(
    y: Tensor,
    shortcut: Tensor,
    dout: Tensor,
    affine: tuple[Tensor, Tensor],
    excitation: Tensor,
    running: tuple[Tensor, Tensor] | None,
    inner: bool,
    relu: bool,
    add: bool,
) -> dict[str, Tensor]:
    """Results and gradients of the tail of a block by PyTorch's operators; `running` are the frozen statistics."""
    y, shortcut, weight, bias = (t.detach().clone().requires_grad_() for t in (y, shortcut, *affine))
    h = F.batch_norm(y, *(running or (None, None)), weight, bias, running is None, 0.1, EPS)
    h = torch.relu(h) if inner else h
    pooled = h.mean((2, 3))
    gate = torch.sigmoid(pooled @ excitation)
    for t in (pooled, gate):
        t.retain_grad()
    out = per_map(gate) * h
    out = out + shortcut if add else out
    out = torch.relu(out) if relu else out
    out.backward(dout)
    return {
        "pooled": pooled.detach(),
        "gate": gate.detach(),
        "out": out.detach(),
        "dgate": gate.grad,
        "dpooled": pooled.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
        "dy": y.grad,
    } | ({"dshortcut": shortcut.grad} if add else {})


def fused_tail(
    y: Tensor,
    shortcut: Tensor,
    dout: Tensor,
    affine: tuple[Tensor, Tensor],
    excitation: Tensor,
    running: tuple[Tensor, Tensor] | None,
    inner: bool,
    relu: bool,
    add: bool,
) -> dict[str, Tensor]:
    """The same by the kernels, PyTorch making the gate."""
    weight, bias = affine
    if running is None:
        stats = batch_stats(y, weight, bias, None, None, 0.1, EPS)
    else:
        invstd = 1 / torch.sqrt(running[1] + EPS)
        stats = torch.stack((running[0], invstd, weight * invstd, bias - running[0] * weight * invstd))
    pooled, link = batch_norm_squeeze(y, stats, inner)
    leaf = pooled.detach().requires_grad_()
    gate = torch.sigmoid(leaf @ excitation)
    out = batch_norm_excite(y, stats, gate.detach(), shortcut if add else None, inner, relu)
    g, dgate, dlink = batch_norm_excite_backward(dout, y, out if relu else None, stats, gate.detach(), inner)
    g = dout if g is None else g
    (dpooled,) = torch.autograd.grad(gate, leaf, dgate)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    sums = batch_norm_squeeze_backward_reduce(dlink, link, dpooled, y, dweight, dbias)
    dy = batch_norm_squeeze_backward_apply(g, y, stats, dlink, dpooled, sums if running is None else None, inner)
    return {
        "pooled": pooled,
        "gate": gate.detach(),
        "out": out,
        "dgate": dgate,
        "dpooled": dpooled,
        "dweight": dweight,
        "dbias": dbias,
        "dy": dy,
    } | ({"dshortcut": g} if add else {})


def tails_of(
    shape: tuple[int, ...], dtype: torch.dtype, training: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor] | None]:
    """What `tail` and `fused_tail` take before their options."""
    C = shape[1]
    y, shortcut, dout = (draw(*shape, seed=seed, dtype=dtype) for seed in range(3))
    weight, bias, mean, var = (draw(C, seed=seed, dtype=dtype) for seed in range(3, 7))
    running = None if training else (mean, var.abs() + 0.5)
    return y, shortcut, dout, (weight, bias), draw(C, C, seed=7, dtype=dtype) / C**0.5, running


@each_pair(inner=INNER, relu=OUTER, add=SHORTCUT, training=TRAINING, shape=("RAGGED", "PADDED"))
def test_the_gradient_through_the_whole_tail_is_autograds(shape, inner, relu, add, training):
    shape = {"RAGGED": RAGGED, "PADDED": (3, 100, 5, 6)}[shape]
    given = tails_of(shape, torch.float64, training)
    expected = tail(*given, inner, relu, add)
    torch.testing.assert_close(fused_tail(*given, inner, relu, add), expected, rtol=1e-9, atol=1e-9)


@per_inner
@pytest.mark.parametrize("mean", [1, 100, 1e4])
def test_sums_over_channels_far_from_zero_are_as_exact_as_eager(mean, inner):
    """Eager's: float32 sums of the products, whose means it takes away first, as the kernels do."""
    results = []
    for seed in range(2):
        y, g = draw(*RAGGED, seed=seed) + mean, draw(*RAGGED, seed=seed + 5)
        gate, dpooled = draw(*RAGGED[:2], seed=seed + 10), draw(*RAGGED[:2], seed=seed + 15)
        stats = batch_stats(y, None, None, None, None, 0.1, EPS)
        pooled, link = batch_norm_squeeze(y, stats, inner)
        _, dgate, dlink = batch_norm_excite_backward(g, y, None, stats, gate, inner)
        sums = batch_norm_squeeze_backward_reduce(dlink, link, dpooled, y)
        # The mask of the kernels: it says itself where h is above zero.
        stop = batch_norm_excite(y, stats, torch.ones_like(gate), None, inner, relu=False) <= 0
        stop = stop if inner else torch.zeros_like(stop)

        def plain(s: Tensor, y=y, g=g, gate=gate, dpooled=dpooled, stop=stop) -> tuple[Tensor, ...]:
            h = torch.where(stop, 0, activated(y, s, False))
            dh = per_map(gate.to(s.dtype)) * g + per_map(dpooled.to(s.dtype)) / (y.shape[2] * y.shape[3])
            summed = reference.batch_norm_backward_reduce(torch.where(stop, 0, dh), y.to(s.dtype), s[0], s[1])
            return h.mean((2, 3)), (g * h).sum((2, 3)), *summed

        names = "pooled", "dgate", "sum dh", "sum dh * xhat"
        results.append(dict(zip(names, zip((pooled, dgate, *sums), plain(stats), plain(stats.double())))))
    assert_draws_parity(results)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_gradients_of_weight_and_bias_are_the_sums_rounded_to_their_types_and_a_bias_before_has_none(dtype):
    given, C = HandedOver.of(RAGGED, dtype), RAGGED[1]
    dweight, dbias = torch.empty(C, dtype=dtype, device=DEVICE), torch.empty(C, device=DEVICE)
    dconv_bias = torch.empty(C, dtype=dtype, device=DEVICE)
    sums = given.sums(dweight, dbias, dconv_bias)
    same(dweight, sums[1].to(dtype))
    same(dbias, sums[0])
    same(dconv_bias, torch.zeros_like(dconv_bias))
    same(sums, given.sums())


# ---- what is handed over -------------------------------------------------------------------------------------------


@per_dtype
def test_a_link_is_of_the_statistics_type_and_has_zeros_where_its_gradient_has_the_gate(dtype):
    """The two have one shape, so that one may be the other's gradient to an operator."""
    given = HandedOver.of(RAGGED, dtype)
    link, dlink = given.link, given.dlink
    assert link.shape == dlink.shape == (3, *RAGGED[:2])
    assert link.dtype == dlink.dtype == given.stats.dtype
    same(link[2], torch.zeros_like(link[2]))
    same(dlink[2], given.gate.to(dlink.dtype))


@per_dtype
def test_without_an_inner_relu_every_pixel_passes(dtype):
    _, link = batch_norm_squeeze(draw(*RAGGED, dtype=dtype), stats_of(RAGGED[1], dtype, seed=0))
    same(link[0], torch.ones_like(link[0]))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_positive_value_that_rounds_to_zero_has_no_gradient(dtype):
    if isinstance(squeeze_kernel, InterpretedFunction) and dtype == torch.bfloat16:
        pytest.skip("the interpreter reads bfloat16's subnormals as zeros")
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    y = torch.full((1, 2, 1, 2), tiny, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    stats = torch.tensor([[0.0, 0], [1, 1], [0.25, 1], [0, 0]], device=DEVICE)
    ones, none = torch.ones_like(y), torch.zeros(1, 2, dtype=dtype, device=DEVICE)
    _, link = batch_norm_squeeze(y, stats, relu=True)
    _, _, dlink = batch_norm_excite_backward(ones, y, None, stats, none + 1, inner_relu=True)
    dy = batch_norm_squeeze_backward_apply(ones, y, stats, dlink, none, None, relu=True)
    assert link[0].tolist() == [[0, 1]] and dlink[0].tolist() == [[0, 2]]
    assert dy[0, :, 0].tolist() == [[0, 0], [1, 1]]


# ---- NaN and infinity ------------------------------------------------------------------------------------------------

BAD = (float("nan"), float("inf"), -float("inf"))


def assert_finite_where_pytorch_is(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(mine[name].isfinite(), value.isfinite()), name
        finite = value.isfinite()
        torch.testing.assert_close(mine[name][finite], value[finite], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.core
@per_inner
@per_dtype
def test_pooled_and_out_keep_nan_and_infinity_as_pytorch_does(dtype, inner):
    y, stats = draw(2, 4, 4, 5, dtype=dtype), torch.ones((4, 4), dtype=statistics_dtype(dtype), device=DEVICE)
    y[0, :3, 1, 2] = torch.tensor(BAD, dtype=dtype, device=DEVICE)
    gate = torch.ones(2, 4, dtype=dtype, device=DEVICE)
    h = torch.relu(y + 1) if inner else y + 1
    for relu in (True, False):
        same(batch_norm_excite(y, stats, gate, None, inner, relu), torch.relu(h) if relu else h)
        same(batch_norm_excite(y, stats, gate, torch.zeros_like(y), inner, relu), torch.relu(h) if relu else h)
    pooled = batch_norm_squeeze(y, stats, inner)[0]
    expected = h.double().mean((2, 3)).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(pooled, expected, rtol=4 * eps, atol=4 * eps, equal_nan=True)


@pytest.mark.parametrize("training", TRAINING.values(), ids=TRAINING)
@pytest.mark.parametrize("relu", OUTER.values(), ids=OUTER)
@per_inner
@pytest.mark.parametrize("bad", BAD, ids=name_of)
@pytest.mark.parametrize("place", ["y", "dout", "shortcut"])
def test_gradients_are_finite_where_autograds_are(place, bad, inner, relu, training):
    """With one value that is not, of y, of the gradient, or of the shortcut, in the first image's first channel.

    The excitation is diagonal: what PyTorch's product would spread over all channels stays in one here.
    """
    *given, excitation, running = tails_of((3, 6, 5, 4), torch.float32, training)
    given[("y", "shortcut", "dout").index(place)][0, 0, 1, 2] = bad
    others = torch.arange(6, device=DEVICE) > 0

    class Gates:
        """As a matrix on the right of a product, one factor for each channel."""

        def __rmatmul__(self, pooled: Tensor) -> Tensor:
            return pooled * excitation.diagonal()

    results = [f(*given, Gates(), running, inner, relu, True) for f in (fused_tail, tail)]
    assert_finite_where_pytorch_is(*results)
    for name, value in results[0].items():
        channels = value if value.dim() == 1 else value.transpose(0, 1)
        assert channels[others].isfinite().all(), name
    if not training:
        for name in ("pooled", "out", "dgate", "dy", "dshortcut"):
            assert results[0][name][1:].isfinite().all(), name


@pytest.mark.parametrize("bad", BAD, ids=name_of)
def test_an_infinite_gradient_at_a_stopped_pixel_reaches_the_gate_and_not_the_norm(bad):
    """The gate's gradient is g * h, and there h is zero."""
    y = -torch.ones(1, 1, 2, 2, device=DEVICE).contiguous(memory_format=torch.channels_last)
    dout = torch.full_like(y, bad)
    stats = torch.tensor([[0.0], [1.0], [1.0], [0.0]], device=DEVICE)
    gate = torch.ones(1, 1, device=DEVICE)
    _, link = batch_norm_squeeze(y, stats, relu=True)
    _, dgate, dlink = batch_norm_excite_backward(dout, y, None, stats, gate, inner_relu=True)
    sums = batch_norm_squeeze_backward_reduce(dlink, link, gate, y)
    dy = batch_norm_squeeze_backward_apply(dout, y, stats, dlink, gate, None, relu=True)
    assert dgate.isnan().all()
    assert (sums == 0).all() and (dy == 0).all()


@pytest.mark.parametrize("bad", BAD, ids=name_of)
def test_a_map_that_the_relu_stops_in_full_adds_nothing_to_the_sums(bad):
    """Though its gate and the gradient of its mean be infinite: PyTorch masks their product."""
    y = draw(2, 2, 3, 3).abs()
    y[0, 0] *= -1
    stats = torch.tensor([[0.0], [1.0], [1.0], [0.0]], device=DEVICE).repeat(1, 2)
    dout, gate = torch.ones_like(y), torch.ones(2, 2, device=DEVICE)
    dpooled = gate.clone()
    gate[0, 0] = dpooled[0, 0] = bad
    _, link = batch_norm_squeeze(y, stats, relu=True)
    _, _, dlink = batch_norm_excite_backward(dout, y, None, stats, gate, inner_relu=True)
    sums = batch_norm_squeeze_backward_reduce(dlink, link, dpooled, y)
    torch.testing.assert_close(sums[0], torch.tensor([10.0, 20.0], device=DEVICE))
    assert sums.isfinite().all()


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_second_run_gives_the_same_bits_and_inputs_are_only_read(name):
    case, before = (Case.of(RAGGED, torch.float16) for _ in range(2))
    same(LAUNCHES[name](case), LAUNCHES[name](case))
    for argument, t in vars(case).items():
        same(t, getattr(before, argument))


@pytest.mark.parametrize("name", [name for name in LAUNCHES if "sums" not in name])  # which are those of all images
def test_an_image_does_not_depend_on_its_neighbours(name):
    """Its results have the same bits in a batch of its own."""
    C = RAGGED[1]
    both = Case.of((2, C, 10, 20), torch.float32)
    first = Case(
        *(t[:1].contiguous(memory_format=torch.channels_last) for t in (both.y, both.shortcut, both.dout, both.out)),
        both.gate[:1],
        both.dpooled[:1],
        both.stats,
        both.sums,
        both.link[:, :1].contiguous(),
        both.dlink[:, :1].contiguous(),
    )
    if name.startswith("squeeze'"):  # M is the pixels of all images, which the sums are divided by
        first.sums = first.sums / 2
    results = [LAUNCHES[name](case) for case in (both, first)]
    for whole, own in zip(*([r] if isinstance(r, Tensor) else r for r in results)):
        if whole is not None:
            same(whole[:, :1] if whole.shape[:2] == (3, 2) else whole[:1], own)


@pytest.mark.core
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 130), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    training=st.booleans(),
)
def test_a_tail_of_any_shape_has_autograds_gradients(shape, dtype, training):
    """Without ReLUs, whose masks another rounding may flip."""
    given = tails_of(shape, dtype, training)
    fused, expected = (f(*given, False, False, True) for f in (fused_tail, tail))
    for name, value in expected.items():
        tolerance = 1e3 * torch.finfo(dtype).eps * max(1.0, value.abs().max().item())
        torch.testing.assert_close(fused[name], value, rtol=0, atol=tolerance)


# ---- what is rejected ----------------------------------------------------------------------------------------------


def calls(c: Case, **changed: Tensor) -> dict[str, Callable[[], object]]:
    """Every launcher, with tensors of c, of which some are replaced by name."""
    y, stats, gate, dlink, dpooled = (changed.get(n, getattr(c, n)) for n in ("y", "stats", "gate", "dlink", "dpooled"))
    shortcut, dout, out, link, sums = (
        changed.get(n, getattr(c, n)) for n in ("shortcut", "dout", "out", "link", "sums")
    )
    g = changed.get("g", c.dout)
    return {
        "squeeze": lambda: batch_norm_squeeze(y, stats),
        "excite": lambda: batch_norm_excite(y, stats, gate, shortcut),
        "excite_backward": lambda: batch_norm_excite_backward(dout, y, out, stats, gate),
        "squeeze_backward_reduce": lambda: batch_norm_squeeze_backward_reduce(dlink, link, dpooled, y),
        "squeeze_backward_apply": lambda: batch_norm_squeeze_backward_apply(g, y, stats, dlink, dpooled, sums),
    }


def refused(places: dict[str, str]) -> pytest.MarkDecorator:
    """A launcher, and a name of an argument of it, for each of the launchers' names in a string."""
    pairs = [(launcher, name) for launcher, names in places.items() for name in names.split()]
    return pytest.mark.parametrize(("launcher", "name"), pairs, ids=[": ".join(pair) for pair in pairs])


@pytest.mark.parametrize("launcher", calls(Case.of((1, 1, 1, 1), torch.float32)))
def test_a_layout_or_a_type_of_y_that_no_kernel_takes_is_rejected(launcher):
    case = Case.of((2, 3, 4, 5), torch.float32)
    for wrong in (case.y.contiguous(), case.y[:, :, :, ::2], case.y[0]):
        with pytest.raises(ValueError, match=r"^x: expected a dense channels_last tensor"):
            calls(case, y=wrong)[launcher]()
    for dtype in (torch.int32, torch.bool):
        with pytest.raises(TypeError, match=f"expected float16, bfloat16, float32 or float64, got {dtype}"):
            calls(case, y=case.y.to(dtype))[launcher]()


@refused({"excite": "shortcut", "excite_backward": "dout out", "squeeze_backward_apply": "g"})
def test_an_activation_unlike_y_is_rejected_by_name(launcher, name):
    case = Case.of((2, 3, 4, 5), torch.float32)
    for wrong, error in (
        (draw(2, 3, 4, 4), ValueError),
        (draw(1, 3, 8, 5), ValueError),
        (draw(2, 3, 4, 5).contiguous(), ValueError),
        (draw(2, 3, 4, 5, dtype=torch.float16), TypeError),
        (draw(2, 3, 4, 5).to("meta"), ValueError),
    ):
        with pytest.raises(error, match=rf"^{name}: expected .* shape \(2, 3, 4, 5\), torch.float32 on .*; got shape"):
            calls(case, **{name: wrong})[launcher]()


@refused(
    {
        "squeeze": "stats",
        "excite": "stats gate",
        "excite_backward": "stats gate",
        "squeeze_backward_reduce": "dlink link dpooled",
        "squeeze_backward_apply": "stats dlink dpooled sums",
    }
)
def test_vectors_of_another_shape_type_or_device_are_rejected_by_name(launcher, name):
    case = Case.of((2, 3, 4, 5), torch.float32)
    right = getattr(case, name)
    for wrong, error in (
        (right[..., :2].contiguous(), ValueError),
        (right[:-1], ValueError),
        (right.mT.contiguous().mT, ValueError),
        (right.to("meta"), ValueError),
        (right.double(), TypeError),
    ):
        with pytest.raises(error, match=rf"^{name}: expected a contiguous tensor, shape \(.*, 3\), torch.float32"):
            calls(case, **{name: wrong})[launcher]()


def test_an_image_of_2_to_the_31_elements_is_refused():
    """Offsets within an image are 32 bits wide; the tensors are never made."""
    case = Case(*(t.to("meta") for t in vars(Case.of((1, 64, 1, 1), torch.float16)).values()))
    y = torch.empty((1, 64, 5794, 5794), dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    for name in ("y", "shortcut", "dout", "out"):
        setattr(case, name, y)
    for launch in calls(case).values():
        with pytest.raises(ValueError, match="span less than 2\\^31 elements, got 2148507904 elements an image"):
            launch()
