"""BatchNorm, the add and ReLU on PyTorch's own operators, in as few passes as they allow: what runs on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from resnet.collectives import merge_moments, merge_sums
from resnet.norm import KeptNorm, Norm, NormGrad, statistics_dtype

aten = torch.ops.aten


# On the CPU PyTorch adds up a channels_last map pixel by pixel in float32, and loses more digits the more there are. So
# they are taken in groups, each a channel of its own, and the groups are merged.
_PIXELS = 128, 64  # of a group, at most; and of 16-bit values: the sums of many equal ones are rounded alike
_SUMS = 1 << 14  # that PyTorch holds at a time: more of them leave the cache
_LARGE, _PART = 1 << 23, 1 << 20  # elements of a map that leaves the cache between two passes, and of one that does not

# Pixels, with one thread and at most, up to which PyTorch's own sums are about as exact, and quicker. Each thread has a
# sum of its own, and what one loses is averaged over them. A call may get fewer threads than there are.
_FEW_ALONE, _FEW = 72, 512

# Standard deviations from zero beyond which a mean is too far: for sums of many groups, of one or of few pixels; dx.
_FAR, _FAR_ALONE, _FAR_FOR_GRAD = 8, 2, 32


def are_few(x: Tensor) -> bool:
    """Whether PyTorch's own sums over the pixels of x (N, C, H, W) keep their digits."""
    pixels = x.numel() // x.shape[1]
    return not x.is_cpu or (pixels <= _FEW and pixels <= _FEW_ALONE * torch.get_num_threads() ** 2)


def _most(dtype: torch.dtype) -> int:
    """How many pixels of values of a type make a group, at most."""
    return _PIXELS[dtype.itemsize == 2]


def rows_of(x: Tensor) -> Tensor:
    """x (N, C, H, W) as (N, H, W, C), with which values per channel (C,) go together."""
    return x.permute(0, 2, 3, 1)


