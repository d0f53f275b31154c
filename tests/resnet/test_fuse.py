"""`fuse` and `unfuse` on this library's own blocks, and on a local class that stands in the table of known ones.

tests/resnet/test_fuse_zoo.py has the models of other libraries, where these are installed.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from resnet import (
    BasicBlock,
    Bottleneck,
    FusedResidual,
    FusedStem,
    LazyFusedResidual,
    Residual,
    ResidualBottleneck,
    ResNet,
    Stem,
    fuse,
    resnet18,
    unfuse,
)
from resnet.fusing.blocks import BlockMixin
from resnet.fusing.known import KNOWN, Known
from resnet.fusing.layouts import BlockLayout, StemLayout
from resnet.fusing.stems import NetworkMixin
from tests.conftest import DEVICE
from tests.helpers.blocks import draw, infer, randomize, snapshot, step


class Shortcut(nn.Sequential):
    """A container of a class of its own, as one library has it."""


class Block(nn.Module):
    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(C, K, 1, bias=False), nn.BatchNorm2d(K), nn.ReLU())
        self.conv2, self.bn2 = nn.Conv2d(K, K, 3, stride, 1), nn.BatchNorm2d(K)
        self.relu = nn.ReLU(inplace=True)
        self.drop = None
        same_shape = C == K and stride == 1
        self.shortcut = None if same_shape else Shortcut(nn.Identity(), nn.Conv2d(C, K, 1, stride), nn.BatchNorm2d(K))

    def forward(self, image):
        y = self.bn2(self.conv2(self.first(image)))
        if self.drop is not None:
            y = self.drop(y)
        return self.relu(y + (image if self.shortcut is None else self.shortcut(image)))


class Net(nn.Module):
    """A network that calls the stem's modules itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.pool = Stem(3, 8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12, 2), Block(12, 12))
        self.calls = 0

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.pool(x)
        return self.blocks(x)


class Branches(Net):
    """One whose forward has more to do with its stem's modules."""

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.pool(x)
        return self.pool(self.blocks(x))


LAYOUT = BlockLayout(
    units=(("first.0", "first.1"), ("conv2", "bn2")),
    relus=("first.2", "relu"),
    shortcut="shortcut",
    optional=("drop",),
    containers=(("first", nn.Sequential),),
    shortcut_class="Shortcut",
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    stem = Known(NetworkMixin, StemLayout("conv", "bn", "relu", "pool"))
    for cls, entry in ((Block, Known(BlockMixin, LAYOUT)), (Net, stem), (Branches, stem)):
        monkeypatch.setitem(KNOWN, f"{cls.__module__}.{cls.__qualname__}", entry)


def net() -> Net:
    model = Net()
    randomize(model)
    return model.to(DEVICE, torch.float64)


def own() -> nn.Sequential:
    model = nn.Sequential(Stem(3, 8), Residual(8, 8), Residual(8, 12, True, 2))
    randomize(model)
    return model.to(DEVICE, torch.float64)


def published() -> ResNet:
    model = ResNet(Bottleneck, depths=(1, 2), widths=(4, 6), num_classes=5)
    randomize(model)
    return model.to(DEVICE, torch.float64)


def deep() -> ResNet:
    """A ResNet-D: a stem of three convolutions, and shortcuts that pool their input."""
    model = ResNet(Bottleneck, depths=(1, 2), widths=(4, 6), num_classes=5, stem="deep", avg_down=True)
    randomize(model)
    return model.to(DEVICE, torch.float64)


def gated() -> ResNet:
    """An SE-ResNet."""
    model = ResNet(Bottleneck, depths=(1, 2), widths=(4, 6), num_classes=5, squeeze_excite=True)
    randomize(model)
    return model.to(DEVICE, torch.float64)


def cut() -> nn.Sequential:
    """A network cut up: its stem's modules are the first of a sequence, as `children()` gives them."""
    model = nn.Sequential(*Stem(3, 8), nn.Sequential(Block(8, 8), Block(8, 12, 2)), nn.Flatten())
    randomize(model)
    return model.to(DEVICE, torch.float64)


models = pytest.mark.parametrize("make", [own, net, published, deep, gated, cut])
IMAGES = (2, 3, 32, 28)


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def names(items) -> list[str]:
    return [item.name for item in items]


def reason_of(report) -> str:
    (item,) = report.left
    return item.reason


# ---- what a fused model is -------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_fused_model_does_the_steps_of_the_eager_one(make, train):
    eager = make().train(train)
    fused = copy.deepcopy(eager)
    assert not fuse(fused).left
    for seed in range(2):  # the second sees what the first has done to the buffers
        x = draw(*IMAGES, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)


@models
def test_a_fused_model_keeps_all_that_it_has(make):
    model = make().eval()
    places = {own: lambda: model[1], net: lambda: model.blocks[0], cut: lambda: model[4][0]}
    block = places.get(make, lambda: model.layer1[0])()
    block.train()
    calls = []
    block.register_forward_hook(lambda *_: calls.append("hook"))
    before = copy.copy(vars(block))
    tensors = model.state_dict(keep_vars=True)
    modes = [module.training for module in model.modules()]
    eager_kinds = kinds(model)
    fuse(model)
    assert vars(block) == before
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[name] is tensors[name] for name in tensors)
    assert [module.training for module in model.modules()] == modes
    assert all(issubclass(fused, eager) for fused, eager in zip(kinds(model), eager_kinds, strict=True))
    model(draw(*IMAGES, dtype=torch.float64))
    assert calls == ["hook"]


