"""Kernels for `test_planted.py`."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if ORDER == "strided":  # neighbouring threads, elements apart
        offsets = offsets * 3
    tl.store(y + offsets, tl.load(x + offsets))


@triton.jit
def dot_kernel(a, b, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))
