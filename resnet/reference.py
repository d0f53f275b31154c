"""The eager reference: the residual blocks, the textbook's ResNets, and each fused operation in plain PyTorch.

Everything here is what the fused code is checked against, so it stays short and obvious. `Residual` is the block of
d2l.ai (chapter 8.6; He et al. 2015, https://arxiv.org/abs/1512.03385): same signature, same `state_dict`.
`ResidualBottleneck` is the deeper nets' block in its style. `BasicBlock` and `Bottleneck` are the published form of
both, with torchvision's names; `resnet.published` builds nets of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet.checks import check_stages, check_whole

# ---- blocks ---------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(X))))) + shortcut(X))`, the shortcut the identity or a 1x1 convolution.

    Args:
        input_channels: channels C of the input (N, C, H, W).
        num_channels: channels K of the output (N, K, P, Q).
        use_1x1conv: shortcut by a 1x1 convolution of stride `strides` (no BatchNorm) in place of the identity.
        strides: stride of conv1 and of the shortcut's convolution.
    """

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int | tuple[int, int] = 1
    ):
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


class ResidualBottleneck(nn.Module):
    """`relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(X)))))))) + shortcut(X))`: 1x1, 3x3, 1x1, as `Residual` is written.

    Args:
        input_channels: channels C of the input (N, C, H, W).
        num_channels: channels K of the output (N, K, P, Q), a multiple of 4; the 3x3 convolution has K / 4.
        use_1x1conv: shortcut by a 1x1 convolution of stride `strides` (no BatchNorm) in place of the identity.
        strides: stride of the 3x3 convolution and of the shortcut's.
    """

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int | tuple[int, int] = 1
    ):
        super().__init__()
        if num_channels % 4:
            raise ValueError(f"num_channels: expected a multiple of 4, got {num_channels}")
        width = num_channels // 4
        self.conv1 = nn.Conv2d(input_channels, width, kernel_size=1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, stride=strides)
        self.conv3 = nn.Conv2d(width, num_channels, kernel_size=1)
        if use_1x1conv:
            self.conv4 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv4 = None
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)
        self.bn3 = nn.BatchNorm2d(num_channels)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = F.relu(self.bn2(self.conv2(Y)))
        Y = self.bn3(self.conv3(Y))
        if self.conv4 is not None:
            X = self.conv4(X)
        Y += X
        return F.relu(Y)


def _downsample(in_channels: int, channels: int, stride: int | tuple[int, int], avg_down: bool) -> nn.Sequential | None:
    """The shortcut of the published blocks; None is the identity, where the shape stays.

    With a pool the keys of its `state_dict` are timm's, which has an identity where there is nothing to pool.
    """
    if stride == 1 and in_channels == channels:
        return None
    pool = []
    if avg_down:
        strided = stride not in (1, (1, 1))
        pool = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if strided else nn.Identity()]
        stride = 1
    return nn.Sequential(
        *pool,
        nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(channels),
    )


class SqueezeExcite(nn.Module):
    """x * gate, a gate for each image and channel: sigmoid(fc2(relu(fc1(mean of x over H and W)))).

    From "Squeeze-and-Excitation Networks" (Hu et al., 2018), with the keys of timm's `SEModule`.

    Args:
        channels: C of the input (N, C, H, W).
        reduced: channels between the two 1x1 convolutions; by default a sixteenth of C, rounded to a multiple of 8.
    """

    def __init__(self, channels: int, reduced: int | None = None):
        super().__init__()
        if reduced is None:
            reduced = max(8, (channels // 16 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, reduced, kernel_size=1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(reduced, channels, kernel_size=1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class _Gated(nn.Module):
    """A block that may have squeeze-and-excitation. One that an earlier version has pickled has none, and no `se`."""

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "se" not in self._modules:
            self.__dict__.setdefault("se", None)


class BasicBlock(_Gated):
    """The published block of ResNet-18 and 34: two 3x3 convolutions without bias, BatchNorm on the shortcut too.

    Args:
        in_channels: channels C of the input (N, C, H, W).
        channels: channels K of the output (N, K, P, Q).
        stride: stride of conv1 and of the shortcut's convolution.
        avg_down: the shortcut averages 2x2 pixels, with the stride, before its convolution, as in ResNet-D.
        squeeze_excite: a `SqueezeExcite`, `se`, follows the last norm.
    """

    expansion = 1  # channels of the output over the width

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        avg_down: bool = False,
        squeeze_excite: bool = False,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels) if squeeze_excite else None
        self.downsample = _downsample(in_channels, channels, stride, avg_down)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.se is not None:
            y = self.se(y)
        if self.downsample is not None:
            x = self.downsample(x)
        y += x
        return self.relu(y)


class Bottleneck(_Gated):
    """The published block of ResNet-50 and deeper: 1x1, 3x3, 1x1 without bias, BatchNorm on the shortcut too.

    The 3x3 convolution has the stride, as in ResNet v1.5 and torchvision; the paper's first 1x1 has it.

    Args:
        in_channels: channels C of the input (N, C, H, W).
        width: a quarter of the output's channels.
        stride: stride of conv2 and of the shortcut's convolution.
        mid_width: channels around the 3x3 convolution where they are not `width`: more of them make a wide ResNet.
        avg_down: see `BasicBlock`.
        groups: of the 3x3 convolution, as in ResNeXt; they divide the channels around it.
        dilation: of the 3x3 convolution, whose padding is the same.
        squeeze_excite: see `BasicBlock`.
    """

    expansion = 4  # channels of the output over the width

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int | tuple[int, int] = 1,
        *,
        mid_width: int | None = None,
        avg_down: bool = False,
        groups: int = 1,
        dilation: int = 1,
        squeeze_excite: bool = False,
    ):
        super().__init__()
        mid, channels = width if mid_width is None else mid_width, self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, mid, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(channels) if squeeze_excite else None
        self.downsample = _downsample(in_channels, channels, stride, avg_down)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.se is not None:
            y = self.se(y)
        if self.downsample is not None:
            x = self.downsample(x)
        y += x
        return self.relu(y)


