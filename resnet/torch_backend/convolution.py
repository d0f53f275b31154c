"""The convolutions around the fused operations: PyTorch's own, except for small maps on the CPU and where it is unsafe.

oneDNN's direct convolution is slow where a map has few pixels and many channels: at 3x3 pixels (ResNet-18's last stage
at 96x96) 32 of its 81 products of a pixel and a tap meet padding. There the convolution is one matrix product per tap,
over the pixels whose tap lies within the map. Where a batch has few pixels altogether, oneDNN spends its time on
bringing the weight into its own layout. There one product of all windows takes the weight as it is. oneDNN's
grad-weight is slow on larger maps too. A 1x1 convolution is one product without any of this. A strided one meets a
quarter of the pixels: oneDNN writes the gradient of all of them, and takes longer for the output, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet.operands import POINTWISE, Geometry

Size = Sequence[int | torch.SymInt]

# Products are faster than oneDNN's convolution, as measured at batches of 1 to 128 with 2 threads, from so many on:
_IMAGES, _CHANNELS, _WINDOW_CHANNELS, _PLAIN_CHANNELS = 4, 256, 512, 64
_WEIGHTS = 1 << 14  # of a tap, for each pixel
_OVERRUN = 16  # channels from which on `overruns` is false


class Limits(NamedTuple):
    """Up to where a CPU's matrix products are faster than its convolutions."""

    pixels: int  # of an output map: one product per tap for the output and for dx
    grad_weight_pixels: int
    rows: range  # of a batch's output pixels: one product of all windows
    plain_pixels: int  # of a batch: a 1x1 convolution's output and dx
    plain_grad_weight_pixels: int
    many_rows: bool  # any number of pixels of a stem of one channel, and of a shortcut that is added
    by_onednn: bool = False  # the products are oneDNN's, not MKL's


# oneDNN uses AVX-512 where a CPU has it. MKL does on Intel's; on AMD's it stays with AVX2. Zen 4 computes AVX-512 in
# two halves, so there the two are about even. From Zen 5 on AVX2 has half the speed, and products are oneDNN's, too.
KEEP_UP = Limits(
    pixels=16,
    grad_weight_pixels=64,
    rows=range(32, 257),
    plain_pixels=1152,
    plain_grad_weight_pixels=sys.maxsize,
    many_rows=True,
)
ABOUT_EVEN = Limits(
    pixels=4, grad_weight_pixels=16, rows=range(0), plain_pixels=576, plain_grad_weight_pixels=1152, many_rows=True
)
LAG = Limits(pixels=4, grad_weight_pixels=4, rows=range(0), plain_pixels=0, plain_grad_weight_pixels=0, many_rows=False)
NO_PRODUCTS = LAG._replace(pixels=0, grad_weight_pixels=0)
BY_ONEDNN = Limits(
    pixels=16,
    grad_weight_pixels=9,
    rows=range(1, 129),
    plain_pixels=1152,
    plain_grad_weight_pixels=1152,
    many_rows=False,
    by_onednn=True,
)


def _onednns_product() -> Callable[..., Tensor] | None:
    """PyTorch's operator, about which it promises nothing: None where it has none with these arguments."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    arguments = [] if operator is None else [argument.name for argument in operator.default._schema.arguments]
    return operator.default if arguments == ["X", "W", "B", "attr", "scalars", "algorithm"] else None


_linear = _onednns_product()


def out_size(size: int | torch.SymInt, kernel: int, stride: int, padding: int, dilation: int = 1) -> int | torch.SymInt:
    """Pixels along one axis of the output of a convolution or of a pool."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def out_map(x: Size, weight: Size, geometry: Geometry) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """(P, Q), the pixels of an output map of the convolution of shapes x (N, C, H, W) and weight (K, C, R, S)."""
    (_, _, H, W), (_, _, R, S) = x, weight
    return out_size(H, R, *geometry), out_size(W, S, *geometry)


def chain_shapes(x: Size, units: Iterable[tuple]) -> list[tuple]:
    """(N, K, P, Q) of each convolution of a chain that begins at x; a unit's first fields are those of a `Unit`."""
    shapes = []
    for weight, geometry, *_ in units:
        x = (x[0], weight.shape[0], *out_map(x, weight.shape, geometry))
        shapes.append(x)
    return shapes