def test_own_blocks_become_the_librarys_fused_ones():
    model = own()
    report = fuse(model)
    assert kinds(model)[1] is FusedStem and [type(block) for block in model[1:]] == [FusedResidual] * 2
    assert [item.kind for item in report.fused] == ["resnet.reference.Stem", *["resnet.reference.Residual"] * 2]


OTHERS = {"BasicBlock": (BasicBlock, 8, 8, 2), "Bottleneck": (Bottleneck, 8, 3, 1), "wide": (Bottleneck, 8, 2, 2)}
OTHERS["ResidualBottleneck"] = (ResidualBottleneck, 8, 12, True, 2)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_block_of_this_library_is_fused_and_keeps_its_values(kind):
    cls, *args = OTHERS[kind]
    eager = cls(*args, **({"mid_width": 5} if kind == "wide" else {})).to(DEVICE, torch.float64)
    randomize(eager)
    fused = copy.deepcopy(eager)
    assert [item.kind for item in fuse(fused).fused] == [f"resnet.reference.{cls.__name__}"]
    assert type(fused).__name__ == f"Fused{cls.__name__}" and isinstance(fused, cls)
    x = draw(2, 8, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)


@models
def test_a_second_call_changes_nothing_and_reports_the_same(make):
    model = make()
    first, before = fuse(model), None
    before = kinds(model)
    assert fuse(model) == first
    assert kinds(model) == before


@models
def test_unfuse_gives_the_classes_back(make):
    model = make()
    before = kinds(model)
    fuse(model)
    assert kinds(model) != before
    unfuse(model)
    assert kinds(model) == before
    unfuse(model)
    assert kinds(model) == before


def test_two_modules_of_a_class_become_of_one_class():
    model = net()
    fuse(model)
    assert type(model.blocks[0]) is type(model.blocks[2]) is not Block
    assert type(model.blocks[0]).__name__ == "FusedBlock"


@models
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_a_fused_model_are_fused_and_change_alone(make, duplicate):
    model = make().eval()
    fuse(model)
    x = draw(*IMAGES, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        twin = duplicate(model)
        assert kinds(twin) == kinds(model)
        assert torch.equal(twin(x), before)
        for p in twin.parameters():
            p.mul_(-0.7)
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)


