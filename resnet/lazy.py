"""The fused modules with the signatures of d2l.ai's current edition, whose modules infer their input's channels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.lazy import LazyModuleMixin

from resnet.checks import check_activation, check_block, check_whole
from resnet.fused import FusedResidual, FusedStem
from resnet.sequential import FusedSequential


def _initialize(child: nn.Module, channels: int) -> None:
    """Do what the first forward of a lazy child does with an input of `channels`; leave any other child alone."""
    if not isinstance(child, (nn.LazyConv2d, nn.LazyBatchNorm2d)):
        return
    x = torch.empty(1, channels, 1, 1, device="meta")  # they look at the number of axes and channels alone
    child._infer_parameters(child, (x,))
    # PyTorch sets the count where it draws the values, and leaves it at 0 where load_state_dict has brought them.
    if isinstance(child, nn.BatchNorm2d):
        child.num_features = child.num_features or channels
    else:
        child.in_channels = child.in_channels or child.groups * child.weight.shape[1]


def _initialize_pairs(pairs: Iterable[tuple[nn.Module, nn.Module]], channels: int) -> None:
    """Initialise convolutions, each with its norm, in order, for an input of `channels`."""
    for conv, bn in pairs:
        _initialize(conv, channels)
        if not isinstance(conv, nn.Conv2d):
            return  # replaced, by what may give any width: what is left is initialised by PyTorch's operators
        channels = conv.out_channels
        _initialize(bn, channels)


class _UntilDryRun(LazyModuleMixin):
    """`LazyModuleMixin` for tools that read a model before its first forward: torch.fx and TorchScript."""

    def _infer_parameters(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Nothing where torch.fx traces: the children are leaves of its graph, which initialises them when it runs."""
        if not any(isinstance(value, Proxy) for value in (*args, *(kwargs or {}).values())):
            super()._infer_parameters(module, args, kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """RuntimeError: `torch.jit.script` would stumble over the hook that initialises."""
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} has uninitialized parameters; run a forward pass first"
        )


class LazyFusedStem(FusedStem, _UntilDryRun):
    """`FusedStem` for an input of any channels: `b1` of d2l.ai's current edition, with the same `state_dict`.

    The children are lazy until the first forward; see `LazyFusedResidual`.
    """

    cls_to_become = FusedStem

    def __init__(self, channels: int = 64):
        check_whole("channels", channels, 0)
        nn.Sequential.__init__(
            self,
            nn.LazyConv2d(channels, kernel_size=7, stride=2, padding=3),
            nn.LazyBatchNorm2d(),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        LazyModuleMixin.__init__(self)

    def initialize_parameters(self, X: Tensor) -> None:
        """Initialise the children for an input (N, C, H, W), of which C alone matters."""
        check_activation(X, None)
        with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
            if len(self) == 4:  # else others were put in, and what is lazy is initialised by PyTorch's operators
                _initialize_pairs([(self[0], self[1])], X.shape[1])


class LazyFusedResidual(FusedResidual, _UntilDryRun):
    """`FusedResidual` that infers its input's channels: the `Residual` of d2l.ai's current edition (1.0, chapter 8.6).

    Its children are `nn.LazyConv2d` and `nn.LazyBatchNorm2d`. The first forward, the dry run, initialises them in the
    order in which the textbook's block does, so that a seed gives the same values, and makes a `FusedResidual` of the
    block (a subclass names in `cls_to_become` what it becomes). As with PyTorch's lazy modules, `to` chooses type and
    device before the dry run; `load_state_dict` may come before or after; `apply(init)` and `deepcopy` come after.

    The weights are channels_last from then on, and `nn.init` draws in the order of memory: a seed set for it gives
    other values than in the textbook's contiguous weights. To have the very same, load them.

    Args:
        num_channels: channels K of the output (N, K, P, Q).
        use_1x1conv: shortcut by a 1x1 convolution of stride `strides` (no BatchNorm) in place of the identity.
        strides: stride of conv1 and of the shortcut's convolution.

    Raises, in the constructor:
        TypeError: `use_1x1conv` is not a bool, as in a call of `FusedResidual`'s signature.
        ValueError: channels or strides that are no whole numbers, or negative, or strides of 0; `strides` other than 1
            without `use_1x1conv`.
    Raises, in the first forward, before anything is initialised:
        ValueError: an input of other than `num_channels` channels without `use_1x1conv`.
        ValueError, TypeError: rank or type of the input.
    """

    cls_to_become = FusedResidual

    def __init__(self, num_channels: int, use_1x1conv: bool = False, strides: int | tuple[int, int] = 1):
        if not isinstance(use_1x1conv, bool):
            raise TypeError(
                f"use_1x1conv: expected a bool, got {use_1x1conv!r}; the arguments are (num_channels, use_1x1conv, "
                "strides), and the input's channels are inferred"
            )
        check_whole("num_channels", num_channels, 0)  # which check_block would call input_channels
        check_block(num_channels, num_channels, use_1x1conv, strides)
        nn.Module.__init__(self)  # not FusedResidual's, which makes children of known channels
        self.conv1 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.LazyConv2d(num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.LazyBatchNorm2d()
        self.bn2 = nn.LazyBatchNorm2d()
        LazyModuleMixin.__init__(self)

    def initialize_parameters(self, X: Tensor) -> None:
        """Initialise the children for an input (N, C, H, W), of which C alone matters."""
        check_activation(X, None)
        channels = X.shape[1]
        if self.conv3 is None and isinstance(self.conv2, nn.Conv2d):
            check_block(channels, self.conv2.out_channels, use_1x1conv=False, strides=1)
        with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
            _initialize_pairs([(self.conv1, self.bn1), (self.conv2, self.bn2)], channels)
            if self.conv3 is not None:
                _initialize(self.conv3, channels)


class LazyResNet18(nn.Module):
    """ResNet-18 as d2l.ai's current edition builds it, on fused blocks: same `net`, same `state_dict`.

    A plain module: of `d2l.Classifier` it has `net` and `forward`, and not `lr`, the loss, the optimizer, the plots
    and the training and validation steps. In a notebook of that edition, `Residual = LazyFusedResidual` and
    `LazyFusedStem()` for the layers of `b1` keep all of them.

    Args:
        num_classes: length of the output's last axis.

    Raises:
        ValueError: `num_classes` is no whole number of at least 1.
    """

    def __init__(self, num_classes: int = 10):
        check_whole("num_classes", num_classes, 1)
        super().__init__()
        self.net = FusedSequential(LazyFusedStem())
        for i, num_channels in enumerate((64, 128, 256, 512)):
            first = LazyFusedResidual(num_channels, use_1x1conv=i > 0, strides=2 if i > 0 else 1)
            self.net.add_module(f"b{i + 2}", FusedSequential(first, LazyFusedResidual(num_channels)))
        last = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.LazyLinear(num_classes))
        self.net.add_module("last", last)

    def forward(self, X: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_classes); C is inferred from the first input."""
        return self.net(X)
