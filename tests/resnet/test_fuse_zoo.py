"""`fuse` on the ResNets of torchvision, timm, transformers and pytorchcv, each where it is installed."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from resnet import BasicBlock, Bottleneck, Residual, ResNet, SmallStem, Stem, fusable, fuse, unfuse
from tests.conftest import DEVICE, ROOT
from tests.helpers.blocks import assert_parity, draw, randomize, saved_and_loaded, snapshot, step, weights_dtype


def torchvision(name: str, **options) -> nn.Module:
    return getattr(pytest.importorskip("torchvision").models, name)(num_classes=5, **options)


def timm(name: str, **options) -> nn.Module:
    classes = {} if "features_only" in options else {"num_classes": 5}
    return pytest.importorskip("timm").create_model(name, **classes, **options)


def transformers(layer_type: str, **options) -> nn.Module:
    library = pytest.importorskip("transformers")
    config = library.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type=layer_type, num_labels=5, **options
    )
    return library.ResNetForImageClassification(config)


def pytorchcv(name: str) -> nn.Module:
    """The maps of a net for images of 32x32; its pool is for these alone."""
    return pytest.importorskip("pytorchcv.model_provider").get_model(name).features[:-1]


class Features(nn.Module):
    """The last map of a backbone."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).feature_maps[-1]


def rt_detr(layer_type: str) -> nn.Module:
    """The backbone of RT-DETR."""
    library = pytest.importorskip("transformers")
    config = library.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24], depths=[1, 2], layer_type=layer_type, out_features=["stage2"]
    )
    return Features(library.RTDetrResNetBackbone(config))


def transformers_regnet(layer_type: str) -> nn.Module:
    library = pytest.importorskip("transformers")
    config = library.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], groups_width=8, layer_type=layer_type, num_labels=5
    )
    return library.RegNetForImageClassification(config)


def of_frozen_norms(name: str) -> nn.Module:
    return torchvision(name, norm_layer=pytest.importorskip("torchvision").ops.FrozenBatchNorm2d)


def dilated_torchvision(name: str) -> nn.Module:
    """As its segmentation models have it for a backbone."""
    return torchvision(name, replace_stride_with_dilation=[False, True, True])


def cut_up(net: nn.Module) -> nn.Sequential:
    """A net without its last layer, as it is often made a backbone."""
    return nn.Sequential(*list(net.children())[:-1], nn.Flatten())


def norm_with_activation(channels: int) -> nn.Module:
    return pytest.importorskip("timm").layers.BatchNormAct2d(channels)


def attending(layer: str | type[nn.Module], **options) -> nn.Module:
    """timm's ResNet-18 whose blocks end in another attention."""
    pytest.importorskip("timm")
    return timm("resnet18", block_args={"attn_layer": partial(layer, **options) if options else layer})


def attention(name: str) -> type[nn.Module]:
    return getattr(pytest.importorskip("timm").layers, name)


class Entry(NamedTuple):
    make: Callable[[], nn.Module]
    fused: int
    left: int


