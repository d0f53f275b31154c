"""The eager reference: the textbook residual block, ResNet-18, and each fused operation in plain PyTorch.

Everything here is what the fused code is checked against, so it stays short and obvious. The block is
`Residual` of d2l.ai (chapter 8.6; He et al. 2015, https://arxiv.org/abs/1512.03385): same signature, same
`state_dict`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(X))))) + shortcut(X))`, the shortcut the identity or a 1x1 convolution.

    Args:
        input_channels: channels C of the input (N, C, H, W).
        num_channels: channels K of the output (N, K, P, Q).
        use_1x1conv: shortcut by a 1x1 convolution of stride `strides` (no BatchNorm) in place of the identity.
        strides: stride of conv1 and of the shortcut's convolution.
    """

    def __init__(self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3 is not None:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class Stem(nn.Sequential):
    """The net's first stage: 7x7 stride-2 convolution, BatchNorm, ReLU, 3x3 stride-2 max-pool.

    (N, C, H, W) -> (N, K, H/4, W/4), halves rounded up twice.
    """

    def __init__(self, in_channels: int, channels: int = 64):
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )


class SmallStem(nn.Sequential):
    """A first stage for images of some 32 pixels, which `Stem` would shrink to 8: 3x3 convolution, BatchNorm, ReLU.

    (N, C, H, W) -> (N, K, H, W).
    """

    def __init__(self, in_channels: int, channels: int = 64):
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


Residual.stem = Stem
STEMS = ("textbook", "small")


def resnet_block(
    input_channels: int,
    num_channels: int,
    num_residuals: int,
    first_block: bool = False,
    block: type[nn.Module] = Residual,
) -> nn.Sequential:
    """A stage of `num_residuals` blocks. All but the net's first stage halve H and W in their first block."""
    blocks = []
    for i in range(num_residuals):
        if i == 0 and not first_block:
            blocks.append(block(input_channels, num_channels, use_1x1conv=True, strides=2))
        else:
            blocks.append(block(num_channels, num_channels))
    return nn.Sequential(*blocks)


def resnet18(
    num_classes: int = 10, in_channels: int = 1, block: type[nn.Module] = Residual, stem: str = "textbook"
) -> nn.Sequential:
    """ResNet-18 as d2l.ai builds it: stem, four stages of two blocks, average pool, flatten, linear.

    Args:
        num_classes: length of the output's last axis.
        in_channels: channels of the input (N, in_channels, H, W); Fashion-MNIST has 1.
        block: `Residual`, `FusedResidual`, or any class with their constructor. Its attribute `stem`, where
            it has one, builds the textbook's first stage; the `state_dict` does not depend on the choice.
        stem: "textbook", or "small" for `SmallStem`, with which the blocks see images at their full size.
    """
    if stem not in STEMS:
        raise ValueError(f"stem: expected one of {', '.join(STEMS)}, got {stem!r}")
    first = SmallStem if stem == "small" else getattr(block, "stem", Stem)
    return nn.Sequential(
        first(in_channels, 64),
        resnet_block(64, 64, 2, first_block=True, block=block),
        resnet_block(64, 128, 2, block=block),
        resnet_block(128, 256, 2, block=block),
        resnet_block(256, 512, 2, block=block),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


# ---- each fused operation, in plain PyTorch -------------------------------------------------------------------


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of x (N, C, H, W) per channel, each (C,)."""
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


def batch_norm_apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None = None,
    shortcut_scale: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """relu(x * scale + shift [+ shortcut [* shortcut_scale] [+ shortcut_shift]]), vectors per channel."""
    z = x * _per_channel(scale) + _per_channel(shift)
    if shortcut is not None:
        if shortcut_scale is not None:
            shortcut = shortcut * _per_channel(shortcut_scale)
        if shortcut_shift is not None:
            shortcut = shortcut + _per_channel(shortcut_shift)
        z = z + shortcut
    return torch.relu(z) if relu else z


def batch_norm_backward_reduce(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g, sum g * xhat) per channel, xhat = (x - mean) * invstd: the gradients of bias and weight."""
    xhat = (x - _per_channel(mean)) * _per_channel(invstd)
    return g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))


def batch_norm_backward_apply(
    g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor, sum_g: Tensor, sum_gx: Tensor, training: bool
) -> Tensor:
    """grad-input of BatchNorm: scale * (g - sum_g / M - xhat * sum_gx / M) in training, scale * g when frozen."""
    if not training:
        return g * _per_channel(scale)
    m = x.numel() // x.shape[1]
    xhat = (x - _per_channel(mean)) * _per_channel(invstd)
    return _per_channel(scale) * (g - _per_channel(sum_g / m) - xhat * _per_channel(sum_gx / m))


def batch_norm_add_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(x) + shortcut): the operators that `resnet.functional.batch_norm_add_relu` fuses."""
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if shortcut is not None:
        z = z + shortcut
    return F.relu(z) if relu else z


class BatchNormAddRelu2d(nn.BatchNorm2d):
    """relu(batch_norm(x) + shortcut), an `nn.BatchNorm2d` that goes on: the eager form of `FusedBatchNorm2d`.

    TorchScript compiles its forward and cannot call `nn.BatchNorm2d`'s, whose steps are therefore written out.
    """

    def __init__(self, *args, relu: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu = relu

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm_add_relu(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            shortcut,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            self.relu,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"
