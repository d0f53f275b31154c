"""What `FusedResidual` and `FusedStem` cannot fuse: changed modules run as eager ones, bad input is refused by name."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from resnet import (
    BasicBlock,
    FusedBasicBlock,
    FusedBatchNorm2d,
    FusedBottleneck,
    FusedResidual,
    FusedStem,
    LazyFusedResidual,
    LazyFusedStem,
    Residual,
    SmallStem,
    Stem,
)
from resnet.functional import batch_norm_add_relu
from tests.conftest import DEVICE
from tests.helpers.blocks import POOLED, draw, same, snapshot, step, trio
from tests.helpers.fused_cases import (
    FEW,
    IDENTITY,
    KINDS,
    STRIDED,
    assert_exact,
    assert_refused,
    images,
    kinds,
    train_and_eval,
)

# ---- changed modules --------------------------------------------------------------------------------------------


def unwarned(module: nn.Module) -> nn.Module:
    """The module, its class a new subclass: a warning that its own class has given before is given for this one too."""
    module.__class__ = type(f"{type(module).__name__}{next(NUMBERS)}", (type(module),), {})
    return module


NUMBERS = itertools.count()


def assert_runs_as_eager_with_one_warning(fused: nn.Module, eager: nn.Module, x: Tensor, message: str) -> None:
    """A step and a second forward pass give eager's values; the step warns, naming the class and the reason."""
    name = type(unwarned(fused)).__name__
    with pytest.warns(UserWarning, match=f"{name} runs PyTorch's operators one by one: {message}"):
        got = step(fused, x)
    torch.testing.assert_close(got, step(eager, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fused(x.double()), eager(x.double()))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(name: str):
    return lambda m: m.get_submodule(name).register_forward_hook(lambda m, args, out: out * 1.5) and None


def pre_hooked(name: str):
    return lambda m: m.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0] * 1.5,)) and None


def grad_hooked(name: str):
    hook = lambda m, grads, _: tuple(2 * g for g in grads)  # noqa: E731
    return lambda m: m.get_submodule(name).register_full_backward_hook(hook) and None


def replaced(name: str, make):
    """A change that puts `make(old)` in a submodule's place, with the same weights each time."""

    def change(module: nn.Module) -> None:
        old = module.get_submodule(name)
        torch.manual_seed(5)
        new = make(old).to(next(module.parameters())).train(module.training)
        setattr(module, name, new)

    return change


def convolution(**options):
    """A 3x3 convolution of the old one's channels, with other options."""
    return lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3, **options)


def shortcut(**options):
    """A change that gives the identity's place to a 1x1 convolution, with the same weights each time."""

    def change(block: nn.Module) -> None:
        torch.manual_seed(5)
        block.conv3 = nn.Conv2d(4, 4, 1, **options).to(block.conv1.weight)

    return change


def own_forward(name: str, attribute: str = "forward"):
    """As accelerate's hooks and quantisation tools do it: in the instance, beside the class's."""

    def change(module: nn.Module) -> None:
        submodule = module.get_submodule(name)
        old = getattr(submodule, attribute)
        setattr(submodule, attribute, lambda *args: 1.5 * old(*args))

    return change


def weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and used
        nn.utils.weight_norm(module.conv2)


def spectral_norm(module: nn.Module) -> None:
    torch.manual_seed(5)
    nn.utils.spectral_norm(module.conv1)


class Conv2d(nn.Conv2d):
    """Of the name of what it replaces."""