def is_single_on_cpu(x: Tensor) -> bool:
    """Whether x is float32 on the CPU, where this module replaces some of PyTorch's convolutions."""
    return x.is_cpu and x.dtype == torch.float32


class Products(NamedTuple):
    """Which parts of a convolution oneDNN's convolution of x does not do, but products, or one of gathered pixels."""

    plain: bool = False  # the output and dx, as one product of pixels and weight
    small: bool = False  # the output and dx, as one product per tap
    windows: bool = False  # the output, as one product of all windows
    grad_weight: bool = False
    gathered: bool = False  # of a strided 1x1 window: the output and dx, by the pixels of x that it meets and no others


_NONE, _SAFER = Products(), Products(grad_weight=True)


def products(x: Tensor, weight: Tensor, geometry: Geometry) -> Products:
    """What is faster, or safer, than oneDNN's convolution of x."""
    if is_single_on_cpu(x):
        return _products(x.shape, weight.shape, geometry, limits())
    if overruns(x, weight.shape, geometry[0]) and geometry[2] == 1:
        return _SAFER
    return _NONE


def limits() -> Limits:
    """This CPU's; NO_PRODUCTS where PyTorch may compute float32 products, but not convolutions, less exactly."""
    exact = torch._C._get_fp32_precision_getter("mkldnn", "matmul") in ("none", "ieee")  # torch.backends takes 5 calls
    return _limits_of_cpu() if exact else NO_PRODUCTS


@cache
def _limits_of_cpu() -> Limits:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return KEEP_UP
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases have none
    if "AMD" not in capabilities.get("cpu_name", ""):
        return KEEP_UP
    since_zen_5 = "avx_vnni", "avx512_vp2intersect"
    if not any(map(capabilities.get, since_zen_5)):
        return ABOUT_EVEN
    return LAG if _linear is None else BY_ONEDNN


@lru_cache(1024)
def _products(x: torch.Size, weight: torch.Size, geometry: Geometry, most: Limits) -> Products:
    """`products` by shapes: every call asks, and Python that has left the cache is slow."""
    N, (K, C, R, S), (stride, padding, dilation) = x[0], weight, geometry
    if dilation > 1 or x[1] > C:
        return _NONE
    P, Q = out_map(x, weight, geometry)
    if R == S == 1:
        pixels, gathered = N * P * Q, stride > 1 and padding == 0 and N >= _IMAGES
        if padding > 0 or min(C, K) < _PLAIN_CHANNELS:
            return Products(grad_weight=stride > 1 and C < _OVERRUN, gathered=gathered)
        plain = pixels <= most.plain_pixels
        wide = K // C if most.by_onednn and K > C else 1  # oneDNN copies what has the K channels
        grad_weight = pixels * wide <= most.plain_grad_weight_pixels
        return Products(plain, grad_weight=grad_weight, gathered=gathered and not plain)
    if min(C, K) < _CHANNELS:
        return _NONE
    small = N >= _IMAGES and most.pixels >= P * Q and P * Q * _WEIGHTS <= C * K
    windows = not small and N * P * Q in most.rows and K >= _WINDOW_CHANNELS
    return Products(small=small, windows=windows, grad_weight=N >= _IMAGES and most.grad_weight_pixels >= P * Q)


def overruns(x: Tensor, weight: Size, stride: int) -> bool:
    """Whether PyTorch's grad-weight of x and a weight (K, C, R, S) may write past the end of a buffer of its own.

    oneDNN (torch 2.13 and 2.14) does so for a strided 1x1 convolution of fewer channels than a vector has, 16 with
    AVX-512 and 8 with AVX2: it gathers the strided pixels in whole vectors. Eager PyTorch in channels_last corrupts its
    heap there.
    """
    _, C, R, S = weight
    gathers = stride > 1 and R == S == 1 and C < _OVERRUN and x.shape[1] == C
    return gathers and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)


