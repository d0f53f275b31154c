"""The eager reference: shapes, parameters, and each functional reference against PyTorch's own operators."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet import FusedResidual, Residual, Stem, reference, resnet18, resnet_block
from tests.helpers.blocks import name_of_block

# ---- the nets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Residual, FusedResidual])
def test_the_layers_of_resnet18_have_the_textbook_shapes(block):
    net = resnet18(block=block)
    x = torch.rand(1, 1, 224, 224)
    shapes = []
    for layer in net:
        x = layer(x)
        shapes.append(tuple(x.shape))
    assert shapes == [
        (1, 64, 56, 56),
        (1, 64, 56, 56),
        (1, 128, 28, 28),
        (1, 256, 14, 14),
        (1, 512, 7, 7),
        (1, 512, 1, 1),
        (1, 512),
        (1, 10),
    ]


@pytest.mark.parametrize("block", [Residual, FusedResidual])
def test_a_block_keeps_the_shape_or_halves_it_and_doubles_the_channels(block):
    x = torch.rand(4, 3, 6, 6)
    assert block(3, 3)(x).shape == (4, 3, 6, 6)
    assert block(3, 6, use_1x1conv=True, strides=2)(x).shape == (4, 6, 3, 3)


@pytest.mark.parametrize("block", [Residual, FusedResidual])
def test_resnet18_takes_other_channels_and_classes(block):
    net = resnet18(num_classes=7, in_channels=3, block=block).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, 40, 33)).shape == (2, 7)


def test_eager_and_fused_resnet18_have_the_same_state_dict():
    eager, fused = resnet18().state_dict(), resnet18(block=FusedResidual).state_dict()
    assert {k: v.shape for k, v in eager.items()} == {k: v.shape for k, v in fused.items()}
    assert list(eager) == list(fused)


@pytest.mark.parametrize("block", [Residual, FusedResidual])
def test_with_a_small_stem_the_blocks_see_images_at_their_full_size(block):
    net = resnet18(block=block, stem="small").eval()
    assert [type(layer) for layer in net[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    x = torch.rand(1, 1, 28, 28)
    sizes = []
    with torch.no_grad():
        for stage in net[:5]:
            x = stage(x)
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 28, 28), (64, 28, 28), (128, 14, 14), (256, 7, 7), (512, 4, 4)]


def test_eager_and_fused_resnet18_agree_with_a_small_stem():
    eager, fused = (resnet18(block=block, stem="small").eval() for block in (Residual, FusedResidual))
    fused.load_state_dict(eager.state_dict(), strict=True)
    x = torch.rand(2, 1, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-3, atol=1e-3)


def test_a_stem_that_is_not_known_is_an_error_that_names_those_that_are():
    with pytest.raises(ValueError, match="stem: expected one of textbook, small, got 'tiny'"):
        resnet18(stem="tiny")


def test_a_block_without_a_stem_of_its_own_gets_the_reference_stem():
    class Plain(nn.Module):
        def __init__(self, input_channels, num_channels, use_1x1conv=False, strides=1):
            super().__init__()

    assert type(resnet18(block=Plain)[0]) is Stem


@pytest.mark.parametrize("first", [True, False], ids=["first stage", "later stage"])
def test_a_stage_halves_in_its_first_block_unless_it_is_the_first_stage(first):
    stage = resnet_block(4, 4, 3, first_block=first)
    assert [b.conv1.stride[0] for b in stage] == [1 if first else 2, 1, 1]
    assert [b.conv3 is not None for b in stage] == [not first, False, False]


# ---- the block and the stem, spelt out -------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(3, 3), (3, 6, True), (3, 6, True, 2), (3, 3, True)], ids=name_of_block)
def test_a_residual_block_computes_its_formula(args):
    block = Residual(*args).double()
    x = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    stride = args[3] if len(args) > 3 else 1
    w = block.state_dict()

    def conv_bn(x, i, stride):
        y = F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], stride, padding=1)
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-5).sqrt()  # weight and bias are 1 and 0 at first

    z = conv_bn(conv_bn(x, 1, stride).clamp(min=0), 2, 1)
    z = z + (F.conv2d(x, w["conv3.weight"], w["conv3.bias"], stride) if len(args) > 2 else x)
    torch.testing.assert_close(block(x), z.clamp(min=0))


def test_convolutions_have_biases_and_the_shortcut_no_batch_norm():
    names = {name.split(".")[0] for name, _ in Residual(3, 6, use_1x1conv=True).named_parameters()}
    assert names == {"conv1", "conv2", "conv3", "bn1", "bn2"}
    assert all(m.bias is not None for m in Residual(3, 6, True).modules() if isinstance(m, nn.Conv2d))


def test_a_residual_block_does_not_write_its_input():
    x = torch.rand(2, 3, 5, 5)
    before = x.clone()
    Residual(3, 3)(x)
    assert torch.equal(x, before)


# ---- functional references against torch.nn.functional ---------------------------------------------------------


@pytest.fixture
def drawn():
    """x, shortcut, dout (N, C, H, W), weight, bias, running mean and variance (C,), float64."""
    activations = [torch.randn(3, 5, 4, 2, dtype=torch.float64) for _ in range(3)]
    vectors = [torch.rand(5, dtype=torch.float64) + 0.5 for _ in range(4)]
    return *activations, *vectors


def scale_shift(mean, invstd, weight, bias):
    scale = weight * invstd
    return scale, bias - mean * scale


def test_statistics_and_apply_are_batch_norm_in_training(drawn):
    x, _, _, weight, bias, *_ = drawn
    mean, var = reference.batch_norm_statistics(x)
    scale, shift = scale_shift(mean, (var + 1e-5).rsqrt(), weight, bias)
    torch.testing.assert_close(
        reference.batch_norm_apply(x, scale, shift, relu=False), F.batch_norm(x, None, None, weight, bias, True)
    )


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_apply_adds_the_shortcut_with_its_own_scale_and_shift(drawn, relu):
    x, shortcut, _, weight, bias, mean, var = drawn
    scale, shift = scale_shift(mean, (var + 1e-5).rsqrt(), weight, bias)
    z = F.batch_norm(x, mean, var, weight, bias)
    activate = F.relu if relu else (lambda z: z)
    for options, skip in (
        ({}, shortcut),
        ({"shortcut_shift": bias}, shortcut + bias.view(1, -1, 1, 1)),
        (
            {"shortcut_scale": weight, "shortcut_shift": bias},
            F.batch_norm(shortcut, 0 * mean, 1 + 0 * var, weight, bias, eps=1e-30),
        ),
    ):
        got = reference.batch_norm_apply(x, scale, shift, shortcut, relu=relu, **options)
        torch.testing.assert_close(got, activate(z + skip))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_reduce_and_apply_are_batch_norms_gradients(drawn, training):
    x, _, g, weight, bias, running_mean, running_var = drawn
    for t in (x, weight, bias):
        t.requires_grad_()
    out = F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, training)
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), g)
    mean, var = reference.batch_norm_statistics(x) if training else (running_mean, running_var)
    invstd = (var + 1e-5).rsqrt()
    sum_g, sum_gx = reference.batch_norm_backward_reduce(g, x, mean, invstd)
    torch.testing.assert_close(sum_g, dbias)
    torch.testing.assert_close(sum_gx, dweight)
    got = reference.batch_norm_backward_apply(g, x, mean, invstd, weight * invstd, sum_g, sum_gx, training)
    torch.testing.assert_close(got, dx)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("add", [True, False], ids=["add", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_add_relu_is_the_three_operators(drawn, training, add, relu):
    x, shortcut, _, weight, bias, mean, var = drawn
    bn = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3).double().train(training)
    bn.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}, strict=False)
    z = bn(x) + shortcut if add else bn(x)
    got = reference.batch_norm_add_relu(
        x, mean, var, weight, bias, shortcut if add else None, training, momentum=0.3, eps=1e-3, relu=relu
    )
    torch.testing.assert_close(got, z.clamp(min=0) if relu else z)
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)
