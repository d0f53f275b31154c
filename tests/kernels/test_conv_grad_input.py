"""The grad-input convolution and its epilogues against PyTorch's own, judged in float64.

Interpreted where there is no GPU, compiled where there is one. "Eager" is PyTorch, operator by operator, in the same
type.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnet.kernels import conv_grad_input, tuning
from resnet.kernels.batch_norm_backward_reduce import batch_norm_backward_reduce
from resnet.kernels.conv_grad_input import AddTo, IdentityGrad, KeptMask, ReluMask, ShortcutGrad
from resnet.kernels.host.shapes import ConvShape
from tests.conftest import DEVICE
from tests.helpers import grad_input_cases as cases
from tests.helpers.blocks import DTYPES, HALF, draw, name_of, one_thread, staircase, unwritten_memory_is_nan  # noqa: F401
from tests.helpers.grad_input_cases import EPILOGUES, Case

# Of NaN and Inf on purpose, by the interpreter's NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NHWC = torch.channels_last
RAGGED = ConvShape(N=2, H=5, W=4, C=20, K=17, R=3, S=3, stride=1, padding=1)
POINTWISE = replace(RAGGED, R=1, S=1, padding=0)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: cases.SMALL_TILES)


def same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("shape, epilogue, dtype", cases.pairwise(), ids=cases.name_of_case)
def test_every_pair_of_options_is_as_exact_as_eager(small_tiles, shape, epilogue, dtype):
    cases.assert_parity(shape, epilogue, dtype)


@pytest.mark.parametrize("epilogue", ["mask", "shortcut"])
def test_the_tiles_of_real_launches_leave_ragged_ends_in_every_dimension(epilogue):
    config = tuning.TABLE["grad_input"]["16-bit"][0]
    shape = ConvShape(N=2, H=9, W=8, C=config.BLOCK_N + 8, K=config.BLOCK_K + 8, R=3, S=3, stride=1, padding=1)
    assert shape.N * shape.H * shape.W > config.BLOCK_M
    cases.assert_parity(shape, epilogue, torch.float16)


@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
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
        expected = torch.zeros_like(dx)
        if epilogue == "identity":
            expected = case.epilogue.g
        same_bits(dx[:, :, h::2, w::2], expected[:, :, h::2, w::2])


@pytest.mark.parametrize("tried", [False, True], ids=["launched", "each tile tried before"])
def test_a_shortcut_adds_once_to_the_pixels_that_it_meets_and_to_no_other(small_tiles, tried):
    case = Case.of(replace(RAGGED, R=1, S=1, stride=2, padding=0), "none", torch.float32)
    before = draw(RAGGED.N, RAGGED.C, RAGGED.H, RAGGED.W, seed=9)
    dx = before.clone(memory_format=NHWC)
    with tuning.every_candidate() if tried else nullcontext():
        assert conv_grad_input.conv_grad_input(case.dy, case.weight, case.shape, AddTo(dx)) is dx
    torch.testing.assert_close(dx, before + case.plain(torch.float32)[0])
    for h, w in ((0, 1), (1, 0), (1, 1)):
        same_bits(dx[:, :, h::2, w::2], before[:, :, h::2, w::2])


def test_the_same_bits_come_out_twice_and_results_are_channels_last(small_tiles):
    case = Case.of(replace(RAGGED, stride=2), "mask", torch.float16)
    first, second = case.fused(), case.fused()
    for a, b in zip(first, second, strict=True):
        same_bits(a, b)
    assert first[0].is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
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
    same_bits(g, expected)
    assert 0 < (g == 0).sum() < g.numel()


def test_sums_are_of_the_gradient_as_stored_and_reach_the_parameters(small_tiles):
    case = Case.of(POINTWISE, "mask", torch.float16)
    dweight, dbias = torch.empty(RAGGED.C, device=DEVICE), torch.empty(RAGGED.C, device=DEVICE, dtype=torch.float16)
    g, sums = conv_grad_input.conv_grad_input(
        case.dy, case.weight, case.shape, case.epilogue, dweight=dweight, dbias=dbias
    )
    same_bits(dweight, sums[1])
    same_bits(dbias, sums[0].half())
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
    same_bits(case.fused()[0][at], torch.where(values == -inf, 0, plain[at]))
    case.epilogue = KeptMask(case.epilogue.y1)
    same_bits(case.fused()[0][at], torch.where(values == -inf, 0, plain[at]))


def test_rows_beyond_the_last_pixel_do_not_spoil_the_sums_of_an_infinite_weight(small_tiles):
    """There acc is 0 * weight, which an infinite weight makes NaN."""
    case = Case.of(POINTWISE, "mask", torch.float32)
    case.dy.abs_()
    case.weight.fill_(float("inf"))
    case.epilogue.stats[3].fill_(100)  # all pass
    assert (case.fused()[1] == float("inf")).all()


# ---- what is not computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_an_empty_batch_gives_empty_results_and_zero_sums(epilogue):
    shape = replace(RAGGED, N=0)
    case = Case.of(shape, epilogue, torch.float16)
    dx, *sums = case.fused()
    assert dx.shape == (0, shape.C, shape.H, shape.W) and dx.dtype == torch.float16
    assert len(sums) == (2 if epilogue == "mask" else 0)
    for total in sums:
        same_bits(total, torch.zeros(shape.C, device=DEVICE))


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