# A change of the module, which returns the changed module or None for the same one, and the reason that is named.
UNFUSABLE = {
    "a subclass": (replaced("bn2", lambda old: Doubled(old.num_features)), "bn2 is a Doubled, not a BatchNorm2d"),
    "GroupNorm": (replaced("bn1", lambda old: nn.GroupNorm(2, old.num_features)), "bn1 is a GroupNorm"),
    "Identity": (replaced("bn2", lambda old: nn.Identity()), "bn2 is a Identity, not a BatchNorm2d"),
    "a forward hook": (hooked("conv2"), "conv2 has hooks"),
    "a forward pre-hook": (pre_hooked("bn1"), "bn1 has hooks"),
    "a backward hook": (grad_hooked("conv1"), "conv1 has hooks"),
    "a parametrisation": (
        lambda m: nn.utils.parametrizations.weight_norm(m.conv1) and None,
        "conv1 is a ParametrizedConv2d, not a Conv2d",
    ),
    "an old weight norm": (weight_norm, "conv2 has hooks"),
    "an old spectral norm": (spectral_norm, "conv1 has hooks"),
    "a pruned weight": (lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5) and None, "conv1 has hooks"),
    "a convolution's own forward": (own_forward("conv1"), "conv1 has a forward of its own"),
    "a BatchNorm's own forward": (own_forward("bn2"), "bn2 has a forward of its own"),
    "an own convolution": (own_forward("conv2", "_conv_forward"), "conv2 has a forward of its own"),
    "a compiled submodule": (lambda m: m.bn1.compile(backend="eager"), "bn1 has a forward of its own"),
    "a namesake": (
        replaced("conv1", lambda old: Conv2d(old.in_channels, old.out_channels, 3, padding=1)),
        r"conv1 is a tests\.\S+\.Conv2d, not a torch\.nn\.modules\.conv\.Conv2d",
    ),
    "dilations of a pair": (
        replaced("conv2", convolution(padding=(1, 2), dilation=(1, 2))),
        r"conv2.padding is \(1, 2\), not \(1, 1\)",
    ),
    "dilation of a shortcut": (
        shortcut(dilation=2),
        r"conv3.dilation is \(2, 2\), not \(1, 1\)",
    ),
    "groups of a shortcut": (
        shortcut(groups=2),
        "conv3.groups is 2, not 1",
    ),
    "circular padding": (
        replaced("conv1", convolution(padding=1, padding_mode="circular")),
        "conv1.padding_mode is circular",
    ),
}


@train_and_eval
@pytest.mark.parametrize("reason", UNFUSABLE)
def test_a_block_that_cannot_be_fused_runs_as_eager_with_one_warning(any_backend, reason, train):
    change, message = UNFUSABLE[reason]
    t = trio(Residual, 4, 4, dtype=torch.float64, train=train)
    fused, eager = (change(m) or m for m in (t.fused, t.exact))
    assert_runs_as_eager_with_one_warning(fused, eager, draw(2, 4, 5, 6), message)


def _narrow(block: nn.Module) -> None:
    """Of another width between its convolutions."""
    torch.manual_seed(5)
    block.conv1, block.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
    block.conv2 = nn.Conv2d(6, 4, 3, padding=1)
    block.to(block.bn2.weight)


def _broadcast(block: nn.Module) -> None:
    """Of one input channel, which the identity adds to all of the output's."""
    torch.manual_seed(5)
    block.conv1 = nn.Conv2d(1, 4, 3, padding=1).to(block.bn1.weight)


def _strided(block: nn.Module) -> None:
    """On one pixel, which stays one."""
    block.conv1.stride = (2, 2)


def _uneven(block: nn.Module) -> None:
    block.conv1.stride = (1, 2)
    block.conv3 = nn.Conv2d(4, 4, 1, stride=(1, 2)).to(block.bn1.weight)
    nn.init.ones_(block.conv3.weight), nn.init.zeros_(block.conv3.bias)


def _unpaired(block: nn.Module) -> None:
    """With numbers where the constructor makes pairs: `conv2d` takes both."""
    block.conv1.stride, block.conv1.padding, block.conv2.padding = 1, 1, [1, 1]


def _kernels(block: nn.Module) -> None:
    """Of other sizes than the convolutions say, which together leave height and width."""
    torch.manual_seed(5)
    for conv, size in ((block.conv1, 1), (block.conv2, 5)):
        conv.weight = nn.Parameter(torch.randn(4, 4, size, size).to(conv.weight))


