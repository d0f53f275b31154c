"""Winograd's F(2x2, 3x3): a 3x3 convolution of stride 1 and padding 1 with 16 products where there were 36.

A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308. Two by two outputs y of a
4x4 tile d of the input and a window g, with the sums over channels between the transforms as 16 matrix products:

    y = A' [(G g G') * (B' d B)] A     B' = 1  0 -1  0    G =  1    0    0    A' = 1  1  1  0
                                            0  1  1  0        1/2  1/2  1/2        0  1 -1 -1
                                            0 -1  1  0        1/2 -1/2  1/2
                                            0  1  0 -1         0    0    1

The transforms add, subtract and halve, and sums of C products stand where direct convolution has 9 C: the error in
float32 is the smaller of the two. An output depends on its own 3x3 window alone, but where that holds an infinity the
differences make NaN of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet.convolution import products_lag

# From how many tiles on, and how many times fewer products by the channels (tiles that leave the map count), the
# transforms pay against oneDNN's convolution, measured with AVX2.
_TILES = 64
_FEWER_PRODUCTS = {128: 2.0, 256: 1.7}
_CHUNK = 2**16  # tiles x channels at a time: their transforms, 16 times as many values, stay in the last cache


def _tiles(x: Tensor) -> tuple[int, int]:
    """Tiles down and across a map of x (N, C, H, W)."""
    return -(-x.shape[2] // 2), -(-x.shape[3] // 2)


def pays(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether `convolve` is faster than oneDNN's convolution of x (N, C, H, W) in float32 with weight (K, C, R, S)."""
    if weight.shape[2:] != (3, 3) or stride != 1 or padding != 1 or products_lag():
        return False
    p, q = _tiles(x)
    fewer, channels = 9 * x.shape[2] * x.shape[3] / (16 * p * q), min(weight.shape[:2])
    wanted = min((f for at_least, f in _FEWER_PRODUCTS.items() if channels >= at_least), default=math.inf)
    return x.shape[0] * p * q >= _TILES and fewer >= wanted


def transform(weight: Tensor) -> Tensor:
    """G weight G' as 16 matrices (16, C, K), of weight (K, C, 3, 3)."""
    K, C, _, _ = weight.shape
    G = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return (torch.kron(G, G) @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(16, K, C).transpose(1, 2)


def convolve(x: Tensor, transformed: Tensor, bias: Tensor) -> Tensor:
    """conv(x, weight) + bias, (N, K, H, W) channels_last; x (N, C, H, W) too, `transformed` is `transform(weight)`."""
    (N, C, H, W), (p, q), K = x.shape, _tiles(x), transformed.shape[2]
    y = x.new_empty(N, p, 2, q, 2, K)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2 * q - W + 1, 1, 2 * p - H + 1))
    images = -(-N // -(-N * p * q * C // _CHUNK))
    work = [x.new_empty(images * size) for size in (4 * p * (2 * q + 2) * C, 16 * p * q * C, 16 * p * q * K)]
    for d, out in zip(padded.split(images), y.split(images)):
        rows, tiles, products = (buffer[: len(buffer) // images * len(d)] for buffer in work)
        tiles = tiles.view(4, 4, len(d), p, q, C)
        _transform_input(d, rows.view(4, len(d), p, 2 * q + 2, C), tiles)
        products = torch.bmm(tiles.view(16, -1, C), transformed, out=products.view(16, -1, K))
        products[5].add_(bias)  # the one that all four outputs have with a positive sign
        _transform_output(products.view(4, 4, len(d), p, q, K), out)
    return y.view(N, 2 * p, 2 * q, K)[:, :H, :W].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _transform_input(d: Tensor, rows: Tensor, tiles: Tensor) -> None:
    """rows (4, N, p, 2q + 2, C) = B' d, tiles (4, 4, N, p, q, C) = B' d B, of d (N, 2p + 2, 2q + 2, C).

    The tiles of d overlap by two rows and columns.
    """
    p, q = tiles.shape[3:5]
    for z, to in (
        ([d[:, i : i + 2 * p - 1 : 2] for i in range(4)], rows),
        ([rows[:, :, :, i : i + 2 * q - 1 : 2] for i in range(4)], tiles.transpose(0, 1)),
    ):
        torch.sub(z[0], z[2], out=to[0])
        torch.add(z[1], z[2], out=to[1])
        torch.sub(z[2], z[1], out=to[2])
        torch.sub(z[1], z[3], out=to[3])


def _transform_output(m: Tensor, out: Tensor) -> None:
    """out (N, p, 2, q, 2, K) = A' m A of m (4, 4, N, p, q, K), which is overwritten."""
    upper, lower = m[0].add_(m[1]).add_(m[2]), m[1].sub_(m[2]).sub_(m[3])
    for z, to in zip((upper, lower), out.unbind(2)):
        left, right = to.unbind(3)
        torch.add(z[0], z[1], out=left).add_(z[2])
        torch.sub(z[1], z[2], out=right).sub_(z[3])
