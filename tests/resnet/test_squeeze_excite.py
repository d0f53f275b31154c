"""Blocks with squeeze-and-excitation: fused operators around the modules that make the gates, beside eager.

The gates of SE-ResNets stand at the end of a block; those of RegNets before its last convolution.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet import BasicBlock, Bottleneck, Residual, backend, fusable, fuse
from resnet.reference import SqueezeExcite
from tests.conftest import DEVICE
from tests.helpers.blocks import (
    GATED,
    SIXTEEN_BIT,
    Trio,
    averaged,
    draw,
    infer,
    keep_norms_constant,
    name_of,
    randomize,
    same,
    snapshot,
    step,
    trio,
)
from tests.helpers.fused_cases import assert_exact, assert_refused, assert_trios_parity, fused_alone, train_and_eval
from tests.helpers.gated import FusedInner, Inner

pytestmark = fused_alone


def trio_of(case: tuple, seed: int = 0, dtype: torch.dtype = torch.float32, train: bool = True) -> Trio:
    kind, arguments = case
    if kind is not Inner:
        return trio(kind, *arguments, GATED, seed=seed, dtype=dtype, train=train)
    torch.manual_seed(seed)
    eager = Inner(*arguments)
    randomize(eager)
    eager = eager.to(DEVICE, dtype).train(train)
    fused = copy.deepcopy(eager)
    fused.__class__ = FusedInner
    return Trio(eager, fused, copy.deepcopy(eager).double())


CASES = {
    "basic, identity": (BasicBlock, (8, 8)),
    "basic, shortcut of stride 2": (BasicBlock, (8, 12, 2)),
    "bottleneck, identity": (Bottleneck, (16, 4)),
    "before the last convolution, identity": (Inner, (8, 8)),
    "before the last convolution, shortcut of stride 2": (Inner, (8, 12, 2)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
one = CASES["basic, identity"]


def input_of(case: tuple, *size: int, **options) -> Tensor:
    N, H, W = size or (3, 7, 6)
    return draw(N, case[1][0], H, W, **options)


# ---- values and gradients ------------------------------------------------------------------------------------------


@cases
@train_and_eval
def test_a_block_gives_eagers_values_in_float64(any_backend, case, train):
    t, x = trio_of(case, dtype=torch.float64, train=train), input_of(case, dtype=torch.float64)
    assert_exact(t, x)
    assert_exact(t.each(nn.Module.eval), x, infer)


@cases
@train_and_eval
def test_a_block_is_as_exact_as_eager(any_backend, case, train):
    trios = [trio_of(case, seed=seed, train=train) for seed in range(4)]
    assert_trios_parity(trios, (4, case[1][0], 7, 6))


@cases
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_block_of_a_16_bit_type_on_pytorchs_operators_is_as_exact_as_eager(dtype, case):
    trios = [trio_of((case[0], [2 * n if n > 2 else n for n in case[1]]), seed, dtype) for seed in range(6)]
    assert_trios_parity(trios, (8, 2 * case[1][0], 24, 24))


TRAINED = {
    "what makes the gates": ("se",),
    "the first convolution": ("conv1",),
    "the norm before the gates": ("bn2",),
    "the last norm": ("bn3",),
    "the shortcut": ("downsample",),
    "all but the gates": ("conv", "bn", "downsample"),
}


@pytest.mark.parametrize("wants_dx", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("case", [(Bottleneck, (16, 8, 2)), (Bottleneck, (16, 4)), (Inner, (8, 12, 2))], ids=name_of)
def test_what_is_frozen_changes_no_other_gradient(any_backend, case, trained, wants_dx):
    t, x = trio_of(case, dtype=torch.float64), input_of(case, dtype=torch.float64).requires_grad_(wants_dx)
    grads = []
    for block in (t.fused, t.exact):
        for name, p in block.named_parameters():
            p.requires_grad_(name.startswith(trained))
        leaves = [p for p in block.parameters() if p.requires_grad] + [x] * wants_dx
        if not leaves:
            pytest.skip("its shortcut is the identity")
        grads.append(torch.autograd.grad(block(x).square().sum(), leaves))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@cases
def test_norms_of_constants_give_eagers_values(any_backend, case):
    assert_exact(trio_of(case, dtype=torch.float64).each(keep_norms_constant), input_of(case, dtype=torch.float64))


@cases
def test_statistics_may_be_averages_over_all_batches(any_backend, case):
    assert_exact(trio_of(case, dtype=torch.float64).each(averaged), input_of(case, dtype=torch.float64))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.detach())


@cases
def test_gates_may_stop_the_gradient(any_backend, case):
    """Nothing reaches the means: the gradients without them are eager's."""
    t = trio_of(case, dtype=torch.float64).each(lambda m: setattr(m.se, "gate", Detached()))
    for block in t.all:
        block.se.requires_grad_(False)
    assert_exact(t, input_of(case, dtype=torch.float64))


