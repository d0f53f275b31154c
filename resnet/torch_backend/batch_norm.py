"""BatchNorm, the add and ReLU on PyTorch's own operators, in as few passes as they allow: what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.norm import Norm, NormGrad, statistics_dtype

aten = torch.ops.aten


# On the CPU PyTorch adds up a channels_last map pixel by pixel in float32, and loses more digits the more there are. So
# they are taken in groups, each a channel of its own, and the groups are merged.
_FEW = 512  # pixels: up to them PyTorch's own sums are about as exact, and quicker
_MANY = 1 << 15  # pixels, from which on dx is made of such sums, too
_PIXELS = 128  # of a group; what is left over makes one of its own
_SUMS = 1 << 14  # that PyTorch holds at a time: more of them leave the cache


def are_few(x: Tensor) -> bool:
    """Whether PyTorch's own sums over the pixels of x (N, C, H, W) keep their digits."""
    return x.numel() <= _FEW * x.shape[1] or not x.is_cpu


def _parts(x: Tensor) -> list[tuple[Tensor, int]]:
    """The pixels of x (N, C, H, W) channels_last, some after some, (n, C), and how many of these make a group."""
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    count, C = pixels.shape
    left = count % _PIXELS
    parts = [(some, _PIXELS) for some in pixels[left:].split(max(1, _SUMS // C) * _PIXELS)]
    return [*parts, (pixels[:left], left)] if left else parts


def _grouped(pixels: Tensor, size: int) -> Tensor:
    """(n, C) as a map of n / size groups' channels: of k groups, group i has the pixels i, i + k, i + 2 k, ..."""
    return pixels.view(size, -1).t()[None, :, None]


def _is_far(mean: Tensor, variance: Tensor) -> bool:
    """Whether a mean is so many deviations from zero that its own digits crowd out those of the differences."""
    return bool((mean * mean > 16 * variance).any())


def _moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, variance) of the batch, (C,) each in `dtype`; the variance is M2 over the number of pixels.

    x (N, C, H, W) is channels_last.
    """
    if are_few(x):
        return _moments_of_few(x, dtype)
    mean, variance = _moments_of_many(x, dtype)
    if _is_far(mean, variance):
        shift = mean
        mean, variance = _moments_of_many(x, dtype, shift)
        mean += shift
    return mean, variance


def _moments_of_many(x: Tensor, dtype: torch.dtype, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`_moments` of x - shift."""
    parts = _parts(x)
    moments = []
    for pixels, size in parts:
        shifted = pixels if shift is None else pixels - shift
        moments.append([m.view(-1, x.shape[1]) for m in _moments_of_few(_grouped(shifted, size), dtype)])
    left = moments.pop() if parts[-1][1] < _PIXELS else None
    means, variances = map(torch.cat, zip(*moments))
    mean = means.mean(0)
    variance = (means - mean).square_().add_(variances).mean(0)
    if left is not None:
        weight = parts[-1][1] / (x.numel() // x.shape[1])
        step = left[0][0] - mean
        mean.add_(step, alpha=weight)
        variance.lerp_(left[1][0], weight).addcmul_(step, step, value=weight * (1 - weight))
    return mean, variance


def _moments_of_few(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_moments` by PyTorch's operator, which takes statistics in the type of the running ones."""
    running = (None, None) if dtype == x.dtype else (x.new_zeros(x.shape[1], dtype=dtype) for _ in range(2))
    return aten.batch_norm_update_stats(x, *running, 0.0)


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the batch, (C,) each; updates the running statistics in place."""
    mean, variance = _moments(x, statistics_dtype(x.dtype))
    if norm.counted is not None:
        norm.counted.add_(1)
    if norm.running_mean is not None:
        count, values = norm.num_batches_tracked, x.numel() // x.shape[1]
        # A count stays a tensor: on a GPU the host does not wait for it.
        momentum = norm.momentum if count is None else count.to(mean.dtype).reciprocal_()
        shifted = mean + (0.0 if norm.conv_bias is None else norm.conv_bias)
        batch = shifted, variance * (values / (values - 1))
        for running, new in zip((norm.running_mean, norm.running_var), batch, strict=True):
            averaged = running.to(new.dtype)
            averaged.mul_(1.0 - momentum).add_(new.mul_(momentum))
            if averaged is not running:
                running.copy_(averaged)
    return mean, (variance + norm.eps).rsqrt_()


def freeze(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the running statistics, (C,) each in `dtype`, the convolution's bias folded in."""
    mean = norm.running_mean.to(dtype)
    if norm.conv_bias is not None:
        mean = mean - norm.conv_bias
    return mean, (norm.running_var.to(dtype) + norm.eps).rsqrt_()


def scale_shift(mean: Tensor, invstd: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(scale, shift), (C,) each: batch_norm(x) = x * scale + shift."""
    scale = invstd if norm.weight is None else invstd * norm.weight
    return scale, -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)


def _stats(x: Tensor, norm: Norm) -> Tensor:
    mean, invstd = _statistics(x, norm) if norm.training else freeze(norm, statistics_dtype(x.dtype))
    return torch.stack((mean, invstd, *scale_shift(mean, invstd, norm)))


def _affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift per channel in one pass: BatchNorm's frozen form with mean 0, variance 1 and eps 0."""
    if scale.device.type == "cpu" and not scale.isfinite().all():  # its own shift would be NaN: mean * scale, 0 * inf
        z = (x.to(scale.dtype) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)
        return z if out is None else out.copy_(z)
    arguments = (x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0)
    if out is None:
        return torch.native_batch_norm(*arguments)[0]
    unused = scale.new_empty(0), scale.new_empty(0)
    return torch.native_batch_norm(*arguments, out=(out, *unused))[0]


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
    stats = _stats(x, norm)
    scale, shift = stats[2], stats[3]
    out = _affine(x, scale, shift if shortcut_shift is None else shift + shortcut_shift, into)
    if shortcut is not None:
        out.add_(shortcut)
    return out.relu_() if relu else out, stats


EAGER_DTYPES = (torch.float32, torch.float64)


def is_eager_as_good(x: Tensor, norm: Norm) -> bool:
    """Whether `eager` keeps and computes what `forward` and `backward` do, with less of Python around it.

    PyTorch takes the statistics in the type of the vectors, of many pixels with few digits; an empty batch changes the
    running ones, and backward on the CPU reads a weight with strides as if it had none.
    """
    dtype = x.dtype
    if dtype not in EAGER_DTYPES or x.numel() == 0 or (norm.training and not are_few(x)):
        return False
    return all(v is None or (v.dtype == dtype and v.is_contiguous()) for v in norm[:4])


def eager(x: Tensor, norm: Norm, shortcut: Tensor | None) -> Tensor:
    """relu(batch_norm(x) [+ shortcut]) by operators that PyTorch records; the add and the ReLU are done in place.

    It keeps x and out for backward. Without the ReLU, whose backward makes dense what it gives, BatchNorm's would
    depend on the layout of the incoming gradient.
    """
    weight, bias, mean, var, _, training, momentum, eps = norm[:8]
    out = torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
    return (out if shortcut is None else out.add_(shortcut)).relu_()


def recompute(x: Tensor, stats: Tensor) -> Tensor:
    """relu(x * scale + shift), bit-equal to what `forward` gave."""
    return _affine(x, stats[2], stats[3]).relu_()


def backward(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    norm: Norm,
    relu: bool = True,
    shortcut: bool = False,
    consume: bool = False,
) -> NormGrad:
    """Gradients of `forward` from dout, x, out (N, C, H, W) channels_last; `g` with a ReLU and a shortcut.

    `consume` allows to overwrite dout.
    """
    if not relu:
        g = dout
    elif consume:
        g = aten.threshold_backward.grad_input(dout, out, 0, grad_input=dout)
    else:
        g = aten.threshold_backward(dout, out, 0)
    dx, dweight, sum_g = (_backward_of_few if are_few(x) else _backward_of_many)(g, x, stats, norm)
    return NormGrad(
        dx,
        None if norm.weight is None else dweight.to(norm.weight.dtype),
        None if norm.bias is None else sum_g.to(norm.bias.dtype),
        sum_g,
        g if shortcut and relu else None,
    )


def _backward_of_few(
    g: Tensor, x: Tensor, stats: Tensor, norm: Norm, sums: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, sum of g) of BatchNorm by PyTorch's operator, the last two where `sums` asks for them."""
    mean, invstd = stats[0], stats[1]
    # The CPU's operator reads a weight with strides as if it had none.
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(mean.dtype).contiguous()
    if norm.training:
        running, eps = (None, None), norm.eps
    else:
        running, eps = (mean, invstd**-2), 0.0
    # CUDA's operator reads what was saved in evaluation, too.
    return aten.native_batch_norm_backward(g, x, weight, *running, mean, invstd, norm.training, eps, [True, sums, sums])


def _backward_of_many(g: Tensor, x: Tensor, stats: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """`_backward_of_few` with sums that keep their digits.

    dx takes means of them, in which an error is n times smaller: up to `_MANY` pixels it is PyTorch's.
    """
    mean, invstd, scale, _ = stats
    C, parts = x.shape[1], list(zip(_parts(g), _parts(x)))
    most = len(parts[0][0][0]) // _PIXELS  # groups in a part
    saved = [v.expand(most, C).reshape(-1) for v in (mean, invstd)]
    sums = []
    for (some_g, size), (some_x, _) in parts:
        of_groups = (v[: len(some_g) // size * C] for v in saved)
        operands = _grouped(some_g, size), _grouped(some_x, size), None, None, None, *of_groups
        _, *some = aten.native_batch_norm_backward(*operands, True, norm.eps, [False, True, True])
        sums.append([v.view(-1, C) for v in some])
    dweight, sum_g = (torch.cat(some).sum(0) for some in zip(*sums))
    if not norm.training or x.numel() <= _MANY * C:
        return _backward_of_few(g, x, stats, norm, sums=False)[0], dweight, sum_g
    # dx = scale * (g - sum_g / n - (x - mean) * invstd * dweight / n)
    n = x.numel() // C
    slope, level = invstd * dweight * scale / -n, scale * sum_g / -n
    far = _is_far(mean, invstd**-2)
    if not far:
        level -= mean * slope
    dx = torch.empty_like(x)
    room = mean.new_empty(parts[0][0][0].shape)
    for ((some_g, _), (some_x, _)), (some_dx, _) in zip(parts, _parts(dx)):
        line = room[: len(some_x)]
        torch.addcmul(level, some_x - mean if far else some_x, slope, out=line)
        torch.addcmul(line, some_g, scale, out=some_dx)
    return dx, dweight, sum_g


def _window_origins(size: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(P, Q): the flat index of each window's first pixel, (2p - 1, 2q - 1), in a map of `width`."""
    p, q = (torch.arange(n, device=device) for n in size)
    return (2 * p[:, None] - 1) * width + 2 * q - 1


def forward_pool(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """out = max_pool(relu(batch_norm(x))), 3x3 with stride 2 and padding 1; tap; stats (4, C) as `forward`.

    out is (N, C, P, Q); tap is of its shape, uint8: which of its window's nine pixels was the maximum.
    """
    stats = _stats(x, norm)
    z = _affine(x, stats[2], stats[3])
    out, index = aten.max_pool2d_with_indices(z, [3, 3], [2, 2], [1, 1])
    width = x.shape[3]
    place = index.int().sub_(_window_origins(out.shape[2:], width, x.device).int())
    row = torch.div(place if width > 2 else place - 1, width, rounding_mode="floor")
    tap = place.sub_(row, alpha=width - 3).to(torch.uint8)
    return out.relu_(), tap, stats


def backward_pool(dout: Tensor, x: Tensor, out: Tensor, tap: Tensor, stats: Tensor, norm: Norm) -> NormGrad:
    """Gradients of `forward_pool`."""
    (N, C, P, Q), width = out.shape, x.shape[3]
    place = torch.arange(9, device=x.device)
    place += place // 3 * (width - 3)  # a tap's index, from its window's first pixel on
    index = place.index_select(0, tap.permute(0, 2, 3, 1).reshape(-1).int()).view(N, P, Q, C).permute(0, 3, 1, 2)
    index += _window_origins((P, Q), width, x.device)
    g = aten.threshold_backward(dout, out, 0)
    g = aten.max_pool2d_with_indices_backward(g, x, [3, 3], [2, 2], [1, 1], [1, 1], False, index)
    return backward(g, x, out, stats, norm, relu=False)