@models
def test_an_optimizer_goes_on(make):
    eager = make()
    fused = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (eager, fused)]
    for i in range(3):
        for model, optimizer in zip((eager, fused), optimizers):
            optimizer.zero_grad()
            model(draw(*IMAGES, seed=i, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        fuse(fused)
    torch.testing.assert_close(snapshot(fused), snapshot(eager), atol=1e-9, rtol=1e-7)


def test_a_fused_method_has_the_arguments_of_the_eager_one():
    block = Block(4, 4).to(DEVICE)
    x = draw(2, 4, 6, 5)
    fuse(block)
    assert torch.equal(block(image=x), block(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        block(x=x)


@pytest.mark.filterwarnings("ignore:FusedBlock runs PyTorch's operators")
def test_modules_that_are_replaced_after_fuse_are_the_ones_that_run():
    eager, x = Block(4, 6, 2).to(DEVICE, torch.float64), draw(2, 4, 6, 5, dtype=torch.float64)
    randomize(eager)
    fused = copy.deepcopy(eager)
    fuse(fused)
    same_bits = {"atol": 1e-12, "rtol": 1e-12}
    for change in (
        lambda block: None,
        lambda block: setattr(block, "conv2", nn.Conv2d(6, 6, 3, 2, 1).to(DEVICE, torch.float64)),
        lambda block: block.first.__setitem__(1, nn.BatchNorm2d(6).to(DEVICE, torch.float64)),
        lambda block: block.first.append(nn.Sigmoid()),
        lambda block: block.first.pop(3),
        lambda block: setattr(block, "drop", torch.neg),
        lambda block: setattr(block, "drop", None),
        lambda block: block.shortcut.__setitem__(0, nn.Tanh()),
        lambda block: setattr(block, "relu", nn.SiLU()),
        lambda block: vars(block).update(shortcut=block._modules.pop("shortcut").forward),
    ):
        for block in (eager, fused):
            torch.manual_seed(1)
            change(block)
        with torch.no_grad():
            torch.testing.assert_close(fused.eval()(x), eager.eval()(x), **same_bits)


def test_a_blocks_part_that_is_shared_is_fused_in_each():
    model = net()
    model.blocks[2].conv2 = model.blocks[1].conv2
    model.blocks[2].conv2.stride = (1, 1)
    model.blocks.append(model.blocks[2])
    assert names(fuse(model).fused) == ["", "blocks.0", "blocks.2"]


def pooling(block: Block, nested: bool = False) -> nn.Sequential:
    """The block's shortcut, in which a pool now has the stride; nested, what was the shortcut follows the pool."""
    pool, block.shortcut[1].stride = nn.AvgPool2d(2, block.shortcut[1].stride, ceil_mode=True), (1, 1)
    if nested:
        block.shortcut = nn.Sequential(pool, block.shortcut)
    else:
        block.shortcut[0] = pool
    return block.shortcut


def deepened(model: Net) -> nn.Sequential:
    """The stem's convolution, now three with a BatchNorm and a ReLU between them."""
    layers = []
    for C, K, stride in ((3, 4, 2), (4, 5, 1), (5, 8, 1)):
        layers += (nn.Conv2d(C, K, 3, stride, 1), nn.BatchNorm2d(K), nn.ReLU())
    model.conv = nn.Sequential(*layers[:-2])
    randomize(model)
    model.to(DEVICE, torch.float64)
    return model.conv


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_deep_stem_gives_what_the_eager_one_gives(any_backend, train):
    eager = net().train(train)
    deepened(eager)
    eager.train(train).blocks = nn.Identity()
    fused, x = copy.deepcopy(eager), draw(2, 3, 13, 10, dtype=torch.float64)
    assert names(fuse(fused).fused) == [""]
    torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(infer(fused, x), infer(eager, x), atol=1e-9, rtol=1e-7)


def test_a_tracer_comes_by_the_container_of_a_deep_stem():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return name == "conv" or super().is_leaf_module(m, name)

    model = net()
    deepened(model)
    expected = Tracer().trace(model)
    assert "" in names(fuse(model).fused)
    assert [node.target for node in Tracer().trace(model).nodes] == [node.target for node in expected.nodes]


@pytest.mark.parametrize("place", ["conv", "conv.0", "conv.3", "pool"])
def test_a_deep_stem_that_cannot_be_fused_warns_by_the_name_of_its_class(monkeypatch, place):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    model = net()
    deepened(model)
    assert "" in names(fuse(model).fused)
    model.get_submodule(place).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=f"FusedNet runs PyTorch's operators one by one: {place} has hooks") as caught:
        model(draw(2, 3, 13, 10, dtype=torch.float64))
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators")
def test_what_is_changed_inside_a_deep_stem_or_a_shortcut_with_a_pool_after_fuse_is_run():
    eager, x = net().eval(), draw(2, 3, 32, 32, dtype=torch.float64)
    deepened(eager)
    pooling(eager.blocks[1], nested=True)
    fused, called = copy.deepcopy(eager), ([], [])
    assert len(fuse(fused).fused) == 4
    for change in (
        lambda model, hook: None,
        lambda model, hook: model.conv[3].register_forward_hook(hook),
        lambda model, hook: model.conv.__setitem__(1, nn.BatchNorm2d(4).to(DEVICE, torch.float64).eval()),
        lambda model, hook: model.conv.__setitem__(3, nn.Conv2d(4, 5, 3, padding=1).to(DEVICE, torch.float64)),
        lambda model, hook: model.conv.register_forward_hook(hook),
        lambda model, hook: model.blocks[1].shortcut[1].__setitem__(1, nn.Conv2d(8, 12, 1).to(DEVICE, torch.float64)),
        lambda model, hook: model.blocks[1].shortcut[0].register_forward_hook(hook),
        lambda model, hook: model.blocks[1].shortcut.__setitem__(0, nn.AvgPool2d(8)),  # its one pixel is broadcast
        lambda model, hook: model.blocks[1].shortcut.__setitem__(0, nn.MaxPool2d(2)),
    ):
        for model, kinds in zip((eager, fused), called):
            torch.manual_seed(1)
            change(model, lambda module, *_, kinds=kinds: kinds.append(type(module)))
        with torch.no_grad():
            torch.testing.assert_close(fused(x), eager(x), atol=1e-12, rtol=1e-12)
    assert called[0] == called[1] and {*called[0]} == {nn.Conv2d, nn.Sequential, nn.AvgPool2d}


# ---- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b, "drop", nn.Dropout()), "drop is a Dropout, not a Identity"),
        (lambda b: setattr(b, "drop", torch.neg), "drop is a builtin_function_or_method and no module"),
        (lambda b: setattr(b, "relu", nn.GELU()), "relu is a GELU, not a ReLU"),
        (lambda b: b.conv2.register_forward_hook(print), "conv2 has hooks"),
        (lambda b: b.first.register_forward_pre_hook(print), "first has hooks"),
        (lambda b: b.first.append(nn.Dropout()), "first.3 is a Dropout"),
        (lambda b: b.shortcut.__setitem__(0, nn.MaxPool2d(2)), "shortcut.0 is a MaxPool2d"),
        (lambda b: b.shortcut.__setitem__(0, nn.AvgPool2d(2)), "shortcut.1.stride is (2, 2), not (1, 1)"),
        (lambda b: setattr(b, "shortcut", Shortcut(nn.AvgPool2d(2))), "no convolution with a norm after it"),
        (lambda b: pooling(b)[0].register_forward_hook(print), "shortcut.0 has hooks"),
        (lambda b: pooling(b, nested=True)[1].register_forward_hook(print), "shortcut.1 has hooks"),
        (lambda b: pooling(b, nested=True).append(nn.Tanh()), "shortcut.2 is a Tanh, not a Identity"),
        (lambda b: setattr(b, "shortcut", nn.Sequential(*b.shortcut)), "shortcut is a Sequential, not a Shortcut"),
        (lambda b: setattr(b, "bn2", nn.GroupNorm(2, 6)), "bn2 is a GroupNorm"),
        (lambda b: b.shortcut.__setitem__(2, nn.GroupNorm(2, 6)), "shortcut.2 is a GroupNorm, not a BatchNorm2d"),
        (lambda b: b.shortcut.append(nn.Dropout()), "shortcut.3 is a Dropout, not a Identity"),
        (lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 3, 2, 1, dilation=2)), "conv2.padding is (1, 1), not (2, 2)"),
        (lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 3, 2, (1, 2), dilation=(1, 2))), "conv2.padding is (1, 2)"),
        (lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 5, 2, 2)), "conv2.kernel_size is"),
        (lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 3, 1, 1)), "shortcut.1.stride is"),
        (
            lambda b: parametrize.register_parametrization(b.conv2, "weight", nn.Identity()),
            "conv2 is a ParametrizedConv2d",
        ),
        (lambda b: nn.utils.weight_norm(b.conv2), "conv2 has hooks"),
        (lambda b: setattr(b, "forward", b.forward), "a forward of its own"),
        (lambda b: setattr(b, "scale", nn.Parameter(torch.ones(1))), "scale is none that"),
        (lambda b: setattr(b, "after", nn.Dropout()), "after is none that"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_a_block_that_might_compute_something_else_is_left_alone(change, reason):
    block = Block(4, 6, 2)
    change(block)
    report = fuse(block)
    assert reason in reason_of(report) and not report.fused
    assert type(block) is Block


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.bn.register_forward_hook(print), "bn has hooks"),
        (lambda m: setattr(m, "pool", nn.AvgPool2d(2)), "pool is a AvgPool2d, not a MaxPool2d"),
        (lambda m: setattr(m, "relu", nn.ReLU6()), "relu is a ReLU6"),
        (lambda m: setattr(m, "conv", nn.Sequential(m.conv, nn.Tanh())), "conv is a Sequential, not a Conv2d"),
        (lambda m: deepened(m).__setitem__(2, nn.Tanh()), "conv.2 is a Tanh, not a ReLU"),
        (lambda m: deepened(m).__setitem__(1, nn.GroupNorm(2, 4)), "conv.1 is a GroupNorm, not a BatchNorm2d"),
        (lambda m: deepened(m)[3].register_forward_hook(print), "conv.3 has hooks"),
        (lambda m: setattr(m, "conv", deepened(m)[3:]), "its convolutions are 2, not 1 or 3 with a pool"),
        (lambda m: deepened(m) and setattr(m, "pool", nn.Identity()), "are 3, not 1 or 3 with a pool"),
        (lambda m: deepened(m).register_forward_hook(print), "conv has hooks"),
        (lambda m: setattr(m, "forward", m.forward), "a forward of its own"),
    ],
)
def test_a_stem_that_might_compute_something_else_is_left_alone_and_the_blocks_are_fused(change, reason):
    model = net()
    change(model)
    report = fuse(model)
    assert names(report.left) == [""] and reason in reason_of(report)
    assert names(report.fused) == ["blocks.0", "blocks.1", "blocks.2"]
    assert type(model) is Net


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_network_with_an_identity_for_a_pool_has_a_fused_stem_too(train):
    eager = net().train(train)
    eager.pool = nn.Identity()
    fused, x = copy.deepcopy(eager), draw(2, 3, 9, 8, dtype=torch.float64)
    assert names(fuse(fused).fused)[0] == ""
    torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)