def _in_parts(*maps: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Maps of one shape (N, C, H, W); of large ones a few images at a time, for more than one pass over them."""
    count, images = maps[0].numel(), maps[0].shape[0]
    if count < _LARGE or not maps[0].is_cpu:
        return [maps]
    return zip(*(some.split(max(1, images * _PART // count)) for some in maps))


def _maps(x: Tensor, most: int) -> list[Tensor]:
    """The pixels of x, dense and channels_last, some after some, as maps (1, groups * C, 1, pixels of a group).

    A group has `most` pixels, or fewer. Of k groups in a map, group i has the pixels i, i + k, i + 2 k, ... What is
    left over makes the last map.
    """
    C, start = x.shape[1], x.storage_offset()
    return [x.as_strided(size, strides, start + first) for size, strides, first in _pieces(x.numel() // C, C, most)]


@lru_cache(1024)
def _pieces(count: int, C: int, most: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Size, strides and first value of each of `_maps`, from `count` pixels."""
    # As many pixels in a group as leave none over, if that is not far fewer than `most`.
    size = next((size for size in range(most, most // 2, -1) if count % size == 0), most)
    whole = count - count % size
    at_a_time = max(1, _SUMS // C) * size

    def piece(first: int, pixels: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        width = pixels // size * C
        return (1, width, 1, size), (pixels * C, 1, pixels * C, width), first * C

    found = [piece(first, min(at_a_time, whole - first), size) for first in range(0, whole, at_a_time)]
    return found if whole == count else [*found, piece(whole, count - whole, count - whole)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_far(mean: Tensor, variance: Tensor, deviations: float) -> bool:
    """Whether a mean is so many deviations from zero that its own digits crowd out those of the differences.

    What is far is moved to zero first, in a pass of its own.
    """
    return torch.addcmul(variance, mean, mean, value=-(deviations**-2)).min().item() < 0


def _is_far_by(mean: Tensor, invstd: Tensor, deviations: float) -> bool:
    """`_is_far` where invstd, which eps keeps finite, is there already."""
    return (mean * invstd).abs_().max().item() > deviations


def is_far_for_grad(mean: Tensor, invstd: Tensor) -> bool:
    """Whether dx needs the differences from the mean. A GPU is not waited for."""
    return not mean.is_cpu or _is_far_by(mean, invstd, _FAR_FOR_GRAD)


def _moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, variance) of the batch, (C,) each in `dtype`; the variance is M2 over the number of pixels.

    x (N, C, H, W) is channels_last.
    """
    most = _most(x.dtype)
    if are_few(x):
        moments, far = _moments_of_few, _FAR_ALONE
    else:
        moments = partial(_moments_of_many, most=most)
        far = min(_FAR, _FAR_ALONE * (x.numel() / (x.shape[1] * most)) ** 0.5)
    mean, variance = moments(x, dtype)
    if x.is_cpu and _is_far(mean, variance, far):
        shift = mean
        mean, variance = moments(x - shift[:, None, None], dtype)
        mean += shift
    return mean, variance


def _moments_of_many(x: Tensor, dtype: torch.dtype, most: int) -> tuple[Tensor, Tensor]:
    """`_moments` from those of groups of `most` pixels."""
    C, maps = x.shape[1], _maps(x, most)
    moments = [[m.view(-1, C) for m in _moments_of_few(some, dtype)] for some in maps]
    size, last = maps[0].shape[3], maps[-1].shape[3]
    left = moments.pop() if last < size else None
    means, variances = map(_joined, zip(*moments))
    mean = means.mean(0)
    step = means - mean
    variance = torch.addcmul(variances, step, step).mean(0)
    if left is not None:
        weight = last / (x.numel() // C)
        step = left[0][0] - mean
        mean.add_(step, alpha=weight)
        variance.lerp_(left[1][0], weight).addcmul_(step, step, value=weight * (1 - weight))
    return mean, variance


def _moments_of_few(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_moments` by PyTorch's operator, which takes statistics in the type of the running ones."""
    running = (None, None) if dtype == x.dtype else (x.new_zeros(x.shape[1], dtype=dtype) for _ in range(2))
    return torch.batch_norm_update_stats(x, *running, 0.0)


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the batch, (C,) each; updates the running statistics in place."""
    return _of_moments(*_moments(x, statistics_dtype(x.dtype)), x.numel() // x.shape[1], norm)


def _of_moments(mean: Tensor, variance: Tensor, values: int, norm: Norm) -> tuple[Tensor, Tensor]:
    """`_statistics` from `_moments` of so many values per channel: with a group, from those of all its processes."""
    running = norm.running_mean is not None
    if norm.group:
        merged, merged_variance, total = merge_moments(mean, variance, values, norm.group)
        if values or total.item():  # the host waits only where this process has no rows, and then no process may have
            dtype = variance.dtype
            mean, variance = merged.to(dtype), merged_variance.to(dtype)
            unbiased, factor = (merged_variance * (total / (total - 1))).to(dtype), 1.0
        else:
            running = False
    elif running:
        unbiased, factor = variance, values / (values - 1)
    if norm.counted is not None:
        norm.counted.add_(1)
    if running:
        _average(norm.running_mean, mean if norm.conv_bias is None else mean + norm.conv_bias, norm)
        _average(norm.running_var, unbiased, norm, factor)
    return mean, (variance + norm.eps).rsqrt_()


def stats_of_moments(mean: Tensor, variance: Tensor, values: int, norm: Norm) -> Tensor:
    """`stats` of a batch of which the moments are known, (C,) each, the variance in the type of the statistics.

    It is M2 over `values`, the number of values per channel. Where that is 0 both are zeros. Before a merge with those
    of other processes the mean may have more digits.
    """
    mean, invstd = _of_moments(mean, variance, values, norm)
    return torch.stack((mean, invstd, *scale_shift(mean, invstd, norm)))


def _average(running: Tensor, new: Tensor, norm: Norm, factor: float = 1.0) -> None:
    """running = running * (1 - momentum) + new * factor * momentum, rounded to its type once."""
    averaged = running if running.dtype == new.dtype else running.to(new.dtype)
    if norm.num_batches_tracked is None:
        averaged.mul_(1.0 - norm.momentum).add_(new, alpha=norm.momentum * factor)
    else:  # it stays a tensor: on a GPU the host does not wait for it
        momentum = norm.num_batches_tracked.to(new.dtype).reciprocal_()
        averaged.mul_(1.0 - momentum).addcmul_(new, momentum, value=factor)
    if averaged is not running:
        running.copy_(averaged)


def freeze(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the running statistics, (C,) each in `dtype`, the convolution's bias folded in."""
    mean = norm.running_mean.to(dtype)
    if norm.conv_bias is not None:
        mean = mean - norm.conv_bias
    return mean, (norm.running_var.to(dtype) + norm.eps).rsqrt_()


def frozen_stats(norm: Norm, dtype: torch.dtype) -> Tensor:
    """stats (4, C) from the running statistics, for activations of `dtype`."""
    mean, invstd = freeze(norm, statistics_dtype(dtype))
    return torch.stack((mean, invstd, *scale_shift(mean, invstd, norm)))


def scale_shift(mean: Tensor, invstd: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(scale, shift), (C,) each: batch_norm(x) = x * scale + shift."""
    scale = invstd if norm.weight is None else invstd * norm.weight
    return scale, -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)


def norm_stats(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Stats (4, C) = mean, invstd, scale, shift of x's norm, and scale and shift by themselves.

    Updates the running statistics when `norm.training`.
    """
    mean, invstd = _statistics(x, norm) if norm.training else freeze(norm, statistics_dtype(x.dtype))
    scale, shift = scale_shift(mean, invstd, norm)
    return torch.stack((mean, invstd, scale, shift)), scale, shift


def affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift per channel in one pass, channels_last."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.is_cpu and (x.dtype == scale.dtype or not scale.isfinite().all()):
        # In half the time of BatchNorm's frozen form, whose own shift would be NaN, too: mean * scale, 0 * inf.
        torch.addcmul(shift, rows_of(x), scale, out=rows_of(out))
        return out
    unused = scale.new_empty(0), scale.new_empty(0)
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0, out=(out, *unused))[0]


def forward(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out = relu(batch_norm(x) [+ shortcut [+ shortcut_shift]]) and stats (4, C) = mean, invstd, scale, shift.

    x, shortcut and out are (N, C, H, W) channels_last of one type; shortcut_shift is (C,). Running statistics are
    updated in place when `norm.training`. `into`, a tensor like x that is no longer needed, becomes out.
    """
    own, scale, shift = norm_stats(x, norm)
    if shortcut_shift is not None:
        shift = shift + shortcut_shift
    out = torch.empty_like(x, memory_format=torch.channels_last) if into is None else into
    for some, some_out, *added in _in_parts(x, out) if shortcut is None else _in_parts(x, out, shortcut):
        affine(some, scale, shift, some_out)
        for other in added:
            some_out.add_(other)
        if relu:
            some_out.relu_()
    return out, own


def forward_normed(
    x: Tensor, norm: Norm, shortcut: Tensor, shortcut_norm: Norm, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out = relu(batch_norm(x) + batch_norm(shortcut)), and the stats (4, C) of both: see `forward`."""
    own, scale, shift = norm_stats(x, norm)
    other, other_scale, other_shift = norm_stats(shortcut, shortcut_norm)
    out, shift = torch.empty_like(x, memory_format=torch.channels_last) if into is None else into, shift + other_shift
    for some, some_out, some_shortcut in _in_parts(x, out, shortcut):
        affine(some, scale, shift, some_out)
        _add_scaled(some_out, some_shortcut, other_scale)
        some_out.relu_()
    return out, own, other


def _add_scaled(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """out += x * scale per channel."""
    if out.dtype == scale.dtype:
        rows = rows_of(out)
        torch.addcmul(rows, rows_of(x), scale, out=rows)
    else:
        out.add_(affine(x, scale, torch.zeros_like(scale)))


EAGER_DTYPES = (torch.float32, torch.float64)


def is_eager_as_good(x: Tensor, norm: Norm) -> bool:
    """Whether `eager` keeps and computes what `forward` and `backward` do, with less of Python around it.

    PyTorch takes the statistics in the type of the vectors, of many pixels with few digits; an empty batch changes the
    running ones, and backward on the CPU reads a weight with strides as if it had none. It wants a momentum
    that the host knows, and one made of a count is the device's. It knows nothing of a convolution's bias or of other
    processes.
    """
    dtype = x.dtype
    if dtype not in EAGER_DTYPES or x.numel() == 0 or (norm.training and not are_few(x)):
        return False
    if norm.num_batches_tracked is not None or norm.conv_bias is not None or norm.group:
        return False
    return all(v is None or (v.dtype == dtype and v.is_contiguous()) for v in norm[:4])


def eager(x: Tensor, norm: Norm, shortcut: Tensor | None) -> Tensor:
    """relu(batch_norm(x) [+ shortcut]) by operators that PyTorch records; the add and the ReLU are done in place.

    It keeps x and out for backward; x - mean in place of x, where a mean is far from zero. Without the ReLU, whose
    backward makes dense what it gives, BatchNorm's would depend on the layout of the incoming gradient.
    """
    weight, bias, mean, var, _, training, momentum, eps, count, counted, _ = norm
    if counted is not None:
        counted.add_(1)
    elif count is not None:
        momentum = 1.0 / count.item()  # nobody waits for it: where a quick look found it, it is on the CPU
    if training and type(x) is Tensor and x.is_cpu:
        # Autograd keeps the running statistics, which backward does not read: later steps may write to them.
        mean, var = (v if v is None or v.requires_grad else v.data for v in (mean, var))
        out, batch_mean, invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        if _is_far_by(batch_mean, invstd, _FAR_ALONE):
            x = x - batch_mean[:, None, None]
            out, rest, _ = torch.native_batch_norm(x, weight, bias, None, None, True, momentum, eps)
            if mean is not None:
                mean.add_(rest, alpha=momentum)
    else:
        out = torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
    return (out if shortcut is None else out.add_(shortcut)).relu_()


def recompute(x: Tensor, stats: Tensor) -> Tensor:
    """relu(x * scale + shift), bit-equal to what `forward` gave."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for some, some_out in _in_parts(x, out):
        affine(some, stats[2], stats[3], some_out).relu_()
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    norm: KeptNorm,
    relu: bool = True,
    shortcut: bool = False,
    consume: bool = False,
    summed: bool = True,
) -> NormGrad:
    """Gradients of `forward` from dout, x, out (N, C, H, W) channels_last; `g` with a ReLU and a shortcut.

    `consume` allows to overwrite dout. Without `summed`, for frozen statistics, dx is the only gradient.
    """
    if not relu:
        g = dout
    elif consume:
        g = aten.threshold_backward.grad_input(dout, out, 0, grad_input=dout)
    else:
        g = aten.threshold_backward.default(dout, out, 0)
    if not summed:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        torch.mul(rows_of(g), stats[2], out=rows_of(dx))
        return NormGrad(dx, None, None, None, g if shortcut and relu else None)
    if are_few(x) and not norm.group:
        dx, dweight, sum_g = _backward_of_few(g, x, stats, norm)
    else:
        dx, dweight, sum_g = _backward_of_many(g, x, stats, norm, consume or (relu and not shortcut))
    return NormGrad(
        dx,
        None if norm.weight is None else dweight.to(norm.weight.dtype),
        None if norm.bias is None else sum_g.to(norm.bias.dtype),
        sum_g,
        g if shortcut and relu else None,
    )


def _backward_of_few(g: Tensor, x: Tensor, stats: Tensor, norm: KeptNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, sum of g) of BatchNorm by PyTorch's operator."""
    mean, invstd, _, _ = stats.unbind()
    # The CPU's operator reads a weight with strides as if it had none.
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(mean.dtype).contiguous()
    if norm.training:
        running, eps = (None, None), norm.eps
    else:
        running, eps = (mean, invstd**-2), 0.0
    # CUDA's operator reads what was saved in evaluation, too.
    return aten.native_batch_norm_backward.default(g, x, weight, *running, mean, invstd, norm.training, eps, [True] * 3)


def _backward_of_many(
    g: Tensor, x: Tensor, stats: Tensor, norm: KeptNorm, consume: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_backward_of_few` with sums that keep their digits; dx takes those of all processes of a group.

    With `consume` dx is written over g.
    """
    C, sums = x.shape[1], []
    for some_g, some_x in [(g, x)] if are_few(x) else zip(*(_maps(t, _most(x.dtype)) for t in (g, x))):
        # Mean and invstd, once for each group and dense, as PyTorch takes them to be.
        spread = stats.as_strided((2, some_x.shape[1] // C, C), (stats.stride(0), 0, stats.stride(1))).contiguous()
        operands = some_g, some_x, None, None, None, *spread.view(2, -1).unbind()
        _, *some = aten.native_batch_norm_backward.default(*operands, True, norm.eps, [False, True, True])
        sums.append([v.view(-1, C) for v in some])
    dweight, sum_g = (_joined(some).sum(0) for some in zip(*sums))
    dx = g if consume else torch.empty_like(x, memory_format=torch.channels_last)
    grad_input(g, x, stats, norm, sum_g, dweight, dx)
    return dx, dweight, sum_g


def grad_input(g: Tensor, x: Tensor, stats: Tensor, norm: KeptNorm, sum_g: Tensor, sum_gx: Tensor, dx: Tensor) -> None:
    """Write BatchNorm's gradient of x (N, C, H, W) to dx, which may be g: the gradient behind it, with its sums (C,).

    The sums are those of this process; with a group those of all its processes are taken.
    """
    mean, invstd, scale, _ = stats.unbind()
    if not norm.training:
        torch.mul(rows_of(g), scale, out=rows_of(dx))
        return
    # dx = scale * (g - sum_g / n - (x - mean) * invstd * sum_gx / n), n pixels
    C = x.shape[1]
    if norm.group:
        sum_g, sum_gx = merge_sums(torch.stack((sum_g, sum_gx)), x.numel() // C, norm.group).unbind()
    share = scale * (-C / x.numel())
    slope, level = invstd * sum_gx * share, sum_g * share
    far = is_far_for_grad(mean, invstd)
    if not far:
        level.addcmul_(mean, slope, value=-1)
    for parts in _in_parts(g, x, dx):
        rows_g, rows, rows_dx = map(rows_of, parts)
        line = rows_dx if dx.dtype == stats.dtype else None  # else of a type of its own: dx is rounded once
        line = torch.addcmul(level, rows_g, scale, out=line)
        torch.addcmul(line, rows - mean if far else rows, slope, out=rows_dx)


def _window_origins(size: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(P, Q): the flat index of each window's first pixel, (2p - 1, 2q - 1), in a map of `width`."""
    p, q = (torch.arange(n, device=device) for n in size)
    return (2 * p[:, None] - 1) * width + 2 * q - 1


def forward_pool(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """out = max_pool(relu(batch_norm(x))), 3x3 with stride 2 and padding 1; tap; stats (4, C) as `forward`.

    out is (N, C, P, Q); tap is of its shape, uint8: which of its window's nine pixels was the maximum.
    """
    stats, scale, shift = norm_stats(x, norm)
    # Where scales are positive the pool comes first: batch_norm is then of a quarter of the pixels.
    first = x.is_cpu and _are_positive(scale)
    out, index = aten.max_pool2d_with_indices(x if first else affine(x, scale, shift), [3, 3], [2, 2], [1, 1])
    if first:
        affine(out, scale, shift, out)
    width = x.shape[3]
    dtype = torch.uint8 if 2 * width + 2 < 256 else torch.int32  # of a place in a window, which ends with its third row
    # A window's column 0 lies within the map, unless that is 1 or 2 pixels wide. uint8 wraps around.
    second = width if width > 2 else width + 1  # the place at which its second row begins
    place = index.to(dtype).sub_(_window_origins(out.shape[2:], width, x.device).to(dtype))
    row = place.ge(second).view(torch.uint8).add_(place.ge(second + width).view(torch.uint8))
    tap = place.to(torch.uint8).sub_(row, alpha=(width - 3) % 256)
    return out.relu_(), tap, stats


def _are_positive(scale: Tensor) -> bool:
    """Whether all are, and finite: then x * scale + shift keeps the order of a channel's values."""
    least, most = scale.aminmax()
    return least.item() > 0 and most.item() < math.inf


def backward_pool(
    dout: Tensor, x: Tensor, out: Tensor, tap: Tensor, stats: Tensor, norm: KeptNorm, summed: bool
) -> NormGrad:
    """Gradients of `forward_pool`; `summed` as in `backward`."""
    (N, C, P, Q), width = out.shape, x.shape[3]
    place = torch.arange(9, device=x.device)
    place += place // 3 * (width - 3)  # a tap's index, from its window's first pixel on
    index = place.index_select(0, tap.permute(0, 2, 3, 1).reshape(-1).int()).view(N, P, Q, C).permute(0, 3, 1, 2)
    index += _window_origins((P, Q), width, x.device)
    g = aten.threshold_backward.default(dout, out, 0)
    g = aten.max_pool2d_with_indices_backward(g, x, [3, 3], [2, 2], [1, 1], [1, 1], False, index)
    return backward(g, x, out, stats, norm, relu=False, summed=summed)
