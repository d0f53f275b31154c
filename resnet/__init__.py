"""Residual blocks that train faster: BatchNorm, the residual add and ReLU fused in Triton kernels.

from resnet import FusedResidual, resnet18
net = resnet18(num_classes=10, in_channels=1, block=FusedResidual)
"""

from resnet._version import __version__ as __version__
from resnet.kernels.host.command import settings_are_read

with settings_are_read():
    from resnet.batch_norm import FusedBatchNorm2d
    from resnet.fused import (
        FusedBasicBlock,
        FusedBottleneck,
        FusedResidual,
        FusedResidualBottleneck,
        FusedSmallStem,
        FusedStem,
    )
    from resnet.fusing import FuseReport, fuse, unfuse
    from resnet.lazy import LazyFusedResidual, LazyFusedStem, LazyResNet18
    from resnet.published import ResNet
    from resnet.reference import (
        BasicBlock,
        Bottleneck,
        Residual,
        ResidualBottleneck,
        SmallStem,
        SqueezeExcite,
        Stem,
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnet_block,
    )
    from resnet.sequential import FusedSequential
    from resnet.settings import backend, convolution, current_backend, current_convolution

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "FuseReport",
    "FusedBasicBlock",
    "FusedBatchNorm2d",
    "FusedBottleneck",
    "FusedResidual",
    "FusedResidualBottleneck",
    "FusedSequential",
    "FusedSmallStem",
    "FusedStem",
    "LazyFusedResidual",
    "LazyFusedStem",
    "LazyResNet18",
    "ResNet",
    "Residual",
    "ResidualBottleneck",
    "SmallStem",
    "SqueezeExcite",
    "Stem",
    "backend",
    "convolution",
    "current_backend",
    "current_convolution",
    "fuse",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet_block",
    "unfuse",
]