def test_a_network_that_uses_its_stem_twice_is_left_alone():
    model = Branches()
    assert "forward does not call conv, bn, relu, pool in turn, and nowhere else" in reason_of(fuse(model))
    assert type(model) is Branches


def test_a_sequential_network_whose_first_layers_are_no_stem_runs_them_as_they_are():
    for stem, names in (("imagenet", "conv1, bn1, relu, maxpool"), ("small", "conv1, bn1, relu")):
        other = ResNet(BasicBlock, depths=(1,), widths=(4,), num_classes=3, stem=stem)
        del other.bn1
        assert reason_of(fuse(other)) == f"it does not begin with {names}"
    eager, x = published().eval(), draw(*IMAGES, dtype=torch.float64)
    fused = copy.deepcopy(eager)
    fuse(fused)
    for model in (eager, fused):
        del model.bn1
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "begun",
    [
        lambda m: [m.conv, m.bn, m.relu, m.pool, nn.Tanh()],
        lambda m: [deepened(m), m.bn, m.relu, m.pool],
        lambda m: [m.conv, m.bn, m.relu, nn.Identity(), nn.Tanh()],
        lambda m: [m.conv, m.bn, m.relu],
        lambda m: [m.conv, m.bn, m.relu, nn.Sequential(nn.Tanh())],
    ],
    ids=["pool", "deep", "identity", "alone", "no pool"],
)
def test_a_sequence_that_begins_with_the_modules_of_a_stem_gives_what_the_eager_one_gives(any_backend, train, begun):
    eager = nn.Sequential(*begun(net())).train(train)
    fused, x = copy.deepcopy(eager), draw(2, 3, 13, 10, dtype=torch.float64)
    report = fuse(fused)
    assert names(report.fused) == [""] and not report.left and not report.unknown
    torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(infer(fused, x), infer(eager, x), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m[1].register_forward_hook(print), "1 has hooks"),
        (lambda m: setattr(m[3], "kernel_size", 2), "3.kernel_size is 2, not 3"),
        (lambda m: setattr(m, "forward", m.forward), "a forward of its own"),
    ],
)
def test_a_sequence_whose_stem_might_compute_something_else_is_left_alone(change, reason):
    model = cut()
    change(model)
    report = fuse(model)
    assert names(report.left) == [""] and reason in reason_of(report)
    assert names(report.fused) == ["4.0", "4.1"]