SURGERY = {
    "a broadcast shortcut": (
        _broadcast,
        (2, 1, 5, 6),
        "its shortcut is the identity, .* 1 -> 4 channels with",
    ),
    "a broadcast pixel": (_strided, (2, 4, 1, 1), "its shortcut is the identity, .* 4 -> 4 channels with stride 2"),
    "other kernels": (_kernels, (2, 4, 7, 6), "conv1.weight is 1x1, not 3x3"),
    "a stride that is a number": (_unpaired, (2, 4, 6, 5), r"conv1.padding is 1, not \(1, 1\)"),
    "strides of a pair": (_uneven, (2, 4, 6, 5), r"conv1.stride is \(1, 2\), not \(1, 1\)"),
}


@train_and_eval
@pytest.mark.parametrize("change", SURGERY)
def test_a_block_of_other_convolutions_runs_as_eager_with_one_warning(any_backend, change, train):
    apply, shape, message = SURGERY[change]
    t = trio(Residual, 4, 4, dtype=torch.float64, train=train).each(apply)
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, draw(*shape), message)


REFUSED = {
    "no dilation": {"dilation": (0, 0), "padding": (0, 0)},
    "a negative dilation": {"dilation": (-1, -1), "padding": (-1, -1)},
    "dilations that are words": {"dilation": ("1", "1"), "padding": ("1", "1")},
    "empty dilations": {"dilation": (), "padding": ()},
    "no groups": {"groups": 0},
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_a_setting_that_pytorch_refuses_is_refused_as_in_eager(any_backend, settings):
    t = trio(Residual, 4, 4, dtype=torch.float64)
    t.each(lambda block: vars(block.conv2).update(settings))
    with pytest.raises((RuntimeError, TypeError)) as expected:
        t.exact(draw(2, 4, 5, 6).double())
    unwarned(t.fused)
    with pytest.warns(UserWarning, match="conv2"), pytest.raises(expected.type) as got:
        t.fused(draw(2, 4, 5, 6).double())
    assert str(got.value) == str(expected.value)
    same(snapshot(t.fused), snapshot(t.exact))


@train_and_eval
def test_a_block_whose_convolutions_have_two_widths_is_fused(any_backend, train, recwarn):
    t = trio(Residual, 4, 4, dtype=torch.float64, train=train).each(_narrow)
    assert_exact(t, draw(2, 4, 5, 6))
    assert not recwarn.list


STEM_CHANGES = {
    "a hook": (hooked("2"), "2 has hooks"),
    "the ReLU's own forward": (own_forward("2"), "2 has a forward of its own"),
    "the pool's own forward": (own_forward("3"), "3 has a forward of its own"),
    "another activation": (replaced("2", lambda old: nn.GELU()), "2 is a GELU, not a ReLU"),
    "another pool": (replaced("3", lambda old: nn.AvgPool2d(3, 2, 1)), "3 is a AvgPool2d, not a MaxPool2d"),
    "another window": (replaced("3", lambda old: nn.MaxPool2d(2)), "3.kernel_size is 2, not 3"),
    "ceil mode": (lambda m: setattr(m[3], "ceil_mode", True), "3.ceil_mode is True"),
    "a stride that is a number": (lambda m: setattr(m[0], "stride", 1), r"0.stride is 1, not \(1, 1\)"),
    "a padding that is a word": (lambda m: setattr(m[0], "padding", "valid"), "0.padding is valid, not"),
    "groups": (replaced("0", lambda old: nn.Conv2d(2, 4, 7, 2, 3, groups=2)), "0.groups is 2, not 1"),
    "no convolution": (replaced("0", lambda old: nn.Sequential(old)), "0 is a Sequential, not a Conv2d"),
}


@pytest.mark.parametrize("reason", STEM_CHANGES)
def test_a_stem_that_cannot_be_fused_runs_as_eager_with_one_warning(any_backend, reason):
    change, message = STEM_CHANGES[reason]
    t = trio(Stem, 2, 4, dtype=torch.float64).each(change)
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, draw(2, 2, 13, 12), message)


def _insert(stem: nn.Module) -> None:
    stem.insert(2, nn.Dropout(0.0))


