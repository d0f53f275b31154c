"""The matrix products for small maps are the same convolution as PyTorch's, forward and backward."""

import pytest
import torch
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from resnet.torch_backend import convolution
from resnet.torch_backend.convolution import KEEP_UP, convolve, convolve_backward, limits, products
from tests.helpers.parity import assert_as_exact_as_eager


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"], autouse=True)
def library(request, monkeypatch):
    """Whose products stand in for convolutions, as on a CPU where they are fast."""
    monkeypatch.setattr(convolution, "limits", lambda: KEEP_UP._replace(by_onednn=request.param))


# N, C, K, H, W, R, stride, padding
SMALL = {
    "last stage": (4, 512, 512, 3, 3, 3, 1, 1),
    "into the last stage": (4, 256, 512, 4, 4, 3, 2, 1),
    "odd and stride 2": (4, 512, 512, 7, 5, 3, 2, 1),
    "one pixel": (4, 256, 272, 1, 1, 3, 1, 1),
    "no padding": (5, 512, 512, 5, 4, 3, 1, 0),
    "5x5 kernel": (4, 256, 256, 2, 2, 5, 1, 2),
}
MOSTLY_WEIGHT = {  # forward
    "one image": (1, 256, 512, 7, 7, 3, 1, 1),
    "two images, stride 2": (2, 272, 512, 13, 11, 3, 2, 1),
}
GRAD_WEIGHT = {
    "few pixels": (4, 256, 256, 6, 6, 3, 1, 1),
    "few pixels, stride 2": (4, 256, 272, 13, 11, 3, 2, 1),
    "many pixels": (16, 256, 256, 6, 6, 3, 1, 1),
}
PLAIN = {
    "1x1 kernel, few pixels": (4, 128, 64, 6, 5, 1, 1, 0),
    "1x1 kernel, stride 2": (4, 128, 64, 6, 5, 1, 2, 0),
    "1x1 kernel, many pixels": (9, 64, 128, 12, 11, 1, 1, 0),
}
GATHERED = {
    "1x1 kernel, stride 2, many pixels": (32, 64, 128, 13, 12, 1, 2, 0),
    "1x1 kernel, stride 3, few channels": (4, 16, 24, 10, 9, 1, 3, 0),
}
OTHER = {
    "large maps": (4, 256, 256, 9, 9, 3, 1, 1),
    "few channels": (4, 128, 128, 3, 3, 3, 1, 1),
    "few images": (3, 512, 512, 3, 3, 3, 1, 1),
    "1x1 kernel, padding": (4, 512, 512, 4, 4, 1, 1, 1),
}


def _draw(N, C, K, H, W, R, stride, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, H, W, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(K, C, R, R, generator=generator).contiguous(memory_format=torch.channels_last) / (C * R)
    dy = torch.randn(conv2d(x, weight, None, stride, padding).shape, generator=generator)
    return x, weight, torch.randn(K, generator=generator), dy.contiguous(memory_format=torch.channels_last)


def _reference(x, weight, bias, dy, stride, padding):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = conv2d(x, weight, bias, stride, padding)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


class GradsAsked(TorchDispatchMode):
    """Records which gradients PyTorch's `convolution_backward` is asked for (x, weight, bias), and its x's shape."""

    def __init__(self):
        super().__init__()
        self.masks: list[list[bool]] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
            self.shapes.append(tuple(args[1].shape))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "shape",
    [*SMALL.values(), *MOSTLY_WEIGHT.values(), *GRAD_WEIGHT.values(), *PLAIN.values()],
    ids=[*SMALL, *MOSTLY_WEIGHT, *GRAD_WEIGHT, *PLAIN],
)
def test_products_in_place_of_convolutions_are_as_exact_as_pytorch(shape):
    *_, stride, padding = shape
    small, mostly_weight = shape in SMALL.values(), shape in MOSTLY_WEIGHT.values()
    few_plain = shape in PLAIN.values() and shape != PLAIN["1x1 kernel, many pixels"]
    results = []
    for seed in range(3):
        x, weight, bias, dy = _draw(*shape, seed=seed)
        own = products(x, weight, (stride, padding, 1))
        assert (own.small, own.windows, own.plain) == (small, mostly_weight, few_plain)
        y = convolve(x, weight, bias, (stride, padding, 1))
        with GradsAsked() as asked:
            fused = (y, *convolve_backward(dy, x, weight, (stride, padding, 1), True, True))
        assert asked.masks == [[not (small or own.plain), mostly_weight, False]]
        exact = _reference(*(t.double() for t in (x, weight, bias, dy)), stride, padding)
        results.append((fused, _reference(x, weight, bias, dy, stride, padding), exact))
    for i, name in enumerate(("y", "dx", "dweight")):
        assert_as_exact_as_eager(name, *([draw[j][i] for draw in results] for j in range(3)))
        assert all(draw[0][i].is_contiguous(memory_format=torch.channels_last) for draw in results), name