class Named(nn.Sequential):
    """A sequence that is told its name."""

    def __init__(self, name: str, **modules: nn.Module):
        super().__init__(OrderedDict(modules))
        self.name = name


class Backwards(nn.Sequential):
    """A sequence that goes through its modules from the last to the first."""

    def __iter__(self):
        return reversed(self._modules.values())


class Negated(nn.Sequential):
    def forward(self, x):
        return -super().forward(x)


class Counting(nn.Sequential):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return super().__call__(x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_class_that_is_derived_from_a_sequence_and_adds_nothing_is_fused_as_one(any_backend, duplicate):
    conv, bn, relu, _ = Stem(3, 8)
    eager = Named("first", conv=conv, bn=bn, relu=relu).to(DEVICE, torch.float64)
    fused, x = copy.deepcopy(eager), draw(2, 3, 13, 10, dtype=torch.float64)
    assert names(fuse(fused).fused) == [""] and type(fused).__name__ == "FusedStemNamed" and isinstance(fused, Named)
    fused = duplicate(fused)
    assert fused.name == "first"
    torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)
    unfuse(fused)
    assert type(fused) is Named


@pytest.mark.parametrize("cls", [Backwards, Negated, Counting])
def test_a_class_that_is_derived_from_a_sequence_and_does_more_is_left_alone(cls):
    report = fuse(cls(*[*Stem(3, 8)][:3]))
    assert not report.fused and report.unknown == {f"{__name__}.{cls.__name__}": 1}


