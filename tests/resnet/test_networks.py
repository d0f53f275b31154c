"""The nets of all depths: counts, names and shapes, in the textbook's form and in the published one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet import (
    BasicBlock,
    Bottleneck,
    LazyResNet18,
    Residual,
    ResidualBottleneck,
    ResNet,
    Stem,
    published,
    reference,
    resnet18,
    resnet_block,
)

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def on_meta(make, *args, **kwargs) -> nn.Module:
    """A net that has shapes and no values: the largest have 60 million."""
    with torch.device("meta"):
        return make(*args, **kwargs)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# ---- the published form ----------------------------------------------------------------------------------------


PUBLISHED = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize(("depth", "count"), PUBLISHED.items())
def test_a_published_net_has_the_published_count_of_parameters(depth, count):
    assert parameters(on_meta(getattr(published, f"resnet{depth}"))) == count


def test_wide_bottlenecks_give_the_published_count_of_the_wide_net():
    assert parameters(on_meta(ResNet, Bottleneck, DEPTHS[50], mid_widths=(128, 256, 512, 1024))) == 68_883_240


@pytest.mark.parametrize(
    ("depth", "groups", "width", "count"), [(50, 32, 4, 25_028_904), (101, 32, 8, 88_791_336), (101, 64, 4, 83_455_272)]
)
def test_bottlenecks_with_groups_give_the_published_count_of_a_resnext(depth, groups, width, count):
    mid_widths = [groups * width * 2**i for i in range(4)]
    assert parameters(on_meta(ResNet, Bottleneck, DEPTHS[depth], mid_widths=mid_widths, groups=groups)) == count


@pytest.mark.parametrize(
    ("output_stride", "maps", "dilations"),
    [(None, (16, 8, 4, 2), (1, 1, 1, 1)), (16, (16, 8, 4, 4), (1, 1, 1, 2)), (8, (16, 8, 8, 8), (1, 1, 2, 4))],
)
def test_from_its_output_stride_on_a_net_has_dilations_in_place_of_strides(output_stride, maps, dilations):
    net, x = (
        on_meta(ResNet, Bottleneck, (2, 2, 2, 2), output_stride=output_stride),
        torch.empty(1, 3, 64, 64, device="meta"),
    )
    stages = [getattr(net, f"layer{i}") for i in (1, 2, 3, 4)]
    assert [net[: 4 + i](x).shape[2] for i in (1, 2, 3, 4)] == list(maps)
    assert [stage[1].conv2.dilation[0] for stage in stages] == list(dilations)
    assert [stage[0].conv2.dilation[0] for stage in stages[1:]] == list(dilations[:-1])  # the one before it


@pytest.mark.parametrize(("block", "depth", "count"), [(BasicBlock, 18, 11_708_744), (Bottleneck, 50, 25_576_264)])
def test_a_deep_stem_and_pooled_shortcuts_give_timms_count_of_resnet_d(block, depth, count):
    net = on_meta(ResNet, block, DEPTHS[depth], stem="deep", avg_down=True)
    assert parameters(net) == count
    assert net[:-3](torch.empty(1, 3, 225, 193, device="meta")).shape == (1, 512 * block.expansion, 8, 7)


@pytest.mark.parametrize(("block", "depth", "count"), [(BasicBlock, 18, 11_779_624), (Bottleneck, 50, 28_088_024)])
def test_squeeze_and_excitation_gives_timms_count_of_an_se_resnet(block, depth, count):
    net = on_meta(ResNet, block, DEPTHS[depth], squeeze_excite=True)
    assert parameters(net) == count
    keys = list(net.layer1[0].state_dict())
    assert [key for key in keys if key.startswith("se.")] == [
        f"se.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]


def torchvision_keys(depth: int) -> list[str]:
    """The keys of torchvision's `resnet{depth}().state_dict()`, in order."""

    def norm(name):
        return [f"{name}.{v}" for v in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    convolutions = 3 if depth >= 50 else 2
    keys = ["conv1.weight", *norm("bn1")]
    for stage, blocks in enumerate(DEPTHS[depth], 1):
        for b in range(blocks):
            block = f"layer{stage}.{b}"
            for i in range(1, convolutions + 1):
                keys += [f"{block}.conv{i}.weight", *norm(f"{block}.bn{i}")]
            if b == 0 and (stage > 1 or convolutions == 3):
                keys += [f"{block}.downsample.0.weight", *norm(f"{block}.downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_keys_of_a_published_net_are_torchvisions(depth):
    keys = list(on_meta(getattr(published, f"resnet{depth}")).state_dict())
    assert keys == torchvision_keys(depth)
    assert len(keys) == {18: 122, 34: 218, 50: 320, 101: 626, 152: 932}[depth]


@pytest.mark.parametrize(("depth", "wider"), [(34, 1), (50, 4)])
def test_the_stages_of_a_published_net_halve_the_image_and_double_the_channels(depth, wider):
    net = on_meta(getattr(published, f"resnet{depth}"), num_classes=7, in_channels=2)
    x = torch.rand(2, 2, 224, 224, device="meta")
    shapes = {}
    for name, layer in net.named_children():
        shapes[name] = tuple((x := layer(x)).shape[1:])
    assert shapes["conv1"] == (64, 112, 112)
    assert shapes["maxpool"] == (64, 56, 56)
    assert [shapes[f"layer{i}"] for i in (1, 2, 3, 4)] == [
        (wider * channels, size, size) for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    ]
    assert shapes["fc"] == (7,)


def test_a_net_for_small_images_has_three_stages_and_keeps_their_size_in_the_first():
    net = ResNet(BasicBlock, depths=(3, 3, 3), widths=(16, 32, 64), num_classes=10, stem="small")
    assert parameters(net) == 272_474  # ResNet-20 for CIFAR-10, with 1x1 convolutions for shortcuts
    x = torch.rand(2, 3, 32, 32)
    features = {name: net[: i + 1](x).shape for i, (name, _) in enumerate(net.named_children())}
    assert [tuple(features[f"layer{i}"]) for i in (1, 2, 3)] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert net(x).shape == (2, 10)


def test_the_stride_of_a_bottleneck_is_that_of_its_3x3_convolution():
    for block in (Bottleneck(8, 4, stride=2), ResidualBottleneck(8, 16, use_1x1conv=True, strides=2)):
        assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_a_net_makes_its_blocks_through_the_class_that_it_is_given():
    made = []

    class Noted(BasicBlock):
        def __init__(self, in_channels, channels, stride=1):
            super().__init__(in_channels, channels, stride)
            made.append((in_channels, channels, stride))

    net = ResNet(Noted, depths=(2, 1), widths=(4, 6), num_classes=3)
    assert made == [(4, 4, 1), (4, 4, 1), (4, 6, 2)]
    assert [type(block) for block in (*net.layer1, *net.layer2)] == [Noted] * 3


def test_the_first_values_are_kaimings_by_fan_out():
    torch.manual_seed(0)
    net = ResNet(Bottleneck, depths=(1,), widths=(64,))
    for conv in (net.conv1, net.layer1[0].conv2, net.layer1[0].downsample[0]):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_a_published_net_is_scripted_and_cut_as_a_sequence(monkeypatch):
    monkeypatch.setattr(F, "conv2d", torch.conv2d)  # see tests/conftest.py
    net = ResNet(Bottleneck, depths=(1, 1), widths=(4, 4), num_classes=3).eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    assert net[:-1](x).shape == (2, 16)
    net.fc = nn.Identity()
    torch.testing.assert_close(net(x), net[:-1](x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": Residual}, r"block: expected a class with an expansion, as BasicBlock has, got .*Residual"),
        ({"depths": ()}, r"depths: expected a list of whole numbers, got \(\)"),
        ({"depths": 3}, r"depths: expected a list of whole numbers, got 3"),
        ({"depths": (1, 0)}, r"depths\[1\]: expected a whole number of at least 1, got 0"),
        ({"depths": (1, 1, 1)}, r"widths: expected 3 numbers, got 2: \(4, 4\)"),
        ({"widths": (4, 2.5)}, r"widths\[1\]: expected a whole number of at least 1, got 2.5"),
        ({"mid_widths": (4,)}, r"mid_widths: expected 2 numbers, got 1: \(4,\)"),
        ({"num_classes": 0}, "num_classes: expected a whole number of at least 1, got 0"),
        ({"in_channels": "3"}, "in_channels: expected a whole number of at least 1, got '3'"),
        ({"stem": "textbook"}, "stem: expected one of imagenet, small, deep, got 'textbook'"),
    ],
)
def test_what_no_net_can_be_made_of_is_an_error_that_names_it(changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ResNet(**{"block": Bottleneck, "depths": (1, 1), "widths": (4, 4), **changed})


# ---- the textbook's form ---------------------------------------------------------------------------------------


def test_the_textbooks_resnet18_is_what_it_was():
    net = on_meta(resnet18)
    assert parameters(net) == 11_178_378
    assert [type(layer) for layer in net] == [Stem, *[nn.Sequential] * 4, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [len(stage) for stage in net[1:5]] == [2, 2, 2, 2]
    shortcuts = [name for name in net.state_dict() if ".conv3." in name]
    assert shortcuts == [f"{stage}.0.conv3.{v}" for stage in (2, 3, 4) for v in ("weight", "bias")]


def test_a_seed_gives_the_textbooks_layers_the_values_that_they_get_one_by_one():
    torch.manual_seed(1)
    layers = [Stem(1, 4), resnet_block(4, 4, 1, first_block=True), resnet_block(4, 8, 1), nn.Linear(8, 10)]
    torch.manual_seed(1)
    net = reference.resnet((1, 1), (4, 4, 8))
    expected = [value for layer in layers for value in layer.state_dict().values()]
    assert all(map(torch.equal, net.state_dict().values(), expected))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_deeper_net_of_the_textbook_differs_from_the_published_one_in_biases_and_shortcuts_alone(depth):
    ours = on_meta(getattr(reference, f"resnet{depth}"), num_classes=1000, in_channels=3)
    theirs = on_meta(getattr(published, f"resnet{depth}"))
    norms = sum(p.numel() for name, p in theirs.named_parameters() if ".downsample.1" in name)
    biases = sum(m.bias.numel() for m in ours.modules() if isinstance(m, nn.Conv2d))
    assert parameters(ours) == PUBLISHED[depth] - norms + biases
    assert tuple(len(stage) for stage in ours[1:5]) == DEPTHS[depth]


def test_the_textbooks_net_has_any_depths_and_channels():
    net = reference.resnet((1, 2, 1), (4, 8, 8, 16), num_classes=3, in_channels=2, block=ResidualBottleneck)
    assert net(torch.rand(2, 2, 32, 32)).shape == (2, 3)
    assert [len(stage) for stage in net[1:4]] == [1, 2, 1]


def test_a_first_stage_of_other_channels_than_the_stems_gives_its_first_block_a_convolution():
    stage = resnet_block(4, 8, 2, first_block=True, block=ResidualBottleneck)
    assert [b.conv4 is not None for b in stage] == [True, False]
    assert stage(torch.rand(2, 4, 5, 5)).shape == (2, 8, 5, 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (((), (4,)), r"depths: expected a list of whole numbers, got \(\)"),
        (((1, 1), (4, 4)), r"channels: expected 3 numbers, got 2: \(4, 4\)"),
        (((1,), (4, -4)), r"channels\[1\]: expected a whole number of at least 1, got -4"),
    ],
)
def test_what_no_textbook_net_can_be_made_of_is_an_error_that_names_it(args, message):
    with pytest.raises(ValueError, match=message):
        reference.resnet(*args)


@pytest.mark.parametrize("number", [0, -1, "10", 1.0], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda n: resnet18(num_classes=n), "num_classes"),
        (lambda n: resnet18(in_channels=n), "in_channels"),
        (lambda n: LazyResNet18(n), "num_classes"),
    ],
)
def test_a_textbook_net_names_the_number_that_it_refuses(make, name, number):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number of at least 1, got {number!r}$"):
        make(number)


# ---- the blocks, spelt out -------------------------------------------------------------------------------------


def composed(x: torch.Tensor, weights: dict, paddings: tuple[int, ...], strides: tuple[int, ...], shortcut: str | None):
    """A block's formula in PyTorch's functions, the norms' weights 1 and biases 0."""

    def conv(x, name, stride, padding=0):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, padding)

    y = x
    for i, (padding, stride) in enumerate(zip(paddings, strides), 1):
        y = F.batch_norm(conv(y.clamp(min=0) if i > 1 else y, f"conv{i}", stride, padding), None, None, training=True)
    if shortcut is not None:
        x = conv(x, shortcut, max(strides))
        if shortcut.startswith("downsample"):
            x = F.batch_norm(x, None, None, training=True)
    return (y + x).clamp(min=0)


BLOCKS = {
    "basic": (BasicBlock, (8, 8), (1, 1), (1, 1), None),
    "basic, stride 2": (BasicBlock, (8, 6, 2), (1, 1), (2, 1), "downsample.0"),
    "bottleneck": (Bottleneck, (8, 2), (0, 1, 0), (1, 1, 1), None),
    "bottleneck, wider": (Bottleneck, (2, 2), (0, 1, 0), (1, 1, 1), "downsample.0"),
    "bottleneck, stride 2": (Bottleneck, (8, 2, 2), (0, 1, 0), (1, 2, 1), "downsample.0"),
    "textbook's bottleneck": (ResidualBottleneck, (8, 8), (0, 1, 0), (1, 1, 1), None),
    "textbook's bottleneck, stride 2": (ResidualBottleneck, (8, 4, True, 2), (0, 1, 0), (1, 2, 1), "conv4"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_computes_its_formula(name):
    kind, args, paddings, strides, shortcut = BLOCKS[name]
    block = kind(*args).double()
    x = torch.randn(2, args[0], 5, 6, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(block(x), composed(x, block.state_dict(), paddings, strides, shortcut))
    assert torch.equal(x, before)


def test_the_middle_of_a_bottleneck_may_be_wider():
    block = Bottleneck(8, 2, mid_width=6)
    assert [tuple(conv.weight.shape[:2]) for conv in (block.conv1, block.conv2, block.conv3)] == [
        (6, 8),
        (6, 6),
        (8, 6),
    ]


def test_published_convolutions_have_no_biases_and_the_textbooks_have():
    for block, biased in ((BasicBlock(4, 8), False), (Bottleneck(4, 4), False), (ResidualBottleneck(4, 8, True), True)):
        assert {m.bias is not None for m in block.modules() if isinstance(m, nn.Conv2d)} == {biased}


def test_a_bottleneck_of_channels_that_four_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="num_channels: expected a multiple of 4, got 6"):
        ResidualBottleneck(6, 6)
