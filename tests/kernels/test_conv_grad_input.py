"""The grad-input convolution and its epilogues against PyTorch's own, judged in float64.

Interpreted where there is no GPU, compiled where there is one. "Eager" is PyTorch, operator by operator, in the same
type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnet.kernels import conv_grad_input, tuning
from resnet.kernels.batch_norm_backward_reduce import NormedShortcut, batch_norm_backward_reduce
from resnet.kernels.conv_grad_input import BlockEnd, IdentityGrad, KeptMask, ReluMask, ShortcutGrad
from resnet.kernels.host.shapes import ConvShape
from tests.conftest import DEVICE
from tests.helpers import grad_input_cases as cases
from tests.helpers.blocks import DTYPES, SIXTEEN_BIT, draw, name_of, same, staircase, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.grad_input_cases import BLOCK_ENDS, EPILOGUES, MET_END, Case

NHWC = torch.channels_last
RAGGED = ConvShape(N=2, H=5, W=4, C=20, K=17, R=3, S=3, stride=1, padding=1)
POINTWISE = replace(RAGGED, R=1, S=1, padding=0)
IDENTITY_END, IDENTITY_NORMED_END, SHORTCUT_END, SHORTCUT_NORMED_END = BLOCK_ENDS
SUMMED = {"mask": 2, **dict.fromkeys((*BLOCK_ENDS, MET_END), 2), IDENTITY_NORMED_END: 3, SHORTCUT_NORMED_END: 3}  # sums


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("shape, epilogue, dtype", cases.pairwise(), ids=cases.name_of_case)
def test_every_pair_of_options_is_as_exact_as_eager(small_tiles, shape, epilogue, dtype):
    cases.assert_parity(shape, epilogue, dtype)


@pytest.mark.parametrize("epilogue", ["mask", "shortcut", SHORTCUT_NORMED_END])
def test_the_tiles_of_real_launches_leave_ragged_ends_in_every_dimension(epilogue):
    config = tuning.TABLE["grad_input"]["16-bit"][0]
    shape = ConvShape(N=2, H=9, W=8, C=config.BLOCK_N + 8, K=config.BLOCK_K + 8, R=3, S=3, stride=1, padding=1)
    assert shape.N * shape.H * shape.W > config.BLOCK_M
    cases.assert_parity(shape, epilogue, torch.float16)


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_shape_is_as_exact_as_eager(data):
    side = st.integers(1, 6)
    kernel, stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    epilogue = data.draw(st.sampled_from(EPILOGUES))
    dilation = data.draw(st.integers(1, 3)) if stride == 1 else 1
    padding = dilation * (kernel - 1) // 2 if epilogue.startswith("shortcut") else data.draw(st.integers(0, 3))
    channels = data.draw(st.tuples(st.integers(1, 19), st.integers(1, 19)))
    pixels = data.draw(st.tuples(st.integers(1, 3), side, side))
    shape = ConvShape(*pixels, *channels, kernel, kernel, stride, padding, dilation)
    if cases.is_valid(shape, epilogue):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)
            cases.assert_parity(shape, epilogue, data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("R, S", [(1, 3), (3, 2)])
def test_a_kernel_need_not_be_square(small_tiles, R, S):
    shape = replace(RAGGED, R=R, S=S, stride=2)
    case = Case.of(shape, "none", torch.float64)
    torch.testing.assert_close(case.fused(), case.plain(torch.float64))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_parity_class_without_taps_still_gets_its_epilogue(small_tiles, epilogue):
    """1x1 with stride 2 meets every fourth pixel; the others get zero, or what is added."""
    case = Case.of(replace(RAGGED, R=1, S=1, stride=2, padding=0), epilogue, torch.float32)
    dx = case.fused()[0]
    for h, w in ((0, 1), (1, 0), (1, 1)):
        expected = case.added if epilogue.startswith("identity") else torch.zeros_like(dx)
        if "block end" in epilogue:
            expected = cases.masked(expected, case.epilogue.out)
        same(dx[:, :, h::2, w::2], expected[:, :, h::2, w::2])


@pytest.mark.parametrize("of_the_pixels", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_meets_some_pixels_is_added_to_these_and_to_no_other(small_tiles, of_the_pixels, stride):
    case = Case.of(replace(RAGGED, stride=stride), "none", torch.float32)
    (alone,) = case.fused()
    g = draw(RAGGED.N, RAGGED.C, *(-(-size // of_the_pixels) for size in (RAGGED.H, RAGGED.W)), seed=9)
    (dx,) = replace(case, epilogue=IdentityGrad(g, of_the_pixels)).fused()
    expected = alone.clone()
    expected[:, :, ::of_the_pixels, ::of_the_pixels] += g
    same(dx, expected)


@pytest.mark.parametrize("epilogue", SUMMED)
def test_the_same_bits_come_out_twice_and_results_are_channels_last(small_tiles, epilogue):
    case = Case.of(replace(RAGGED, stride=2), epilogue, torch.float16)
    first, second = case.fused(), case.fused()
    for a, b in zip(first, second, strict=True):
        same(a, b)
    assert first[0].is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_long_reduction_is_accumulated_in_float32(small_tiles, dtype):
    K, shape = 544, ConvShape(N=1, H=3, W=3, C=4, K=544, R=1, S=1, stride=1, padding=0)
    dy = torch.ones(1, K, 3, 3, dtype=dtype, device=DEVICE).contiguous(memory_format=NHWC)
    weight = staircase(K, dtype)[:, None].expand(K, 4).reshape(K, 4, 1, 1).contiguous(memory_format=NHWC)
    dx = conv_grad_input.conv_grad_input(dy, weight, shape)
    assert torch.equal(dx, weight.double().sum(0)[None].expand(dx.shape).to(dtype))


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_recomputed_mask_is_that_of_batch_norm_backward_bit_for_bit(small_tiles, dtype):
    """At values around zero, too: those that are zero, and positive ones that are stored as zero."""
    case = Case.of(POINTWISE, "mask", dtype)
    y1, stats = case.epilogue
    stats[2] = torch.finfo(dtype).tiny  # products are subnormal, or vanish
    stats[3] = 0
    stats[2:, ::3] = draw(2, stats[2:, ::3].shape[1], dtype=stats.dtype)
    stats[3, ::3] = -y1[0, ::3, 1, 1] * stats[2, ::3]
    g = case.fused()[0]
    dx = replace(case, epilogue=None).fused()[0]
    expected = torch.empty_like(dx)
    batch_norm_backward_reduce(dx, y1, None, stats, g=expected)
    same(g, expected)
    assert 0 < (g == 0).sum() < g.numel()


def test_sums_are_of_the_gradient_as_stored_and_reach_the_parameters(small_tiles):
    case = Case.of(POINTWISE, "mask", torch.float16)
    dweight, dbias = torch.empty(RAGGED.C, device=DEVICE), torch.empty(RAGGED.C, device=DEVICE, dtype=torch.float16)
    g, sums = conv_grad_input.conv_grad_input(
        case.dy, case.weight, case.shape, case.epilogue, dweight=dweight, dbias=dbias
    )
    same(dweight, sums[1])
    same(dbias, sums[0].half())
    reduced = batch_norm_backward_reduce(g, case.epilogue.y1, None, case.epilogue.stats, relu=False)
    torch.testing.assert_close(sums, reduced, rtol=1e-5, atol=1e-4)  # float32, in another order


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_passes_a_relu_and_a_masked_nan_does_not(small_tiles, dtype):
    nan, inf = float("nan"), float("inf")
    shape = POINTWISE
    at = (1, slice(0, 4), 2, 3)
    values = torch.tensor([nan, inf, -inf, 1.0], dtype=dtype, device=DEVICE)
    ones = torch.ones(4, shape.C, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)

    case = Case.of(shape, "mask", dtype)
    plain = replace(case, epilogue=None).fused()[0]
    case.epilogue.y1[at] = values
    case.epilogue = ReluMask(case.epilogue.y1, ones)
    same(case.fused()[0][at], torch.where(values == -inf, 0, plain[at]))
    case.epilogue = KeptMask(case.epilogue.y1)
    same(case.fused()[0][at], torch.where(values == -inf, 0, plain[at]))


def test_rows_beyond_the_last_pixel_do_not_spoil_the_sums_of_an_infinite_weight(small_tiles):
    """There acc is 0 * weight, which an infinite weight makes NaN."""
    case = Case.of(POINTWISE, "mask", torch.float32)
    case.dy.abs_()
    case.weight.fill_(float("inf"))
    case.epilogue.stats[3].fill_(100)  # all pass
    assert (case.fused()[1] == float("inf")).all()


# ---- the end of a block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_a_block_s_end_is_the_two_launches_that_it_replaces(small_tiles, epilogue, stride, dtype):
    """The gradient bit for bit, since both round it before they sum it. The sums add the same values in another order.

    A mask of zeros, too: both stop the gradient there.
    """
    case = Case.of(replace(RAGGED, stride=stride), epilogue, dtype)
    branch, out, y, stats, shortcut = case.epilogue
    out[:, ::3] = 0
    g, *sums = case.fused()
    dx = replace(case, epilogue=branch).fused()[0]
    expected = torch.empty_like(dx)
    expected_sums = batch_norm_backward_reduce(dx, y, out, stats, shortcut=shortcut, g=expected)
    same(g, expected)
    eps = torch.finfo(stats.dtype).eps
    torch.testing.assert_close(torch.stack(sums), expected_sums, rtol=80 * eps, atol=800 * eps)
    assert 0 < (g == 0).sum() < g.numel()


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_partial_sums_are_those_of_each_row_tile_in_order(small_tiles, epilogue):
    case = Case.of(POINTWISE, epilogue, torch.float64)
    g, partial = launch(case)
    rows = cases.SMALL_TILES[0].BLOCK_M
    of_pixels = lambda t: t.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]  # noqa: E731
    tiles = zip(*(of_pixels(t).split(rows) for t in (g, *(x for x, _ in case.norms))))
    stats = [stats for _, stats in case.norms]
    expected = [torch.stack(cases.sums_of(g, list(zip(xs, stats)))) for g, *xs in tiles]
    assert len(expected) > 1 and partial.dtype == torch.float64
    torch.testing.assert_close(partial, torch.stack(expected, 1))


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_tiles_that_are_tried_before_leave_nothing_in_a_block_s_end(monkeypatch, epilogue):
    """Each tile has its own number of partial sums, and the result those of the one that is taken."""
    tiles = [replace(cases.SMALL_TILES[0], BLOCK_M=rows) for rows in (32, 16, 64)]
    case = Case.of(RAGGED, epilogue, torch.float32)
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: tiles)
    with tuning.every_candidate():
        tried = launch(case)
    for a, b in zip(tried, launch(case), strict=True):
        same(a, b)
    for tile in tiles:
        monkeypatch.setattr(tuning.choice, "candidates", lambda *_, tile=tile: [tile])
        _, partial = launch(case)
        assert partial.shape[1] == -(-40 // tile.BLOCK_M)  # pixels
        torch.testing.assert_close(partial.sum(1), tried[1].sum(1), rtol=1e-5, atol=1e-4)  # float32, in another order


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_a_block_s_end_sums_the_gradient_as_stored(small_tiles, epilogue):
    case = Case.of(POINTWISE, epilogue, torch.float16)
    g, *sums = case.fused()
    _, _, y, stats, shortcut = case.epilogue
    reduced = batch_norm_backward_reduce(g, y, None, stats, relu=False, shortcut=shortcut)
    torch.testing.assert_close(torch.stack(sums), reduced, rtol=1e-5, atol=1e-4)  # float32, in another order


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_a_nan_output_passes_its_gradient_and_minus_infinity_stops_it(small_tiles, epilogue, dtype):
    at = (1, slice(0, 5), 2, 3)
    values = torch.tensor([float("nan"), float("inf"), 1.0, -float("inf"), 0.0], dtype=dtype, device=DEVICE)
    case = Case.of(POINTWISE, epilogue, dtype)
    case.epilogue.out[at] = values
    dx = replace(case, epilogue=case.epilogue.branch).fused()[0]
    assert dx[at].all()
    g, *sums = case.fused()
    same(g[at], torch.where(values <= 0, 0, dx[at]))
    assert torch.stack(sums).isfinite().all()


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_a_gradient_that_is_nan_reaches_the_sums_where_the_mask_lets_it_pass_alone(small_tiles, epilogue):
    case = Case.of(POINTWISE, epilogue, torch.float32)
    case.dy[0, 0, 1, 2] = float("nan")  # every channel of one pixel
    out = case.epilogue.out
    out[0, :, 1, 2] = -1
    out[0, 3, 1, 2] = 1
    g, *sums = case.fused()
    passed = torch.zeros_like(g, dtype=torch.bool)
    passed[0, 3, 1, 2] = True
    assert torch.equal(g.isnan(), passed)
    assert torch.equal(torch.stack(sums).isnan(), passed[0, :, 1, 2].expand(len(sums), -1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_beyond_the_last_pixel_a_block_s_end_sums_nothing(small_tiles, epilogue, stride):
    """There acc is 0 * weight, which an infinite weight makes NaN, and a mean that is large would count, too."""
    case = Case.of(replace(POINTWISE, stride=stride), epilogue, torch.float32)
    case.dy.abs_()
    case.epilogue.out.fill_(1)  # all pass
    case.weight.fill_(float("inf"))
    for x, stats in case.norms:
        stats[0] = -1e4
        stats[1] = 1
        x.zero_()
    for total in case.fused()[1:]:
        assert (total == float("inf")).all()


@pytest.mark.parametrize("epilogue", BLOCK_ENDS)
def test_a_block_s_end_changes_nothing_that_it_reads(small_tiles, epilogue):
    case = Case.of(RAGGED, epilogue, torch.float16)
    branch = filter(torch.is_tensor, case.branch)
    read = [case.dy, case.weight, *branch, case.epilogue.out, *(t for norm in case.norms for t in norm)]
    before = [t.clone() for t in read]
    case.fused()
    for a, b in zip(read, before, strict=True):
        same(a, b)


# ---- what is not computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_an_empty_batch_gives_empty_results_and_zero_sums(epilogue):
    shape = replace(RAGGED, N=0)
    case = Case.of(shape, epilogue, torch.float16)
    dx, *sums = case.fused()
    assert dx.shape == (0, shape.C, shape.H, shape.W) and dx.dtype == torch.float16
    assert len(sums) == SUMMED.get(epilogue, 0)
    for total in sums:
        same(total, torch.zeros(shape.C, device=DEVICE))


def test_an_empty_batch_zeroes_the_parameters_gradients():
    case = Case.of(replace(RAGGED, N=0), "mask", torch.float16)
    vectors = torch.ones(3, RAGGED.C, device=DEVICE)
    conv_grad_input.conv_grad_input(case.dy, case.weight, case.shape, case.epilogue, False, *vectors)
    assert not vectors.any()


def launch(case: Case, **changes) -> object:
    """`case` with some arguments in another's place."""
    arguments = {"dy": case.dy, "weight": case.weight, "shape": case.shape, "epilogue": case.epilogue} | changes
    return conv_grad_input.conv_grad_input(**arguments)


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.contiguous_format)