def test_a_sequence_that_begins_with_something_else_is_none_with_a_stem():
    conv, bn, relu, pool = Stem(3, 8)
    for modules in ((), (bn, relu, pool), (conv, bn, relu, conv), (conv, nn.GroupNorm(2, 8), relu, pool)):
        report = fuse(nn.Sequential(*modules))
        assert not report.fused and not report.left


def test_what_was_put_in_the_place_of_a_module_of_a_sequences_stem_is_run_and_named_by_a_warning(monkeypatch):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager, x = cut().eval(), draw(*IMAGES, dtype=torch.float64)
    fused = copy.deepcopy(eager)
    fuse(fused)
    for model in (eager, fused):
        model[2] = nn.Tanh()
    with pytest.warns(UserWarning, match="^FusedStemSequential runs PyTorch's operators one by one: 2 is a Tanh"):
        torch.testing.assert_close(infer(fused, x), infer(eager, x), atol=1e-9, rtol=1e-7)
    assert reason_of(fuse(fused)) == "2 is a Tanh, not a ReLU"


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_part_of_a_sequence_with_a_stem_computes_what_the_eager_part_does():
    eager, x = cut().eval(), draw(2, 8, 13, 10, dtype=torch.float64)
    fused = copy.deepcopy(eager)
    fuse(fused)
    for part in (slice(1, None), slice(4, None), slice(1, 3)):
        torch.testing.assert_close(infer(fused[part], x), infer(eager[part], x), atol=1e-9, rtol=1e-7)


def test_a_class_whose_forward_was_replaced_is_left_alone(monkeypatch):
    def forward(self, image):
        return -image

    monkeypatch.setattr(Block, "forward", forward)
    block = Block(4, 4)
    assert reason_of(fuse(block)).endswith("Block.forward was replaced")
    assert type(block) is Block


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one")
@pytest.mark.parametrize("cls, method", [(Block, "forward"), (Net, "forward"), (nn.Conv2d, "_conv_forward")])
def test_what_is_put_into_a_class_after_fuse_is_run(monkeypatch, cls, method):
    eager = net().eval()
    fused = copy.deepcopy(eager)
    assert fuse(fused).fused
    before = getattr(cls, method)
    x = draw(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = fused(x)
        with monkeypatch.context() as changes:
            changes.setattr(cls, method, lambda self, *args: before(self, *args) + 1)
            torch.testing.assert_close(fused(x), eager(x))
        assert torch.equal(fused(x), plain)


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one")
@pytest.mark.parametrize("cls", [nn.AvgPool2d, nn.Identity, nn.Sequential])
def test_what_is_put_into_the_class_of_a_pool_or_of_a_container_is_run(monkeypatch, cls):
    eager, forward = deep().eval(), cls.forward
    fused, x = copy.deepcopy(eager), draw(2, 3, 32, 32, dtype=torch.float64)
    assert len(fuse(fused).fused) == 4
    monkeypatch.setattr(cls, "forward", lambda self, x: 1.5 * forward(self, x))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), atol=1e-9, rtol=1e-7)