def _delete(stem: nn.Module) -> None:
    del stem[3]


SMALL_STEM_CHANGES = {
    "a hook on the convolution": (hooked("0"), "0 has hooks"),
    "a hook on the norm": (pre_hooked("1"), "1 has hooks"),
    "a hook on the ReLU": (hooked("2"), "2 has hooks"),
    "an own convolution": (own_forward("0", "_conv_forward"), "0 has a forward of its own"),
    "another norm": (replaced("1", lambda old: nn.GroupNorm(2, 4)), "1 is a GroupNorm, not a BatchNorm2d"),
    "another activation": (replaced("2", lambda old: nn.GELU()), "2 is a GELU, not a ReLU"),
    "a module more": (lambda m: m.append(nn.MaxPool2d(2)), "it has 4 children, not 3"),
    "a module less": (lambda m: m.pop(2) and None, "it has 2 children, not 3"),
}


@pytest.mark.parametrize("reason", SMALL_STEM_CHANGES)
def test_a_small_stem_that_cannot_be_fused_runs_as_eager_with_one_warning(any_backend, reason):
    change, message = SMALL_STEM_CHANGES[reason]
    t = trio(SmallStem, 3, 4, dtype=torch.float64).each(change)
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, draw(2, 3, 6, 5), message)


CHILDREN = {
    "appended": (lambda m: m.append(nn.Flatten()), "it has 5 children, not 4"),
    "inserted": (_insert, "it has 5 children, not 4"),
    "deleted": (_delete, "it has 3 children, not 4"),
    "an identity": (replaced("1", lambda old: nn.Identity()), "1 is a Identity, not a BatchNorm2d"),
    "a kernel that is not square": (
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach()[..., :5])),
        "0.weight is 7x5, not square",
    ),
}


@pytest.mark.parametrize("change", CHILDREN)
@train_and_eval
def test_a_stem_of_other_children_runs_as_eager_with_one_warning(any_backend, change, train):
    apply, message = CHILDREN[change]
    t = trio(Stem, 2, 4, dtype=torch.float64, train=train).each(apply)
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, draw(2, 2, 13, 12), message)


def test_a_lazy_stem_of_other_children_runs_as_eager_from_the_first_forward():
    stem = LazyFusedStem(4).append(nn.Flatten())
    with pytest.warns(UserWarning, match="it has 5 children, not 4"):
        assert stem(torch.rand(2, 3, 16, 16)).shape == (2, 64)


@pytest.mark.parametrize("change", ["the convolution", "its weight"])
@train_and_eval
def test_a_stem_of_other_channels_is_fused(any_backend, change, train):
    """As that of colour images is made one for grey ones."""

    def apply(stem: nn.Module) -> None:
        if change == "its weight":
            stem[0].weight = nn.Parameter(stem[0].weight.detach().sum(1, keepdim=True))
        else:
            torch.manual_seed(5)
            stem[0] = nn.Conv2d(1, 4, 7, 2, 3).to(stem[1].weight)

    t = trio(Stem, 3, 4, dtype=torch.float64, train=train).each(apply)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(t, draw(2, 1, 13, 12))


@train_and_eval
@pytest.mark.parametrize("name", ["conv3", "bn1"])
def test_an_own_forward_is_run_beside_a_1x1_shortcut_too(any_backend, name, train):
    t = trio(Residual, 4, 6, True, 2, dtype=torch.float64, train=train).each(own_forward(name))
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, draw(2, 4, 5, 6), f"{name} has a forward of its own")


def test_a_forward_put_into_a_class_is_run(any_backend, monkeypatch):
    t, plain = trio(Residual, 4, 4, dtype=torch.float64), nn.BatchNorm2d.forward
    x = draw(2, 4, 5, 6)
    before = step(t.fused, x)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda bn, y: 1.5 * plain(bn, y))
    t.exact.load_state_dict(t.fused.state_dict())
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, x, "bn1 has a forward of its own")
    assert not torch.equal(t.fused(x.double()), before["out"])


