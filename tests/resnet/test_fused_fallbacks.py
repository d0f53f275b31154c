"""What `FusedResidual` and `FusedStem` cannot fuse: changed modules run as eager ones, bad input is refused by name."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from resnet import FusedResidual, Residual, Stem
from tests.helpers.blocks import draw, step, trio
from tests.helpers.fused_cases import IDENTITY, STRIDED, assert_exact, assert_refused, train_and_eval

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


# A change of the module, which returns the changed module or None for the same one, and the reason that is named.
UNFUSABLE = {
    "SyncBatchNorm": (nn.SyncBatchNorm.convert_sync_batchnorm, "bn1 is a SyncBatchNorm, not a BatchNorm2d"),
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
    "groups": (replaced("conv2", convolution(padding=1, groups=2)), "conv2.groups is 2, not 1"),
    "dilation": (
        replaced("conv2", convolution(padding=2, dilation=2)),
        r"conv2.padding is \(2, 2\), not \(1, 1\)",
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


STEM_CHANGES = {
    "a hook": (hooked("2"), "2 has hooks"),
    "another activation": (replaced("2", lambda old: nn.GELU()), "2 is a GELU, not a ReLU"),
    "another pool": (replaced("3", lambda old: nn.AvgPool2d(3, 2, 1)), "3 is a AvgPool2d, not a MaxPool2d"),
    "another window": (replaced("3", lambda old: nn.MaxPool2d(2)), "3.kernel_size is 2, not 3"),
    "ceil mode": (lambda m: setattr(m[3], "ceil_mode", True), "3.ceil_mode is True"),
    "groups": (replaced("0", lambda old: nn.Conv2d(2, 4, 7, 2, 3, groups=2)), "0.groups is 2, not 1"),
    "no convolution": (replaced("0", lambda old: nn.Sequential(old)), "0 is a Sequential, not a Conv2d"),
}


@pytest.mark.parametrize("reason", STEM_CHANGES)
def test_a_stem_that_cannot_be_fused_runs_as_eager_with_one_warning(any_backend, reason):
    change, message = STEM_CHANGES[reason]
    t = trio(Stem, 2, 4, dtype=torch.float64).each(change)
    assert_runs_as_eager_with_one_warning(t.fused, t.exact, draw(2, 2, 13, 12), message)


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


BAD_INPUT = {
    "no batch axis": (lambda x: x[0], ValueError, r"input: expected 4 axes .* got 3: shape \(4, 6, 5\)"),
    "five axes": (lambda x: x[None], ValueError, "input: expected 4 axes .* got 5"),
    "other channels": (lambda x: x[:, :3], ValueError, r"input: expected 4 channels, got 3: shape \(2, 3, 6, 5\)"),
    "height 0": (lambda x: x[:, :, :0], ValueError, "input: expected height and width of at least 1"),
    "integers": (lambda x: x.long(), TypeError, "input: expected float16, .* got torch.int64"),
    "another type": (lambda x: x.double(), TypeError, "weight: expected .* torch.float64, got torch.float32"),
    "float16": (lambda x: x.half(), TypeError, "weight: expected .* torch.float16, got torch.float32"),
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