class Derived(Block):
    def forward(self, image):
        return super().forward(image)


class DerivedResidual(Residual):
    def forward(self, X):
        return super().forward(X)


def test_derived_classes_whose_forward_is_not_understood_are_left_alone():
    model = nn.Sequential(Derived(4, 4), DerivedResidual(4, 4), LazyFusedResidual(4))
    before = kinds(model)
    report = fuse(model)
    assert kinds(model) == before and not report.fused
    assert [item.reason for item in report.left] == [
        f"it is derived from {Block.__module__}.Block and may compute something else",
        "it is derived from resnet.reference.Residual and may compute something else",
        "conv1 is a LazyConv2d, not a Conv2d",
    ]


class Initialised(Residual):
    """One that changes its weights alone."""

    def __init__(self, *args):
        super().__init__(*args)
        nn.init.zeros_(self.bn2.weight)


def test_derived_classes_that_have_the_forward_of_a_known_one_are_fused():
    eager = nn.Sequential(Initialised(4, 4), Initialised(4, 6, True, 2)).to(DEVICE, torch.float64)
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, 4, 9, 8, dtype=torch.float64)
    report = fuse(fused)
    assert names(report.fused) == ["0", "1"] and not report.left
    assert [type(block).__name__ for block in fused] == ["FusedInitialised"] * 2
    torch.testing.assert_close(step(fused, x), step(eager, x), atol=1e-9, rtol=1e-7)


def test_a_class_that_a_tool_derives_from_a_fused_one_stays_and_is_reported_as_fused():
    """As `torch.distributed.fsdp.fully_shard` does."""
    block = Block(4, 4)
    fuse(block)
    block.__class__ = derived = type("Derived", (type(block),), {})
    report = fuse(block)
    assert names(report.fused) == [""] and not report.left
    unfuse(block)
    assert type(block) is derived


def test_a_copy_of_a_class_that_is_derived_from_a_fused_one_is_of_that_class():
    block = Block(4, 4)
    fuse(block)
    block.__class__ = derived = type("Derived", (type(block),), {})
    assert type(copy.deepcopy(block)) is derived


def test_a_model_whose_children_know_it_is_freed():
    """As by a hook that holds the model. It is once another one is fused."""
    block = Block(4, 4).to(DEVICE)
    fuse(block)
    block.conv2.owner = [block]
    block(draw(2, 4, 5, 6))
    alive = weakref.ref(block)
    del block
    fuse(Block(4, 4))
    gc.collect()
    assert alive() is None


def test_own_blocks_are_left_alone_with_a_reason():
    model = own()
    model[1].bn1.register_forward_hook(print)
    model[2].forward = model[2].forward
    assert [item.reason for item in fuse(model).left] == [
        "bn1 has hooks, which a fused operator would not call",
        "it has a forward of its own",
    ]


def test_a_block_that_was_fused_and_no_longer_can_be_keeps_its_class_and_is_reported():
    model = net()
    fuse(model)
    fused = type(model.blocks[1])
    handle = model.blocks[1].conv2.register_forward_hook(print)
    report = fuse(model)
    assert names(report.left) == ["blocks.1"] and type(model.blocks[1]) is fused
    handle.remove()
    assert not fuse(model).left


# ---- the report ------------------------------------------------------------------------------------------------------