GLOBAL_HOOKS = {
    "a forward hook": (
        register_module_forward_hook,
        lambda m, args, out: 1.5 * out if isinstance(m, nn.BatchNorm2d) else None,
    ),
    "a forward pre-hook": (
        register_module_forward_pre_hook,
        lambda m, args: (1.5 * args[0],) if isinstance(m, nn.BatchNorm2d) else None,
    ),
}


HOOKED = {
    "identity": (Residual, *IDENTITY),
    "strided": (Residual, *STRIDED),
    "stem": (Stem, 4, 5),
    "small stem": (SmallStem, 4, 5),
}


@pytest.mark.parametrize("args", HOOKED.values(), ids=HOOKED)
@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
def test_a_global_hook_sees_and_changes_the_submodules_as_in_eager(any_backend, hook, args):
    t = trio(*args, dtype=torch.float64)
    x = draw(2, 4, 6, 5)
    register, function = GLOBAL_HOOKS[hook]
    handle = register(function)
    try:
        assert_runs_as_eager_with_one_warning(t.fused, t.exact, x, "global module hooks are registered")
    finally:
        handle.remove()
    assert type(t.fused(x.double()).grad_fn).__name__.startswith(("ResidualBlock", "Stem", "BatchNormAddRelu"))


BACKWARD_HOOKS = {
    "a backward hook": (register_module_full_backward_hook, lambda m, grads, _: (1.5 * grads[0], *grads[1:])),
    "a backward pre-hook": (register_module_full_backward_pre_hook, lambda m, grads: (1.5 * grads[0],)),
}


@pytest.mark.parametrize("hook", BACKWARD_HOOKS)
def test_a_global_backward_hook_is_called_for_a_stems_submodules_as_in_eager(any_backend, hook):
    t, (register, function) = trio(Stem, 4, 5, dtype=torch.float64), BACKWARD_HOOKS[hook]
    x = draw(2, 4, 6, 5)
    handle = register(lambda m, *grads: function(m, *grads) if isinstance(m, nn.BatchNorm2d) else None)
    try:
        assert_runs_as_eager_with_one_warning(t.fused, t.exact, x, "global module hooks are registered")
    finally:
        handle.remove()


@pytest.mark.parametrize("hook", BACKWARD_HOOKS)
def test_a_global_backward_hook_on_a_block_is_refused_as_in_eager(hook):
    """The textbook's block adds its shortcut in place, which PyTorch refuses behind such a hook."""
    t, (register, function) = trio(Residual, 4, 4), BACKWARD_HOOKS[hook]
    handle = register(function)
    try:
        for block in (t.eager, unwarned(t.fused)):
            refused = pytest.raises(RuntimeError, match=r"BackwardHookFunction\w* is a view")
            with warnings.catch_warnings(), refused:
                warnings.simplefilter("ignore")
                block(draw(2, 4, 6, 5).requires_grad_())
    finally:
        handle.remove()


def test_a_block_compiles_after_another_one_with_numpys_strides():
    """What such a block has left in memory is no part of a graph."""
    strided, t = trio(Residual, 4, 8, True, 2), trio(Residual, 4, 4, dtype=torch.float64)
    for conv in (strided.fused.conv1, strided.fused.conv3):
        conv.stride = (np.int64(2), np.int64(2))
    strided.fused(draw(2, 4, 5, 6))
    torch.compiler.reset()
    x = draw(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(t.fused, fullgraph=True, backend="aot_eager")(x), t.exact(x))


@pytest.mark.parametrize(
    "change", [own_forward("conv1"), hooked("conv2"), pre_hooked("bn1")], ids=["own forward", "hook", "pre-hook"]
)
def test_a_compiled_block_that_cannot_be_fused_warns_once_in_one_graph(change):
    t = trio(Residual, 4, 4, dtype=torch.float64).each(change)
    unwarned(t.fused)
    torch.compiler.reset()
    compiled = torch.compile(t.fused, fullgraph=True, backend="aot_eager")
    x = draw(2, 4, 5, 6, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(x), t.exact(x))
        torch.testing.assert_close(compiled(x), t.exact(x))
    assert sum("one by one" in str(warning.message) for warning in caught) == 1


