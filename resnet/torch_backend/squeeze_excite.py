"""The chain and the tail of a block with squeeze-and-excitation on PyTorch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet.norm import statistics_dtype
from resnet.operands import ChainGrad, ExciteGrad, ExciteKept, Unit, UnitGrad
from resnet.torch_backend import batch_norm
from resnet.torch_backend.batch_norm import affine, rows_of
from resnet.torch_backend.block import chain_backward, chain_forward
from resnet.torch_backend.convolution import convolve
from resnet.torch_backend.inference import conv_batch_norm

aten = torch.ops.aten


def _spread(v: Tensor) -> Tensor:
    """(N, C), values of images and channels, as the rows of `rows_of` take them."""
    return v[:, None, None]


def _sums(x: Tensor) -> Tensor:
    """(N, C), the sums over each image of x (N, C, H, W), in the type of the statistics."""
    return x.sum((2, 3), dtype=statistics_dtype(x.dtype))


def _beta(stats: Tensor) -> Tensor:
    """(C,): norm(y) is scale * (y - mean) + beta."""
    mean, _, scale, shift = stats
    return torch.addcmul(shift, mean, scale)


def squeeze_forward(x: Tensor, units: tuple[Unit, ...], relu: bool, added: bool) -> tuple:
    """A chain of units up to the means of [relu](norm(y)): the fields of a squeeze's output.

    x (N, C, H, W) and the activations are channels_last. Running statistics are updated in place. `added` says that x
    is the shortcut of what the excitation gives, which is of use in backward.
    """
    *units, last = units
    a, ys, inner_stats = chain_forward(x, units)
    y = convolve(a, last.weight, None, last.geometry)
    stats, scale, shift = batch_norm.norm_stats(y, last.norm)
    mean, invstd, *_ = stats
    rows, pixels = y - mean[:, None, None], y.shape[2] * y.shape[3]
    if relu:
        h = affine(y, scale, shift).relu_()
        passed = aten.threshold_backward(torch.ones_like(h), h, 0)
        share, rows = _sums(passed) / pixels, rows.mul_(passed)
    else:
        share = torch.ones_like(mean).expand(y.shape[:2])
    centered = _sums(rows) / pixels
    pooled = torch.addcmul(_beta(stats) * share, centered, scale)
    link = torch.stack((share, centered * invstd, torch.zeros_like(share)))
    return y, pooled.to(y.dtype), link, stats, tuple(ys), tuple(inner_stats)


def squeeze_backward(g: Tensor, dpooled: Tensor, dlink: Tensor, kept: tuple, needs: tuple) -> ChainGrad:
    """Gradients of `squeeze_forward`.

    Args:
        g, dlink: as `excite_backward` gives them, (N, K, P, Q) channels_last and (3, N, K).
        dpooled: (N, K).
    """
    x, ys, stats, link, units, relu, added = kept
    y, norm, (_, _, scale, shift) = ys[-1], units[-1].norm, stats[-1]
    (sum_g, sum_gx, gate), pixels = dlink, y.shape[2] * y.shape[3]
    dpooled = dpooled.to(gate.dtype)
    total_g = torch.addcmul(gate * sum_g, dpooled, link[0]).sum(0)
    total_gx = torch.addcmul(gate * sum_gx, dpooled, link[1]).sum(0)
    grad = UnitGrad(
        None,
        None if norm.weight is None else total_gx.to(norm.weight.dtype),
        None if norm.bias is None else total_g.to(norm.bias.dtype),
        total_g,
    )
    dh = torch.empty_like(y, memory_format=torch.channels_last)
    torch.addcmul(_spread(dpooled / pixels), rows_of(g), _spread(gate), out=rows_of(dh))
    if relu:
        dh = aten.threshold_backward(dh, affine(y, scale, shift).relu_(), 0)
    batch_norm.grad_input(dh, y, stats[-1], norm, total_g, total_gx, dh)
    dx, grads = chain_backward([dh], grad, x, ys, stats, units, needs)
    if added and needs.x:
        dx.add_(g)
    return ChainGrad(dx, grads)


def excite_forward(
    y: Tensor, stats: Tensor, link: Tensor, gate: Tensor, shortcut: Tensor | None, inner_relu: bool, relu: bool
) -> Tensor:
    """[relu](gate * [relu](y * scale + shift) [+ shortcut]), (N, C, H, W) channels_last as y is; gate is (N, C)."""
    _, _, scale, shift = stats
    out = torch.empty_like(y, memory_format=torch.channels_last)
    if inner_relu:
        h = affine(y, scale, shift).relu_()
        torch.mul(rows_of(h), _spread(gate), out=rows_of(out))
    else:
        torch.addcmul(_spread(gate * shift), rows_of(y), _spread(gate * scale), out=rows_of(out))
    if shortcut is not None:
        out.add_(shortcut)
    return out.relu_() if relu else out


def squeeze_inference(x: Tensor, units: tuple[Unit, ...]) -> Tensor:
    """norm(y), (N, K, P, Q) channels_last, y the chain's last: for norms that are constants.

    A fused squeeze has no use for it. Without gradients a norm that is folded into its convolution saves more.
    """
    *units, last = units
    for unit in units:
        x = conv_batch_norm(x, unit).relu_()
    return conv_batch_norm(x, last)


def excite_inference(h: Tensor, gate: Tensor, shortcut: Tensor) -> Tensor:
    """relu(gate * h + shortcut), (N, K, P, Q) channels_last as both maps are; gate is (N, K)."""
    return torch.addcmul(rows_of(shortcut), rows_of(h), _spread(gate)).permute(0, 3, 1, 2).relu_()


def excite_backward(dout: Tensor, kept: ExciteKept) -> ExciteGrad:
    """Gradients of `excite_forward`, and link (3, N, C): the sums of g and of g * xhat over each image, and the gates.

    The sums are those where the inner ReLU lets g pass.
    """
    y, out, stats, gate, inner_relu = kept
    mean, invstd, scale, shift = stats
    g = None if out is None else aten.threshold_backward(dout, out, 0)
    passed = dout if g is None else g
    if inner_relu:
        passed = aten.threshold_backward(passed, affine(y, scale, shift).relu_(), 0)
    sum_g, sum_gx = _sums(passed), _sums((y - mean[:, None, None]).mul_(passed))
    dgate = torch.addcmul(_beta(stats) * sum_g, sum_gx, scale)
    return ExciteGrad(g, dgate.to(gate.dtype), torch.stack((sum_g, sum_gx * invstd, gate.to(stats.dtype))))
