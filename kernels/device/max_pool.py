"""The gradient of the stem's 3x3 stride-2 max-pool: each pixel of its input gathers from the windows it lies in."""

import triton
import triton.language as tl

from .pointwise import relu_passes


@triton.jit
def load_windows(dout, out, tap, n, windows, cols, P, Q, C: tl.constexpr):
    """(p, q, taps, grads) of image n's windows (p, q).

    taps and grads are of four windows each: (p, q), (p, q + 1), (p + 1, q) and (p + 1, q + 1). A gradient is
    dout * (out > 0).
    """
    p = windows // Q
    q = windows % Q
    dout += n * P * Q * C
    out += n * P * Q * C
    tap += n * P * Q * C
    taps, grads = (), ()
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            mask = ((p + i < P) & (q + j < Q))[:, None] & (cols < C)[None, :]
            offsets = ((p + i) * Q + q + j)[:, None] * C + cols[None, :]
            passes = relu_passes(tl.load(out + offsets, mask=mask, other=0.0))
            grads += (tl.where(passes, tl.load(dout + offsets, mask=mask, other=0.0), 0.0),)
            taps += (tl.load(tap + offsets, mask=mask, other=255),)
    return p, q, taps, grads


@triton.jit
def locate(n, p, q, a: tl.constexpr, b: tl.constexpr, cols, H, W, C: tl.constexpr):
    """Where image n has the channels `cols` of its pixels (2p + a, 2q + b), and which of these exist."""
    h = 2 * p + a
    w = 2 * q + b
    mask = ((h < H) & (w < W))[:, None] & (cols < C)[None, :]
    return n * H * W * C + (h * W + w)[:, None] * C + cols[None, :], mask


@triton.jit
def gather_grad(taps, grads, a: tl.constexpr, b: tl.constexpr, ACC: tl.constexpr):
    """g of the pixels (2p + a, 2q + b), a and b 0 or 1: the sum over the windows whose tap is the pixel."""
    g = tl.zeros(grads[0].shape, ACC)
    for i in tl.static_range(a + 1):
        for j in tl.static_range(b + 1):
            here = taps[2 * i + j] == (a + 1 - 2 * i) * 3 + b + 1 - 2 * j
            g += tl.where(here, grads[2 * i + j], 0.0).to(ACC)
    return g
