"""BatchNorm's per-channel vectors: from the partial moments of a batch, or from the running statistics.

    stats (4, C) = mean, invstd, scale, shift
    invstd = 1 / sqrt(var + eps),  scale = weight * invstd,  shift = bias - mean * scale

Partials are merged by Chan's formula in a fixed order, without atomics: the same bits from run to run. Grid (column
tiles,); more than MAX_PARTIALS partials are first merged in groups, on a grid (column tiles, groups). Moves vectors
and partials only, no activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.batch_norm import load_running, store_stats
from .device.moments import merge_partials
from .device.pointwise import inverse_std
from .host.arguments import FLAGS, SIZES, accumulator
from .host.launcher import launch
from .host.tiling import MAX_PARTIALS, merge_blocks, merge_group


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial,  # (3, T, C): see `batch_norm_finalize`
    merged,  # (3, G, C)
    M,
    T,
    G,
    ROWS,  # rows per partial
    GROUP: tl.constexpr,  # partials per group
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge each GROUP partials in turn into one. Grid (column tiles, G)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, T)
    mean, rest, m2, _ = merge_partials(partial, first, last, M, T, ROWS, cols, C, ACC, BLOCK_T, BLOCK_C)
    out = tl.program_id(1) * C + cols
    tl.store(merged + out, mean, mask=cols < C)
    tl.store(merged + G * C + out, m2, mask=cols < C)
    tl.store(merged + 2 * G * C + out, rest, mask=cols < C)


@triton.jit(do_not_specialize=SIZES)
def finalize_kernel(
    partial,  # (3, T, C): see `batch_norm_finalize`
    weight,  # (C,) or None: ones
    bias,  # (C,) or None: zeros
    conv_bias,  # (C,) or None: the bias of the convolution that made x, which did not add it
    running_mean,  # (C,) or None
    running_var,  # (C,) or None
    num_batches_tracked,  # () int64 or None: momentum is 1 over it, in place of the argument
    counted,  # () int64 or None: one more batch
    stats,  # (4, C)
    M,
    T,
    ROWS,  # rows per partial
    momentum: tl.float64,
    eps: tl.float64,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge the partials, write stats, update the running statistics in place. Grid (column tiles,).

    A convolution's bias shifts the mean and nothing else, so only the running mean takes it in.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    mean, _, m2, count = merge_partials(partial, 0, T, M, T, ROWS, cols, C, ACC, BLOCK_T, BLOCK_C)
    invstd = inverse_std(m2 / count, eps)
    store_stats(stats, weight, bias, mean, invstd, cols, C)
    if num_batches_tracked is not None:
        momentum = (1.0 / tl.load(num_batches_tracked).to(tl.float64)).to(ACC)
    if running_mean is not None:
        shifted = mean
        if conv_bias is not None:
            shifted += tl.load(conv_bias + cols, mask=live).to(ACC)
        old = tl.load(running_mean + cols, mask=live).to(ACC)
        tl.store(running_mean + cols, old * (1.0 - momentum) + shifted * momentum, mask=live)
    if running_var is not None:
        old = tl.load(running_var + cols, mask=live).to(ACC)
        tl.store(running_var + cols, old * (1.0 - momentum) + m2 / (count - 1.0) * momentum, mask=live)
    if counted is not None:
        if tl.program_id(0) == 0:
            tl.store(counted, tl.load(counted) + 1)


@triton.jit
def freeze_kernel(
    running_mean,  # (C,)
    running_var,  # (C,)
    weight,  # (C,) or None
    bias,  # (C,) or None
    conv_bias,  # (C,) or None
    stats,  # (4, C)
    eps: tl.float64,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """stats from the running statistics, the convolution's bias folded into the mean. Grid (column tiles,)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, invstd = load_running(running_mean, running_var, conv_bias, eps, cols, C, ACC)
    store_stats(stats, weight, bias, mean, invstd, cols, C)


def batch_norm_finalize(
    partial: Tensor,
    rows: int,
    M: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    conv_bias: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """stats (4, C) from the partials of M rows; the running statistics are updated in place.

    weight, bias, conv_bias and the running statistics are (C,). With `num_batches_tracked`, () int64 and this batch
    included, the running statistics become averages over that many batches: momentum is 1 over it. It is read on the
    device, so that it counts on in each replay of a CUDA graph. `counted`, another () int64, is incremented.

    partial is (3, T, C), float32 or float64, contiguous. It holds the mean and M2 = sum (x - mean)^2 of each `rows`
    rows in turn, of fewer in the last: (T - 1) * rows < M <= T * rows. The third plane is what rounding left of the
    mean. Without it running_var would be wrong by some eps * |mean| / sqrt(M) standard deviations.
    """
    if partial.shape[1] > MAX_PARTIALS:
        partial, rows = _merge(partial, rows, M)
    _, T, C = partial.shape
    stats = torch.empty((4, C), dtype=partial.dtype, device=partial.device)
    merge = merge_blocks(T, C, partial.element_size())
    launch(
        finalize_kernel,
        (triton.cdiv(C, merge["BLOCK_C"]),),
        partial,
        weight,
        bias,
        conv_bias,
        running_mean,
        running_var,
        num_batches_tracked,
        counted,
        stats,
        M,
        T,
        rows,
        momentum,
        eps,
        C=C,
        ACC=accumulator(partial)[1],
        **merge,
        **FLAGS,
    )
    return stats


def batch_norm_merge(partial: Tensor, rows: int, M: int) -> Tensor:
    """(3, C): one partial of M rows, from several as `batch_norm_finalize` takes them."""
    while partial.shape[1] > 1:
        partial, rows = _merge(partial, rows, M)
    return partial[:, 0]


def _merge(partial: Tensor, rows: int, M: int) -> tuple[Tensor, int]:
    """Each `merge_group` partials in turn merged into one: (3, G, C), and the rows of each."""
    _, T, C = partial.shape
    group = merge_group(T)
    G = triton.cdiv(T, group)
    merged = torch.empty((3, G, C), dtype=partial.dtype, device=partial.device)
    merge = merge_blocks(group, C, partial.element_size())
    launch(
        merge_kernel,
        (triton.cdiv(C, merge["BLOCK_C"]), G),
        partial,
        merged,
        M,
        T,
        G,
        rows,
        GROUP=group,
        C=C,
        ACC=accumulator(partial)[1],
        **merge,
        **FLAGS,
    )
    return merged, rows * group


def batch_norm_freeze(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """stats (4, C) of evaluation: BatchNorm's running statistics as scale and shift, `conv_bias` folded in."""
    C = running_mean.numel()
    stats = torch.empty((4, C), dtype=dtype, device=running_mean.device)
    BLOCK_C = min(128, triton.next_power_of_2(C))
    launch(
        freeze_kernel,
        (triton.cdiv(C, BLOCK_C),),
        running_mean,
        running_var,
        weight,
        bias,
        conv_bias,
        stats,
        eps,
        C=C,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK_C=BLOCK_C,
        num_warps=1,
        **FLAGS,
    )
    return stats
