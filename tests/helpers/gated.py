"""A block whose gates stand before its last convolution, as a RegNetY's do, and the same on fused operators."""

from __future__ import annotations

from torch import Tensor, nn

from resnet import SqueezeExcite
from resnet.fusable import BlockParts, UnitParts, Watched, gate_parts
from resnet.fused.block import FusedBlock


class Inner(nn.Module):
    """A bottleneck with groups whose gates stand before its last convolution, as in a RegNetY."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=2, bias=False)
        self.bn2, self.se = nn.BatchNorm2d(channels), SqueezeExcite(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.se(self.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class FusedInner(FusedBlock, Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    forward.__wrapped__ = Inner.forward

    def _parts(self) -> BlockParts:
        own = self._modules
        units = tuple(UnitParts(own[f"conv{i}"], own[f"bn{i}"], f"conv{i}", f"bn{i}") for i in (1, 2, 3))
        gate = gate_parts("se", own["se"], 2, own.get("downsample"))
        return BlockParts(units, None, (Watched("relu", own["relu"], nn.ReLU),), None, gate)
