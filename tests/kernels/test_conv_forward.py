"""`kernels/conv_forward.py` against PyTorch's convolution, judged in float64.

Interpreted where there is no GPU, compiled where there is one. Tiles are small, so that small shapes leave ragged ones
in every dimension. "Eager" is PyTorch in the type of the accumulator, rounded once to the stored type.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from resnet.kernels import conv_forward as kernels
from resnet.kernels import tuning
from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_finalize import batch_norm_finalize
from resnet.kernels.conv_forward import Frozen, Moments, Shortcut
from resnet.kernels.host.arguments import check_span
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, SIXTEEN_BIT, draw, name_of, staircase, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.convolutions import EPILOGUES, EPS, Case
from tests.helpers.pairs import pairwise
from tests.helpers.parity import assert_as_exact_as_eager

TILE = tuning.Config(BLOCK_M=32, BLOCK_N=16, BLOCK_K=32, num_warps=4, num_stages=2)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: (TILE,))


def assert_parity(case: Case) -> None:
    out = case.run()
    sides = ((out.y, out.shortcut), case.reference(exact=False), case.reference(exact=True))
    for name, *values in zip(("y", "shortcut"), *sides):
        if values[0] is not None:
            assert values[0].is_contiguous(memory_format=torch.channels_last)
            assert_as_exact_as_eager(name, *([v] for v in values))
    for moments, y in ((out.moments, out.y), (out.shortcut_moments, out.shortcut)):
        if moments is not None:
            assert_statistics_of(y, moments)


def assert_statistics_of(y: Tensor, moments: Moments) -> None:
    """The merged moments are mean and invstd of y as stored, as far as the type of the statistics goes."""
    eps = torch.finfo(moments.partial.dtype).eps
    mean, invstd, *_ = batch_norm_finalize(
        moments.partial, moments.rows, y.numel() // y.shape[1], None, None, None, None, 0.1, EPS
    )
    values = y.double()
    exact = values.mean((0, 2, 3)), 1 / torch.sqrt(values.var((0, 2, 3), unbiased=False) + EPS)
    torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=8 * eps * values.abs().max().item())
    # tiles' means are rounded in proportion to their size; a variance that cancels would be wrong by its square
    far = (values.abs().amax((0, 2, 3)) * exact[1]).max().item()
    torch.testing.assert_close(invstd.double(), exact[1], rtol=(32 + far) * eps, atol=0)


# ---- parity --------------------------------------------------------------------------------------------------------

PADDINGS = {"none": lambda R: 0, "same": lambda R: R // 2, "more": lambda R: R // 2 + 1}
# A shortcut needs its pixel in the middle of the window, and some dilated windows need more pixels than there are.
FORBIDDEN = [(("epilogue", "shortcut"), ("padding", padding)) for padding in ("none", "more")]
FORBIDDEN.append((("dilation", 2), ("padding", "none")))
PAIRS = pairwise(
    *FORBIDDEN,
    dtype=(*DTYPES, "tf32"),
    epilogue=tuple(EPILOGUES),
    C=(1, 3, 6, 64, 100),
    K=(1, 16, 20),
    R=(1, 3, 7),
    stride=(1, 2, 3),
    padding=tuple(PADDINGS),
    dilation=(1, 2),
    prologue=(False, True),
)


@pytest.mark.core
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: ",".join(name_of(value) for value in pair.values()))
def test_as_exact_as_eager_with_any_two_options(pair):
    tf32 = pair["dtype"] == "tf32"
    assert_parity(
        Case.of(
            (2, pair["C"], 7, 8),
            pair["K"],
            pair["R"],
            pair["stride"],
            PADDINGS[pair["padding"]](pair["R"]) * pair["dilation"],
            torch.float32 if tf32 else pair["dtype"],
            dilation=pair["dilation"],
            tf32=tf32,
            prologue=pair["prologue"],
            **EPILOGUES[pair["epilogue"]],
        )
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 5, 16, 33)), st.integers(1, 6), st.integers(1, 6)),
    K=st.integers(1, 18),
    R=st.sampled_from((1, 2, 3, 5)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    prologue=st.booleans(),
    epilogue=st.sampled_from([name for name in EPILOGUES if name != "shortcut"]),
)
def test_as_exact_as_eager_for_drawn_shapes(shape, K, R, stride, padding, dilation, dtype, prologue, epilogue):
    padding = max(padding, math.ceil((dilation * (R - 1) + 1 - min(shape[2:])) / 2))
    options = {"dilation": dilation, "prologue": prologue, **EPILOGUES[epilogue]}
    assert_parity(Case.of(shape, K, R, stride, padding, dtype, **options))


def test_a_block_without_options_on_its_convolution_or_its_norm():
    """No weight, bias or convolution's bias of a frozen BatchNorm, no bias of a shortcut."""
    case = Case.of((1, 6, 4, 5), 5, 3, 2, 1, torch.float32, frozen=True, shortcut=True)
    frozen, shortcut = case.options["frozen"], case.options["shortcut"]
    ones, zeros = torch.ones_like(frozen.weight), torch.zeros_like(frozen.bias)
    bare = case.run(
        frozen=Frozen(frozen.running_mean, frozen.running_var, None, None, None, EPS),
        shortcut=Shortcut(shortcut.weight, None),
    )
    full = case.run(
        frozen=Frozen(frozen.running_mean, frozen.running_var, ones, zeros, zeros, EPS),
        shortcut=Shortcut(shortcut.weight, zeros),
    )
    torch.testing.assert_close(bare.y, full.y, rtol=0, atol=0)
    torch.testing.assert_close(bare.shortcut, full.shortcut, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_long_reduction_is_accumulated_in_float32(dtype):
    C = 544
    x = torch.ones(1, C, 3, 3, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = staircase(C, dtype).expand(4, C).reshape(4, C, 1, 1).contiguous(memory_format=torch.channels_last)
    y = kernels.conv_forward(x, weight, 1, 0).y
    assert torch.equal(y, weight.double().sum(1, keepdim=True).transpose(0, 1).expand(y.shape).to(dtype))


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
def test_statistics_of_values_far_from_zero_do_not_cancel(dtype):
    """A mean of 1000 and a standard deviation of about 1."""
    case = Case.of((3, 20, 6, 7), 20, 3, 1, 1, dtype, bias=True, shortcut=True, moments=True)
    thousand = torch.full_like(case.options["bias"], 1000)
    out = case.run(bias=thousand, shortcut=Shortcut(case.options["shortcut"].weight, thousand))
    assert_statistics_of(out.y, out.moments)
    assert_statistics_of(out.shortcut, out.shortcut_moments)


def test_moments_are_of_the_values_as_stored():
    """A value that rounding moves counts as what it became: with steps of 1 at 1024 to 2048, all of them integers."""
    case = Case.of((2, 6, 5, 5), 4, 3, 1, 1, torch.float16, bias=True, moments=True)
    out = case.run(bias=torch.full_like(case.options["bias"], 1500))
    first = out.y.permute(0, 2, 3, 1).reshape(-1, 4)[: out.moments.rows].double()
    assert (first == first.round()).all()
    torch.testing.assert_close(out.moments.partial[0, 0].double(), first.mean(0), rtol=2**-22, atol=0)


# ---- the prologue --------------------------------------------------------------------------------------------------


@per_dtype
@pytest.mark.parametrize("C", (6, 16, 40))
def test_prologue_is_bit_equal_to_a_launch_on_the_activation(dtype, C):
    case = Case.of((2, C, 5, 6), 18, 3, 1, 1, dtype, prologue=True, moments=True)
    a = batch_norm_add_relu(case.x, case.options["stats"])
    stats = None
    if C < 16:  # without a prologue few channels are reduced over the flattened axis, in another order
        stats = torch.zeros_like(case.options["stats"])
        stats[2] = 1
    plain = kernels.conv_forward(a, case.weight, 1, 1, stats=stats, moments=True)
    fused = case.run()
    torch.testing.assert_close(fused.y, plain.y, rtol=0, atol=0)
    torch.testing.assert_close(fused.moments.partial, plain.moments.partial, rtol=0, atol=0)


@pytest.mark.parametrize("C", (3, 32))
def test_padding_is_zero_after_the_prologue(C):
    """Not relu(shift): with an activation of 1 everywhere and weights of 1 a pixel of y counts its window's pixels."""
    x = draw(1, C, 4, 5)
    stats = torch.zeros(4, C, device=DEVICE)
    stats[3] = 1
    weight = torch.ones(1, C, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = kernels.conv_forward(x, weight, 1, 2, stats=stats).y
    assert torch.equal(y, F.conv2d(torch.ones_like(x), weight, None, 1, 2))


def test_shortcut_reads_the_input_and_not_the_activation():
    case = Case.of((2, 20, 5, 6), 18, 3, 2, 1, torch.float32, shortcut=True)
    stats = draw(4, 20, seed=9)
    torch.testing.assert_close(case.run(stats=stats).shortcut, case.run().shortcut, rtol=0, atol=0)


# ---- special values ------------------------------------------------------------------------------------------------

SPECIAL = (float("nan"), float("inf"), -float("inf"))


@per_dtype
@pytest.mark.parametrize("prologue", (False, True), ids=("plain", "prologue"))
@pytest.mark.parametrize("C", (2, 20))
def test_nan_and_infinities_pass_as_through_torch_relu(dtype, prologue, C):
    x = draw(3, C, 3, 3, dtype=dtype)
    for image, value in enumerate(SPECIAL):
        x[image, 1, 1, 1] = value
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.zeros(2, C, 1, 1, dtype=dtype, device=DEVICE)
    weight[:, 1] = torch.tensor([1, -1]).view(2, 1, 1)
    weight = weight.contiguous(memory_format=torch.channels_last)
    stats = torch.tensor([0, 1, 1, 0], dtype=acc, device=DEVICE).view(4, 1).repeat(1, C)
    y = kernels.conv_forward(x, weight, 1, 0, stats=stats if prologue else None, relu=True).y
    a = torch.relu(x) if prologue else x
    expected = torch.relu(torch.stack([a[:, 1], -a[:, 1]], 1))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_what_lies_in_padding_and_beyond_the_tile_reaches_nothing():
    """NaN in every pixel of the other image: a zero weight times it would show."""
    case = Case.of((2, 20, 3, 3), 5, 3, 1, 1, torch.float32, prologue=True, moments=True)
    expected = case.run().y[:1]
    case.x[1] = float("nan")
    y = case.run().y
    torch.testing.assert_close(y[:1], expected, rtol=0, atol=0)
    assert y[1].isnan().all()


# ---- determinism, empty batch --------------------------------------------------------------------------------------


def test_the_same_bits_twice():
    case = Case.of((2, 20, 5, 6), 18, 3, 2, 1, torch.float16, prologue=True, moments=True, shortcut=True)
    a, b = case.run(), case.run()
    pairs = [(a.y, b.y), (a.shortcut, b.shortcut), (a.moments.partial, b.moments.partial)]
    for first, second in [*pairs, (a.shortcut_moments.partial, b.shortcut_moments.partial)]:
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_an_empty_batch_gives_an_empty_result():
    case = Case.of((0, 6, 5, 6), 4, 3, 2, 1, torch.float32, moments=True, shortcut=True)
    out = case.run()
    assert out.y.shape == out.shortcut.shape == (0, 4, 3, 3)
    assert out.moments.partial.shape == out.shortcut_moments.partial.shape == (3, 0, 4)


# ---- bad input -----------------------------------------------------------------------------------------------------

X, WEIGHT = (2, 6, 5, 5), (4, 6, 3, 3)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "x has three dimensions": ({"x": lambda: zeros(6, 5, 5)}, ValueError, r"^x: expected a dense channels_last"),
    "x is NCHW": ({"x": lambda: zeros(*X)}, ValueError, r"^x: expected a dense channels_last"),
    "x is not floating": ({"x": lambda: channels_last(*X, dtype=torch.int32)}, TypeError, r"^x: expected float16, "),
    "weight is NCHW": ({"weight": lambda: zeros(*WEIGHT)}, ValueError, r"^weight: expected a dense channels_last"),
    "weight of another type": (
        {"weight": lambda: channels_last(*WEIGHT, dtype=torch.float16)},
        TypeError,
        r"^weight: expected .*torch.float32 on .*; got .*torch.float16",
    ),
    "weight of other channels": (
        {"weight": lambda: channels_last(4, 5, 3, 3)},
        ValueError,
        r"^weight: expected 6 input channels",
    ),
    "window larger than x": ({"weight": lambda: channels_last(4, 6, 9, 9)}, ValueError, r"^x: 5x5 pixels are fewer"),
    "more taps than bits": (
        {"x": lambda: channels_last(1, 16, 9, 9), "weight": lambda: channels_last(4, 16, 8, 8)},
        ValueError,
        r"^weight: expected a window of at most 63 pixels .*, got 8x8",
    ),
    "stride 0": ({"stride": lambda: 0}, ValueError, r"^stride: expected at least 1, got 0"),
    "negative padding": ({"padding": lambda: -1}, ValueError, r"^padding: expected at least 0, got -1"),
    "dilation 0": ({"dilation": lambda: 0}, ValueError, r"^dilation: expected at least 1, got 0"),
    "fewer pixels than a dilated window": (
        {"dilation": lambda: 9},
        ValueError,
        r"^x: 5x5 pixels are fewer than a 3x3 kernel with padding 1, dilation 9 needs",
    ),
    "taps too far apart": (
        {"dilation": lambda: 10**7, "padding": lambda: 10**7},
        ValueError,
        r"^dilation: 10000000 is too large for 32-bit offsets",
    ),
    "stats of another shape": ({"stats": lambda: zeros(4, 5)}, ValueError, r"^stats: expected .* \(4, 6\)"),
    "stats of another type": (
        {"stats": lambda: zeros(4, 6, dtype=torch.float64)},
        TypeError,
        r"^stats: expected .*torch.float32",
    ),
    "bias of another length": (
        {"bias": lambda: zeros(5)},
        ValueError,
        r"^bias: expected a contiguous tensor, shape \(4,\)",
    ),
    "bias is not floating": ({"bias": lambda: zeros(4, dtype=torch.int64)}, TypeError, r"^bias: expected a floating"),
    "running_var of another length": (
        {"frozen": lambda: Frozen(zeros(4), zeros(1), None, None, None, EPS)},
        ValueError,
        r"^running_var: expected a contiguous tensor, shape \(4,\)",
    ),
    "conv_bias of another length": (
        {"frozen": lambda: Frozen(zeros(4), zeros(4), None, None, zeros(3), EPS)},
        ValueError,
        r"^conv_bias: expected a contiguous tensor, shape \(4,\)",
    ),
    "skip of another shape": (
        {"skip": lambda: channels_last(2, 4, 4, 5)},
        ValueError,
        r"^skip: expected .*shape \(2, 4, 5, 5\)",
    ),
    "skip of another type": (
        {"skip": lambda: channels_last(2, 4, 5, 5, dtype=torch.float64)},
        TypeError,
        r"^skip: expected .*torch.float32",
    ),
    "shortcut of another window": (
        {"shortcut": lambda: Shortcut(channels_last(4, 6, 3, 3), None)},
        ValueError,
        r"^shortcut.weight: expected .*shape \(4, 6, 1, 1\)",
    ),
    "shortcut's bias of another length": (
        {"shortcut": lambda: Shortcut(channels_last(4, 6, 1, 1), zeros(5))},
        ValueError,
        r"^shortcut.bias: expected a contiguous tensor, shape \(4,\)",
    ),
    "shortcut beside its window's centre": (
        {"shortcut": lambda: Shortcut(channels_last(4, 6, 1, 1), None), "padding": lambda: 0},
        ValueError,
        r"^shortcut: expected a window with its centre at the padding, that is 1 wide, got 3x3",
    ),
    "shortcut beside a dilated window's centre": (
        {"shortcut": lambda: Shortcut(channels_last(4, 6, 1, 1), None), "dilation": lambda: 2, "padding": lambda: 1},
        ValueError,
        r"^shortcut: expected .* that is 3 wide, got 3x3 with dilation 2",
    ),
    "statistics of no shortcut": (
        {"shortcut_moments": lambda: True},
        ValueError,
        r"^shortcut_moments: expected a shortcut",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(changes, error, message):
    arguments = {"x": channels_last(*X), "weight": channels_last(*WEIGHT), "stride": 1, "padding": 1}
    arguments |= {name: make() for name, make in changes.items()}
    with pytest.raises(error, match=message):
        kernels.conv_forward(**arguments)


def test_tiles_that_span_2_to_the_31_elements_are_refused():
    """Two images of 2^30 elements, which one tile reaches; the images themselves are never made."""
    x = torch.empty(1, device=DEVICE).expand(2, 2**15, 2**15, 1).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="span less than 2\\^31 elements, got 1073741824 elements an image"):
        check_span(x[0].numel(), 4, x.shape[0], TILE.BLOCK_M)
    check_span(x[0].numel() - 1, 4, x.shape[0], TILE.BLOCK_M)
