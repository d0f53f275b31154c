"""`FusedSmallStem`, whose convolution is PyTorch's, and nets without a pool, beside the eager ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from resnet import (
    BasicBlock,
    FusedResidual,
    FusedResidualBottleneck,
    FusedSmallStem,
    ResNet,
    SmallStem,
    fuse,
    resnet18,
    resnet50,
    unfuse,
)
from tests.conftest import DEVICE
from tests.helpers.blocks import SIXTEEN_BIT, averaged, draw, name_of, randomize, same, snapshot, step, trio
from tests.helpers.fused_cases import assert_exact, assert_refused, assert_trios_parity, train_and_eval

SHAPES = {"few pixels": (2, 3, 5, 6), "many pixels": (3, 3, 14, 13), "one pixel": (4, 3, 1, 1), "grey": (2, 1, 6, 5)}

# ---- parity ----------------------------------------------------------------------------------------------------------


@train_and_eval
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_gradients_and_statistics_are_as_exact_as_eager(any_backend, shape, train):
    assert_trios_parity([trio(SmallStem, shape[1], 4, seed=seed, train=train) for seed in range(3)], shape)


@train_and_eval
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_16_bit_type_is_as_exact_as_eager(any_backend, dtype, train):
    assert_trios_parity([trio(SmallStem, 3, 4, seed=seed, dtype=dtype, train=train) for seed in range(3)], (2, 3, 9, 8))


def conv(**options) -> Callable[[nn.Module], None]:
    """A change that puts another convolution of 4 channels in the stem's place."""

    def change(stem: nn.Module) -> None:
        torch.manual_seed(5)
        stem[0] = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **options}).to(stem[1].running_mean)

    return change


def untracked(stem: nn.Module) -> None:
    bn = stem[1]
    bn.track_running_stats, bn.running_mean, bn.running_var, bn.num_batches_tracked = False, None, None, None