class Wrapped(torch.Tensor):
    """A tensor in another one, for which PyTorch's own operators alone are known, as a quantized weight is."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __tensor_flatten__(self) -> tuple:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, *_) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            return NotImplemented
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        results = function(*args, **kwargs)
        return cls(results) if function is torch.ops.aten.detach.default else results


@kinds
@pytest.mark.parametrize("wrapped", ["weight", "weight under autocast", "input"])
@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one. one of its tensors is a Wrapped")
def test_a_tensor_that_wraps_another_meets_pytorchs_operators(any_backend, wrapped, kind):
    t = trio(*KINDS[kind])
    x = images(kind, FEW)
    results = []
    for module in (t.fused, t.eager):
        if wrapped != "input":
            conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
            conv.weight = nn.Parameter(Wrapped(conv.weight.detach()), requires_grad=False)
        with torch.autocast(x.device.type, torch.bfloat16, enabled="autocast" in wrapped):
            out = module(Wrapped(x) if wrapped == "input" else x)
        out.sum().backward()
        grads = [p.grad for m in module.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        results.append((out, grads, [*module.buffers()]))
    loose = {"atol": 0.1, "rtol": 0.1} if "autocast" in wrapped else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(*results, **loose)


def doubled_convolution(function: Callable, args: tuple, kwargs: dict | None) -> object:
    out = function(*args, **(kwargs or {}))
    return out * 2 if function is torch.conv2d else out


class Doubling(torch.Tensor):
    """A tensor whose convolutions give twice as much."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = doubled_convolution(function, args, kwargs)
        return out.as_subclass(cls) if type(out) is torch.Tensor else out


class DoublingMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return doubled_convolution(function, args, kwargs)


@kinds
@pytest.mark.parametrize("by", ["input", "weight", "mode"])
def test_who_replaces_pytorchs_functions_meets_them(monkeypatch, by, kind):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    t = trio(*KINDS[kind], train=False)
    x = images(kind, FEW)
    if by == "weight":
        for module in t.all:
            conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
            conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Doubling), requires_grad=False)
    given = x.as_subclass(Doubling) if by == "input" else x
    reason = "a DoublingMode is in force" if by == "mode" else "one of its tensors is a Doubling"
    with torch.no_grad(), DoublingMode() if by == "mode" else nullcontext():
        expected = t.eager(given)
        with pytest.warns(UserWarning, match=reason):
            out = t.fused(given)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_a_mode_meets_a_shortcuts_pool_as_often_as_in_the_eager_block(monkeypatch):
    class Counting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("resnet.fused.module._warned", set())
    called, t = [], trio(BasicBlock, 4, 6, 2, POOLED)
    with pytest.warns(UserWarning, match="a Counting is in force"), Counting():
        t.fused(draw(2, 4, 5, 6))
    assert called.count(nn.functional.avg_pool2d) == 1


def test_a_mode_that_sets_the_device_and_a_class_without_functions_of_its_own_are_fused():
    class Named(torch.Tensor):
        pass

    t, x = trio(*KINDS["strided"], train=False), images("strided", FEW)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        expected = t.fused(x)
        with torch.device(DEVICE):
            assert torch.equal(t.fused(x), expected)
        assert torch.equal(t.fused(x.as_subclass(Named)), expected)


