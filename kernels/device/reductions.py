"""Sums over the rows of a tile, for the kernels that leave one value per channel."""

import triton
import triton.language as tl


@triton.jit
def column_sums(x):
    """Sums (N,) over the rows of a tile (M, N), M and N powers of two, the same bits from run to run.

    `tl.sum` exchanges its warps' results in stores and loads of single words, which from 32 columns on meet in a few
    banks of shared memory, eight deep. There rows ROWS apart, of one thread as a rule, are added first; then halves of
    what is left, and between two halvings Triton chooses layouts whose exchange has no conflicts.
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
    """The tile (M, N), M at least 8, in registers of which a thread's are of few columns, for what is done by column.

    An accumulator's have rows in the lanes of a warp: 32 columns a thread, whose sums are each to be exchanged between
    8 lanes and all warps, and whose vectors fill its registers. Rows 4 apart are of no tensor core's thread, but
    `tl.split` wants them in one, and moves x, before a conversion to float32 best, to lanes along N.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(x, [M // 8, 2, 4, N]), (0, 2, 3, 1)))
    return tl.reshape(tl.permute(tl.join(a, b), (0, 3, 1, 2)), [M, N])