ZOO = {
    "torchvision resnet18": Entry(lambda: torchvision("resnet18"), 9, 0),
    "torchvision resnet50": Entry(lambda: torchvision("resnet50"), 17, 0),
    "torchvision resnet18, cut up": Entry(lambda: cut_up(torchvision("resnet18")), 9, 0),
    "timm resnet18d, cut up": Entry(lambda: cut_up(timm("resnet18d")), 9, 0),
    "torchvision resnet18, FrozenBatchNorm2d": Entry(lambda: of_frozen_norms("resnet18"), 9, 0),
    "torchvision resnext50": Entry(lambda: torchvision("resnext50_32x4d"), 17, 0),
    "torchvision resnet50, dilation": Entry(lambda: dilated_torchvision("resnet50"), 17, 0),
    "torchvision regnet_x": Entry(lambda: torchvision("regnet_x_400mf"), 23, 0),
    "timm regnetx": Entry(lambda: timm("regnetx_002"), 14, 0),
    "transformers RegNet": Entry(lambda: transformers_regnet("x"), 5, 0),
    "timm resnet18": Entry(lambda: timm("resnet18"), 9, 0),
    "timm resnet50": Entry(lambda: timm("resnet50"), 17, 0),
    "timm resnet18d": Entry(lambda: timm("resnet18d"), 9, 0),
    "timm resnext50": Entry(lambda: timm("resnext50_32x4d"), 17, 0),
    "timm resnet50, dilation": Entry(lambda: timm("resnet50", output_stride=8), 17, 0),
    "timm resnet18, dilation": Entry(lambda: timm("resnet18", output_stride=16), 9, 0),
    "timm resnet26t": Entry(lambda: timm("resnet26t"), 9, 0),
    "timm seresnet18": Entry(lambda: timm("seresnet18"), 9, 0),
    "timm seresnext26t": Entry(lambda: timm("seresnext26t_32x4d"), 9, 0),
    "timm ecaresnet26t": Entry(lambda: timm("ecaresnet26t"), 9, 0),
    "timm resnet18, EffectiveSEModule": Entry(lambda: attending("ese"), 9, 0),
    "timm regnety": Entry(lambda: timm("regnety_002"), 14, 0),
    "timm resnetv2_18": Entry(lambda: timm("resnetv2_18"), 8, 0),
    "timm resnetv2_50": Entry(lambda: timm("resnetv2_50"), 16, 0),
    "torchvision regnet_y": Entry(lambda: torchvision("regnet_y_400mf"), 17, 0),
    "transformers RegNet, gates": Entry(lambda: transformers_regnet("y"), 5, 0),
    "transformers basic": Entry(lambda: transformers("basic"), 5, 0),
    "transformers bottleneck": Entry(lambda: transformers("bottleneck"), 5, 0),
    "transformers stride first": Entry(lambda: transformers("bottleneck", downsample_in_bottleneck=True), 5, 0),
    "transformers RT-DETR, basic": Entry(lambda: rt_detr("basic"), 4, 0),
    "transformers RT-DETR, bottleneck": Entry(lambda: rt_detr("bottleneck"), 4, 0),
    "pytorchcv resnet20": Entry(lambda: pytorchcv("resnet20_cifar10"), 10, 0),
    "pytorchcv seresnet20": Entry(lambda: pytorchcv("seresnet20_cifar10"), 10, 0),
    "pytorchcv resnext29": Entry(lambda: pytorchcv("resnext29_32x4d_cifar10"), 10, 0),
}
zoo = pytest.mark.parametrize("name", ZOO)
ONE_OF_EACH = (
    "torchvision resnet18",
    "timm resnet18",
    "transformers bottleneck",
    "timm seresnet18",
    "transformers RegNet, gates",
)
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)
IMAGES = (2, 3, 64, 64)


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO[name].make()
    randomize(model)
    return model.to(DEVICE, dtype).eval()


def logits(out: Tensor | object) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def run(model: nn.Module, x: Tensor) -> Tensor:
    return logits(model(x))


def one_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return step(model, x, lambda call: logits(call()))


def fused_classes(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fused")]


def links(out: Tensor) -> int:
    """How many blocks, in the graph of what a model gives, give the block before what its backward begins with."""
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [after for after, _ in node.next_functions]
    return sum(getattr(node, "before", None) is not None for node in seen)


# ---- each model ------------------------------------------------------------------------------------------------------


@zoo
def test_what_is_fused_and_what_is_left(name):
    model = made(name)
    before = [type(module) for module in model.modules()]
    report = fuse(model)
    assert (len(report.fused), len(report.left)) == ZOO[name][1:]
    named = [kind for kind in fused_classes(model) if kind != "FusedSequential" and not kind.endswith("Stage")]
    assert len(named) == len(report.fused)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), before, strict=True))
    assert fuse(model) == report
    unfuse(model)
    assert [type(module) for module in model.modules()] == before


LINKED = {
    "torchvision resnet18": 7,
    "torchvision resnet18, cut up": 7,
    "torchvision resnet50": 15,
    "torchvision resnext50": 15,
    "torchvision regnet_x": 18,  # a stage's first block is apart
    "timm resnet18": 7,
    "timm resnet26t": 7,
    "timm regnetx": 9,
    "timm seresnet18": 0,
    "transformers bottleneck": 2,
    "transformers RegNet": 2,
    "transformers RT-DETR, basic": 1,
}


@pytest.mark.parametrize("name", LINKED)
def test_blocks_that_follow_each_other_are_linked(name):
    model = made(name)
    fuse(model)
    assert links(run(model, draw(*IMAGES, dtype=torch.float64))) == LINKED[name]


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm resnet18"])
def test_where_a_stage_has_a_hook_it_is_not_linked_to_its_neighbours(name):
    model, seen = made(name), []
    fuse(model)
    model.layer2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert links(run(model, draw(*IMAGES, dtype=torch.float64))) == 5 and len(seen) == 1


