"""What `fuse` has changed computes what the eager module does: with parts that were replaced since, or by odd names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet import fuse, unfuse
from tests.conftest import DEVICE
from tests.helpers.blocks import draw, infer, randomize, step


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.idle = nn.ReLU(), nn.Identity()


class IdleInside(Parts):
    def forward(self, x):
        out = self.idle(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + x)


class IdleBefore(Parts):
    def forward(self, x):
        x = self.idle(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class IdleAfter(Parts):
    def forward(self, x):
        return self.idle(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x))


class IdleShortcut(Parts):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.idle(x))


class EmptySequences(Parts):
    def __init__(self):
        super().__init__()
        self.idle, self.shortcut = nn.Sequential(), nn.Sequential()

    def forward(self, x):
        out = self.idle(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + self.shortcut(x))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.fc, self.cast = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Identity()

    def forward(self, x):
        return x * torch.sigmoid(self.cast(self.fc(self.pool(x))))


class IdleBehindGates(Parts):
    def __init__(self):
        super().__init__()
        self.se = Gate()

    def forward(self, x):
        out = self.idle(self.se(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))))
        out = out + x
        return self.relu(out)


class NormBesideShortcut(Parts):
    def __init__(self):
        super().__init__()
        self.idle, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.bn3(self.idle(x)))


class DeepStem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.idle, self.bn3, self.relu3 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.idle(x)))
        return self.pool(x)


class StemParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.idle = nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.scale = nn.MaxPool2d(3, 2, 1), 3.0


class StemOfModules(StemParts):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.idle(x)
        x = self.pool(x)
        return x * self.scale


PLACEHOLDERS = IdleInside, IdleBefore, IdleAfter, IdleShortcut, EmptySequences, IdleBehindGates
REPLACEABLE = *PLACEHOLDERS, NormBesideShortcut, DeepStem, StemOfModules
NEW: dict[str, Callable[[nn.Module], object]] = {
    "a convolution": lambda old: nn.Conv2d(4, 4, 1),
    "a convolution and a norm": lambda old: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    "a sequence with the old one": nn.Sequential,
    "an identity": lambda old: nn.Identity(),
    "nothing in a sequence": lambda old: nn.Sequential(),
    "another activation": lambda old: nn.Softsign(),
}


def pair(cls: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """An eager module, and the same one fused."""
    eager = cls()
    randomize(eager)
    eager.to(DEVICE, dtype)
    fused = copy.deepcopy(eager)
    assert fuse(fused).fused
    return eager, fused


def images() -> Tensor:
    return draw(2, 4, 9, 8, dtype=torch.float64)


def check_both_alike(eager: nn.Module, fused: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch's operators run
        for mode in (True, False):
            eager.train(mode), fused.train(mode)
            torch.testing.assert_close(step(fused, images()), step(eager, images()), atol=1e-9, rtol=1e-7)
            torch.testing.assert_close(infer(fused, images()), infer(eager, images()), atol=1e-9, rtol=1e-7)


# ---- parts that are replaced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
@pytest.mark.parametrize("cls", REPLACEABLE)
def test_what_is_put_into_a_place_is_called_there(cls, new):
    eager, fused = pair(cls)
    torch.manual_seed(0)
    put_in = new(eager.idle).to(DEVICE, torch.float64)
    eager.idle = put_in
    fused.idle = copy.deepcopy(put_in)
    check_both_alike(eager, fused)


@pytest.mark.parametrize("cls", PLACEHOLDERS)
def test_a_placeholder_that_is_none_cannot_be_called(cls):
    _, fused = pair(cls)
    fused.idle = None
    with pytest.raises(TypeError, match="NoneType"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused(images().to(DEVICE))


def test_modules_of_a_stem_may_become_functions():
    eager, fused = pair(StemOfModules)
    for module in (eager, fused):
        for name in ("idle", "pool"):
            delattr(module, name)
            setattr(module, name, torch.tanh)
    check_both_alike(eager, fused)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1.5


def test_the_convolution_of_a_stem_may_be_wrapped_in_a_module_without_a_weight():
    eager, fused = pair(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    eager[0], fused[0] = Wrapper(eager[0]), Wrapper(fused[0])
    check_both_alike(eager, fused)


# ---- the text of a forward -------------------------------------------------------------------------------------------


class AsksForItsClass(StemParts):
    SCALE = 3.0

    def forward(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        return x * self.__class__.SCALE


class LooksIntoItsDict(StemParts):
    def forward(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        return x * self.__dict__.get("scale", 1.0)


class SetsAnAttribute(StemParts):
    def forward(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        self.__setattr__("calls", getattr(self, "calls", 0) + 1)
        return x * self.calls


class NamesByALambda(StemParts):
    def __init__(self):
        super().__init__()
        self.stages = ["pool"]

    def forward(self, x):
        pick = lambda name: getattr(self, name)  # noqa: E731
        for name in self.stages:
            x = x * len(name)
        x = self.idle(self.bn(self.conv(x)))
        return pick("idle")(x - 1)


class BranchesThatShareAStep(nn.Module):
    """As many values as a block has, but not those of one."""

    def __init__(self):
        super().__init__()
        self.conv0, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv0(x)
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(x)))))
        out = self.bn3(self.conv3(out))
        unused = F.relu(out)  # noqa: F841
        return F.relu(out + x)


class WithAKeyword(StemParts):
    def forward(self, x):
        return self.features(x)

    def features(self, x, *, scale=2.0):
        return self.pool(F.relu(self.bn(self.conv(x)))) * scale


@pytest.mark.parametrize(
    "cls", [AsksForItsClass, LooksIntoItsDict, SetsAnAttribute, NamesByALambda, BranchesThatShareAStep, WithAKeyword]
)
def test_a_text_that_needs_the_module_itself_or_is_no_block_is_left_alone(cls):
    eager = cls().to(DEVICE, torch.float64)
    fused = copy.deepcopy(eager)
    fuse(fused)
    check_both_alike(eager, fused)


class PrivateName(StemParts):
    def __init__(self):
        super().__init__()
        self.__head = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        return self.__head(x)


def test_a_private_name_is_the_networks_own():
    check_both_alike(*pair(PrivateName))


class WithADefault(StemParts):
    def forward(self, x=None):
        return self.pool(self.idle(self.bn(self.conv(images().to(DEVICE) if x is None else x))))


def test_a_default_argument_stays_one():
    eager, fused = pair(WithADefault)
    torch.testing.assert_close(fused(), eager())


class GatesByAWindow(Gate):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x):
        return x * self.fc(self.pool(x).expand_as(x))


N, C = 1, 8


class GatesBySizesOfTheirModule(Gate):
    def __init__(self):
        super().__init__()
        self.fc = nn.Softmax(dim=1)

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(N, C)).view(b, c, 1, 1)


class GatesExpandedAtTheEnd(Gate):
    def forward(self, x):
        return x * self.fc(self.pool(x)).expand_as(x)


@pytest.mark.parametrize(
    ("gate", "fused"), [(GatesByAWindow, False), (GatesBySizesOfTheirModule, False), (GatesExpandedAtTheEnd, True)]
)
def test_gates_are_one_number_per_map(gate, fused):
    model = IdleBehindGates()
    model.se = gate()
    model.to(DEVICE, torch.float64)
    changed = copy.deepcopy(model)
    assert (len(fuse(changed).fused) == 1) == fused
    check_both_alike(model, changed)


class ToFloat(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gates_of_a_wider_type_widen_the_output(train):
    eager, fused = pair(IdleBehindGates, torch.bfloat16)
    eager.se.cast, fused.se.cast = ToFloat(), ToFloat()
    x = images().to(DEVICE, torch.bfloat16)
    out, expected = fused.train(train)(x), eager.train(train)(x)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.02)


# ---- names and classes -----------------------------------------------------------------------------------------------


class ChildOfOurName(StemParts):
    def __init__(self):
        super().__init__()
        self._run = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        return self._run(x)


class MethodOfOurName(StemParts):
    def forward(self, x):
        return self._run(x)

    def _run(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        return x * 2


class NetworkOfOurName(StemParts):
    def __init__(self):
        super().__init__()
        self._network = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.pool(self.idle(self.bn(self.conv(x))))
        return self._network(x)


class AttributeOfOurName(IdleInside):
    def __init__(self):
        super().__init__()
        self._layout = "NCHW"


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (ChildOfOurName, "_run"),
        (MethodOfOurName, "_run"),
        (NetworkOfOurName, "_network"),
        (AttributeOfOurName, "_layout"),
    ],
)
def test_a_module_with_a_name_that_fused_ones_have_is_left_alone(cls, name):
    eager = cls().to(DEVICE, torch.float64)
    fused = copy.deepcopy(eager)
    (item,) = fuse(fused).left
    assert item.reason == f"a fused module has a {name}, and so has this"
    check_both_alike(eager, fused)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        conv, bn, relu = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.sequential = nn.Sequential(conv, bn, relu, nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return F.relu(self.sequential(x) + x)


def test_a_body_called_sequential_is_reached_by_its_name():
    _, fused = pair(Body)
    assert fused.get_submodule("sequential.0") is fused.sequential[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused.sequential[0].register_forward_hook(lambda *_: None)
        fused(images().to(DEVICE))


class Keyed(nn.Module):
    def __init_subclass__(cls, *, key: str):
        super().__init_subclass__()


class Registered(IdleInside, Keyed, key="registered"):
    pass


def test_a_class_that_nothing_can_be_derived_from_is_left_alone():
    model = Registered()
    (item,) = fuse(model).left
    assert "no class can be derived from" in item.reason and "key" in item.reason
    assert type(model) is Registered


class Sealed(IdleInside):
    def __init__(self):
        super().__init__()
        self.__dict__["sealed"] = True

    def __setattr__(self, name, value):
        if "sealed" in self.__dict__:
            raise AttributeError("sealed")
        super().__setattr__(name, value)


def test_a_module_that_lets_nobody_set_its_attributes_is_fused_and_unfused():
    model = Sealed()
    assert fuse(model).fused
    unfuse(model)
    assert type(model) is Sealed


def test_a_slice_of_a_fused_stem_is_a_sequence_like_others():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten())
    fuse(model)
    for end in range(3):
        assert not fuse(nn.Sequential(model[:end], nn.Tanh())).fused


# ---- code that is replaced -------------------------------------------------------------------------------------------


def minus(self, x):
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) - x)


def test_code_that_is_put_into_a_forward_runs(monkeypatch):
    eager, fused = pair(IdleShortcut)
    monkeypatch.setattr(IdleShortcut.forward, "__code__", minus.__code__)  # as a notebook does when a file changes
    check_both_alike(eager, fused)
    assert not fuse(IdleShortcut()).fused


def test_a_forward_that_a_class_was_given_is_read_anew(monkeypatch):
    assert fuse(IdleShortcut()).fused

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) - x)

    forward.__qualname__ = IdleShortcut.forward.__qualname__
    monkeypatch.setattr(IdleShortcut, "forward", forward)
    assert not fuse(IdleShortcut()).fused
