"""What the implicit GEMMs of a convolution share on the device: pixels of rows, valid taps and the product."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def split_pixels(pixels, P, Q):
    """(n, p, q) of pixel indices counted over maps of P x Q. The divisions are unsigned, which takes half as long."""
    unsigned = pixels.to(tl.uint32)
    n = unsigned // tl.cast(P * Q, tl.uint32)
    rest = unsigned - n * tl.cast(P * Q, tl.uint32)
    p = rest // tl.cast(Q, tl.uint32)
    return n.to(tl.int32), p.to(tl.int32), (rest - p * tl.cast(Q, tl.uint32)).to(tl.int32)


@triton.jit
def taps_within(pixels, DILATION: tl.constexpr):
    """How many taps, DILATION pixels apart, lie among so many pixels; where DILATION is 1 that may be negative."""
    if DILATION > 1:
        pixels = (tl.maximum(pixels, 0) + DILATION - 1) // DILATION
    return pixels


@triton.jit
def axis_taps(first, size, TAPS: tl.constexpr, one, DILATION: tl.constexpr = 1):
    """A bit mask: bit t says that pixel `first` + t * DILATION lies in an axis of `size` pixels.

    `one` is the number 1; its type is the mask's.
    """
    start = tl.minimum(tl.maximum(taps_within(-first, DILATION), 0), TAPS)
    end = tl.maximum(tl.minimum(taps_within(size - first, DILATION), TAPS), start)
    return (one << end) - (one << start)


@triton.jit
def valid_taps(h0, w0, live, H, W, R: tl.constexpr, S: tl.constexpr, DILATION: tl.constexpr):
    """A bit mask per row: bit r*S + s says that pixel (h0 + r * DILATION, w0 + s * DILATION) lies in the image.

    It is 0 where not `live`. It is made once, so that a step of the reduction asks for one bit in place of four
    comparisons.
    """
    if R * S > 31:
        one = tl.full([1], 1, tl.int64)
    else:
        one = tl.full([1], 1, tl.int32)
    rows = axis_taps(h0, H, R, one, DILATION)
    columns = tl.where(live, axis_taps(w0, W, S, one, DILATION), 0)
    spread = rows & 1  # bit r moves to bit r*S, so that the product below is R copies of `columns` side by side
    for r in tl.static_range(1, R):
        spread |= (rows & (1 << r)) << (r * (S - 1))
    return spread * columns


@triton.jit
def round_to_tf32(x):
    """A float32 whose first 19 bits are x rounded to TensorFloat-32. Ties go away from zero, NaN and Inf stay.

    Tensor cores ignore the last 13 bits. Without rounding every product would be too small; cuDNN and cuBLAS round, but
    `tl.dot` does not (Triton 3.6 to 3.9). If a later one does, values will be rounded up twice.
    """
    power = (x.to(tl.int32, bitcast=True) & -(1 << 23)).to(tl.float32, bitcast=True)  # of two, with the sign of x
    x = tl.fma(power, tl.full(power.shape, 2**-11, tl.float32), x)  # half of the last bit that is kept
    if INTERPRETED:  # its product reads all bits
        x = (x.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. Triton's interpreter would multiply bfloat16's bit patterns, so there the operands are widened."""
    if PRECISION == "tf32":
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