def test_stages_under_timms_checkpoints_are_not_linked():
    model = made("timm resnet18")
    fuse(model)
    model.set_grad_checkpointing()
    assert links(run(model, draw(*IMAGES, dtype=torch.float64))) == 0


@zoo
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_step_gives_what_the_eager_one_gives(name, train):
    eager = made(name).train(train)
    fused = copy.deepcopy(eager)
    fuse(fused)
    x = draw(*IMAGES, dtype=torch.float64)
    torch.testing.assert_close(one_step(fused, x), one_step(eager, x), atol=1e-8, rtol=1e-6)


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        out = run(model, x.to(weights_dtype(model)))
    return {"out": out, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


@one_of_each
def test_outputs_and_statistics_in_float32_are_as_exact_as_eagers(name):
    """Gradients are not compared here: in a whole network a single value on the other side of a ReLU outweighs all."""
    results = []
    for seed in range(3):
        eager = made(name, torch.float32, seed).train()
        fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
        fuse(fused)
        results.append(tuple(outputs(model, draw(*IMAGES, seed=seed)) for model in (eager, fused, exact)))
    assert_parity(results)


PUBLISHED = {
    "ResNet-D, as timm": (
        lambda: timm("resnet18d"),
        lambda: ResNet(BasicBlock, (2, 2, 2, 2), num_classes=5, stem="deep", avg_down=True),
    ),
    "ResNeXt, as torchvision": (
        lambda: torchvision("resnext50_32x4d"),
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), num_classes=5, mid_widths=(128, 256, 512, 1024), groups=32),
    ),
    "SE-ResNet, as timm": (
        lambda: timm("seresnet50"),
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), num_classes=5, squeeze_excite=True),
    ),
    "SE-ResNet of basic blocks, as timm": (
        lambda: timm("seresnet18"),
        lambda: ResNet(BasicBlock, (2, 2, 2, 2), num_classes=5, squeeze_excite=True),
    ),
    "dilated, as torchvision": (
        lambda: dilated_torchvision("resnet50"),
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), num_classes=5, output_stride=8),
    ),
    "dilated, as timm": (
        lambda: timm("resnet50", output_stride=16),
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), num_classes=5, output_stride=16),
    ),
}