@cases
def test_the_means_alone_may_have_a_gradient(any_backend, case):
    """A loss on the gates, and none on what the block gives."""

    def on_gates(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
        seen = []
        handle = block.se.gate.register_forward_hook(lambda module, args, out: seen.append(out))
        block(x)
        handle.remove()
        leaves = [block.conv1.weight, block.bn2.weight, block.bn2.bias, block.se.fc1.weight]
        return dict(enumerate(torch.autograd.grad(seen[0].square().sum(), leaves)))

    assert_exact(trio_of(case, dtype=torch.float64), input_of(case, dtype=torch.float64), on_gates)


def test_inference_with_gates_before_the_last_convolution_is_eagers_on_pytorchs_operators():
    case = CASES["before the last convolution, identity"]
    t, x = trio_of(case, train=False), input_of(case)
    with backend("torch"):
        same(infer(t.fused, x), infer(t.eager, x))


def test_a_mean_far_from_zero_costs_no_digits(any_backend):
    def shifted(m: nn.Module) -> None:
        m.conv2.weight.data += 3.0

    trios = [trio_of(one, seed=seed).each(shifted) for seed in range(4)]
    assert_trios_parity(trios, (4, 8, 7, 6))


@pytest.mark.parametrize("size", [(0, 7, 6), (1, 1, 2), (2, 1, 1)], ids=name_of)
def test_batches_of_few_pixels_and_of_none_are_eagers(any_backend, size):
    assert_exact(trio_of(one, dtype=torch.float64), input_of(one, *size, dtype=torch.float64))


def test_a_second_step_gives_the_same_bits(any_backend):
    block, x = trio_of(one).fused, input_of(one)
    state = snapshot(block)
    first = step(block, x)
    block.load_state_dict(state)
    same(first, step(block, x))


def test_backward_keeps_the_input_the_convolutions_and_the_output():
    block, saved = trio_of(one).fused, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = block(input_of(one, 2, 32, 32).requires_grad_())
    maps = {t.data_ptr(): t.shape for t in saved if t.dim() == 4 and t.shape[2:] == (32, 32)}
    assert out.data_ptr() in maps and list(maps.values()) == [(2, 8, 32, 32)] * 4


# ---- the modules that make the gates -------------------------------------------------------------------------------


@cases
def test_hooks_on_what_makes_the_gates_are_called(case):
    block, seen = trio_of(case).fused, []
    block.se.fc1.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    block(input_of(case))
    assert seen == [(3, block.se.fc1.in_channels, 1, 1)]


@cases
def test_what_makes_the_gates_may_be_replaced(any_backend, case):
    def replace(m: nn.Module) -> None:
        torch.manual_seed(5)
        m.se.act = nn.SiLU()
        m.se.fc1 = nn.utils.parametrizations.weight_norm(nn.Conv2d(m.se.fc1.in_channels, 8, 1)).to(m.conv1.weight)

    assert_exact(trio_of(case, dtype=torch.float64).each(replace), input_of(case, dtype=torch.float64))


def hooked(block: nn.Module) -> None:
    block.se.register_forward_hook(lambda module, args, out: out * 2)


def of_another_class(block: nn.Module) -> None:
    block.se = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid()).to(block.conv1.weight)


def with_a_forward_of_its_own(block: nn.Module) -> None:
    block.se.forward = lambda x: x * 0.5