CHANGES = {
    "no bias": conv(bias=False),
    "uneven strides": conv(stride=(2, 1)),
    "a kernel that is not square": conv(kernel_size=(5, 1), padding=(2, 0)),
    "groups and dilation": conv(groups=2, dilation=2),
    "reflected padding": conv(padding_mode="reflect"),
    "padding by name": conv(padding="same"),
    "cumulative average": averaged,
    "untracked": untracked,
    "tracked no longer": lambda stem: setattr(stem[1], "track_running_stats", False),
    "frozen norm": lambda stem: stem[1].eval(),
    "without weight and bias": lambda stem: (setattr(stem[1], "weight", None), setattr(stem[1], "bias", None)),
    "a frozen convolution": lambda stem: stem[0].requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_convolution_and_any_setting_of_batch_norm_is_fused(any_backend, change, recwarn):
    t = trio(SmallStem, 4, 4, dtype=torch.float64).each(CHANGES[change])
    for train in (True, True, False):
        if change != "frozen norm":
            t.each(lambda stem, train=train: stem.train(train))
        assert_exact(t, draw(2, 4, 6, 5))
    assert not recwarn.list


def test_a_bias_before_batch_statistics_is_in_the_running_mean_alone(any_backend):
    stem = trio(SmallStem, 3, 4).fused
    twin = copy.deepcopy(stem)
    nn.init.constant_(twin[0].bias, 100.0)
    x, shift = draw(2, 3, 6, 5), 0.1 * (twin[0].bias - stem[0].bias).detach()
    got, moved = step(stem, x), step(twin, x)
    assert not got["d 0.bias"].any()
    torch.testing.assert_close(moved.pop("1.running_mean"), got.pop("1.running_mean") + shift)
    same(moved, got)


@train_and_eval
def test_an_empty_batch_counts_and_leaves_the_statistics(any_backend, train):
    stem = trio(SmallStem, 3, 4, train=train).fused
    before = snapshot(stem)
    result = step(stem, draw(0, 3, 6, 5))
    assert result["out"].shape == (0, 4, 6, 5) and not any(v.any() for k, v in result.items() if k.startswith("d "))
    before["1.num_batches_tracked"] += train
    same(snapshot(stem), before)


# ---- bad input -------------------------------------------------------------------------------------------------------

WRONG = {
    "three axes": (lambda stem: None, (3, 6, 5), ValueError, r"input: expected 4 axes \(N, C, H, W\), got 3"),
    "other channels": (lambda stem: None, (2, 4, 6, 5), RuntimeError, "to have 3 channels, but got 4 channels"),
    "one value per channel": (lambda stem: None, (1, 3, 1, 1), ValueError, "1: expected more than 1 value per channel"),
    "a norm of other channels": (
        lambda stem: stem.__setitem__(1, nn.BatchNorm2d(5).to(DEVICE)),
        (2, 3, 6, 5),
        ValueError,
        r"1.weight: expected shape \(4,\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_refused_before_anything_changes(any_backend, wrong):
    change, shape, error, message = WRONG[wrong]
    stem = trio(SmallStem, 3, 4).each(change).fused
    assert_refused(stem, draw(*shape), error, message)


@pytest.mark.parametrize("channels", [(-1, 4), (3, 4.0)], ids=name_of)
def test_channels_that_are_none_are_refused_by_the_constructor(channels):
    with pytest.raises(ValueError, match="channels: expected a whole number of at least 0"):
        FusedSmallStem(*channels)


# ---- nets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "block"), [(resnet18, FusedResidual), (resnet50, FusedResidualBottleneck)], ids=["resnet18", "resnet50"]
)
def test_a_net_of_fused_blocks_has_a_fused_small_stem(build, block):
    with torch.device("meta"):
        fused, eager = build(block=block, stem="small"), build(stem="small")
    assert type(fused[0]) is FusedSmallStem and type(eager[0]) is SmallStem
    assert list(fused.state_dict()) == list(eager.state_dict())


def test_fuse_and_unfuse_change_its_class():
    model = nn.Sequential(SmallStem(3, 4))
    (item,) = fuse(model).fused
    assert type(model[0]) is FusedSmallStem and item.kind == "resnet.reference.SmallStem"
    unfuse(model)
    assert type(model[0]) is SmallStem


def published(maxpool: nn.Module | None) -> ResNet:
    """A net whose stem has no pool, or another module in its place."""
    net = ResNet(BasicBlock, depths=(1,), widths=(4,), num_classes=3, stem="small" if maxpool is None else "imagenet")
    if maxpool is not None:
        net.maxpool = maxpool
    randomize(net)
    return net.to(DEVICE, torch.float64)


WITHOUT_POOL = {"none": None, "an identity": nn.Identity()}


@train_and_eval
@pytest.mark.parametrize("maxpool", WITHOUT_POOL.values(), ids=WITHOUT_POOL)
def test_a_published_net_without_a_pool_is_fused_and_so_are_its_copies(any_backend, maxpool, train):
    eager = published(maxpool).train(train)
    fused = copy.deepcopy(eager)
    report = fuse(fused)
    assert [item.name for item in report.fused] == ["", "layer1.0"] and not report.left
    x = draw(2, 3, 7, 6, dtype=torch.float64)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused):
        torch.testing.assert_close(step(twin, x), step(copy.deepcopy(eager), x), atol=1e-9, rtol=1e-7)
    unfuse(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in eager.modules()]


def test_the_pool_of_a_fused_net_may_be_replaced():
    eager = published(nn.MaxPool2d(3, 2, 1)).eval()
    fused, x = copy.deepcopy(eager), draw(2, 3, 9, 8, dtype=torch.float64)
    fuse(fused)
    for pool in (None, nn.Identity(), nn.MaxPool2d(3, 2, 1)):
        for net in (eager, fused):
            if pool is not None:
                net.maxpool = pool
        with torch.no_grad():
            torch.testing.assert_close(fused(x), eager(x), atol=1e-9, rtol=1e-7)


def operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Those that one graph of `torch.compile` calls."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    (graph,) = graphs
    return [str(node.target) for node in graph.graph.nodes]


@pytest.mark.parametrize("maxpool", WITHOUT_POOL.values(), ids=WITHOUT_POOL)
def test_a_compiled_net_keeps_the_operator_in_one_graph(maxpool):
    net = published(maxpool)
    fuse(net)
    called = operators(net, draw(2, 3, 7, 6, dtype=torch.float64))
    assert sum("batch_norm_add_relu" in name for name in called) == 1


def test_hooks_in_the_place_of_the_pool_are_called():
    net = published(nn.Identity())
    net.maxpool.register_forward_hook(lambda m, args, out: 2 * out)
    (item,) = fuse(net).left
    assert item.reason == "maxpool has hooks, which a fused operator would not call"
