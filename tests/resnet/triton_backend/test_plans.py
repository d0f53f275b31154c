"""Blocks and stems whose calls are replayed: whatever changes between two calls, the next one does what eager does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import resnet
from resnet import BasicBlock, Residual, Stem, ops
from resnet.kernels.host import plan
from resnet.kernels.tuning import choice, memory, timing
from tests.conftest import DEVICE
from tests.helpers.blocks import (
    POOLED,
    averaged,
    deep_stems,
    draw,
    infer,
    keep_norms_constant,
    snapshot,
    step,
    trio,
)
from tests.helpers.fused_cases import assert_refused
from tests.helpers.replays import replays


@pytest.fixture(autouse=True)
def no_plans():
    plan.forget()


@pytest.fixture(autouse=True)
def kernels():
    """The convolutions are PyTorch's where kernels are interpreted, which takes seconds for a Triton one."""
    with resnet.backend("triton"), resnet.convolution("triton" if DEVICE.type == "cuda" else "pytorch"):
        yield


@pytest.fixture(params=["called directly", "called by PyTorch's dispatcher"])
def any_caller(request):
    """A profile wants to see the operators, so the dispatcher calls them, as it does in what torch.compile has made."""
    with torch.autograd.profiler.profile(enabled="dispatcher" in request.param):
        yield


DEEP_STEM = partial(deep_stems, in_channels=4, dtype=torch.float64)


class Pair:
    """A fused module and the eager one that does the same, in float64."""

    def __init__(self, kind: Callable = Residual, *args):
        t = kind() if kind is DEEP_STEM else trio(kind, *(args or (4, 4)), dtype=torch.float64)
        self.fused, self.eager = t.fused, t.exact

    def each(self, change) -> None:
        for module in (self.fused, self.eager):
            torch.manual_seed(7)
            change(module)

    def assert_same(self, x: Tensor, run=step) -> None:
        torch.testing.assert_close(run(self.fused, x), run(self.eager, x))
        torch.testing.assert_close(snapshot(self.fused), snapshot(self.eager))


def images(*shape: int, seed: int = 0) -> Tensor:
    return draw(*(shape or (2, 4, 5, 6)), seed=seed, dtype=torch.float64)


SHAPES = {
    "identity": (Residual, 4, 4),
    "1x1, stride 2": (Residual, 4, 6, True, 2),
    "pooled shortcut": (BasicBlock, 4, 6, 2, POOLED),
    "stem": (Stem, 4, 5),
    "deep stem": (DEEP_STEM,),
}


MODES = {"train": nn.Module.train, "eval": nn.Module.eval, "norms of constants": keep_norms_constant}