UNLIKE = {
    "se has hooks": hooked,
    "se is a Sequential": of_another_class,
    "se has a forward of": with_a_forward_of_its_own,
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_a_block_whose_module_does_something_else_runs_pytorchs_operators(reason):
    t = trio_of(one, dtype=torch.float64)
    for block in t.all:
        torch.manual_seed(3)
        UNLIKE[reason](block)
    x = input_of(one, dtype=torch.float64)
    with pytest.warns(UserWarning, match=reason):
        out = t.fused(x)
    torch.testing.assert_close(out, t.exact(x), atol=1e-12, rtol=1e-12)
    report = fuse(copy.deepcopy(t.eager))
    assert not report.fused and report.left[0].reason.startswith(reason)


@pytest.mark.parametrize("name", ["se", "downsample"])
@pytest.mark.parametrize("case", [one, CASES["bottleneck, identity"]], ids=name_of)
def test_a_function_in_the_place_of_a_module_is_called(case, name):
    """PyTorch keeps what is no module apart from the modules."""
    t = trio_of(case, dtype=torch.float64)
    for block in t.all:
        delattr(block, name)
        setattr(block, name, lambda x: 0.5 * x)
    x = input_of(case, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"{name} is a function and no module"):
        out = t.fused(x)
    torch.testing.assert_close(out, t.exact(x), atol=1e-12, rtol=1e-12)


def test_a_function_in_the_place_of_a_textbooks_shortcut_is_called():
    t, x = trio(Residual, 8, 8, dtype=torch.float64), draw(2, 8, 7, 6, dtype=torch.float64)
    t.each(lambda m: setattr(m, "conv3", lambda x: 0.5 * x))
    with pytest.warns(UserWarning, match="conv3 is a function and no module"):
        torch.testing.assert_close(t.fused(x), t.exact(x), atol=1e-12, rtol=1e-12)


class Broadcast(nn.Module):
    def __init__(self, *size: int):
        super().__init__()
        self.value = nn.Parameter(torch.linspace(0.5, 1.5, torch.Size(size).numel()).view(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


@cases
@pytest.mark.parametrize("size", [lambda K: (K, 1, 1), lambda K: (1, K, 1, 1), lambda K: (3, 1, 1, 1), lambda K: (1,)])
def test_gates_are_broadcast_as_eager_does(any_backend, case, size):
    """Also where there are as many images as channels."""

    def replace(m: nn.Module) -> None:
        m.se.requires_grad_(False)
        m.se.gate = Broadcast(*size(m.se.fc1.in_channels)).to(m.conv1.weight)

    N = 3 if size(1) == (3, 1, 1, 1) else trio_of(case).fused.se.fc1.in_channels
    t = trio_of(case, dtype=torch.float64).each(replace)
    x = input_of(case, N, 4, 3, dtype=torch.float64).requires_grad_()
    grads = [torch.autograd.grad(b(x).square().sum(), (x, b.conv1.weight, b.se.gate.value)) for b in (t.fused, t.exact)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


def test_a_block_that_was_pickled_before_there_were_gates_has_none(any_backend):
    for kind, arguments in ((BasicBlock, (8, 8)), (Bottleneck, (16, 4))):
        t = trio(kind, *arguments, dtype=torch.float64)
        for block in t.all:
            del block.se
        t = Trio(*(pickle.loads(pickle.dumps(block)) for block in t.all))
        assert_exact(t, draw(2, arguments[0], 4, 4, dtype=torch.float64))


def test_gates_are_dropped_with_their_module(any_backend):
    """The block is then one operator, as any other is."""
    t = trio_of(one, dtype=torch.float64).each(lambda m: setattr(m, "se", None))
    assert_exact(t, input_of(one, dtype=torch.float64))
    assert "residual_block" in str(t.fused(input_of(one, dtype=torch.float64)).grad_fn).lower().replace(
        "block2", "_block"
    )


class OfOnePixel(nn.Module):
    """A shortcut that eager adds to all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("case", [one, CASES["before the last convolution, identity"]], ids=name_of)
def test_a_shortcut_of_another_shape_or_type_is_eagers(any_backend, case):
    t = trio_of(case, dtype=torch.float64).each(lambda m: setattr(m, "downsample", OfOnePixel()))
    assert_exact(t, input_of(case, dtype=torch.float64))


class InFloat32(nn.Module):
    """A norm of constants that makes float32 of a 16-bit map, as a `FrozenBatchNorm2d` does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * 0.7 + 0.1


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_a_shortcut_of_float32_under_autocast_is_added_as_in_eager(any_backend, kind):
    t, outs = trio(kind, 8, 4, 2, GATED), []
    for block in (t.fused, t.eager):
        block.downsample[1] = InFloat32()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            outs.append(block(draw(2, 8, 9, 8)))
        outs[-1].float().sum().backward()
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outs, atol=0.1, rtol=0.1)


@cases
def test_backward_hooks_on_what_makes_the_gates_and_on_the_shortcut_are_called(any_backend, case):
    def hook(m: nn.Module) -> None:
        m.se.act = nn.SiLU()  # PyTorch lets none work in place behind such a hook
        for module, factor in ((m.se.fc1, 2), (m.se.gate, 3), (m.downsample, 5)):
            if module is not None:
                module.register_full_backward_hook(lambda module, dx, dout, factor=factor: (dx[0] * factor,))

    assert_exact(trio_of(case, dtype=torch.float64).each(hook), input_of(case, dtype=torch.float64))


# ---- the rest of PyTorch -------------------------------------------------------------------------------------------


@cases
def test_a_block_under_autocast_trains_its_own_weights(case):
    t = trio_of(case)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outs = [block(input_of(case, 2, 16, 16)) for block in (t.fused, t.eager)]
    assert outs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outs[0].float(), outs[1].float(), atol=0.1, rtol=0.1)
    outs[0].float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in t.fused.parameters())


@cases
def test_a_block_compiles_in_one_graph(case):
    t, x = trio_of(case, dtype=torch.float64), input_of(case, dtype=torch.float64)
    compiled = torch.compile(t.fused, backend="aot_eager", fullgraph=True)
    found = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x).items()}
    torch.testing.assert_close(found, step(t.exact, x), atol=1e-9, rtol=1e-7)


