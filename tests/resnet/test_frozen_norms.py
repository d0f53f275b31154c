"""Norms of constants: a `FrozenBatchNorm2d`, or BatchNorms in evaluation of which no vector is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import resnet
from resnet import BasicBlock, Bottleneck, Residual, ResidualBottleneck, SmallStem, Stem, fusable, fuse
from tests.conftest import DEVICE
from tests.helpers.blocks import POOLED, Trio, draw, incoming_gradient, infer, keep_norms_constant, step, trio
from tests.helpers.fused_cases import assert_exact, assert_trios_parity, fused_alone

# (class, constructor's arguments)
CASES = {
    "textbook, identity": (Residual, (8, 8)),
    "textbook, 1x1 of stride 2": (Residual, (8, 12, True, 2)),
    "basic, normed shortcut of stride 2": (BasicBlock, (8, 12, 2)),
    "basic, pooled shortcut": (BasicBlock, (8, 12, 2, POOLED)),
    "bottleneck, identity": (Bottleneck, (16, 4)),
    "bottleneck, normed shortcut of stride 2": (Bottleneck, (8, 4, 2)),
    "bottleneck, groups": (Bottleneck, (8, 8, 2, {"groups": 2})),
    "bottleneck, dilation": (Bottleneck, (16, 4, 1, {"dilation": 2})),
    "textbook's bottleneck, 1x1": (ResidualBottleneck, (8, 16, True)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it; without `eps`, as transformers has."""

    def __init__(self, bn: nn.BatchNorm2d, eps: bool = True):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())
        if eps:
            self.eps = bn.eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (v.reshape(1, -1, 1, 1) for v in self.buffers())
        scale = weight * (var + getattr(self, "eps", 1e-5)).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(fusable, "_FROZEN", {fusable.full_name(FrozenBatchNorm2d)})


