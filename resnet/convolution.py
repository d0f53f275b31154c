"""The convolutions around the fused operations: PyTorch's own, but for small maps on the CPU and where it is unsafe.

oneDNN's direct convolution is at a loss where a map has a few pixels and many channels (3x3 pixels of 512 channels in
ResNet-18's last stage at 96x96): half of its taps fall on padding. There the same convolution as one matrix product
over an unfolded copy of x takes half the time, forward and backward. Its K, R, S, C weight is the matrix as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_PIXELS = 16  # of an output map: up to so many, from _CHANNELS on, the product was the faster at batches of 8 to 128
_CHANNELS = 128


def out_size(size: int | torch.SymInt, kernel: int, stride: int, padding: int) -> int | torch.SymInt:
    """Pixels along one axis of a convolution's output."""
    return (size + 2 * padding - kernel) // stride + 1


def is_small(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the product is the faster: float32 on the CPU, few pixels, many channels."""
    K, C, R, S = weight.shape
    P, Q = out_size(x.shape[2], R, stride, padding), out_size(x.shape[3], S, stride, padding)
    few = P * Q <= _PIXELS and min(C, K) >= _CHANNELS and R * S > 1
    return few and x.device.type == "cpu" and x.dtype == torch.float32


def overruns(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether PyTorch's grad-weight may write past the end of a buffer of its own.

    That of a strided 1x1 convolution of fewer than 8 channels does, where oneDNN (torch 2.13) has AVX2 and no AVX-512:
    it gathers the strided pixels in whole vectors of 8 channels. Eager PyTorch corrupts its heap there.
    """
    _, C, R, S = weight.shape
    return R == S == 1 and stride > 1 and C < 8 and x.device.type == "cpu" and x.dtype == torch.float32


def _nhwc(t: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C): pixels become rows. Of channels_last, a contiguous view."""
    return t.permute(0, 2, 3, 1)


def _unfold(x: Tensor, kernel: tuple[int, int], stride: int, padding: int) -> Tensor:
    """(N, P, Q, R, S, C): under each output pixel the input pixels that it reads, as a view of a padded copy of x."""
    R, S = kernel
    P, Q = (out_size(size, k, stride, padding) for size, k in zip(x.shape[2:], kernel, strict=True))
    padded = F.pad(_nhwc(x), (0, 0, padding, padding, padding, padding))
    n, h, w, c = padded.stride()
    return padded.as_strided((x.shape[0], P, Q, R, S, x.shape[1]), (n, h * stride, w * stride, h, w, c))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """conv(x, weight) + bias, (N, K, P, Q) channels_last, of x (N, C, H, W) channels_last and weight (K, C, R, S)."""
    if not is_small(x, weight, stride, padding):
        y = torch.conv2d(x, weight, bias, stride, padding)
        return y.contiguous(memory_format=torch.channels_last)
    windows = _unfold(x, weight.shape[2:], stride, padding)
    y = F.linear(windows.flatten(3), _nhwc(weight).flatten(1), bias)
    return y.permute(0, 3, 1, 2)


def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of `convolve`, channels_last, None where not needed; dy (N, K, P, Q) is channels_last."""
    if is_small(x, weight, stride, padding):
        return (
            _grad_input(dy, x, weight, stride, padding) if needs_x else None,
            _grad_weight(dy, x, weight, stride, padding) if needs_weight else None,
        )
    ours = needs_weight and overruns(x, weight, stride)
    wanted = [needs_x, needs_weight and not ours, False]  # with none of them PyTorch computes nothing
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )
    if ours:
        dweight = _grad_weight(dy, x, weight, stride, padding)
    return tuple(g.contiguous(memory_format=torch.channels_last) if g is not None else None for g in (dx, dweight))


def _grad_weight(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    K, C, R, S = weight.shape
    windows = _unfold(x, (R, S), stride, padding).flatten(3).flatten(0, 2)
    return (_nhwc(dy).flatten(0, 2).t() @ windows).view(K, R, S, C).permute(0, 3, 1, 2)


def _grad_input(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Each window's gradient, added back to where the window was read from."""
    N, C, H, W = x.shape
    R, S = weight.shape[2:]
    P, Q = dy.shape[2:]
    windows = (_nhwc(dy).flatten(0, 2) @ _nhwc(weight).flatten(1)).view(N, P, Q, R, S, C)
    padded = dy.new_zeros(N, H + 2 * padding, W + 2 * padding, C)
    for r in range(R):
        for s in range(S):
            rows, columns = slice(r, r + stride * (P - 1) + 1, stride), slice(s, s + stride * (Q - 1) + 1, stride)
            padded[:, rows, columns] += windows[:, :, :, r, s]
    inner = padded[:, padding : padding + H, padding : padding + W]
    return inner.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