def test_a_report_prints_a_line_for_each_class_and_reason():
    model = nn.Sequential(resnet18(in_channels=3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[0][3][1].bn2 = nn.Identity()
    model[0][4][0].bn2 = nn.Identity()
    model[0][4][1].conv1.register_forward_hook(print)
    assert str(fuse(model)) == "\n".join(
        [
            "fused: 6",
            "  1 resnet.reference.Stem: 0.0",
            "  5 resnet.reference.Residual: 0.1.0-1, 0.2.0-1, 0.3.0",
            "left as they are: 3",
            "  2 resnet.reference.Residual, since bn2 is a Identity, not a BatchNorm2d: 0.3.1, 0.4.0",
            "  1 resnet.reference.Residual, since conv1 has hooks, which a fused operator would not call: 0.4.1",
            "of other classes, with a convolution and a BatchNorm: 1",
            "  1 torch.nn.modules.container.Sequential",
        ]
    )


def test_a_report_names_the_stem_of_a_network_and_the_model_itself():
    assert "  1 stem of tests" in str(fuse(net())).replace(Net.__module__, "tests")
    assert str(fuse(Residual(4, 4))) == "fused: 1\n  1 resnet.reference.Residual: the model itself"


def test_a_model_with_nothing_that_is_known_says_so():
    report = fuse(nn.Sequential(nn.Linear(2, 2)))
    assert not report.fused and not report.left and not report.unknown
    assert str(report) == "fused: 0, as the model has no block or stem that resnet.fuse knows"


def test_what_is_inside_a_known_block_is_not_counted_as_unknown():
    assert fuse(net()).unknown == {}
    assert fuse(nn.ModuleList([Derived(4, 6), nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))])).unknown == {
        "torch.nn.modules.container.Sequential": 1
    }


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: expected a torch.nn.Module, got a type"):
        function(Residual)


# ---- tools -----------------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize(
    "tool",
    [
        torch.fx.symbolic_trace,
        torch.jit.script,
        lambda model: torch.jit.trace(model, draw(*IMAGES, dtype=torch.float64)),
        lambda model: torch.compile(model, backend="eager", fullgraph=True),
        lambda model: torch.export.export(model, (draw(*IMAGES, dtype=torch.float64),)).module(),
    ],
    ids=["fx", "script", "trace", "compile", "export"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_tools_see_a_model_that_computes_the_same(make, tool, monkeypatch):
    monkeypatch.setattr(nn.functional, "conv2d", torch.conv2d)  # TorchScript would read tests/conftest.py's
    model = make().eval()
    x = draw(*IMAGES, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        fuse(model)
        torch.testing.assert_close(tool(model)(x), expected, atol=1e-9, rtol=1e-7)


def checkpointed(model: nn.Module) -> nn.Module:
    """Each stage's activations are computed again in backward."""
    for stage in (model.layer1, model.layer2):
        forward = stage.forward
        stage.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    return model


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(DEVICE.type, (1,))
    for block in (*model.layer1, *model.layer2):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tool", [checkpointed, DistributedDataParallel, sharded], ids=["checkpoint", "DDP", "FSDP2"])
def test_tools_train_a_fused_model_as_the_eager_one(one_process, tool):
    states = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        model = published()
        if is_fused:
            assert not fuse(model).left
        wrapped = tool(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if tool is checkpointed else None
        for seed in range(2):
            optimizer.zero_grad()
            wrapped(draw(*IMAGES, seed=seed, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
        state = model.state_dict() if average is None else average.module.state_dict()
        states.append({name: getattr(value, "to_local", lambda v=value: v)() for name, value in state.items()})
    torch.testing.assert_close(states[1], states[0], atol=1e-9, rtol=1e-7)


def test_a_fused_model_under_autocast_is_eagers_within_its_rounding():
    eager = published().float()
    fused = copy.deepcopy(eager)
    fuse(fused)
    x = draw(*IMAGES)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, expected = fused(x), eager(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    exact = copy.deepcopy(eager).double()(x.double())
    errors = [(out.double() - exact).square().mean().sqrt() for out in (got, expected)]
    assert errors[0] <= 2 * errors[1]


def test_a_replica_runs_its_own_modules():
    """What `nn.DataParallel` makes of a module: a shallow copy whose children are then replaced."""
    block = Block(4, 4).to(DEVICE).eval()
    fuse(block)
    x = draw(2, 4, 6, 5)
    with torch.no_grad():
        before = block(x)
        replica = block._replicate_for_data_parallel()
        replica.conv2 = copy.deepcopy(block.conv2)
        replica.conv2.weight.zero_()
        assert not torch.equal(replica(x), before)
        assert torch.equal(block(x), before)
