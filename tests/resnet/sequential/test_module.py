"""`FusedSequential` is an `nn.Sequential` for all tools, and what `fuse` makes of one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd

import resnet
from resnet import BasicBlock, FusedResidual, FusedSequential, Residual, ResNet, fuse, resnet18, unfuse
from tests.conftest import DEVICE
from tests.helpers.blocks import Trio, draw, incoming_gradient, same, saved_and_loaded, snapshot, step
from tests.helpers.chains import CHAINS, RESIDUAL, chain, grads_of, inputs, watch
from tests.helpers.fused_cases import assert_exact, fused_alone

# ---- a module among others -------------------------------------------------------------------------------------------


STAGES = CHAINS["stages"]


def test_it_is_a_sequence_with_the_same_state():
    t = chain(STAGES)
    assert isinstance(t.fused, nn.Sequential)
    same(snapshot(t.fused), snapshot(t.eager))
    assert [name for name, _ in t.fused.named_modules()] == [name for name, _ in t.eager.named_modules()]
    t.eager.load_state_dict(t.fused.state_dict(), strict=True)
    assert repr(t.fused).startswith("FusedSequential(\n  (0): FusedSequential(\n    (0): FusedResidual(")
    assert repr(t.fused).replace("Fused", "") == repr(t.eager)


def test_its_parts_and_what_it_is_extended_to_are_of_its_class(on_kernels):
    t = chain([RESIDUAL] * 3)
    assert type(t.fused[1:]) is FusedSequential and type(t.fused[0]) is FusedResidual
    assert_exact(t.each(lambda m: m.append(copy.deepcopy(m.pop(0)))), inputs([RESIDUAL]))
    assert_exact(t.each(lambda m: m.insert(1, nn.Sigmoid())), inputs([RESIDUAL]))
    assert_exact(Trio(t.eager[:2], t.fused[:2], t.exact[:2]), inputs([RESIDUAL]))
    assert type(t.fused) is FusedSequential and len(t.fused) == 4


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_and_loaded], ids=lambda f: f.__name__)
def test_a_copy_is_linked_too_and_changes_alone(own_convolutions, reduced, duplicate):
    fused, x = chain(STAGES).fused, inputs(STAGES)
    twin = duplicate(fused)
    assert [type(module) for module in twin.modules()] == [type(module) for module in fused.modules()]
    before = snapshot(fused)
    of_twin = step(twin, x)
    same(snapshot(fused), before)
    same(of_twin, step(fused, x))
    assert len(reduced) == 2


@pytest.mark.parametrize(
    "tool",
    [
        torch.fx.symbolic_trace,
        torch.jit.script,
        lambda net: torch.compile(net, backend="aot_eager", fullgraph=True),
        lambda net: lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,)),
        lambda net: torch.export.export(net, (inputs(STAGES),)).module(),
        lambda net: torch.jit.trace(net, inputs(STAGES), check_trace=False),
        lambda net: net._replicate_for_data_parallel(),
        lambda net: nn.parallel.DataParallel(net),
    ],
    ids=["fx", "script", "compile", "functional_call", "export", "trace", "replica", "DataParallel"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_tools_see_a_chain_that_computes_the_same(on_kernels, tool, monkeypatch):
    monkeypatch.setattr(nn.functional, "conv2d", torch.conv2d)  # TorchScript would read tests/conftest.py's
    torch.compiler.reset()
    t, results = chain(STAGES, train=False), []
    for module, run in ((t.fused, tool(t.fused)), (t.exact, t.exact)):
        x = inputs(STAGES).requires_grad_()
        out = run(x)
        results.append((out, *torch.autograd.grad(out, x, incoming_gradient(out))))
        assert module.training is False
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


@fused_alone
def test_a_compiled_chain_trains_as_eager(any_backend):
    torch.compiler.reset()
    t = chain(STAGES)
    compiled = torch.compile(t.fused, backend="aot_eager", fullgraph=True)
    got = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, inputs(STAGES)).items()}
    torch.testing.assert_close(got, step(t.exact, inputs(STAGES)), atol=1e-9, rtol=1e-7)


def test_compiled_autograd_gives_eagers_gradients(any_backend):
    """It has what each node saved in a graph, and calls their backwards from there."""
    t, x = chain([RESIDUAL] * 3), inputs([RESIDUAL])
    with compiled_autograd._enable(lambda graph: graph):
        got = grads_of(t.fused, x, lambda out, wanted: out.backward(incoming_gradient(out)) or [w.grad for w in wanted])
    expected = grads_of(t.exact, x, lambda out, wanted: torch.autograd.grad(out, wanted, incoming_gradient(out)))
    torch.testing.assert_close(got, [*expected], atol=1e-9, rtol=1e-7)


def test_compiled_autograd_calls_each_operators_backward_and_compiles_nothing_below_it(any_backend):
    torch.compiler.reset()
    t, x, graphs = chain([RESIDUAL] * 3), inputs([RESIDUAL]), []

    def kept(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with compiled_autograd._enable(torch.compile(backend=kept)):
        got = grads_of(t.fused, x, lambda out, wanted: out.backward(incoming_gradient(out)) or [w.grad for w in wanted])
    expected = grads_of(t.exact, x, lambda out, wanted: torch.autograd.grad(out, wanted, incoming_gradient(out)))
    torch.testing.assert_close(got, [*expected], atol=1e-9, rtol=1e-7)
    assert len(graphs) <= 2 * len(t.fused)


TRANSFORMS = {
    "grad": lambda net, x: torch.func.grad(lambda x: net(x).square().sum())(x),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x.cos(),)),
    "vmap": lambda net, x: torch.func.vmap(net)(torch.stack([x, -x])),
    "jacrev": lambda net, x: torch.func.jacrev(lambda x: net(x).mean((1, 2, 3)))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_functions_give_eagers_values(on_kernels, transform):
    t, x = chain(STAGES, train=False), inputs(STAGES)
    torch.testing.assert_close(transform(t.fused, x), transform(t.exact, x), atol=1e-9, rtol=1e-7)


def test_a_gradient_that_is_kept_as_its_negative_counts_as_itself(on_kernels):
    t, grads = chain(STAGES), []
    for module in (t.fused, t.exact):
        x = inputs(STAGES).requires_grad_()
        out = module(x)
        dout = incoming_gradient(out).contiguous(memory_format=torch.channels_last)
        grads.append(torch.autograd.grad(out, x, torch._neg_view(dout)))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


def test_hooks_of_the_sequence_itself_are_called_as_in_eager(on_kernels):
    t, results = chain(STAGES), []
    for net in (t.fused, t.exact):
        called = []
        net.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        net.register_forward_hook(lambda module, args, out: out + 1)
        net.register_full_backward_hook(lambda module, grads, douts, called=called: called.extend((grads, douts)))
        results.append((step(net, inputs(STAGES)), called))
    assert results[0][1]
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


def test_its_call_is_refused_as_a_sequences():
    t = chain([RESIDUAL])
    x = inputs([RESIDUAL])
    same({"out": t.fused(input=x)}, {"out": t.fused.train()(x)})
    messages = []
    for net in (t.fused, t.exact):
        net.add_module("none", None)
        for args in ((), (x, x), (x,)):
            with pytest.raises(TypeError) as refused:
                net(*args)
            messages.append(str(refused.value).replace("Fused", ""))
    assert messages[:3] == messages[3:]


def test_an_empty_sequence_gives_its_input():
    x = inputs([RESIDUAL])
    assert FusedSequential()(x) is x
    assert FusedSequential(FusedSequential())(x) is x


# ---- fuse and unfuse -------------------------------------------------------------------------------------------------


def kinds_of(net: nn.Module) -> list[type]:
    return [type(module) for module in net.modules() if isinstance(module, nn.Sequential)]


def test_fuse_makes_sequences_of_blocks_and_unfuse_gives_them_back(any_backend):
    t = chain(STAGES)
    net = copy.deepcopy(t.exact)
    first = fuse(net)
    assert kinds_of(net) == kinds_of(t.fused) == [FusedSequential] * 4
    assert str(fuse(net)) == str(first) and kinds_of(net) == kinds_of(t.fused)
    assert_exact(Trio(t.eager, net, t.exact), inputs(STAGES))
    unfuse(net)
    assert kinds_of(net) == [nn.Sequential] * 4


def test_fuse_links_the_users_own_sequence_of_fused_blocks(own_convolutions, reduced):
    net = nn.Sequential(FusedResidual(4, 4), FusedResidual(4, 4)).to(DEVICE)
    step(net, draw(2, 4, 5, 6))
    fuse(net)
    assert type(net) is FusedSequential
    step(net, draw(2, 4, 5, 6))
    assert len(reduced) == 2 + 1


class Numbered(nn.Sequential):
    """May do anything."""


def with_own_forward() -> nn.Sequential:
    net = nn.Sequential(Residual(4, 4), Residual(4, 4))
    net.forward = lambda x: net[1](net[0](x)) + 1
    return net


LEFT = {
    "a derived class": lambda: Numbered(Residual(4, 4), Residual(4, 4)),
    "a forward of its own": with_own_forward,
    "no blocks": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
    "nothing": nn.Sequential,
    "a list": lambda: nn.ModuleList([Residual(4, 4), Residual(4, 4)]),
}


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_other_sequences_are_left_alone(make):
    net = make()
    before = type(net)
    fuse(net)
    assert type(net) is before


def test_a_hook_of_a_sequence_stays_when_it_is_fused(on_kernels):
    t, results = chain(STAGES), []
    nets = t.exact, copy.deepcopy(t.exact)
    for net in nets:
        noted = []
        net[0].register_forward_hook(lambda module, args, out, noted=noted: watch(out, noted.append))
        if net is nets[1]:
            assert not fuse(net).left
        results.append((step(net, inputs(STAGES)), noted))
    assert results[0][1]
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("lazy", [False, True], ids=["resnet18", "LazyResNet18"])
def test_the_librarys_nets_are_sequences_that_link(lazy):
    net = resnet.LazyResNet18() if lazy else resnet18(block=FusedResidual)
    stages = [module for module in net.modules() if type(module) is FusedSequential]
    assert len(stages) == 1 + 4
    assert not any(type(m) is FusedSequential for m in resnet18().modules())


def test_a_fused_network_of_stages_saves_a_pass_in_each_block_but_the_last(own_convolutions, reduced):
    torch.manual_seed(0)
    net = ResNet(BasicBlock, (2, 1), widths=(4, 6), num_classes=3, stem="small").to(DEVICE)
    assert not fuse(net).left
    net(draw(2, 3, 6, 6)).sum().backward()
    assert reduced.count((2, 4, 6, 6)) == 1 and reduced.count((2, 6, 3, 3)) == 1