@pytest.mark.parametrize("shape", GATHERED.values(), ids=GATHERED)
def test_a_strided_1x1_kernel_convolves_the_pixels_that_it_meets_alone(shape):
    *_, stride, padding = shape
    geometry = stride, padding, 1
    results = []
    for seed in range(3):
        x, weight, bias, dy = _draw(*shape, seed=seed)
        with GradsAsked() as asked:
            fused = (convolve(x, weight, bias, geometry), *convolve_backward(dy, x, weight, geometry, True, True))
        assert asked.shapes == [x.shape, (*x.shape[:2], *dy.shape[2:])]
        assert asked.masks[1] == [True, False, False]
        exact = _reference(*(t.double() for t in (x, weight, bias, dy)), stride, padding)
        results.append((fused, _reference(x, weight, bias, dy, stride, padding), exact))
    for i, name in enumerate(("y", "dx", "dweight")):
        assert_as_exact_as_eager(name, *([draw[j][i] for draw in results] for j in range(3)))
        assert all(draw[0][i].is_contiguous(memory_format=torch.channels_last) for draw in results), name


ADDED = {**SMALL, **PLAIN, **GATHERED, **OTHER}


@pytest.mark.parametrize("shape", ADDED.values(), ids=ADDED)
def test_grad_input_may_be_added_to_another_gradient(shape):
    *_, stride, padding = shape
    x, weight, _, dy = _draw(*shape, seed=0)
    other = torch.randn_like(x)
    expected = (
        other.double() + _reference(*(t.double() for t in (x, weight, weight[:, 0, 0, 0], dy)), stride, padding)[1]
    )
    dx, dweight = convolve_backward(dy, x, weight, (stride, padding, 1), True, False, other)
    assert dx is other and dweight is None
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-5)
    assert convolve_backward(dy, x, weight, (stride, padding, 1), False, True, other)[0] is None
    torch.testing.assert_close(other.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [*SMALL.values(), *MOSTLY_WEIGHT.values()], ids=[*SMALL, *MOSTLY_WEIGHT])