def with_end(**changes: Callable[[BlockEnd], object]) -> Callable[[Case], dict]:
    """A block's end with fields that are made of it."""
    return lambda case: {
        "epilogue": case.epilogue._replace(**{name: change(case.epilogue) for name, change in changes.items()})
    }


def with_norm(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Case], dict]:
    """A block's end whose shortcut has another norm."""
    return with_end(shortcut=lambda end: NormedShortcut(*change(*end.shortcut[:2])))


BAD: dict[str, tuple[str, Callable[[Case], dict], type[Exception], str]] = {
    "an integer type": ("none", lambda c: {"dy": c.dy.int()}, TypeError, "int32"),
    "dy in another layout": ("none", lambda c: {"dy": contiguous(c.dy)}, ValueError, "channels_last"),
    "dy of other pixels": ("none", lambda c: {"dy": c.dy[:, :, 1:].clone()}, ValueError, "dy: expected .*shape"),
    "another weight": (
        "none",
        lambda c: {"weight": c.weight[1:]},
        ValueError,
        r"weight: expected .*shape \(17, 20, 3, 3",
    ),
    "a weight of another type": (
        "none",
        lambda c: {"weight": c.weight.double()},
        TypeError,
        "weight: expected .*torch.fl",
    ),
    "an unknown epilogue": ("none", lambda c: {"epilogue": (c.dy,)}, TypeError, "epilogue: expected ReluMask"),
    "y1 of another shape": (
        "mask",
        lambda c: {"epilogue": ReluMask(c.dy, c.epilogue.stats)},
        ValueError,
        "y1: expected .*shape",
    ),
    "half of the stats": (
        "mask",
        lambda c: {"epilogue": ReluMask(c.epilogue.y1, c.epilogue.stats[2:])},
        ValueError,
        r"stats: expected a contiguous tensor, shape \(4, 20\)",
    ),
    "stats of another type": (
        "mask",
        lambda c: {"epilogue": ReluMask(c.epilogue.y1, c.epilogue.stats.half())},
        TypeError,
        "stats: expected .*torch.float32",
    ),
    "a dweight of another length": (
        "mask",
        lambda c: {"dweight": torch.empty(3, device=DEVICE)},
        ValueError,
        r"dweight: expected a contiguous tensor, shape \(20,\)",
    ),
    "a dbias without a mask": (
        "none",
        lambda c: {"dbias": torch.empty(20, device=DEVICE)},
        ValueError,
        "dbias, dconv_bias: only ReluMask",
    ),
    "a kept mask of another shape": (
        "kept mask",
        lambda c: {"epilogue": KeptMask(c.dy)},
        ValueError,
        "a: expected .*shape",
    ),
    "g of another shape": ("identity", lambda c: {"epilogue": IdentityGrad(c.dy)}, ValueError, "g: expected .*shape"),
    "a 3x3 shortcut": (
        "shortcut",
        lambda c: {"epilogue": ShortcutGrad(c.epilogue.g, c.weight)},
        ValueError,
        r"shortcut weight: expected .*shape \(17, 20, 1, 1\)",
    ),
    "a shortcut of fewer pixels": (
        "shortcut",
        lambda c: {"shape": replace(c.shape, padding=0), "dy": c.dy[:, :, 2:, 2:].contiguous(memory_format=NHWC)},
        ValueError,
        r"shape: a 1x1 shortcut of stride 1 has \(5, 4\) pixels, dy has \(3, 2\)",
    ),
    "a block's end of no branch": (IDENTITY_END, with_end(branch=lambda e: None), TypeError, "branch: .* got NoneType"),
    "a block's end of another epilogue": (
        IDENTITY_END,
        with_end(branch=lambda e: KeptMask(e.out)),
        TypeError,
        "branch: expected IdentityGrad or ShortcutGrad, got KeptMask",
    ),
    "a block's end: g of another shape": (
        IDENTITY_END,
        with_end(branch=lambda e: IdentityGrad(e.out[:, :, 1:].clone(memory_format=NHWC))),
        ValueError,
        "g: expected .*shape",
    ),
    "a block's end: g of another type": (
        SHORTCUT_END,
        with_end(branch=lambda e: ShortcutGrad(e.branch.g.float(), e.branch.weight)),
        TypeError,
        "g: expected .*torch.float16",
    ),
    "a block's end: a 3x3 shortcut": (
        SHORTCUT_END,
        lambda c: {"epilogue": c.epilogue._replace(branch=ShortcutGrad(c.branch.g, c.weight))},
        ValueError,
        r"shortcut weight: expected .*shape \(17, 20, 1, 1\)",
    ),
    "a block's end: a shortcut of fewer pixels": (
        SHORTCUT_END,
        lambda c: {"shape": replace(c.shape, padding=0), "dy": c.dy[:, :, 2:, 2:].contiguous(memory_format=NHWC)},
        ValueError,
        r"shape: a 1x1 shortcut of stride 1 has \(5, 4\) pixels, dy has \(3, 2\)",
    ),
    "out of another shape": (
        IDENTITY_END,
        lambda c: {"epilogue": c.epilogue._replace(out=c.dy)},
        ValueError,
        r"out: expected .*shape \(2, 20, 5, 4\)",
    ),
    "out of another type": (
        IDENTITY_END,
        with_end(out=lambda e: e.out.float()),
        TypeError,
        "out: expected .*torch.float16",
    ),
    "out in another layout": (
        IDENTITY_END,
        with_end(out=lambda e: contiguous(e.out)),
        ValueError,
        "out: .*channels_last",
    ),
    "out on another device": (IDENTITY_END, with_end(out=lambda e: e.out.to("meta")), ValueError, "out: .*meta"),
    "y of another shape": (
        IDENTITY_END,
        lambda c: {"epilogue": c.epilogue._replace(y=c.dy)},
        ValueError,
        r"y: expected .*shape \(2, 20, 5, 4\)",
    ),
    "y of another type": (SHORTCUT_END, with_end(y=lambda e: e.y.double()), TypeError, "y: expected .*torch.float16"),
    "y in another layout": (SHORTCUT_END, with_end(y=lambda e: contiguous(e.y)), ValueError, "y: .*channels_last"),
    "half of y's stats": (
        IDENTITY_END,
        with_end(stats=lambda e: e.stats[:2]),
        ValueError,
        r"^stats: expected a contiguous tensor, shape \(4, 20\)",
    ),
    "y's stats of another type": (
        IDENTITY_END,
        with_end(stats=lambda e: e.stats.half()),
        TypeError,
        "^stats: expected .*torch.float32",
    ),
    "z of another shape": (
        IDENTITY_NORMED_END,
        with_norm(lambda z, stats: (z[:, :, 1:].clone(memory_format=NHWC), stats)),
        ValueError,
        r"shortcut.y: expected .*shape \(2, 20, 5, 4\)",
    ),
    "z of another type": (
        SHORTCUT_NORMED_END,
        with_norm(lambda z, stats: (z.float(), stats)),
        TypeError,
        "shortcut.y: expected .*torch.float16",
    ),
    "z in another layout": (
        IDENTITY_NORMED_END,
        with_norm(lambda z, stats: (contiguous(z), stats)),
        ValueError,
        "shortcut.y: .*channels_last",
    ),
    "half of z's stats": (
        IDENTITY_NORMED_END,
        with_norm(lambda z, stats: (z, stats[:2])),
        ValueError,
        r"shortcut.stats: expected a contiguous tensor, shape \(4, 20\)",
    ),
    "z's stats of another type": (
        SHORTCUT_NORMED_END,
        with_norm(lambda z, stats: (z, stats.double())),
        TypeError,
        "shortcut.stats: expected .*torch.float32",
    ),
    "a dweight beside a block's end": (
        IDENTITY_END,
        lambda c: {"dweight": torch.empty(20, device=DEVICE)},
        ValueError,
        "dbias, dconv_bias: only ReluMask",
    ),
    "dilation and a stride": (
        "none",
        lambda c: {
            "shape": replace(c.shape, stride=2, padding=2, dilation=2),
            "dy": draw(2, 17, 3, 2, dtype=torch.float16),
        },
        ValueError,
        "shape: expected stride 1 with dilation 2, got 2",
    ),
    "too many taps": (
        "none",
        lambda c: {
            "shape": replace(c.shape, R=16, padding=8),
            "weight": draw(17, 20, 16, 3, dtype=torch.float16),
            "dy": draw(2, 17, 6, 18, dtype=torch.float16),
        },
        ValueError,
        "weight: 16x3 taps are more than 15",
    ),
}


@pytest.mark.parametrize("epilogue, change, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_before_anything_is_launched(monkeypatch, epilogue, change, error, message):
    monkeypatch.setattr(conv_grad_input, "grad_input_kernel", None)
    case = Case.of(RAGGED, epilogue, torch.float16)
    with pytest.raises(error, match=message):
        launch(case, **change(case))


def test_an_image_too_large_for_offsets_of_32_bits_is_refused():
    shape = ConvShape(N=1, H=8192, W=8192, C=64, K=32, R=3, S=3, stride=1, padding=1)  # 2^32 elements
    dy = torch.empty(1, 32, 8192, 8192, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    weight = torch.empty(32, 64, 3, 3, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="2\\^31 elements"):
        conv_grad_input.conv_grad_input(dy, weight, shape)
