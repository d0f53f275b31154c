"""Sums over the rows of a tile, for the kernels that leave one value per channel."""

import triton
import triton.language as tl


@triton.jit
def column_sums(x):
    """Sums (N,) over the rows of a tile (M, N), M and N powers of two, the same bits from run to run.

    With `tl.sum`, warps exchange their results word by word. From 32 columns on, eight of these words meet in the same
    bank of shared memory. So there this adds rows first that are ROWS apart, which as a rule are one thread's. Then it
    adds one half of what is left to the other, five times at most: for the exchange between two halvings Triton chooses
    layouts without conflicts.
    """
    N: tl.constexpr = x.shape[1]
    if N < 32:
        total = tl.sum(x, 0)
    else:
        ROWS: tl.constexpr = 32 if N == 32 else 16
        if x.shape[0] > ROWS:
            x = tl.sum(tl.reshape(x, [x.shape[0] // ROWS, ROWS, N]), 0)
        for _ in tl.static_range(5):
            if x.shape[0] > 1:
                a, b = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, N]), (1, 2, 0)))
                x = a + b
        total = tl.reshape(x, [N])
    return total


@triton.jit
def lanes_along_columns(x):
    """The tile (M, N), M at least 8, in a layout where a thread holds few columns, for what is done by column.

    In an accumulator's layout the lanes of a warp lie along the rows, and a thread holds 32 columns. It would exchange
    32 sums with 8 lanes and all warps, and the vectors of 32 channels would fill its registers. Rows that are 4 apart
    never lie in one thread of that layout. But `tl.split` needs them in one thread, so Triton moves x to a layout whose
    lanes lie along N. That costs least before a conversion to float32.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(x, [M // 8, 2, 4, N]), (0, 2, 3, 1)))
    return tl.reshape(tl.permute(tl.join(a, b), (0, 3, 1, 2)), [M, N])