def test_an_infinite_weight_meets_no_padding(shape):
    *_, stride, padding = shape
    x, weight, bias, _ = _draw(*shape, seed=0)
    x = x.abs() + 0.1
    weight[1, 2, 0, 0] = 0.0
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), stride, padding).float()
    tap = torch.zeros_like(weight[:1, :1])
    tap[..., 0, 0] = 1.0
    meets = torch.conv2d(torch.ones_like(x[:, :1]), tap, None, stride, padding) > 0
    expected[:, 1:2][meets] = torch.inf
    weight[1, 2, 0, 0] = torch.inf
    got, pytorchs = convolve(x, weight, bias, (stride, padding, 1)), torch.conv2d(x, weight, bias, stride, padding)
    expected[got.isnan() & pytorchs.isnan()] = torch.nan  # some of oneDNN's convolutions multiply padding, too
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("shape", OTHER.values(), ids=OTHER)
def test_large_maps_few_channels_few_images_and_1x1_kernels_are_pytorchs_convolution(shape):
    *_, stride, padding = shape
    x, weight, bias, dy = _draw(*shape, seed=0)
    assert not any(products(x, weight, (stride, padding, 1)))
    y, dx, dweight = _reference(x, weight, bias, dy, stride, padding)
    assert torch.equal(convolve(x, weight, bias, (stride, padding, 1)), y)
    got = convolve_backward(dy, x, weight, (stride, padding, 1), True, True)
    assert torch.allclose(got[0], dx, atol=1e-6) and torch.allclose(got[1], dweight, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("C", [1, 3, 4, 7, 8, 15], ids="{} channels".format)
def test_the_grad_weight_of_a_strided_1x1_kernel_on_few_channels_is_not_onednns(C, dtype):
    """oneDNN's writes past the end of a buffer."""
    x, weight, _, dy = (t.to(dtype) for t in _draw(2, C, 6, 6, 6, 1, 2, 0, seed=0))
    exact = _reference(*(t.double() for t in (x, weight, torch.zeros(6), dy)), 2, 0)
    with GradsAsked() as asked:
        got = convolve_backward(dy, x, weight, (2, 0, 1), True, True)
    assert asked.masks == [[True, False, False]]
    error = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for grad, expected in zip(got, exact[1:]):
        assert grad.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(grad.double(), expected, rtol=error, atol=error)


def test_a_gradient_that_nobody_needs_is_none():
    x, weight, _, dy = _draw(*SMALL["last stage"], seed=0)
    assert convolve_backward(dy, x, weight, (1, 1, 1), False, True)[0] is None
    assert convolve_backward(dy, x, weight, (1, 1, 1), True, False)[1] is None


def test_an_nchw_weight_gives_the_same_bits():
    x, weight, bias, _ = _draw(*SMALL["last stage"], seed=0)
    assert torch.equal(convolve(x, weight.contiguous(), bias, (1, 1, 1)), convolve(x, weight, bias, (1, 1, 1)))


def test_a_small_float64_map_is_pytorchs_convolution():
    x, weight, *_ = _draw(*SMALL["last stage"], seed=0)
    assert not any(products(x.double(), weight.double(), (1, 1, 1)))


# By CPU: its name, what it can do, up to how many pixels of an output map products per tap are faster, for the output
# and for grad-weight, and whose products.
CPUS = {
    "MKL keeps up": ("Intel(R) Xeon(R) Platinum 8488C", {"avx_vnni"}, 16, 64, "MKL"),
    "MKL is about even": ("AMD EPYC 9354", set(), 4, 16, "MKL"),
    "MKL lags": ("AMD EPYC 9355", {"avx_vnni", "avx512_vp2intersect"}, 16, 9, "oneDNN"),
}


class Linears(TorchDispatchMode):
    """Counts oneDNN's products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name() == "mkldnn::_linear_pointwise"
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def on_cpu(monkeypatch):
    """A function that has the limits be those of a CPU with AVX-512, by its name and what it can do."""

    def choose(name, features):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, **dict.fromkeys(features, True)})
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr(convolution, "_limits_of_cpu", convolution._limits_of_cpu.__wrapped__)
        monkeypatch.setattr(convolution, "limits", limits)

    return choose


def _draw_square(N, size, window=3):
    return _draw(N, 512, 512, size, size, window, 1, window // 2, seed=0)


@pytest.mark.parametrize("cpu", CPUS)
def test_what_becomes_products_depends_on_whose_are_fast_on_the_cpu(on_cpu, cpu):
    name, features, pixels, grad_weight_pixels, whose = CPUS[cpu]
    on_cpu(name, features)
    for size in (2, 3, 4, 8):
        x, weight, _, dy = _draw_square(4, size)
        assert products(x, weight, (1, 1, 1)).small == (size**2 <= pixels)
        with GradsAsked() as asked, Linears() as linears:
            convolve_backward(dy, x, weight, (1, 1, 1), False, True)
        assert asked.masks == [[False, size**2 > grad_weight_pixels, False]]
        assert linears.count == (9 if size**2 <= grad_weight_pixels and whose == "oneDNN" else 0)
    assert products(*_draw_square(1, 7)[:2], (1, 1, 1)).windows == (pixels == 16)
    assert products(*_draw_square(1, 7, window=1)[:2], (1, 0, 1)).plain


def test_onednns_product_is_taken_with_the_arguments_that_are_known():
    assert convolution._onednns_product() is torch.ops.mkldnn._linear_pointwise.default
    with torch.library._scoped_library("mkldnn", "FRAGMENT") as library:
        library.define("_linear_pointwise_of_another_release(Tensor X, Tensor W) -> Tensor")
        other = torch.ops.mkldnn._linear_pointwise_of_another_release
        with pytest.MonkeyPatch.context() as changes:
            changes.setattr(torch.ops.mkldnn, "_linear_pointwise", other)
            assert convolution._onednns_product() is None


def test_without_onednns_product_few_maps_are_products_where_mkl_lags(on_cpu, monkeypatch):
    on_cpu(*CPUS["MKL lags"][:2])
    monkeypatch.setattr(convolution, "_linear", None)
    assert products(*_draw_square(4, 2)[:2], (1, 1, 1)).small
    assert not any(products(*_draw_square(4, 3)[:2], (1, 1, 1)))
    assert not any(products(*_draw_square(1, 7, window=1)[:2], (1, 0, 1)))


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("cpu", CPUS)
def test_nothing_becomes_a_product_where_products_may_take_fewer_digits(on_cpu, cpu, precision):
    on_cpu(*CPUS[cpu][:2])
    few_maps, one_image, pixels = (_draw_square(*size)[:2] for size in ((4, 2), (1, 7), (1, 7, 1)))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert not any(products(*few_maps, (1, 1, 1)) + products(*one_image, (1, 1, 1)) + products(*pixels, (1, 0, 1)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert products(*few_maps, (1, 1, 1)).small and products(*pixels, (1, 0, 1)).plain


def test_grad_weight_of_a_1x1_kernel_is_onednns_product_where_it_copies_little(on_cpu):
    on_cpu(*CPUS["MKL lags"][:2])
    x, (narrow, wide) = torch.zeros(32, 256, 6, 6), (torch.zeros(K, 256, 1, 1) for K in (256, 1024))
    assert products(x, narrow, (1, 0, 1)).grad_weight and not products(x, wide, (1, 0, 1)).grad_weight
    assert products(x[:8], wide, (1, 0, 1)).grad_weight
