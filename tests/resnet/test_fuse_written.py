"""`fuse` on blocks and stems of classes that nobody has listed: what their forward's text says is what is fused."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
import sys
import warnings

import pytest
import torch
from torch import nn

from resnet import FusedBasicBlock, FusedSequential, fuse, unfuse
from resnet.fusing.sources import called_in_turn, has_chain
from tests.conftest import DEVICE
from tests.helpers import written_blocks
from tests.helpers.blocks import draw, infer, randomize, step
from tests.helpers.written_blocks import (
    BLOCKS,
    GATES,
    NETWORKS,
    OTHER_GATES,
    OTHER_NETWORKS,
    OTHERS,
    OTHERS_PRE_ACTIVATED,
    PRE_ACTIVATED,
    AsksAroundItsStem,
    Body,
    Configured,
    ConstantNorm,
    ConvNorm,
    ConvWithNorm,
    Deep,
    Delegating,
    Excited,
    Flagged,
    GateOfFlags,
    Half,
    InOneExpression,
    InSequence,
    Layer,
    LooksIntoItsStage,
    Network,
    OfAUnit,
    OfConvsWithNorms,
    OfFunctions,
    OfUnits,
    PreActivated,
    PreActivatedNarrow,
    SeesItsStages,
    StemOfAConvWithNorm,
    StepByStep,
    Textbook,
    Unit,
    Wide,
)

blocks = pytest.mark.parametrize("cls", BLOCKS + PRE_ACTIVATED)
linked = pytest.mark.parametrize("cls", BLOCKS)
CLOSE = {"atol": 1e-9, "rtol": 1e-7}


def stage(cls: type[nn.Module]) -> nn.Sequential:
    model = nn.Sequential(cls(4, 4), cls(4, 6, 2), cls(6, 6))
    randomize(model)
    return model.to(DEVICE, torch.float64)


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def images(C: int = 4):
    return draw(2, C, 9, 8, dtype=torch.float64)


# ---- what is fused ---------------------------------------------------------------------------------------------------


@blocks
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_written_blocks_do_the_steps_of_the_eager_ones(any_backend, cls, train):
    eager = stage(cls).train(train)
    fused = copy.deepcopy(eager)
    report = fuse(fused)
    assert [item.name for item in report.fused] == ["0", "1", "2"] and not report.left and not report.unknown
    assert {item.kind for item in report.fused} == {f"{cls.__module__}.{cls.__name__}"}
    torch.testing.assert_close(step(fused, images()), step(eager, images()), **CLOSE)
    torch.testing.assert_close(infer(fused, images()), infer(eager, images()), **CLOSE)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_written_squeeze_and_excitation_gives_what_the_eager_one_gives(any_backend, gate, train):
    eager = Excited(4, 4).train(train)
    eager.se = gate(4)
    randomize(eager)
    eager.to(DEVICE, torch.float64)
    fused = copy.deepcopy(eager)
    assert [item.stem for item in fuse(fused).fused] == [False]
    torch.testing.assert_close(step(fused, images()), step(eager, images()), **CLOSE)
    torch.testing.assert_close(infer(fused, images()), infer(eager, images()), **CLOSE)


@pytest.mark.parametrize("gate", OTHER_GATES)
def test_attention_that_does_something_else_leaves_its_block_alone(gate):
    model = Excited(4, 4)
    model.se = gate(4)
    assert not fuse(model).fused


@pytest.mark.filterwarnings("ignore:FusedExcited runs PyTorch's operators one by one")
def test_written_squeeze_and_excitation_is_watched():
    eager = Excited(4, 4).to(DEVICE, torch.float64)
    fused = copy.deepcopy(eager)
    for change in (
        lambda m: m.se.fc.register_forward_hook(lambda module, args, out: out * (args[0].dim() + 1)),
        lambda m: setattr(m.se.avg_pool, "output_size", (1, 2)),
        lambda m: setattr(m, "se", nn.Tanh()),
    ):
        fuse(fused)
        for model in (fused, eager):
            change(model)
        try:
            expected = eager(images())
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                fused(images())
        else:
            torch.testing.assert_close(fused(images()), expected, **CLOSE)


@pytest.mark.parametrize(("flag", "reason"), [("uses_convs", "se.uses_convs is False"), ("gives_gates", "is True")])
def test_the_flags_of_written_squeeze_and_excitation_are_watched(monkeypatch, flag, reason):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager = Excited(4, 4).eval()
    eager.se = GateOfFlags(4)
    eager.se.linear = nn.Linear(4, 4)
    fused, x = copy.deepcopy(eager).to(DEVICE), draw(2, 4, 5, 6)
    assert fuse(fused).fused
    for model in (eager.to(DEVICE), fused):
        setattr(model.se, flag, not getattr(model.se, flag))
    with pytest.warns(UserWarning, match=reason):
        torch.testing.assert_close(fused(x), eager(x))


@linked
def test_a_sequence_of_written_blocks_links_them(cls):
    model = stage(cls)
    fuse(model)
    assert type(model) is FusedSequential


@blocks
def test_written_blocks_keep_their_class_as_a_base(cls):
    model = stage(cls)
    before = kinds(model)
    report = fuse(model)
    assert all(isinstance(block, cls) and type(block).__name__ == f"Fused{cls.__name__}" for block in model)
    after = kinds(model)
    assert fuse(model) == report and kinds(model) == after
    unfuse(model)
    assert kinds(model) == before


@blocks
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_written_blocks_are_fused(cls, duplicate):
    model = stage(cls).eval()
    fuse(model)
    twin = duplicate(model)
    assert kinds(twin) == kinds(model)
    torch.testing.assert_close(infer(twin, images()), infer(model, images()), atol=0, rtol=0)


@blocks
def test_compiled_and_exported_written_blocks_compute_the_same(cls):
    torch.compiler.reset()  # a sequence's forward is compiled for no more than 8
    model = stage(cls).eval()
    fuse(model)
    with torch.no_grad():
        expected = model(images())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    exported = torch.export.export(model, (images(),)).module()
    for other in (compiled, exported):
        with torch.no_grad():
            torch.testing.assert_close(other(images()), expected, **CLOSE)


@pytest.mark.parametrize("cls", [StepByStep, InSequence])
def test_the_modules_of_a_written_block_are_watched(monkeypatch, cls):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    model, called = cls(4, 4).to(DEVICE), []
    assert fuse(model).fused
    relu = model.relu if cls is StepByStep else model.residual[2]
    relu.register_forward_hook(lambda *_: called.append("relu"))
    with pytest.warns(UserWarning, match=f"Fused{cls.__name__} runs PyTorch's operators one by one: .* has hooks"):
        model(draw(2, 4, 5, 6))
    assert called
    assert "has hooks" in fuse(model).left[0].reason


def swap_norms(block: OfFunctions) -> None:
    block.norm1_name, block.norm2_name, block.downsample = "bn2", "bn1", None


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (Textbook, lambda block: setattr(block, "conv3", None)),
        (Flagged, lambda block: setattr(block, "projects", False)),
        (StepByStep, lambda block: setattr(block, "downsample", None)),
        (OfFunctions, swap_norms),
    ],
)
def test_a_forward_that_takes_another_way_than_when_it_was_fused_is_run(monkeypatch, cls, change):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager = cls(4, 6).to(DEVICE, torch.float64).eval()
    fused, x = copy.deepcopy(eager), draw(2, 6, 9, 8, dtype=torch.float64)
    assert fuse(fused).fused
    for block in (eager, fused):
        for name in ("conv1", "a"):
            if hasattr(block, name):
                setattr(block, name, nn.Conv2d(6, 6, 3, 1, 1).to(DEVICE, torch.float64))
        change(block)
    fused.load_state_dict(eager.state_dict())
    with pytest.warns(UserWarning, match="its forward takes another way than it did when it was fused"):
        torch.testing.assert_close(infer(fused, x), infer(eager, x), **CLOSE)
    fuse(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(infer(fused, x), infer(eager, x), **CLOSE)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (PreActivated, "shortcut", nn.Conv2d(4, 4, 1, dtype=torch.float64)),
        (PreActivatedNarrow, "downsample", nn.Conv2d(4, 4, 1, dtype=torch.float64)),
        (Wide, "drop", 1e-30),
    ],
)
def test_one_with_pre_activation_that_takes_another_way_runs_its_forward(monkeypatch, cls, name, value):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager = cls(4, 4).to(DEVICE, torch.float64)
    fused = copy.deepcopy(eager)
    assert fuse(fused).fused
    for block in (eager, fused):
        setattr(block, name, copy.deepcopy(value).to(DEVICE) if isinstance(value, nn.Module) else value)
    with pytest.warns(UserWarning, match="its forward takes another way than it did when it was fused"):
        torch.testing.assert_close(step(fused, images()), step(eager, images()), **CLOSE)


@pytest.mark.parametrize(
    ("cls", "replace"),
    [
        (PreActivated, lambda block: setattr(block, "shortcut", nn.Identity())),
        (PreActivated, lambda block: setattr(block.shortcut, "0", nn.Identity())),
        (PreActivatedNarrow, lambda block: setattr(block, "downsample", nn.Identity())),
        (Wide, lambda block: setattr(block, "project", nn.Sequential())),
    ],
)
def test_a_shortcut_that_no_longer_convolves_what_is_activated_adds_it(monkeypatch, cls, replace):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    torch.manual_seed(0)
    eager = cls(4, 6).to(DEVICE, torch.float64)
    norm = "norm1" if cls is PreActivatedNarrow else "bn1"
    setattr(eager, norm, nn.BatchNorm2d(6, dtype=torch.float64, device=DEVICE))
    eager.conv1 = nn.Conv2d(6, eager.conv1.out_channels, 1, dtype=torch.float64, device=DEVICE)
    fused, x = copy.deepcopy(eager), draw(2, 6, 9, 8, dtype=torch.float64)
    assert not fuse(fused).fused[0].stem
    for block in (eager, fused):
        replace(block)
    with pytest.warns(UserWarning, match="adds what the first norm and ReLU give, not the input"):
        torch.testing.assert_close(step(fused, x), step(eager, x), **CLOSE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.body.conv1, "activates", False), "its forward takes another way"),
        (lambda block: block.body.conv1.register_forward_hook(lambda *_: None), "body.conv1 has hooks"),
        (lambda block: setattr(block.body, "forward", torch.neg), "body has a forward of its own"),
        (lambda block: setattr(block, "body", nn.Conv2d(4, 4, 3, 1, 1)), "its forward takes another way"),
        (lambda block: setattr(block, "shortcut", Layer(4, 4, 1, 1, False)), "shortcut is a Layer, not a ConvNorm"),
        (lambda block: setattr(block.shortcut, "activ", nn.ReLU()), "shortcut.activ is a ReLU, not a Identity"),
    ],
)
def test_the_units_of_a_written_block_are_watched(monkeypatch, change, reason):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager = OfUnits(4, 4)
    eager.resizes, eager.shortcut = True, ConvNorm(4, 4, 1, activate=False)
    fused, x = copy.deepcopy(eager).to(DEVICE).eval(), draw(2, 4, 5, 6)
    assert fuse(fused).fused
    for block in (eager.to(DEVICE).eval(), fused):
        change(block)
        block.to(DEVICE).eval().load_state_dict(eager.state_dict())
    with pytest.warns(UserWarning, match=reason):
        out = fused(x)
    torch.testing.assert_close(out, eager(x))


@pytest.mark.filterwarnings("ignore:FusedOfUnits runs PyTorch's operators one by one")
def test_a_forward_put_into_a_units_class_is_called(monkeypatch):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    block = OfUnits(4, 4).to(DEVICE).eval()
    for twin in (block, pickle.loads(pickle.dumps(block))):
        fuse(twin)
        with monkeypatch.context() as patch:
            patch.setattr(ConvNorm, "forward", lambda self, x: -x)
            assert torch.equal(twin(draw(2, 4, 5, 6)), draw(2, 4, 5, 6).mul(2).relu())
            assert "ConvNorm.forward was replaced" in fuse(OfUnits(4, 4)).left[0].reason


def test_what_holds_a_block_and_does_no_more_is_none():
    model = Body(4, 4, 1)
    model.conv1, model.conv2 = StepByStep(4, 4), nn.Identity()
    assert [item.name for item in fuse(model).fused] == ["conv1"]


NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, ConstantNorm], ids=["BatchNorm2d", "constants"])


@NORMS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_convolutions_that_hold_their_norms_are_fused(any_backend, norm, train):
    eager = nn.Sequential(StemOfAConvWithNorm(norm), OfConvsWithNorms(4, 4, 1, norm), OfConvsWithNorms(4, 6, 2, norm))
    randomize(eager)
    eager.to(DEVICE, torch.float64).train(train)
    fused, x = copy.deepcopy(eager), draw(2, 3, 20, 18, dtype=torch.float64)
    assert [item.name for item in fuse(fused).fused] == ["0", "1", "2"]
    torch.testing.assert_close(step(fused, x), step(eager, x), **CLOSE)
    torch.testing.assert_close(infer(fused, x), infer(eager, x), **CLOSE)


@NORMS
@pytest.mark.filterwarnings("error::UserWarning")
def test_under_autocast_convolutions_that_hold_their_norms_give_its_type(norm):
    eager = OfConvsWithNorms(4, 6, 2, norm).to(DEVICE)
    fused, x = copy.deepcopy(eager), draw(2, 4, 9, 8)
    assert fuse(fused).fused
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out, expected = fused(x), eager(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.conv1, "norm", None), "its forward takes another way"),
        (lambda block: setattr(block.conv2, "activation", nn.Tanh()), "its forward takes another way"),
        (
            lambda block: setattr(block.shortcut, "norm", nn.Identity()),
            "shortcut.norm is a Identity, not a BatchNorm2d",
        ),
        (lambda block: block.conv2.norm.register_forward_hook(lambda *_: None), "conv2.norm has hooks"),
        (lambda block: setattr(block, "conv1", nn.Conv2d(4, 6, 3, 2, 1)), "its forward takes another way"),
    ],
)
def test_convolutions_that_hold_their_norms_are_watched(monkeypatch, change, reason):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager, x = OfConvsWithNorms(4, 6, 2).eval(), draw(2, 4, 9, 8)
    fused = copy.deepcopy(eager).to(DEVICE)
    assert fuse(fused).fused
    for block in (eager.to(DEVICE), fused):
        change(block)
        block.to(DEVICE).load_state_dict(eager.state_dict())
    with pytest.warns(UserWarning, match=reason):
        torch.testing.assert_close(fused(x), eager(x))


def test_a_convolution_that_holds_its_norm_is_not_taken_for_one_alone(monkeypatch):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    model = StepByStep(4, 4)
    model.conv1 = ConvWithNorm(4, 4, 3, 1, 1, norm=nn.BatchNorm2d(4))
    assert not fuse(model).fused
    model, x = FusedBasicBlock(4, 4).to(DEVICE), draw(2, 4, 5, 6)
    model(x)
    model.conv1 = ConvWithNorm(4, 4, 3, 1, 1, bias=False, norm=nn.BatchNorm2d(4)).to(DEVICE)
    with pytest.warns(UserWarning, match="conv1 is a ConvWithNorm, not a Conv2d"):
        model(x)
    assert fuse(model).left[0].reason == "conv1 is a ConvWithNorm, not a Conv2d"


def test_under_autocast_an_identity_that_is_not_cast_is_added_as_it_is(monkeypatch):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager = InSequence(4, 4).to(DEVICE)
    fused, x = copy.deepcopy(eager), draw(2, 4, 5, 6)
    assert fuse(fused).fused
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.warns(UserWarning, match="autocast leaves the input"):
        out, expected = fused(x), eager(x)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("cls", NETWORKS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_written_networks_have_a_fused_stem(any_backend, cls, train):
    eager = cls().to(DEVICE, torch.float64).train(train)
    randomize(eager)
    fused, x = copy.deepcopy(eager), draw(2, 3, 20, 18, dtype=torch.float64)
    report = fuse(fused)
    assert [item.name for item in report.fused] == ["", "stage.0", "stage.1"] and not report.left
    assert f"1 stem of {cls.__module__}.{cls.__name__}" in str(report)
    assert fuse(fused) == report
    torch.testing.assert_close(step(fused, x), step(eager, x), **CLOSE)
    eager.eval()
    for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(twin) is type(fused)
        torch.testing.assert_close(infer(twin.eval(), x), infer(eager, x), **CLOSE)
    unfuse(fused)
    assert type(fused) is cls


@pytest.mark.parametrize("cls", NETWORKS)
def test_compiled_and_exported_written_networks_compute_the_same(cls):
    model, x = cls().to(DEVICE, torch.float64).eval(), draw(2, 3, 20, 18, dtype=torch.float64)
    fuse(model)
    with torch.no_grad():
        expected = model(x)
        for other in (
            torch.compile(model, fullgraph=True, backend="eager"),
            torch.export.export(model, (x,)).module(),
            torch.fx.symbolic_trace(model),
        ):
            torch.testing.assert_close(other(x), expected, **CLOSE)


def test_a_value_that_a_function_in_the_forward_sees_goes_from_stage_to_stage_as_it_is():
    assert called_in_turn(LooksIntoItsStage.forward) == {"conv", "bn", "act", "stage"}
    assert not called_in_turn(SeesItsStages.forward)


def test_a_forward_that_may_read_a_module_by_a_name_has_no_chain_of_calls():
    assert has_chain(Network.forward, ("conv", "bn", "act"))
    assert not has_chain(Configured.forward, ("conv", "norm", "act"))


def test_what_a_network_asks_before_and_after_its_stem_is_no_condition_of_it():
    model = AsksAroundItsStem()
    assert fuse(model).fused[0].stem and not model._known.conditions


def test_a_module_that_has_more_than_a_stem_is_also_one_of_another_class():
    report = fuse(Half())
    assert [item.stem for item in report.fused] == [True] and report.unknown == {f"{Half.__module__}.Half": 1}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_does_not_repeat_the_relu_of_its_stem(any_backend, monkeypatch, layout):
    model, sizes, relu = InOneExpression().to(DEVICE, torch.float64).eval(), [], nn.functional.relu
    fuse(model)
    monkeypatch.setattr(nn.functional, "relu", lambda x: sizes.append(tuple(x.shape[2:])) or relu(x))
    infer(model, draw(2, 3, 20, 18, dtype=torch.float64).contiguous(memory_format=layout))
    of_stem, of_last_stage = (10, 9), (5, 5)
    assert sizes == ([of_last_stage] if any_backend == "triton" else [of_stem, of_last_stage])


@pytest.mark.parametrize("make", [Unit, lambda: Layer(3, 8, 3)], ids=["written", "sequence"])
def test_before_a_residual_block_a_convolution_its_norm_and_relu_of_the_kernels_give_channels_last(any_backend, make):
    model, x = nn.Sequential(make(), Textbook(8, 8)).to(DEVICE), draw(2, 3, 9, 8).contiguous()
    fused = copy.deepcopy(model)
    assert [item.name for item in fuse(fused).fused] == ["0", "1"]
    out = fused[0](x)
    assert out.is_contiguous(memory_format=torch.channels_last) == (any_backend == "triton")
    torch.testing.assert_close(out, model[0](x))


@pytest.mark.parametrize("input_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [Unit, lambda: Layer(3, 8, 3)], ids=["written", "sequence"])
def test_a_convolution_its_norm_and_relu_alone_give_the_layout_that_the_eager_ones_give(
    any_backend, make, input_layout, weight_layout
):
    eager, x = make().to(DEVICE, memory_format=weight_layout), draw(2, 3, 9, 8).contiguous(memory_format=input_layout)
    fused = copy.deepcopy(eager)
    assert [item.name for item in fuse(fused).fused] == [""]
    out, expected = fused(x), eager(x)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.stages.append("pool"),
        lambda model: setattr(model, "norm_name", "other"),
        lambda model: setattr(model, "deep", True),
    ],
)
def test_a_network_that_calls_something_else_than_when_it_was_fused_is_called_as_it_is(any_backend, change):
    eager, x = Configured().to(DEVICE, torch.float64).eval(), draw(2, 3, 20, 18, dtype=torch.float64)
    eager.other, eager.stem = nn.BatchNorm2d(8).to(x), nn.Conv2d(3, 8, 3, 2).to(x)
    randomize(eager)
    fused = copy.deepcopy(eager)
    assert fuse(fused).fused[0].stem
    for model in (eager, fused):
        change(model)
    torch.testing.assert_close(infer(fused, x), infer(eager, x), **CLOSE)


@pytest.mark.parametrize("hook", ["unit", "unit.conv", "pool"])
@pytest.mark.filterwarnings("ignore:FusedOfAUnit runs PyTorch's operators one by one")
def test_what_a_written_networks_stem_lies_in_is_watched(hook):
    model, called = OfAUnit().to(DEVICE), []
    fuse(model)
    model.get_submodule(hook).register_forward_hook(lambda *_: called.append(hook))
    model(draw(2, 3, 20, 18))
    assert called == [hook]


def test_of_a_networks_stems_the_one_with_a_pool_is_fused():
    model = Deep()
    model.relu1 = nn.GELU()
    assert fuse(model).fused[0].stem
    assert model._layout.names == ("conv", "bn", "act", "pool")


def test_what_holds_a_stem_and_does_no_more_is_none():
    model = Body(3, 8, 1)
    model.conv2 = nn.Identity()
    assert [item.name for item in fuse(model).fused] == ["conv1"]


def test_the_modules_of_a_written_networks_stem_are_watched(monkeypatch):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    eager, x = Network().to(DEVICE, torch.float64).eval(), draw(2, 3, 20, 18, dtype=torch.float64)
    fused = copy.deepcopy(eager)
    fuse(fused)
    for model in (eager, fused):
        model.act = nn.SiLU()
    with pytest.warns(UserWarning, match="FusedNetwork runs PyTorch's operators one by one: act is a SiLU, not a ReLU"):
        torch.testing.assert_close(infer(fused, x), infer(eager, x), **CLOSE)
    report = fuse(fused)
    assert report.left[0].reason == "act is a SiLU, not a ReLU" and not report.unknown


# ---- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OTHERS)
def test_a_forward_that_does_something_else_is_left_alone(cls):
    model = cls()
    report = fuse(model)
    assert {item.name for item in report.fused} <= {"body.conv1"} and not report.left  # a layer, no block
    assert type(model) is cls


@pytest.mark.parametrize("cls", OTHERS_PRE_ACTIVATED)
def test_a_block_that_is_not_quite_one_with_pre_activation_is_none(cls):
    eager = cls(4, 4).to(DEVICE, torch.float64)
    if not hasattr(eager, "shortcut"):
        eager.shortcut = nn.Identity()
    fused = copy.deepcopy(eager)
    assert all(item.stem for item in fuse(fused).fused)  # a layer in it, no block
    for model in (fused, eager):
        torch.manual_seed(0)
        model.got = model(images().clone())
    torch.testing.assert_close(fused.got, eager.got, **CLOSE)


@pytest.mark.parametrize("cls", OTHER_NETWORKS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_network_that_does_more_with_its_stem_is_left_alone(cls, train):
    model = cls().train(train)
    assert [item.name for item in fuse(model).fused] == ["stage.0", "stage.1"]
    assert type(model) is cls


@pytest.mark.parametrize("other", [nn.GELU(), nn.Dropout(), nn.Sequential(nn.Dropout())], ids=["GELU", "Dropout", "in"])
def test_a_module_that_a_block_does_not_have_leaves_it_alone(other):
    model = StepByStep(4, 4)
    model.relu = other
    assert not fuse(model).fused


@pytest.mark.parametrize(("make", "method"), [(lambda: Textbook(4, 4), "forward"), (Delegating, "features")])
def test_a_module_with_a_method_of_its_own_is_left_alone(make, method):
    model = make()
    setattr(model, method, getattr(model, method))
    assert [item.reason for item in fuse(model).left] == [f"it has a {method} of its own"]


SOURCE = """
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
"""


def test_a_text_that_was_edited_since_it_was_compiled_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, later, fused in (("kept", SOURCE, 1), ("edited", SOURCE.replace("+ x", "+ 2 * x"), 0)):
        path = tmp_path / f"{name}.py"
        path.write_text(SOURCE.replace("+ x", "- x") if name == "edited" else SOURCE)
        module = importlib.import_module(name)
        path.write_text(later if name == "kept" else SOURCE)  # a block's text, of code that does something else
        assert len(fuse(module.Block()).fused) == fused
        monkeypatch.delitem(sys.modules, name)


def test_a_class_without_a_text_is_left_alone():
    names: dict = {"__name__": "nowhere"}
    exec(SOURCE, names)
    assert not fuse(names["Block"]()).fused


def test_what_the_forwards_names_stand_for_is_looked_up(monkeypatch):
    monkeypatch.setattr(written_blocks, "F", nn)
    assert not fuse(Textbook(4, 4)).fused


def test_another_getattr_than_pythons_may_do_anything(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = inspect.getsource(written_blocks) + "\n\ndef getattr(module, name):\n    return nn.Identity()\n"
    (tmp_path / "shadowed.py").write_text(text)
    shadowed = importlib.import_module("shadowed")
    assert not fuse(shadowed.OfFunctions(4, 4)).fused
    for network in (shadowed.Configured(), shadowed.AsksItsStageByName()):
        assert [item.name for item in fuse(network).fused] == ["stage.0", "stage.1"]
    monkeypatch.delitem(sys.modules, "shadowed")