# ---- the textbook's nets --------------------------------------------------------------------------------------


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
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


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
        elif i == 0 and input_channels != num_channels:  # bottlenecks widen what the stem gives
            blocks.append(block(input_channels, num_channels, use_1x1conv=True))
        else:
            blocks.append(block(num_channels, num_channels))
    return sequential_of(block)(*blocks)


def sequential_of(block: type[nn.Module]) -> type[nn.Sequential]:
    """The class of a sequence of such blocks: that of their attribute `sequential`, where they have it."""
    return getattr(block, "sequential", nn.Sequential)


def resnet(
    depths: Sequence[int],
    channels: Sequence[int],
    num_classes: int = 10,
    in_channels: int = 1,
    block: type[nn.Module] = Residual,
    stem: str = "textbook",
) -> nn.Sequential:
    """A ResNet as d2l.ai builds it: stem, stages of blocks, average pool, flatten, linear.

    Args:
        depths: blocks of each stage.
        channels: of the stem's output, then of each stage's.
        num_classes: length of the output's last axis.
        in_channels: channels of the input (N, in_channels, H, W); Fashion-MNIST has 1.
        block: `Residual`, `FusedResidual`, or any class with their constructor. Its attributes `stem` and
            `small_stem`, where it has them, build the first stage, and `sequential` the net and its stages; the
            `state_dict` does not depend on the choice.
        stem: "textbook", or "small" for `SmallStem`, with which the blocks see images at their full size.

    Raises:
        ValueError: a number or the stem is out of its range, or the lists do not fit together.
    """
    if stem not in STEMS:
        raise ValueError(f"stem: expected one of {', '.join(STEMS)}, got {stem!r}")
    check_stages("depths", depths)
    check_stages("channels", channels, len(depths) + 1)
    check_whole("num_classes", num_classes, 1)
    check_whole("in_channels", in_channels, 1)
    first = getattr(block, "small_stem", SmallStem) if stem == "small" else getattr(block, "stem", Stem)
    return sequential_of(block)(
        first(in_channels, channels[0]),
        *(
            resnet_block(channels[i], channels[i + 1], depth, first_block=i == 0, block=block)
            for i, depth in enumerate(depths)
        ),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(channels[-1], num_classes),
    )


_NARROW, _WIDE = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)


def resnet18(
    num_classes: int = 10, in_channels: int = 1, block: type[nn.Module] = Residual, stem: str = "textbook"
) -> nn.Sequential:
    """ResNet-18 as d2l.ai builds it: four stages of two blocks. The arguments are those of `resnet`."""
    return resnet(DEPTHS[18], _NARROW, num_classes, in_channels, block, stem)


def resnet34(
    num_classes: int = 10, in_channels: int = 1, block: type[nn.Module] = Residual, stem: str = "textbook"
) -> nn.Sequential:
    """ResNet-34 in the textbook's form. The arguments are those of `resnet`."""
    return resnet(DEPTHS[34], _NARROW, num_classes, in_channels, block, stem)


def resnet50(
    num_classes: int = 10, in_channels: int = 1, block: type[nn.Module] = ResidualBottleneck, stem: str = "textbook"
) -> nn.Sequential:
    """ResNet-50 in the textbook's form. The arguments are those of `resnet`."""
    return resnet(DEPTHS[50], _WIDE, num_classes, in_channels, block, stem)


def resnet101(
    num_classes: int = 10, in_channels: int = 1, block: type[nn.Module] = ResidualBottleneck, stem: str = "textbook"
) -> nn.Sequential:
    """ResNet-101 in the textbook's form. The arguments are those of `resnet`."""
    return resnet(DEPTHS[101], _WIDE, num_classes, in_channels, block, stem)


def resnet152(
    num_classes: int = 10, in_channels: int = 1, block: type[nn.Module] = ResidualBottleneck, stem: str = "textbook"
) -> nn.Sequential:
    """ResNet-152 in the textbook's form. The arguments are those of `resnet`."""
    return resnet(DEPTHS[152], _WIDE, num_classes, in_channels, block, stem)


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