def _nhwc(t: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C): pixels become rows. A contiguous view where t is channels_last."""
    return t.permute(0, 2, 3, 1)


def _inside(size: int, tap: int, out: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Along one axis: the outputs whose tap lies within the map, and the inputs that the tap meets."""
    first = max(0, -(-(padding - tap) // stride))
    last = min(out - 1, (size - 1 + padding - tap) // stride)
    start = first * stride + tap - padding
    return slice(first, max(first, last + 1)), slice(start, start + max(0, last - first) * stride + 1, stride)


def _taps(x: Tensor, weight: Tensor, geometry: Geometry) -> Iterator[tuple[tuple, tuple, tuple]]:
    """For each tap that meets a pixel: indices into the (K, C, R, S) weight, the NHWC output and the NHWC input."""
    (R, S), (stride, padding, _) = weight.shape[2:], geometry
    P, Q = out_map(x.shape, weight.shape, geometry)
    for r in range(R):
        rows_out, rows = _inside(x.shape[2], r, P, stride, padding)
        for s in range(S):
            columns_out, columns = _inside(x.shape[3], s, Q, stride, padding)
            if rows_out.stop > rows_out.start and columns_out.stop > columns_out.start:
                yield (..., r, s), (slice(None), rows_out, columns_out), (slice(None), rows, columns)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.t() [+ bias], of matrices."""
    if a.dtype != torch.float32 or not limits().by_onednn:
        return F.linear(a, b, bias)
    return _linear(_dense(a), _dense(b), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """The matrix with dense rows or columns: of others oneDNN's product takes a thousand times as long."""
    return matrix.contiguous() if matrix.stride(1) == 1 else matrix.t().contiguous().t()


def _add_product(to: Tensor, index: tuple, pixels: Tensor, matrix: Tensor) -> None:
    """to[index] += pixels @ matrix.t(). Gathering the rows first makes one product, which takes half the time."""
    to[index].add_(_product(pixels.flatten(0, 2), matrix).view(*pixels.shape[:3], -1))


def windows(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """What the convolution's window meets at each output pixel: (N, P, Q, R, S, C), a view of x with its padding."""
    (N, C), (R, S), (stride, padding, _) = x.shape[:2], weight.shape[2:], geometry
    padded = F.pad(_nhwc(x), [0, 0, *[padding] * 4])
    n, h, w, c = padded.stride()
    size = N, *out_map(x.shape, weight.shape, geometry), R, S, C
    return padded.as_strided(size, (n, stride * h, stride * w, h, w, c))


def convolve_windows(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`convolve` as one product of all windows, in which the padding's zeros are multiplied, too."""
    matrix = _nhwc(weight.contiguous(memory_format=torch.channels_last)).flatten(1)
    met = windows(x, weight, geometry)
    y = _product(met.flatten(3).flatten(0, 2), matrix, bias)
    return y.view(*met.shape[:3], -1).permute(0, 3, 1, 2)


def groups_of(x: Tensor, weight: Tensor) -> int:
    """How many groups the convolution of x (N, C, H, W) with weight (K, C / groups, R, S) has."""
    return x.shape[1] // weight.shape[1]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """conv(x, weight) + bias, (N, K, P, Q) channels_last, from x (N, C, H, W) channels_last and weight (K, C, R, S).

    The weight may lie in memory in any way. Where it has fewer channels than x, x is taken in groups.
    """
    own = products(x, weight, geometry)
    if own.plain:
        pixels = _met_by_1x1(x, geometry)
        y = _product(pixels.flatten(0, 2), weight.flatten(1), bias)
        return y.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)
    if own.windows:
        y = convolve_windows(x, weight, bias, geometry)
        if not y.isnan().any():  # as an infinite weight makes of the padding's zeros, which a convolution leaves out
            return y
    if own.gathered:
        x, geometry = _met_by_1x1(x, geometry).contiguous().permute(0, 3, 1, 2), POINTWISE
    if not own.small:
        y = torch.conv2d(x, weight, bias, *geometry, groups_of(x, weight))
        return y.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    N, K = x.shape[0], weight.shape[0]
    P, Q = out_map(x.shape, weight.shape, geometry)
    y = x.new_zeros(N, P, Q, K) if bias is None else bias.expand(N, P, Q, K).contiguous()
    for tap, outputs, inputs in _taps(x, weight, geometry):
        _add_product(y, outputs, _nhwc(x)[inputs], weight[tap])
    return y.permute(0, 3, 1, 2)


def _met_by_1x1(x: Tensor, geometry: Geometry) -> Tensor:
    """(N, P, Q, C), the pixels of x that a 1x1 window without padding meets."""
    stride = geometry[0]
    return _nhwc(x)[:, ::stride, ::stride]


def add_projected(to: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """to += conv(x, weight) with a 1x1 window; on the CPU by a matrix product that adds to `to` itself.

    to (N, K, P, Q) and x (N, C, H, W) are channels_last. Returns `to`.
    """
    if not is_single_on_cpu(x) or not limits().many_rows:
        return to.add_(convolve(x, weight, None, geometry))
    _nhwc(to).view(-1, to.shape[1]).addmm_(_met_by_1x1(x, geometry).flatten(0, 2), weight.flatten(1).t())
    return to


def convolve_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    needs_x: bool,
    needs_weight: bool,
    to: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of `convolve`, None where not needed; dx is channels_last, as dy (N, K, P, Q) is.

    With `to`, like x and channels_last, dx is added to it and returned as that.
    """
    own = products(x, weight, geometry)
    own_x, own_weight = needs_x and (own.plain or own.small or own.gathered), needs_weight and own.grad_weight
    wanted = needs_x and not own_x, needs_weight and not own_weight  # with none PyTorch computes nothing
    dx, dweight = _pytorchs_backward(dy, x, weight, geometry, *wanted)
    if own_x:
        dx = _grad_input(dy, x, weight.contiguous(memory_format=torch.channels_last), geometry, own, to)
    elif needs_x:
        dx = dx.contiguous(memory_format=torch.channels_last) if to is None else to.add_(dx)
    if own_weight:
        dweight = _grad_weight(dy, x, weight, geometry)
    return dx, dweight


def _pytorchs_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation = geometry
    settings = [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups_of(x, weight)
    wanted = [needs_x, needs_weight, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, wanted)[:2]


def _grad_input(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, own: Products, to: Tensor | None) -> Tensor:
    if own.plain and geometry[0] == 1:
        dx = _product(_nhwc(dy).flatten(0, 2), weight.flatten(1).t()).view(_nhwc(x).shape).permute(0, 3, 1, 2)
        return dx if to is None else to.add_(dx)
    dx = torch.zeros_like(x, memory_format=torch.channels_last) if to is None else to
    if own.gathered:
        (N, C), (P, Q) = x.shape[:2], dy.shape[2:]
        shape_alone = dy.new_empty(N, P, Q, C).permute(0, 3, 1, 2)  # what x holds is not read for dx
        met, _ = _pytorchs_backward(dy, shape_alone, weight, POINTWISE, True, False)
        _met_by_1x1(dx, geometry).add_(_nhwc(met))
        return dx
    for tap, outputs, inputs in _taps(x, weight, geometry):
        _add_product(_nhwc(dx), inputs, _nhwc(dy)[outputs], weight[tap].t())
    return dx


def _grad_weight(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    taps, (R, S) = list(_taps(x, weight, geometry)), weight.shape[2:]
    if len(taps) == R * S == 1:
        _, outputs, inputs = taps[0]
        return _product(_nhwc(dy)[outputs].flatten(0, 2).t(), _nhwc(x)[inputs].flatten(0, 2).t()).view(weight.shape)
    made = torch.empty_like if len(taps) == R * S else torch.zeros_like  # a tap that meets no pixel has no gradient
    dweight = made(weight, memory_format=torch.channels_last)
    for tap, outputs, inputs in taps:
        pixels_dy, pixels = _nhwc(dy)[outputs].flatten(0, 2), _nhwc(x)[inputs].flatten(0, 2)
        if limits().by_onednn:
            dweight[tap] = _product(pixels_dy.t(), pixels.t())
        else:
            torch.mm(pixels_dy.t(), pixels, out=dweight[tap])
    return dweight