@pytest.mark.parametrize("theirs, ours", PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_net_takes_their_weights_and_gives_their_values(theirs, ours):
    eager, own = theirs().to(DEVICE, torch.float64), ours().to(DEVICE, torch.float64)
    own.load_state_dict(eager.state_dict(), strict=True)
    assert list(own.state_dict()) == list(eager.state_dict())
    torch.testing.assert_close(one_step(own, draw(*IMAGES)), one_step(eager, draw(*IMAGES)), atol=1e-9, rtol=1e-7)


@zoo
def test_the_state_dict_and_its_tensors_stay(name):
    model = made(name)
    before = model.state_dict(keep_vars=True)
    fuse(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    twin = made(name, seed=1)
    twin.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(twin.state_dict(), strict=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved_and_loaded,
}


@one_of_each
@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_are_fused(name, duplicate):
    model = made(name)
    fuse(model)
    x = draw(*IMAGES, dtype=torch.float64)
    with torch.no_grad():
        before = run(model, x)
        twin = COPIES[duplicate](model)
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(run(twin, x), before)


READER = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
out = model(torch.load(sys.argv[2]))
torch.save(getattr(out, "logits", out).detach(), sys.argv[3])
print(*(type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fused")))
"""


@one_of_each
def test_a_saved_model_is_fused_in_a_fresh_process(name, tmp_path: Path):
    model, x = made(name), draw(*IMAGES, dtype=torch.float64)
    fuse(model)
    files = [str(tmp_path / file) for file in ("model.pt", "x.pt", "out.pt")]
    torch.save(model, files[0])
    torch.save(x, files[1])
    done = subprocess.run([sys.executable, "-c", READER, *files], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == fused_classes(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(files[2]), run(model, x), atol=1e-9, rtol=1e-7)


@one_of_each
def test_an_optimizer_that_was_made_before_goes_on(name):
    eager = made(name).train()
    fused = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in (eager, fused)]
    for i in range(2):
        for model, optimizer in zip((eager, fused), optimizers):
            optimizer.zero_grad()
            run(model, draw(*IMAGES, seed=i, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        fuse(fused)
    assert fused_classes(fused)
    torch.testing.assert_close(snapshot(fused), snapshot(eager), atol=1e-8, rtol=1e-6)


@one_of_each
def test_compiled_and_exported_models_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(nn.functional, "conv2d", torch.conv2d)  # tools would read tests/conftest.py's
    model, x = made(name), draw(*IMAGES, dtype=torch.float64)
    with torch.no_grad():
        expected = run(model, x)
        fuse(model)
        for recorded in (
            torch.compile(model, backend="eager", fullgraph=True),
            torch.export.export(model, (x,)).module(),
        ):
            torch.testing.assert_close(run(recorded, x), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["torchvision resnet50", "timm resnet18", "timm seresnet18", "torchvision regnet_y"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripted_and_symbolically_traced_models_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(nn.functional, "conv2d", torch.conv2d)  # tools would read tests/conftest.py's
    model, x = made(name), draw(*IMAGES, dtype=torch.float64)
    with torch.no_grad():
        expected = run(model, x)
        fuse(model)
        for recorded in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
            torch.testing.assert_close(recorded(x), expected, atol=1e-9, rtol=1e-7)


# ---- what is left alone, and what else the libraries do with their models --------------------------------------------


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (lambda: torchvision("resnet18", norm_layer=lambda K: nn.GroupNorm(1, K)), ["bn1 is a GroupNorm"]),
        (lambda: torchvision("resnet18", norm_layer=norm_with_activation), ["bn1 is a BatchNormAct2d"]),
        (lambda: timm("resnet18", drop_path_rate=0.1), ["drop_path is a DropPath"]),
        (lambda: timm("resnet18", drop_block_rate=0.1), ["drop_block is a DropBlock2d"]),
        (lambda: timm("resnet18", act_layer="silu"), ["act1 is a SiLU"]),
        (lambda: timm("resnetblur50"), ["aa is a BlurPool2d", "maxpool is a Sequential"]),
        (lambda: attending(attention("SEModule"), add_maxpool=True), ["se.add_maxpool is True"]),
        (lambda: attending("ecam"), ["se.conv2 is a Conv1d"]),
        (lambda: attending("gc"), ["se is a GlobalContext"]),
        (lambda: attending("cbam"), ["se is a CbamModule"]),
        (lambda: timm("regnety_002", drop_path_rate=0.1), ["drop_path is a DropPath"]),
        (lambda: timm("regnetx_002", act_layer="silu"), ["conv1.bn.act is a SiLU"]),
        (lambda: timm("regnetx_002", drop_path_rate=0.1), ["drop_path is a DropPath"]),
        (lambda: timm("regnetx_002", norm_layer="layernorm2d"), ["conv1.bn is a LayerNormAct2d"]),
        (lambda: timm("resnet18d", act_layer="silu"), ["act1 is a SiLU", "conv1.2 is a SiLU"]),
        (lambda: timm("resnet18d", output_stride=8), ["downsample.0 is a AvgPool2dSame"]),
        (
            lambda: transformers("basic", hidden_act="gelu"),
            ["embedder.activation is a GELU", "activation is a GELU"],
        ),
    ],
)
def test_the_reasons_name_what_is_in_the_way(make, reasons):
    found = {item.reason for item in fuse(make()).left}
    for reason in reasons:
        assert any(text.startswith(reason) for text in found), found


# Changes of a block of timm's RegNet, whose norms hold the activations that follow them.
INSIDE = {
    "another activation": lambda b: setattr(b.conv1.bn, "act", nn.GELU()),
    "an activation more": lambda b: setattr(b.conv3.bn, "act", nn.ReLU()),
    "an activation of the shortcut": lambda b: setattr(b.downsample.bn, "act", nn.ReLU()),
    "a drop": lambda b: setattr(b.conv2.bn, "drop", nn.Softplus()),
    "a drop of the shortcut": lambda b: setattr(b.downsample.bn, "drop", nn.Softplus()),
    "a hook": lambda b: b.conv2.bn.act.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook of the norm": lambda b: b.conv2.bn.register_forward_hook(lambda module, args, out: 2 * out),
    "no activation": lambda b: delattr(b.conv1.bn, "act") or setattr(b.conv1.bn, "act", nn.Identity()),
}


@pytest.mark.parametrize("change", INSIDE.values(), ids=INSIDE)
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_what_the_norms_of_timms_regnets_hold_is_watched(change):
    eager = timm("regnetx_002").to(DEVICE, torch.float64)
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(*IMAGES, dtype=torch.float64)
    fuse(fused)
    torch.testing.assert_close(one_step(fused, x), one_step(eager, x), atol=1e-8, rtol=1e-6)
    for model in (fused, eager):
        change(model.s2.b1)
    torch.testing.assert_close(one_step(fused, x), one_step(eager, x), atol=1e-8, rtol=1e-6)
    unfuse(fused)
    assert fuse(fused).left


@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_what_the_norm_behind_a_pool_of_timms_regnets_holds_is_watched():
    eager = timm("regnetx_002", downsample="avg").s2.b1.to(DEVICE, torch.float64)
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, 24, 8, 8, dtype=torch.float64)
    assert not fuse(fused).left
    torch.testing.assert_close(step(fused, x), step(eager, x))
    for block in (fused, eager):
        block.downsample[1].bn.act = nn.Softplus()
    torch.testing.assert_close(step(fused, x), step(eager, x))


GATES = {  # a block with squeeze-and-excitation, and the module's name
    "timm's SE-ResNet": (lambda: timm("seresnet18").layer2[0], "se"),
    "timm's ECA-ResNet": (lambda: timm("ecaresnet26t").layer2[0], "se"),
    "timm's RegNet": (lambda: timm("regnety_002").s2.b1, "se"),
    "torchvision's RegNet": (lambda: torchvision("regnet_y_400mf").trunk_output.block2[0], "f.se"),
    "transformers' RegNet": (lambda: transformers_regnet("y").regnet.encoder.stages[1].layers[0], "layer.2"),
}
OTHERWISE = {
    "a hook": lambda se: se.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook before it": lambda se: se.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "a forward of its own": lambda se: setattr(se, "forward", lambda x: x * 0.5),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize("case", GATES)
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_squeeze_and_excitation_that_does_something_else_is_called(case, change, called):
    make, name = GATES[case]
    eager = make().to(DEVICE, torch.float64).eval()
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, next(eager.parameters()).shape[1], 6, 6, dtype=torch.float64)
    assert not fuse(fused).left
    if called:
        torch.testing.assert_close(fused(x), eager(x))
    for block in (fused, eager):
        change(block.get_submodule(name))
    torch.testing.assert_close(fused(x), eager(x))
    unfuse(fused)
    (item,) = fuse(fused).left
    assert item.reason.startswith(f"{name} has ")


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_an_identity_beside_gates_is_called_where_it_has_hooks(called):
    eager = transformers_regnet("y").regnet.encoder.stages[1].layers[1].to(DEVICE, torch.float64).eval()
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, 32, 6, 6, dtype=torch.float64)
    assert not fuse(fused).left
    if called:
        torch.testing.assert_close(fused(x), eager(x))
    for block in (fused, eager):
        block.shortcut.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(fused(x), eager(x))
    unfuse(fused)
    (item,) = fuse(fused).left
    assert item.reason.startswith("shortcut has hooks")


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("case", "pool"), [("torchvision's RegNet", "f.se.avgpool"), ("transformers' RegNet", "layer.2.pooler")]
)
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_a_pool_of_another_size_is_called(case, pool, called):
    """Its gates are those of quarters, which eager multiplies a map of as many pixels with."""
    eager = GATES[case][0]().to(DEVICE, torch.float64).eval()
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, next(eager.parameters()).shape[1], 4, 4, dtype=torch.float64)
    assert not fuse(fused).left
    if called:
        torch.testing.assert_close(fused(x), eager(x))
    for block in (fused, eager):
        block.get_submodule(pool).output_size = 2
    torch.testing.assert_close(fused(x), eager(x))
    unfuse(fused)
    assert [item.reason for item in fuse(fused).left] == [f"{pool}.output_size is 2, not 1"]


def test_split_attention_is_in_blocks_of_another_class_whose_first_convolution_is_fused_with_its_norm():
    report = fuse(timm("resnest14d"))
    assert len(report.fused) == 9 and all(item.stem for item in report.fused)
    assert report.unknown["timm.models.resnest.ResNestBottleneck"] == 4


def _last(container: nn.Module, name: str) -> None:
    """A child becomes the last one that a sequence calls."""
    container._modules[name] = container._modules.pop(name)


REORDERED = {
    "torchvision's transform": (lambda: torchvision("regnet_x_400mf").trunk_output.block2[1], "f", "a"),
    "torchvision's layer": (lambda: torchvision("regnet_x_400mf").trunk_output.block2[1], "f.b", "1"),
    "torchvision's transform, gates": (lambda: torchvision("regnet_y_400mf").trunk_output.block2[1], "f", "se"),
    "transformers' layers, gates": (lambda: transformers_regnet("y").regnet.encoder.stages[1].layers[1], "layer", "2"),
    "torchvision's shortcut": (lambda: torchvision("resnet18").layer2[0], "downsample", "0"),
    "transformers' layers": (lambda: transformers_regnet("x").regnet.encoder.stages[1].layers[1], "layer", "1"),
}


STEMS = {
    "appended": lambda stem: stem.append(nn.Softplus()),
    "inserted": lambda stem: stem.insert(1, nn.Softplus()),
    "in another order": lambda stem: _last(stem, "1"),
    "deleted": lambda stem: stem.pop(2),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", STEMS.values(), ids=STEMS)
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_each_module_of_a_stem_that_is_a_sequence_is_called(change, called):
    eager = torchvision("regnet_x_400mf").stem.to(DEVICE, torch.float64).eval()
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, 3, 9, 8, dtype=torch.float64)
    assert not fuse(fused).left
    if called:
        torch.testing.assert_close(fused(x), eager(x))
    for stem in (fused, eager):
        change(stem)
    torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("case", REORDERED)
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_a_sequence_in_another_order_is_run_in_that_order(case, called):
    make, container, name = REORDERED[case]
    eager = make().to(DEVICE, torch.float64).eval()
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, next(eager.parameters()).shape[1], 6, 6, dtype=torch.float64)
    assert not fuse(fused).left
    if called:
        torch.testing.assert_close(fused(x), eager(x))
    for block in (fused, eager):
        _last(block.get_submodule(container), name)
    try:
        expected = eager(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused(x)
    else:
        torch.testing.assert_close(fused(x), expected)


HOLDERS = {  # where timm's norm with an activation is none that the class is known for
    "a unit of a bottleneck": (lambda: Bottleneck(32, 8), "bn3"),
    "a shortcut": (lambda: Bottleneck(8, 8), "downsample.1"),
    "a textbook's block": (lambda: Residual(8, 8), "bn1"),
    "a stem": (lambda: Stem(8, 8), "1"),
    "a small stem": (lambda: SmallStem(8, 8), "1"),
    "timm's block": (lambda: timm("resnet18").layer1[0], "bn2"),
    "torchvision's block": (lambda: torchvision("resnet18").layer1[0], "bn2"),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.filterwarnings("ignore:.* runs PyTorch's operators one by one")
def test_an_activation_in_a_norm_is_applied(holder):
    layers, (make, name) = pytest.importorskip("timm.layers"), HOLDERS[holder]
    eager = make()
    fused = copy.deepcopy(eager)
    assert not fuse(fused).left
    for module in (eager, fused):
        norm = layers.BatchNormAct2d(module.get_submodule(name).num_features, act_layer=nn.Softplus)
        module.set_submodule(name, norm)
        module.to(DEVICE, torch.float64)
    x = draw(2, next(eager.parameters()).shape[1], 8, 8, dtype=torch.float64)
    torch.testing.assert_close(step(fused, x), step(eager, x))
    unfuse(fused)
    assert [item.reason for item in fuse(fused).left] == [f"{name} is a BatchNormAct2d, not a BatchNorm2d"]


def test_models_that_torchvision_quantizes_are_derived_and_left_alone():
    model = pytest.importorskip("torchvision").models.quantization.resnet18()
    report = fuse(model)
    assert not report.fused and len(report.left) == 9
    assert all("is derived from torchvision.models.resnet." in item.reason for item in report.left)


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_hooks_on_the_stems_modules_see_what_they_saw(kind):
    model = {"torchvision": torchvision, "timm": timm}[kind]("resnet18").to(DEVICE).eval()
    x, seen = draw(*IMAGES), []
    model.bn1.register_forward_hook(lambda module, args, out: seen.append(out.clone()))  # ReLU changes it
    report = fuse(model)
    assert [item.name for item in report.left] == [""]
    with torch.no_grad():
        model(x)
        bn, y = model.bn1, model.conv1(x)
        expected = nn.functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    torch.testing.assert_close(seen, [expected])


def test_timms_other_ways_through_a_fused_network_are_its_own():
    model = timm("resnet18").to(DEVICE, torch.float64).eval()
    eager = copy.deepcopy(model)
    fuse(model)
    x, close = draw(*IMAGES, dtype=torch.float64), {"atol": 1e-9, "rtol": 1e-7}
    with torch.no_grad():
        for call in (
            lambda m: m.forward_features(x),
            lambda m: m.forward_head(m.forward_features(x), pre_logits=True),
            lambda m: m.forward_intermediates(x),
        ):
            torch.testing.assert_close(call(model), call(eager), **close)
    for m in (model, eager):
        m.set_grad_checkpointing()
    torch.testing.assert_close(one_step(model.train(), x), one_step(eager.train(), x), atol=1e-8, rtol=1e-6)


def test_blocks_in_timms_feature_extractor_are_fused():
    model = pytest.importorskip("timm").create_model("resnet18", features_only=True).to(DEVICE, torch.float64).eval()
    x = draw(*IMAGES, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        report = fuse(model)
        torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=1e-7)
    assert len(report.fused) == 8 and [item.reason for item in report.left] == ["it gives what act1 gives"]


@pytest.mark.parametrize("feature_cls", ["list", "dict"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_the_stem_of_timms_feature_extractor_is_fused_where_only_stages_are_asked_for(feature_cls, checkpointed):
    eager = timm("resnet18", features_only=True, out_indices=(1, 4), feature_cls=feature_cls)
    randomize(eager)
    eager.to(DEVICE, torch.float64).train().set_grad_checkpointing(checkpointed)
    fused = copy.deepcopy(eager)
    report = fuse(fused)
    assert len(report.fused) == 9 and not report.left and not report.unknown
    x = draw(*IMAGES, dtype=torch.float64)
    results = []
    for model in (fused, eager):
        found = model(x)
        loss = sum(out.square().mean() for out in (found.values() if feature_cls == "dict" else found))
        results.append((found, torch.autograd.grad(loss, list(model.parameters())), snapshot(model)))
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-6)


def test_a_backbone_of_torchvisions_detectors_has_fused_blocks():
    models = pytest.importorskip("torchvision").models
    model = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    report = fuse(model)
    stem, *blocks = [item.kind for item in report.fused]
    assert stem == "torchvision.models._utils.IntermediateLayerGetter"
    assert blocks == ["torchvision.models.resnet.Bottleneck"] * 16


def getter(*layers: str) -> nn.Module:
    """Of a ResNet-18 the part that gives what these of its children give."""
    net = torchvision("resnet18")
    randomize(net)
    utilities = pytest.importorskip("torchvision.models._utils")
    return utilities.IntermediateLayerGetter(net, {name: name for name in layers}).to(DEVICE, torch.float64)


@pytest.mark.parametrize("layers", [("layer1", "layer4"), ("maxpool", "layer2"), ("relu",)], ids=", ".join)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_stem_of_a_part_of_torchvisions_net_is_fused(layers, train):
    eager = getter(*layers).train(train)
    fused = copy.deepcopy(eager)
    assert fuse(fused).fused[0].name == ""
    x = draw(*IMAGES, dtype=torch.float64)
    results = []
    for model in (fused, eager):
        found = model(x)
        loss = sum(out.square().mean() for out in found.values())
        results.append((found, torch.autograd.grad(loss, list(model.parameters())), snapshot(model)))
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-6)
    assert list(fused(x)) == list(layers)
    torch.testing.assert_close(saved_and_loaded(fused)(x), fused(x))


def test_a_part_that_gives_what_is_inside_the_stem_keeps_its_class():
    model = getter("relu", "layer1")
    report = fuse(model)
    assert [item.reason for item in report.left] == ["it gives what relu gives"] and len(report.fused) == 2
    model = getter("layer1")
    x = draw(*IMAGES, dtype=torch.float64)
    fuse(model)
    model.return_layers = {"relu": "relu"}  # a user may ask for it later
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x)["relu"], model.relu(model.bn1(model.conv1(x))))


@pytest.mark.parametrize("order", ["fused first", "extracted first"])
def test_blocks_that_are_leaves_of_torchvisions_feature_extractor_are_fused(order):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net, x = made("torchvision resnet18"), draw(*IMAGES, dtype=torch.float64)
    block = type(net.layer1[0])
    with torch.no_grad():
        expected = extraction.create_feature_extractor(net, ["layer2"])(x)["layer2"]
        if order == "fused first":
            fuse(net)
        model = extraction.create_feature_extractor(net, ["layer2"], tracer_kwargs={"leaf_modules": [block]})
        report = fuse(model)
        torch.testing.assert_close(model(x)["layer2"], expected, atol=1e-9, rtol=1e-7)
    assert [item.name for item in report.fused] == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]


def test_the_frozen_norms_of_transformers_detectors_are_fused():
    library = pytest.importorskip("transformers")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    backbone = library.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type="bottleneck", out_features=["stage2"]
    )
    config = library.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, d_model=16, num_queries=4, num_labels=3, **heads
    )
    model = library.DetrForObjectDetection(config).to(DEVICE, torch.float64).eval()
    for module in model.modules():
        if type(module).__name__ == "DetrFrozenBatchNorm2d":
            nn.init.uniform_(module.running_var, 0.3, 2)
    eager, x = copy.deepcopy(model), draw(*IMAGES, dtype=torch.float64).requires_grad_()
    report = fuse(model)
    assert len(report.fused) == 4 and not report.left
    results = []
    for m in (model, eager):
        out = run(m, x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-6)


def test_each_frozen_norm_of_transformers_is_known_and_computes_what_that_of_detr_does():
    folder = Path(pytest.importorskip("transformers").__file__).parent / "models"
    forwards = {}
    for path in folder.glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "FrozenBatchNorm2d(nn.Module)" in text:
            for cls in filter(lambda node: isinstance(node, ast.ClassDef), ast.parse(text).body):
                if cls.name.endswith("FrozenBatchNorm2d"):
                    (forward,) = (ast.unparse(f) for f in cls.body if getattr(f, "name", "") == "forward")
                    forwards[f"transformers.models.{path.parent.name}.{path.stem}.{cls.name}"] = forward
    assert "transformers.models.rt_detr.modeling_rt_detr.RTDetrFrozenBatchNorm2d" in forwards
    assert set(forwards) <= fusable._FROZEN and len(set(forwards.values())) == 1


def test_the_backbone_of_transformers_rt_detr_is_fused():
    modeling = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr")
    eager = transformers("bottleneck")
    randomize(eager)
    with torch.no_grad():
        modeling.replace_batch_norm(eager)
    eager = eager.to(DEVICE, torch.float64).train()
    fused, x = copy.deepcopy(eager), draw(*IMAGES, dtype=torch.float64)
    report = fuse(fused)
    assert len(report.fused) == 5 and not report.left
    torch.testing.assert_close(one_step(fused, x), one_step(eager, x), atol=1e-8, rtol=1e-6)


def test_a_stage_that_timm_has_frozen_is_fused():
    eager = timm("resnet18").to(DEVICE, torch.float64).train()
    randomize(eager)
    pytest.importorskip("timm").utils.freeze(eager, ["layer1"])
    fused, x = copy.deepcopy(eager), draw(*IMAGES, dtype=torch.float64)
    assert len(fuse(fused).fused) == 9
    assert "FrozenBatchNorm2d" in {type(module).__name__ for module in fused.layer1.modules()}
    torch.testing.assert_close(one_step(fused, x), one_step(eager, x), atol=1e-8, rtol=1e-6)


def test_wrong_channels_are_refused_in_the_words_of_transformers():
    model = transformers("basic").to(DEVICE)
    fuse(model)
    with pytest.raises(ValueError, match="channel dimension of the pixel values"):
        model(draw(2, 4, 64, 64))


def test_transformers_saves_and_loads_what_it_did(tmp_path):
    model = transformers("bottleneck").eval()
    fuse(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not fused_classes(loaded)
    with torch.no_grad():
        torch.testing.assert_close(run(loaded, torch.ones(IMAGES)), run(model, torch.ones(IMAGES)))
    hidden = [m(torch.ones(IMAGES), output_hidden_states=True).hidden_states for m in (model, loaded)]
    torch.testing.assert_close(*hidden)