def frozen(module: nn.Module, **options) -> None:
    """Each BatchNorm a `FrozenBatchNorm2d` with its values; no bias is trained."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(child, **options))
    keep_norms_constant(module)


NORMS = {"FrozenBatchNorm2d": frozen, "BatchNorm2d in evaluation": keep_norms_constant}
norms = pytest.mark.parametrize("freeze", NORMS.values(), ids=NORMS)


def trio_of(case: tuple, freeze=frozen, **options) -> Trio:
    kind, arguments = case
    return trio(kind, *arguments, **options).each(freeze)


def operator(out: Tensor) -> str:
    return type(out.grad_fn).__name__


# ---- blocks ----------------------------------------------------------------------------------------------------------


@cases
@norms
@fused_alone
def test_a_block_gives_eagers_values_in_float64(any_backend, case, freeze):
    t, x = trio_of(case, freeze, dtype=torch.float64), draw(3, case[1][0], 7, 6, dtype=torch.float64)
    assert_exact(t, x)
    assert_exact(t, x, infer)
    assert operator(t.fused(x)).endswith("FrozenBackward")


@cases
@norms
def test_a_block_is_as_exact_as_eager(any_backend, case, freeze):
    assert_trios_parity([trio_of(case, freeze, seed=seed) for seed in range(4)], (4, case[1][0], 7, 6))


@cases
def test_a_block_of_bfloat16_on_pytorchs_operators_is_as_exact_as_eager(case):
    """The compiled kernels have the same test in tests/emulated."""
    trios = [trio_of(case, keep_norms_constant, seed=seed, dtype=torch.bfloat16) for seed in range(6)]
    assert_trios_parity(trios, (8, case[1][0], 24, 24))


@cases
def test_a_block_under_autocast_is_as_exact_as_eager(any_backend, case):
    def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=x.dtype == torch.float32):
            return step(module, x)

    trios = [trio_of(case, keep_norms_constant, seed=seed) for seed in range(6)]
    assert_trios_parity(trios, (8, case[1][0], 9, 10), run)


@cases
def test_each_gradient_may_be_wanted_alone(any_backend, case):
    t = trio_of(case, dtype=torch.float64)
    x = draw(3, case[1][0], 7, 6, dtype=torch.float64)
    names = [name for name, parameter in t.exact.named_parameters() if parameter.dim() == 4]
    for wanted in (None, *names):
        grads = []
        for module in (t.fused, t.exact):
            module.requires_grad_(False)
            given = x.detach().requires_grad_(wanted is None)
            of = given if wanted is None else module.get_parameter(wanted).requires_grad_()
            out = module(given)
            grads += torch.autograd.grad(out, of, incoming_gradient(out))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bn2.weight.requires_grad_(),
        lambda m: m.bn1.bias.requires_grad_(),
        lambda m: m.conv1.bias.requires_grad_(),
        lambda m: m.conv3.bias.requires_grad_(),
        lambda m: m.bn1.train(),
    ],
    ids=["weight", "bias", "convolution's bias", "shortcut's bias", "batch statistics"],
)
def test_a_vector_that_is_trained_or_changes_is_no_constant(any_backend, change):
    t = trio_of(CASES["textbook, 1x1 of stride 2"], keep_norms_constant, dtype=torch.float64).each(change)
    x = draw(3, 8, 7, 6, dtype=torch.float64)
    assert_exact(t, x)
    assert operator(t.fused(x)) == "ResidualBlock2Backward"


def test_weights_of_float16_are_not_scaled():
    """Its range is too small for that."""
    t = trio_of(CASES["textbook, identity"], keep_norms_constant, dtype=torch.float16)
    assert operator(t.fused(draw(2, 8, 5, 5, dtype=torch.float16))) == "ResidualBlock2Backward"


@cases
def test_what_a_relu_gave_is_kept_and_no_convolutions_output(any_backend, case):
    block, saved = trio_of(case).fused, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = block(draw(2, case[1][0], 8, 8).requires_grad_())
    weights = {p.data_ptr() for p in block.parameters()}
    maps = {t.data_ptr() for t in saved if t.dim() == 4} - weights
    units = sum(name.startswith("bn") for name, _ in block.named_children())
    inputs = 1 + (POOLED in case[1])
    assert out.data_ptr() in maps and len(maps) == inputs + units  # the others are what each ReLU gave


def test_constants_may_change_between_forward_and_backward(any_backend):
    t = trio_of(CASES["bottleneck, identity"], dtype=torch.float64)
    x, grads = draw(2, 16, 6, 5, dtype=torch.float64).requires_grad_(), []
    for module in (t.fused, t.exact):
        out = module(x)
        module.bn2.running_var.mul_(4)
        grads += torch.autograd.grad(out, x, incoming_gradient(out))
    torch.testing.assert_close(*grads)


@fused_alone
def test_a_block_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(nn.functional, "conv2d", torch.conv2d)  # the compiler would read tests/conftest.py's
    t = trio_of(CASES["bottleneck, normed shortcut of stride 2"], dtype=torch.float64)
    t.fused = torch.compile(t.fused, backend="aot_eager", fullgraph=True)
    x = draw(2, 8, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(t.fused(x), t.exact(x))


# ---- FrozenBatchNorm2d -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Stem, SmallStem])
@fused_alone
def test_a_stem_gives_eagers_values(any_backend, kind):
    t = trio_of((kind, (3, 8)), dtype=torch.float64)
    x = draw(2, 3, 12, 11, dtype=torch.float64)
    assert_exact(t, x)
    assert_exact(t, x, infer)


def test_one_without_an_eps_has_the_usual_one(any_backend):
    t = trio_of(CASES["textbook, identity"], lambda m: frozen(m, eps=False), dtype=torch.float64)
    assert_exact(t, draw(2, 8, 5, 5, dtype=torch.float64))


def test_fuse_knows_it():
    model = nn.Sequential(Stem(3, 8), BasicBlock(8, 8), BasicBlock(8, 12, 2))
    frozen(model)
    report = fuse(model)
    assert len(report.fused) == 3 and not report.left


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one")
@pytest.mark.parametrize("kind", [Stem, SmallStem, BasicBlock])
def test_under_autocast_it_gives_float32_by_pytorchs_operators(kind):
    """Its product of a 16-bit map and float32 constants is float32, which a fused operator would not give."""
    eager = kind(3, 8).to(DEVICE)
    frozen(eager)
    fused = copy.deepcopy(eager)
    fuse(fused)
    x = draw(2, 3, 12, 11)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, out = eager(x), fused(x)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one")
@pytest.mark.parametrize("kind", [Stem, SmallStem, BasicBlock])
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_its_constants_may_be_of_a_narrower_type(kind, types):
    t = trio_of((kind, (8, 8)), dtype=types[0])
    x = draw(2, 8, 12, 11, dtype=types[0])
    for module in t.all:
        for buffer in module.buffers():
            buffer.data = buffer.to(types[1])
    expected, out = t.eager(x), t.fused(x)
    assert out.dtype == expected.dtype == types[0]
    torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one")
@pytest.mark.parametrize("kind", [Stem, SmallStem, BasicBlock])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_its_statistics_may_be_trained(any_backend, kind, name):
    t, grads = trio_of((kind, (8, 8)), dtype=torch.float64), []
    x = draw(2, 8, 12, 11, dtype=torch.float64)
    for module in (t.fused, t.exact):
        norm = next(m for m in module.modules() if isinstance(m, FrozenBatchNorm2d))
        module(x)  # what is remembered of it has no such gradient
        statistic = getattr(norm, name).requires_grad_()
        out = module(x)
        grads += torch.autograd.grad(out, statistic, incoming_gradient(out))
    torch.testing.assert_close(*grads)


def test_a_class_derived_from_it_is_left_alone():
    class Derived(FrozenBatchNorm2d):
        pass

    block = BasicBlock(8, 8)
    block.bn1 = Derived(block.bn1)
    assert fuse(block).left[0].reason == "bn1 is a Derived, not a BatchNorm2d"


@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one")
def test_its_forward_is_called_where_it_was_replaced(monkeypatch):
    eager = BasicBlock(8, 8).to(DEVICE)
    frozen(eager)
    fused, x = copy.deepcopy(eager), draw(2, 8, 5, 5)
    assert fuse(fused).fused
    before = FrozenBatchNorm2d.forward
    monkeypatch.setattr(FrozenBatchNorm2d, "forward", lambda self, x: before(self, x) + 1)
    torch.testing.assert_close(fused(x), eager(x))
    assert fuse(copy.deepcopy(eager)).left


def test_its_values_are_read_at_each_call(any_backend):
    t = trio_of(CASES["textbook, identity"], dtype=torch.float64)
    x = draw(2, 8, 5, 5, dtype=torch.float64)
    for _ in range(2):
        assert_exact(t, x)
        for module in t.all:
            module.bn1.running_mean.add_(0.5)
    with resnet.backend("torch"), torch.no_grad():
        torch.testing.assert_close(t.fused(x), t.exact(x))
