"""BatchNorm, the add and ReLU on PyTorch's own operators, in as few passes as they allow: what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.norm import Norm, NormGrad, statistics_dtype

aten = torch.ops.aten


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of the batch, (C,) each; updates the running statistics in place."""
    dtype = statistics_dtype(x.dtype)
    running = norm.running_mean, norm.running_var
    # PyTorch takes the batch's statistics in the type of the running ones: float32 ones where those are not.
    accumulated = running
    if running[0] is None or running[0].dtype != dtype:
        accumulated = tuple(x.new_zeros(x.shape[1], dtype=dtype) if r is None else r.to(dtype) for r in running)
    count = norm.num_batches_tracked
    if count is None or count.is_cpu:
        momentum = norm.momentum if count is None else 1.0 / float(count)
        mean, var = aten.batch_norm_update_stats(x, *accumulated, momentum)
        if norm.conv_bias is not None:
            accumulated[0].add_(norm.conv_bias, alpha=momentum)
    else:
        mean, var = average_stats(x, *accumulated, count, norm.conv_bias)
    if running[0] is not None and accumulated is not running:
        for r, a in zip(running, accumulated, strict=True):
            r.copy_(a)
    return mean, (var + norm.eps).rsqrt_()


def average_stats(
    x: Tensor, running_mean: Tensor, running_var: Tensor, count: Tensor, conv_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`batch_norm_update_stats` with a momentum of 1 / count, () int64, whose value the host does not wait for."""
    batch = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    mean_var = aten.batch_norm_update_stats(x, *batch, 1.0)
    if conv_bias is not None:
        batch[0].add_(conv_bias)
    momentum = count.double().reciprocal_()
    for running, new in zip((running_mean, running_var), batch, strict=True):
        running.mul_(1.0 - momentum).add_(new * momentum)
    return mean_var


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

    PyTorch takes the statistics in the type of the vectors, an empty batch changes the running ones, and backward on
    the CPU reads a weight with strides as if it had none.
    """
    dtype = x.dtype
    if dtype not in EAGER_DTYPES or x.numel() == 0:
        return False
    return all(v is None or (v.dtype == dtype and v.is_contiguous()) for v in norm[:4])


def eager(x: Tensor, norm: Norm, shortcut: Tensor | None) -> Tensor:
    """relu(batch_norm(x) [+ shortcut]) by operators that PyTorch records; the add and the ReLU are done in place.

    It keeps x and out for backward. Without the ReLU, whose backward makes dense what it gives, BatchNorm's would
    depend on the layout of the incoming gradient.
    """
    weight, bias, mean, var, _, training, momentum, eps, _ = norm
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
    mean, invstd = stats[0], stats[1]
    if not relu:
        g = dout
    elif consume:
        g = aten.threshold_backward.grad_input(dout, out, 0, grad_input=dout)
    else:
        g = aten.threshold_backward(dout, out, 0)
    # The CPU's operator reads a weight with strides as if it had none.
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(mean.dtype).contiguous()
    if norm.training:
        running, eps = (None, None), norm.eps
    else:
        running, eps = (mean, invstd**-2), 0.0
    # CUDA's operator reads what was saved in evaluation, too.
    dx, dweight, sum_g = aten.native_batch_norm_backward(
        g, x, weight, *running, mean, invstd, norm.training, eps, [True, True, True]
    )
    return NormGrad(
        dx,
        None if norm.weight is None else dweight.to(norm.weight.dtype),
        None if norm.bias is None else sum_g.to(norm.bias.dtype),
        sum_g,
        g if shortcut and relu else None,
    )


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
