"""What the implicit GEMMs of a convolution share on the device: valid taps, the product, and sums over its rows."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def split_pixels(pixels, P, Q):
    """(n, p, q) of pixel indices counted over maps of P x Q. Unsigned: a signed division takes twice as long."""
    unsigned = pixels.to(tl.uint32)
    n = unsigned // tl.cast(P * Q, tl.uint32)
    rest = unsigned - n * tl.cast(P * Q, tl.uint32)
    p = rest // tl.cast(Q, tl.uint32)
    return n.to(tl.int32), p.to(tl.int32), (rest - p * tl.cast(Q, tl.uint32)).to(tl.int32)


@triton.jit
def valid_taps(h0, w0, live, H, W, R: tl.constexpr, S: tl.constexpr):
    """Per row a bit mask: bit r*S + s says that pixel (h0 + r, w0 + s) lies in the image; 0 where not `live`.

    Made once, so that a step of the reduction asks for one bit in place of four comparisons.
    """
    if R * S > 31:
        one = tl.full([1], 1, tl.int64)
    else:
        one = tl.full([1], 1, tl.int32)
    first = tl.minimum(tl.maximum(-h0, 0), R)
    end = tl.maximum(tl.minimum(H - h0, R), first)
    rows = (one << end) - (one << first)
    first = tl.minimum(tl.maximum(-w0, 0), S)
    end = tl.maximum(tl.minimum(W - w0, S), first)
    columns = tl.where(live, (one << end) - (one << first), 0)
    spread = rows & 1  # bit r moves to r*S: times the columns' bits that makes R copies side by side
    for r in tl.static_range(1, R):
        spread |= (rows & (1 << r)) << (r * (S - 1))
    return spread * columns


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. Triton's interpreter multiplies bfloat16's bit patterns; there the operands are widened."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def column_sums(x):
    """Sums (N,) over the rows of a tile (M, N), M and N powers of two, the same bits from run to run.

    `tl.sum` would exchange its warps' results in stores and loads of single words that meet in a few banks of shared
    memory, eight deep. Here rows 32 apart, of one thread as a rule, are added first; then halves of what is left, and
    between two halvings Triton chooses layouts whose exchange has no conflicts.
    """
    N: tl.constexpr = x.shape[1]
    ROWS: tl.constexpr = min(x.shape[0], 32)
    x = tl.sum(tl.reshape(x, [x.shape[0] // ROWS, ROWS, N]), 0)
    for _ in tl.static_range(5):
        if x.shape[0] > 1:
            a, b = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, N]), (1, 2, 0)))
            x = a + b
    return tl.reshape(x, [N])