@pytest.mark.parametrize("args", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_replayed_steps_and_inference_do_what_eager_does(any_caller, args, mode):
    pair = Pair(*args)
    pair.each(mode)
    for run in (step, infer):
        for seed in range(4):
            pair.assert_same(images(seed=seed), run)
        with replays() as calls:
            run(pair.fused, images(seed=5))
            run(pair.eager, images(seed=5))
        assert calls


@pytest.mark.parametrize("args", SHAPES.values(), ids=SHAPES)
def test_steps_with_a_cumulative_average_are_replayed_and_count_on(args):
    step(Pair(*args).fused, images())  # on a GPU a shape's first step chooses tiles, and counts for no plan
    plan.forget()
    pair = Pair(*args)
    pair.each(averaged)
    for seed in range(6):
        x = images(seed=seed)
        with replays() as calls:
            got = step(pair.fused, x)
        assert len(calls) == (2 if seed > 1 else 0)  # forward and backward; the second step is recorded
        torch.testing.assert_close(got, step(pair.eager, x))


def replace(name: str, make):
    """A new tensor in a parameter's or buffer's place, made from the old one."""

    def change(module: nn.Module) -> None:
        owner, field = name.split(".")
        owner = module.get_submodule(owner)
        old = getattr(owner, field)
        new = make(old.detach().clone())
        setattr(owner, field, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)

    return change


def misaligned(t: Tensor) -> Tensor:
    """The same values and strides, one element from where a vector begins."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return memory.as_strided(t.shape, t.stride()).copy_(t)


def hook(module: nn.Module) -> None:
    module.bn1.register_forward_hook(lambda m, args, out: out * 1.5)


def set_data(module: nn.Module) -> None:
    module.conv2.weight.data = (2 * module.conv2.weight.detach()).contiguous()  # another layout too


CHANGES = {
    "momentum": lambda m: setattr(m.bn1, "momentum", 0.7),
    "a cumulative average": lambda m: setattr(m.bn2, "momentum", None),
    "eps": lambda m: setattr(m.bn2, "eps", 0.3),
    "a momentum and an eps that are tensors": lambda m: (
        setattr(m.bn1, "momentum", torch.tensor(0.7)),
        setattr(m.bn2, "eps", torch.tensor(0.3)),
    ),
    "evaluation": lambda m: m.eval(),
    "evaluation of one norm": lambda m: m.bn1.eval(),
    "no running statistics": lambda m: setattr(m.bn1, "track_running_stats", False),
    "a weight": replace("bn1.weight", lambda t: 3 * t),
    "a weight of the opposite sign in memory": replace("bn1.weight", torch._neg_view),
    "a misaligned weight": replace("bn2.weight", lambda t: misaligned(-t)),
    "a misaligned convolution": replace("conv1.weight", lambda t: misaligned(2 * t)),
    "an NCHW convolution": replace("conv1.weight", lambda t: (2 * t).contiguous()),
    "a buffer": replace("bn1.running_var", lambda t: t + 1),
    "a parameter's data": set_data,
    "a frozen weight": lambda m: m.conv1.weight.requires_grad_(False),
    "a bias less": lambda m: setattr(m.conv2, "bias", None),
    "a hook": hook,
    "a shared norm": lambda m: setattr(m, "bn2", m.bn1),
    "a shared norm with a cumulative average": lambda m: (setattr(m, "bn2", m.bn1), averaged(m)),
    "a list for a tuple": lambda m: setattr(m.conv1, "stride", [1, 1]),
    "another norm": lambda m: setattr(m, "bn2", nn.GroupNorm(2, 4).double().to(DEVICE)),
}


@pytest.mark.filterwarnings("ignore:.*runs PyTorch's operators one by one")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_module_counts_from_the_next_call_on(any_caller, name):
    pair = Pair()
    for seed in range(3):
        pair.assert_same(images(seed=seed))
    pair.each(CHANGES[name])
    for seed in range(3):
        pair.assert_same(images(seed=seed))


def test_a_removed_hook_and_a_restored_mode_count_too():
    pair = Pair()
    handles = []
    with pytest.warns(UserWarning):
        pair.each(lambda m: handles.append(m.conv1.register_forward_hook(lambda *_: None)))
        pair.assert_same(images())
    for handle in handles:
        handle.remove()
    for mode in (True, True, True, False, False, False, True, False):
        pair.each(lambda m, mode=mode: m.train(mode))
        pair.assert_same(images())


INPUTS = {
    "one image": lambda: images(1, 4, 5, 6),
    "sixteen images": lambda: images(16, 4, 5, 6),
    "one pixel": lambda: images(3, 4, 1, 1),
    "sixteen rows": lambda: images(2, 4, 16, 3),
    "no image": lambda: images(0, 4, 5, 6),
    "misaligned": lambda: misaligned(images().contiguous(memory_format=torch.channels_last)),
    "NCHW": lambda: images().contiguous(),
    "strided": lambda: images(2, 4, 5, 12)[..., ::2],
    "of the opposite sign in memory": lambda: torch._neg_view(images().contiguous(memory_format=torch.channels_last)),
    "a batch's part": lambda: images(4, 4, 5, 6).contiguous(memory_format=torch.channels_last)[1:3],
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_another_kind_are_not_taken_for_the_same(any_caller, name):
    pair = Pair()
    if name == "no image":
        pair.each(nn.Module.eval)
    plain = images().contiguous(memory_format=torch.channels_last)
    for x in (plain, plain, plain, INPUTS[name](), plain, INPUTS[name](), INPUTS[name](), INPUTS[name]()):
        pair.assert_same(x)


def test_settings_count_from_the_next_call_on():
    pair = Pair()
    for backend in ("triton", "triton", "triton", "torch", "auto", "triton"):
        with resnet.backend(backend), replays() as calls:
            pair.assert_same(images())
        assert not calls or backend != "torch"
    for convolution in ("pytorch", "epilogue", "pytorch", "epilogue", "epilogue"):
        with resnet.convolution(convolution):
            pair.assert_same(images(1, 4, 3, 2))


def test_steps_are_replayed_without_the_dispatcher_under_a_default_device_too():
    """It is another one than the tensors': what is made without a device given would be there."""
    pair = Pair()
    for seed in range(4):
        x, dout = images(seed=seed).requires_grad_(), images(seed=seed + 4)
        with torch.device("meta"), replays() as calls:
            assert ops.is_direct()
            (dx,) = torch.autograd.grad(pair.fused(x), x, dout)
        torch.testing.assert_close(dx, torch.autograd.grad(pair.eager(x), x, dout)[0])
    assert len(calls) == 2  # forward and backward


def test_forgotten_choices_are_made_again(monkeypatch, tmp_path):
    pair = Pair()
    for _ in range(3):
        pair.assert_same(images())
    memory.Choices(tmp_path / "choices.json").clear()
    with replays() as calls:
        pair.assert_same(images())
    assert not calls


def test_a_choice_for_something_else_leaves_plans_as_they_are(monkeypatch):
    monkeypatch.setitem(timing.CLOCKS, DEVICE.type, lambda runs, device: [1.0 for _ in runs])
    pair = Pair()
    for _ in range(3):
        pair.assert_same(images())
    memory.Choices(None).choose(("another size",), {"a": lambda: None, "b": lambda: None}, DEVICE)
    with replays() as calls:
        pair.assert_same(images())
    assert calls


def test_a_choice_while_a_plan_is_recorded_is_in_none(monkeypatch):
    """What times it is launched too."""
    monkeypatch.setitem(timing.CLOCKS, DEVICE.type, lambda runs, device: [1.0 for _ in runs])
    x, calls = images(), []

    def function(x):
        calls.append(x)
        if len(calls) == 2:  # another thread has forgotten it
            memory.Choices(None).choose(("a size",), {"a": lambda: None, "b": lambda: None}, DEVICE)
        return [x + 1]

    for _ in range(4):
        plan.run(function, [x], choice.state())
    assert len(calls) == 4


def test_pytorchs_convolutions_without_cudnn_are_in_other_plans():
    """They give maps of another layout, which a plan would read as if it were the first one."""
    pair = Pair()
    for _ in range(3):
        pair.assert_same(images())
    for enabled in (True, False):
        with torch.backends.cudnn.flags(enabled=enabled), replays() as calls:
            pair.assert_same(images())
        assert bool(calls) == enabled


def test_autocast_counts_from_the_next_call_on():
    t = trio(Residual, 4, 4)
    x = draw(2, 4, 5, 6)
    dtypes = []
    for enabled in (False, False, False, True, True, True, False):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            out = t.fused(x)
        dtypes.append(out.dtype)
        torch.testing.assert_close(out.float(), t.fused(x), rtol=0.1, atol=0.1)
    assert dtypes == [torch.float32] * 3 + [torch.bfloat16] * 3 + [torch.float32]


def test_a_block_may_run_twice_before_its_backward():
    pair = Pair()
    for seed in range(4):
        gradients = []
        for module in (pair.fused, pair.eager):
            module.zero_grad()
            x = images(seed=seed).requires_grad_()
            (module(module(x)).sum() + module(2 * x).square().sum()).backward()
            gradients.append([x.grad, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*gradients)


def test_bad_input_is_refused_after_good_input_too():
    block = Pair().fused
    for seed in range(3):
        step(block, images(seed=seed))
    assert_refused(block, images(2, 3, 5, 6), ValueError, "input: expected 4 channels, got 3")
    assert_refused(block, images().float(), TypeError, "input: expected float64 as conv1.weight, got float32")
    assert_refused(block, images(1, 4, 1, 1), ValueError, "expected more than 1 value per channel")
    assert_refused(block, images().to("meta"), ValueError, "weight: expected the input's device meta, got ")
    block.bn1.bias = nn.Parameter(block.bn1.bias.detach()[:3])
    assert_refused(block, images(), ValueError, "bn1.bias: expected shape")


def test_a_double_backward_is_refused_after_replayed_steps_too():
    block = Pair().fused
    for seed in range(3):
        step(block, images(seed=seed))
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradient.sum().backward()


def test_functorch_sees_the_operator_not_a_plan():
    pair = Pair()
    pair.each(nn.Module.eval)
    x = images()
    with torch.no_grad():
        for _ in range(3):
            pair.fused(x)
    with replays() as calls, contextlib.suppress(RuntimeError):
        torch.func.vmap(pair.fused)(x[None])
    assert not calls