def test_the_operation_on_a_tensor_that_wraps_another_is_pytorchs(any_backend):
    x = draw(2, 4, 3, 5)
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    norm = FusedBatchNorm2d(4).to(DEVICE).eval()
    expected = x.div((1 + norm.eps) ** 0.5).relu()
    torch.testing.assert_close(batch_norm_add_relu(Wrapped(x), mean, var), expected)
    torch.testing.assert_close(norm(Wrapped(x)), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.filterwarnings(
    "ignore:Fused.* runs PyTorch's operators one by one. one of its tensors is a tensor of layout"
)
@pytest.mark.parametrize("case", [(Residual, 4, 4), (BasicBlock, 4, 6, 2, POOLED)], ids=["identity", "pooled"])
def test_an_input_in_onednns_layout_meets_pytorchs_operators(case):
    t = trio(*case, train=False).each(lambda module: module.cpu())
    x = draw(2, 4, 5, 6).cpu()
    with torch.no_grad():
        torch.testing.assert_close(*(module(x.to_mkldnn()).to_dense() for module in (t.fused, t.eager)))


def test_a_removed_hook_lets_a_block_fuse_again():
    block = unwarned(FusedResidual(3, 3))
    handle = block.bn1.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="bn1 has hooks"):
        block(torch.rand(2, 3, 4, 4))
    handle.remove()
    assert "ResidualBlock" in type(block(torch.rand(2, 3, 4, 4)).grad_fn).__name__


def test_a_stem_of_another_kernel_size_and_stride_is_fused_too(any_backend):
    t = trio(Stem, 3, 4, dtype=torch.float64).each(replaced("0", lambda old: nn.Conv2d(3, 4, 3, stride=1, padding=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(t, draw(2, 3, 7, 6))


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "got"),
    [
        ((3, 6), "3 -> 6 channels, strides 1"),
        ((3, 3, False, 2), "3 -> 3 channels, strides 2"),
        ((6, 3, False, 2), "6 -> 3"),
    ],
    ids=["more channels", "strided", "fewer channels, strided"],
)
def test_an_identity_shortcut_that_cannot_match_is_refused_by_the_constructor(args, got):
    with pytest.raises(ValueError, match=f"identity shortcut .* got {got}.*use_1x1conv=True"):
        FusedResidual(*args)


@pytest.mark.parametrize("strides", [-2, 0, 1.5, "2", True, None, (), (1, 1, 1), (2, 0), "22"], ids=repr)
@pytest.mark.parametrize("make", [lambda s: FusedResidual(4, 4, True, s), lambda s: LazyFusedResidual(4, True, s)])
def test_strides_that_are_none_are_refused_by_the_constructor(make, strides):
    with pytest.raises(ValueError, match=r"^strides: expected a whole number of at least 1, or a pair of them, got "):
        make(strides)


@pytest.mark.parametrize("stride", [-2, 0, "2", (2, 0)], ids=repr)
@pytest.mark.parametrize("block", [FusedBasicBlock, FusedBottleneck])
def test_a_published_block_names_its_stride_where_it_refuses_it(block, stride):
    with pytest.raises(ValueError, match=r"^stride: expected a whole number of at least 1, or a pair of them, got "):
        block(4, 4, stride)


@pytest.mark.parametrize("channels", [-1, 4.0, "4", None], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda c: FusedResidual(c, 4), "input_channels"),
        (lambda c: FusedResidual(4, c), "num_channels"),
        (lambda c: FusedStem(c), "in_channels"),
        (lambda c: FusedStem(3, c), "channels"),
        (lambda c: LazyFusedStem(c), "channels"),
        (lambda c: LazyFusedResidual(c), "num_channels"),
        (lambda c: FusedBasicBlock(c, 4), "in_channels"),
        (lambda c: FusedBasicBlock(4, c), "channels"),
        (lambda c: FusedBottleneck(c, 4), "in_channels"),
        (lambda c: FusedBottleneck(4, c), "width"),
    ],
)
def test_channels_that_are_none_are_refused_by_the_constructor(make, name, channels):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number of at least 0, got {channels!r}$"):
        make(channels)


@pytest.mark.parametrize("strides", [(1, 1), [1, 1], (2, 2), np.int64(2), (2,)], ids=repr)
def test_strides_may_be_what_a_convolution_takes(strides):
    args = (4, 4, True, strides)
    t = trio(Residual, *args, dtype=torch.float64)
    x = draw(2, 4, 6, 5)
    torch.testing.assert_close(t.fused(x.double()), t.exact(x.double()))


