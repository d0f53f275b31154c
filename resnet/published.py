"""ResNets in the published form: their `state_dict` has torchvision's keys, so that weights load both ways."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from resnet.checks import check_stages, check_whole
from resnet.reference import DEPTHS, BasicBlock, Bottleneck, sequential_of

STEMS = ("imagenet", "small", "deep")


class ResNet(nn.Sequential):
    """A ResNet of any depths and widths: conv1, bn1, relu, maxpool, layer1, layer2, ..., avgpool, flatten, fc.

    (N, in_channels, H, W) -> (N, num_classes). All stages but the first halve H and W, down to the `output_stride`.

        ResNet(BasicBlock, depths=(3, 3, 3), widths=(16, 32, 64), num_classes=10, stem="small")  # CIFAR's ResNet-20
        ResNet(Bottleneck, depths=(3, 4, 6, 3), mid_widths=(128, 256, 512, 1024))  # wide_resnet50_2
        ResNet(Bottleneck, depths=(3, 4, 6, 3), mid_widths=(128, 256, 512, 1024), groups=32)  # resnext50_32x4d
        ResNet(Bottleneck, depths=(3, 4, 6, 3), output_stride=8)  # the backbone of DeepLab and FCN
        ResNet(Bottleneck, depths=(3, 4, 6, 3), stem="deep", avg_down=True)  # ResNet-50-D, with timm's keys
        ResNet(Bottleneck, depths=(3, 4, 6, 3), squeeze_excite=True)  # SE-ResNet-50, with timm's keys

    Args:
        block: `BasicBlock`, `Bottleneck`, or any class with their constructor and their attribute `expansion`.
        depths: blocks of each stage.
        widths: of each stage; its output has `expansion` times as many channels. The first is the stem's width too.
        num_classes: length of the output's last axis.
        in_channels: channels of the input.
        stem: "imagenet" for a 7x7 convolution of stride 2 and a max-pool, or "small" for a 3x3 convolution of
            stride 1 and no pool, with which the blocks see images at their full size, or "deep" for three 3x3
            convolutions, the first one of stride 2, and a max-pool.
        mid_widths: the bottlenecks' `mid_width` in each stage, for wide ResNets.
        avg_down: the blocks' `avg_down`.
        groups: the bottlenecks' `groups`, for ResNeXts.
        output_stride: pixels of the image along an axis to one of the last stage's maps, a power of two, at most: from
            there on a stage has a dilation in place of its stride, as in torchvision's and timm's nets. The first
            block of such a stage keeps the dilation of the one before it.
        squeeze_excite: the blocks' `squeeze_excite`.

    Raises:
        ValueError: an argument is out of its range, or the lists are not as long as each other.
        TypeError: the class of the blocks does not take one of these arguments, as `BasicBlock` takes no groups.
    """

    def __init__(
        self,
        block: type[nn.Module],
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = "imagenet",
        mid_widths: Sequence[int] | None = None,
        avg_down: bool = False,
        groups: int = 1,
        output_stride: int | None = None,
        squeeze_excite: bool = False,
    ):
        if not hasattr(block, "expansion"):
            raise ValueError(f"block: expected a class with an expansion, as BasicBlock has, got {block!r}")
        check_stages("depths", depths)
        check_stages("widths", widths, len(depths))
        if mid_widths is not None:
            check_stages("mid_widths", mid_widths, len(depths))
        check_whole("num_classes", num_classes, 1)
        check_whole("in_channels", in_channels, 1)
        check_whole("groups", groups, 1)
        if stem not in STEMS:
            raise ValueError(f"stem: expected one of {', '.join(STEMS)}, got {stem!r}")
        reduced = 1 if stem == "small" else 4  # pixels of the image, along an axis, to one of the map
        if output_stride is not None:
            check_whole("output_stride", output_stride, reduced)
            if output_stride & (output_stride - 1):
                raise ValueError(f"output_stride: expected a power of two, got {output_stride}")
            if avg_down:
                raise ValueError("output_stride: expected None with avg_down, whose pools have a stride")

        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=_first_convolution(stem, in_channels, widths[0]),
            bn1=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(inplace=True),
        )
        if stem != "small":
            layers["maxpool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels, dilation, options = widths[0], 1, {"avg_down": True} if avg_down else {}
        if groups > 1:
            options["groups"] = groups
        if squeeze_excite:
            options["squeeze_excite"] = True
        for i, (depth, width) in enumerate(zip(depths, widths)):
            if mid_widths is not None:
                options["mid_width"] = mid_widths[i]
            stride, before = 1 if i == 0 else 2, dilation
            if output_stride is not None and reduced * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reduced *= stride
            blocks = []
            for j in range(depth):
                spread = dilation if j else before
                dilated = {"dilation": spread} if spread > 1 else {}
                blocks.append(block(channels, width, 1 if j else stride, **options, **dilated))
                channels = block.expansion * width
            layers[f"layer{i + 1}"] = sequential_of(block)(*blocks)
        layers["avgpool"] = nn.AdaptiveAvgPool2d((1, 1))
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels, num_classes)
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer; for a slice, as `net[:-1]` for the features, an `nn.Sequential`, since a part is no `ResNet`."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _first_convolution(stem: str, in_channels: int, channels: int) -> nn.Conv2d | nn.Sequential:
    """The stem's convolution, or several of them with BatchNorm and ReLU between them."""
    if stem == "imagenet":
        return nn.Conv2d(in_channels, channels, 7, 2, padding=3, bias=False)
    if stem == "small":
        return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    layers, narrow = [], max(1, channels // 2)
    for C, K, stride in ((in_channels, narrow, 2), (narrow, narrow, 1), (narrow, channels, 1)):
        layers += (nn.Conv2d(C, K, 3, stride, padding=1, bias=False), nn.BatchNorm2d(K), nn.ReLU(inplace=True))
    return nn.Sequential(*layers[:-2])


_WIDTHS = (64, 128, 256, 512)


def resnet18(
    num_classes: int = 1000, in_channels: int = 3, block: type[nn.Module] = BasicBlock, stem: str = "imagenet"
) -> ResNet:
    """ResNet-18, of 11.7 million parameters. The arguments are those of `ResNet`."""
    return ResNet(block, DEPTHS[18], _WIDTHS, num_classes, in_channels, stem)


def resnet34(
    num_classes: int = 1000, in_channels: int = 3, block: type[nn.Module] = BasicBlock, stem: str = "imagenet"
) -> ResNet:
    """ResNet-34, of 21.8 million parameters. The arguments are those of `ResNet`."""
    return ResNet(block, DEPTHS[34], _WIDTHS, num_classes, in_channels, stem)


def resnet50(
    num_classes: int = 1000, in_channels: int = 3, block: type[nn.Module] = Bottleneck, stem: str = "imagenet"
) -> ResNet:
    """ResNet-50 v1.5, of 25.6 million parameters. The arguments are those of `ResNet`."""
    return ResNet(block, DEPTHS[50], _WIDTHS, num_classes, in_channels, stem)


def resnet101(
    num_classes: int = 1000, in_channels: int = 3, block: type[nn.Module] = Bottleneck, stem: str = "imagenet"
) -> ResNet:
    """ResNet-101 v1.5, of 44.5 million parameters. The arguments are those of `ResNet`."""
    return ResNet(block, DEPTHS[101], _WIDTHS, num_classes, in_channels, stem)


def resnet152(
    num_classes: int = 1000, in_channels: int = 3, block: type[nn.Module] = Bottleneck, stem: str = "imagenet"
) -> ResNet:
    """ResNet-152 v1.5, of 60.2 million parameters. The arguments are those of `ResNet`."""
    return ResNet(block, DEPTHS[152], _WIDTHS, num_classes, in_channels, stem)
