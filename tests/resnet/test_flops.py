"""`FlopCounterMode` counts of the fused modules and operators what it counts of eager's."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet import Bottleneck, FusedResidual, Residual, fuse, resnet18
from tests.conftest import DEVICE, ROOT
from tests.helpers.blocks import GATED, POOLED, deep_stems, draw, trio
from tests.helpers.fused_cases import images, inference_trio, kinds, train_and_eval
from tests.helpers.written_blocks import PreActivated, PreActivatedInSequence

PASSES = ("inference", "forward", "forward and backward")


def counted(module: nn.Module, x: Tensor, what: str) -> int:
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(what != "inference"), counter:
        out = module(x)
        if what == "forward and backward":
            out.sum().backward()
    return counter.get_total_flops()


@pytest.fixture(params=["module", "operator"])
def whichever_is_counted(request, monkeypatch):
    """The counter's global hooks make a module run its submodules; without them it is the fused operators' turn."""
    if request.param == "operator":
        for name in ("module", "stem"):
            monkeypatch.setattr(f"resnet.fused.{name}._has_any_global_hook", lambda: None)


FROZEN = {
    "nothing": (),
    "the first weight": ("conv1.weight", "0.weight"),
    "all before conv2": ("conv1", "bn1"),
    "conv2": ("conv2",),
    "the shortcut": ("conv3",),
    "every vector": ("bn", "conv1.bias", "conv2.bias", "conv3.bias", "1.", "0.bias"),
}


@kinds
@train_and_eval
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("wants_dx", [True, False], ids=["dx", "no dx"])
@pytest.mark.usefixtures("whichever_is_counted")
def test_the_count_is_eagers(kind, train, what, frozen, wants_dx):
    t = inference_trio(kind)
    x = images(kind, (2, 9, 8)).requires_grad_(wants_dx)
    counts = []
    for module in (t.fused, t.eager):
        for name, p in module.train(train).named_parameters():
            p.requires_grad_(not name.startswith(FROZEN[frozen]))
        counts.append(counted(module, x, what))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("frozen", [(), ("conv1.weight",), ("conv1", "bn1", "conv2"), ("downsample",)], ids=str)
@pytest.mark.usefixtures("whichever_is_counted")
@pytest.mark.parametrize(
    "options",
    [{}, POOLED, {"groups": 2}, {"dilation": 2}, GATED],
    ids=["strided shortcut", "pooled shortcut", "groups", "dilation", "gates"],
)
def test_the_count_of_a_bottleneck_is_eagers(frozen, options):
    t = trio(Bottleneck, 8, 4, 2, **options)
    x = draw(2, 8, 9, 8)
    counts = []
    for module in (t.fused, t.eager):
        for name, p in module.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        counts.append(counted(module, x, "forward and backward"))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("frozen", [(), ("bn1", "conv1"), ("conv2",), ("shortcut",), ("bn", "conv1")], ids=str)
@pytest.mark.parametrize("kind", [PreActivated, PreActivatedInSequence], ids=["what is activated", "the input"])
@pytest.mark.parametrize("wants_dx", [True, False], ids=["dx", "no dx"])
@pytest.mark.usefixtures("whichever_is_counted")
def test_the_count_of_a_block_with_pre_activation_whose_shortcut_reads(kind, what, frozen, wants_dx):
    eager, counts = kind(4, 6, 2).to(DEVICE), []
    fused = copy.deepcopy(eager)
    assert fuse(fused).fused
    x = draw(2, 4, 9, 8).requires_grad_(wants_dx)
    for module in (fused, eager):
        for name, p in module.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        counts.append(counted(module, x, what))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("frozen", [(), ("conv1.0",), ("conv1.0", "conv1.1", "conv1.3")], ids=str)
@pytest.mark.usefixtures("whichever_is_counted")
def test_the_count_of_a_deep_stem_is_eagers(what, frozen):
    counts = []
    for stem in deep_stems(train=what != "inference").all[:2]:
        for name, p in stem.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        counts.append(counted(stem, draw(2, 3, 13, 10), what))
    assert counts[0] == counts[1] > 0


def test_the_count_of_a_net_is_eagers_and_no_warning_is_given(recwarn):
    x = draw(1, 3, 64, 64)
    counts = [counted(resnet18(10, 3, block).to(DEVICE).eval(), x, "inference") for block in (Residual, FusedResidual)]
    assert counts[0] == counts[1] == 296101888
    assert not [w for w in recwarn if "one by one" in str(w.message)]


@pytest.mark.parametrize("first", ["resnet", "torch.utils.flop_counter"])
def test_the_formulas_are_registered_whichever_is_imported_first(first):
    second = {"resnet": "torch.utils.flop_counter", "torch.utils.flop_counter": "resnet"}[first]
    program = (
        f"import {first}, {second}; import torch; registry = torch.utils.flop_counter.flop_registry;"
        "print(sum('fused_residual' in str(name) for name in registry))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["46"]


def test_importing_the_library_imports_neither_the_counter_nor_triton():
    program = "import sys, resnet; print('triton' in sys.modules, 'torch.utils.flop_counter' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