BAD_INPUT = {
    "no batch axis": (lambda x: x[0], ValueError, r"input: expected 4 axes .* got 3: shape \(4, 6, 5\)"),
    "five axes": (lambda x: x[None], ValueError, "input: expected 4 axes .* got 5"),
    "other channels": (lambda x: x[:, :3], ValueError, r"input: expected 4 channels, got 3: shape \(2, 3, 6, 5\)"),
    "height 0": (lambda x: x[:, :, :0], ValueError, "input: expected height and width of at least 1"),
    "integers": (lambda x: x.long(), TypeError, "input: expected float16, .* got torch.int64"),
    "another type": (lambda x: x.double(), TypeError, "input: expected float32 as (conv1|0).weight, got float64"),
    "float16": (lambda x: x.half(), TypeError, "input: expected float32 as (conv1|0).weight, got float16"),
    "another device": (lambda x: x.to("meta"), ValueError, "weight: expected the input's device meta, got "),
    "an array": (lambda x: x.cpu().numpy(), TypeError, "input: expected a tensor, got ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT)
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("kind", [IDENTITY, STRIDED, "stem"], ids=["identity", "strided", "stem"])
def test_bad_input_is_named_before_anything_changes(any_backend, kind, mode, bad):
    change, error, message = BAD_INPUT[bad]
    t = trio(Stem, 4, 5) if kind == "stem" else trio(Residual, *kind)
    with torch.set_grad_enabled(mode != "no_grad"):
        assert_refused(t.fused.train(mode == "train"), change(draw(2, 4, 6, 5)), error, message)


def _set(path: str, make):
    def change(block: nn.Module) -> None:
        name, field = path.split(".")
        module = block.get_submodule(name)
        value = make(getattr(module, field))
        if isinstance(getattr(module, field), nn.Parameter) and value is not None:
            value = nn.Parameter(value)
        setattr(module, field, value)

    return change


BAD_MODULES = {
    "bn1.weight's length": (_set("bn1.weight", lambda t: t.detach()[:3]), ValueError, r"bn1.weight: expected sh"),
    "bn2.bias's type": (_set("bn2.bias", lambda t: t.detach().double()), TypeError, "bn2.bias: expected torch.float32"),
    "bn2.running_var missing": (_set("bn2.running_var", lambda t: None), ValueError, "bn2: .* both or neither"),
    "bn2.running_mean's length": (_set("bn2.running_mean", lambda t: t[:1]), ValueError, r"bn2.running_mean: exp"),
    "bn2 on another device": (lambda m: m.bn2.to("meta"), ValueError, "bn2.weight: expected the input's device"),
    "conv2.weight's type": (_set("conv2.weight", lambda t: t.detach().double()), TypeError, "conv2.weight: expected"),
    "conv1.weight's type": (_set("conv1.weight", lambda t: t.detach().half()), TypeError, "conv1.weight: expected the"),
    "conv1's channels": (
        lambda m: setattr(m, "conv1", nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float32).to(DEVICE)),
        ValueError,
        r"conv2.weight: expected shape \(4, 6, 3, 3\), got \(4, 4, 3, 3\)",
    ),
    "conv2.bias's type": (_set("conv2.bias", lambda t: t.detach().double()), TypeError, "bn2.conv_bias: expected"),
    "conv2.weight's shape": (_set("conv2.weight", lambda t: t.detach()[:3]), ValueError, "conv2.weight: expected"),
    "conv3.bias's type": (_set("conv3.bias", lambda t: t.detach().double()), TypeError, "conv3.bias: expected"),
    "conv3.bias's length": (_set("conv3.bias", lambda t: t.detach()[:1]), ValueError, "conv3.bias: expected"),
    "conv3 on another device": (lambda m: m.conv3.to("meta"), ValueError, "conv3.weight: expected the input's device"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_MODULES)
@train_and_eval
def test_a_bad_parameter_is_named_before_anything_changes(any_backend, train, bad):
    change, error, message = BAD_MODULES[bad]
    block = trio(Residual, 4, 4, True, train=train).fused
    change(block)
    assert_refused(block, draw(2, 4, 5, 6), error, message)