def test_a_block_that_is_compiled_before_any_has_run_is_fused(monkeypatch):
    """Whether a class has its own forward is remembered of the first look at it, which dynamo cannot take."""
    known = {kind: forward for kind, forward in fusable._FORWARD.items() if kind is not SqueezeExcite}
    monkeypatch.setattr(fusable, "_FORWARD", known)
    t, called = trio_of(one), []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    torch.compile(t.fused, backend=backend, fullgraph=True)(input_of(one))
    assert any("fused_residual.squeeze" in name for name in called)


@cases
def test_a_block_under_a_checkpoint_gives_eagers_gradients(case):
    t, x = trio_of(case, dtype=torch.float64), input_of(case, dtype=torch.float64).requires_grad_()
    grads = []
    for block in (t.fused, t.exact):
        out = checkpoint(block, x, use_reentrant=False)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *block.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@cases
def test_a_batch_of_gradients_is_taken_one_by_one(case):
    t, x = trio_of(case, dtype=torch.float64), input_of(case, dtype=torch.float64).requires_grad_()
    grads = []
    for block in (t.fused, t.exact):
        out = block(x)
        douts = draw(3, *out.shape, seed=4, dtype=torch.float64)
        grads.append(torch.autograd.grad(out, [x, *block.parameters()], douts, is_grads_batched=True))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_batch_of_gradients_reaches_a_shortcut_of_another_layout(layout, images):
    """With one image the strides of `torch.stack` mislead PyTorch's BatchNorm."""
    case = CASES["basic, shortcut of stride 2"]
    t = trio_of(case, dtype=torch.float64)
    x = input_of(case, images, 3, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    grads = []
    for block in (t.fused, t.exact):
        out = block(x)
        douts = draw(3, *out.shape, seed=4, dtype=torch.float64)
        wanted = [x, *block.parameters()]
        grads.append(torch.autograd.grad(out, wanted, douts, is_grads_batched=True, retain_graph=True))
        each = [torch.autograd.grad(out, wanted, dout, retain_graph=True) for dout in douts]
        torch.testing.assert_close(grads[-1], tuple(map(torch.stack, zip(*each))), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


def test_a_second_derivative_is_refused():
    block, x = trio_of(one).fused, input_of(one).requires_grad_()
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through the fused operators is not supported"):
        dx.sum().backward()


@pytest.mark.parametrize("case", [one, CASES["before the last convolution, identity"]], ids=name_of)
def test_bad_input_is_refused_before_anything_changes(case):
    block = trio_of(case).fused
    assert_refused(block, draw(2, 5, 7, 6), ValueError, "channels")
    assert_refused(block, draw(2, 8, 7, 6, dtype=torch.float64), TypeError, "float64")
    assert_refused(block, draw(1, 8, 1, 1), ValueError, "bn1")
