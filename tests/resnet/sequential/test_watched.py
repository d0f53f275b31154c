"""Who sees what lies between two blocks of a chain sees what is there in eager."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

from resnet import BasicBlock, FusedBasicBlock
from tests.helpers.blocks import draw, incoming_gradient
from tests.helpers.chains import CHAINS, chain, inputs, watch
from tests.helpers.fused_cases import fused_alone

Note = Callable[[Tensor], None]


class Passed(nn.Module):
    """Gives what it is given, and watches it."""

    def __init__(self, note: Note):
        super().__init__()
        self.note = note

    def forward(self, x: Tensor) -> Tensor:
        watch(x, self.note)
        return x


WATCHES: list[Callable[[nn.Sequential, Note], object]] = []


def watching(attach: Callable[[nn.Sequential, Note], object]) -> Callable[[nn.Sequential, Note], object]:
    """A way to see the gradient between the first block and the next; what it returns ends it."""
    WATCHES.append(attach)
    return attach


@watching
def forward_hook(net: nn.Sequential, note: Note) -> None:
    net[0].register_forward_hook(lambda module, args, out: watch(out, note))


@watching
def forward_hook_that_is_called_once(net: nn.Sequential, note: Note) -> None:
    def hook(module, args, out):
        handle.remove()
        watch(out, note)

    handle = net[0].register_forward_hook(hook)


@watching
def forward_pre_hook_of_the_neighbour(net: nn.Sequential, note: Note) -> None:
    net[1].register_forward_pre_hook(lambda module, args: watch(args[0], note))


@watching
def forward_pre_hook_of_the_neighbour_that_is_called_once(net: nn.Sequential, note: Note) -> None:
    def hook(module, args):
        handle.remove()
        watch(args[0], note)

    handle = net[1].register_forward_pre_hook(hook)


@watching
def backward_hook(net: nn.Sequential, note: Note) -> None:
    net[0].register_full_backward_hook(lambda module, grads, douts: note(douts[0].clone()))


@watching
def backward_pre_hook(net: nn.Sequential, note: Note) -> None:
    net[0].register_full_backward_pre_hook(lambda module, douts: note(douts[0].clone()))


@watching
def backward_hook_of_the_neighbour(net: nn.Sequential, note: Note) -> None:
    net[1].register_full_backward_hook(lambda module, grads, douts: note(grads[0].clone()))


@watching
def own_forward(net: nn.Sequential, note: Note) -> None:
    forward = net[0].forward

    def noted(x: Tensor) -> Tensor:
        out = forward(x)
        watch(out, note)
        return out

    net[0].forward = noted


@watching
def own_forward_of_the_neighbour(net: nn.Sequential, note: Note) -> None:
    forward = net[1].forward

    def noted(x: Tensor) -> Tensor:
        watch(x, note)
        return forward(x)

    net[1].forward = noted


@watching
def derived_class(net: nn.Sequential, note: Note) -> None:
    class Noted(type(net[0])):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            watch(out, note)
            return out

    net[0].__class__ = Noted


@watching
def module_between(net: nn.Sequential, note: Note) -> None:
    net.insert(1, Passed(note))


@watching
def module_between_in_a_sequence(net: nn.Sequential, note: Note) -> None:
    net[0] = type(net)(net[0], Passed(note))


@watching
def hook_on_a_sequence(net: nn.Sequential, note: Note) -> None:
    net[0] = type(net)(net[0])
    forward_hook(net, note)


@watching
def hook_on_a_sequence_that_is_called_once(net: nn.Sequential, note: Note) -> None:
    net[0] = type(net)(net[0])
    forward_hook_that_is_called_once(net, note)


@watching
def pre_hook_on_the_neighbours_sequence(net: nn.Sequential, note: Note) -> None:
    net[1] = type(net)(net[1])
    forward_pre_hook_of_the_neighbour(net, note)


@watching
def own_forward_of_a_sequence(net: nn.Sequential, note: Note) -> None:
    net[0] = type(net)(net[0])
    own_forward(net, note)


@watching
def derived_sequence(net: nn.Sequential, note: Note) -> None:
    net[0] = type(net)(net[0])
    derived_class(net, note)


watches = pytest.mark.parametrize("attach", WATCHES, ids=lambda f: f.__name__.replace("_", " "))


def seen(net: nn.Sequential, attach: Callable[[nn.Sequential, Note], object]) -> Tensor:
    """The gradient that is seen behind the first block in a step."""
    noted: list[Tensor] = []
    attach(net, noted.append)
    out = net(draw(2, 4, 5, 6, dtype=torch.float64).requires_grad_())
    out.backward(incoming_gradient(out))
    (grad,) = noted
    return grad


BASIC = (BasicBlock, (4, 4))  # behind whose hooks nothing is added in place, which PyTorch would refuse


@watches
def test_who_sees_the_tensor_between_two_blocks_sees_its_gradient(on_kernels, attach):
    t = chain([BASIC] * 3)
    torch.testing.assert_close(seen(t.fused, attach), seen(t.exact, attach), atol=1e-9, rtol=1e-7)


@watches
def test_blocks_that_nobody_watches_stay_linked_beside_one_that_is_watched(own_convolutions, reduced, attach):
    fused = chain([BASIC] * 4).fused
    seen(fused, attach)
    assert len(reduced) == 2 + ("neighbour" in attach.__name__)  # one that is watched is linked on neither side


GLOBAL_HOOKS = {
    "a forward hook": (register_module_forward_hook, lambda note: lambda module, args, out: note(module, out)),
    "a forward pre-hook": (register_module_forward_pre_hook, lambda note: lambda module, args: note(module, args[0])),
}


@pytest.mark.parametrize("hook", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
@pytest.mark.filterwarnings("ignore:Fused.* runs PyTorch's operators one by one. global module hooks")
def test_a_global_hook_sees_the_gradient_of_each_block(on_kernels, hook):
    t, results = chain([BASIC] * 3), []
    register, noting = hook
    for net in (t.fused, t.exact):
        noted = []

        def note(module, x, noted=noted):
            if type(module) in KINDS:
                watch(x, noted.append)

        handle = register(noting(note))
        try:
            out = net(draw(2, 4, 5, 6, dtype=torch.float64).requires_grad_())
        finally:
            handle.remove()
        out.backward(incoming_gradient(out))
        results.append(noted)
    assert len(results[0]) == 3
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


KINDS = (BasicBlock, FusedBasicBlock)


@pytest.mark.parametrize("owner", ["FusedBasicBlock", "nn.Module", "nn.Sequential"])
def test_a_method_that_is_put_into_a_class_sees_each_gradient(on_kernels, monkeypatch, owner):
    """As tools do that follow all calls."""
    t = chain([BASIC] * 3)
    expected = seen(t.exact, WATCHES[0])
    noted, first = [], t.fused[0]
    kind, name = {
        "FusedBasicBlock": (FusedBasicBlock, "forward"),
        "nn.Module": (nn.Module, "__call__"),
        "nn.Sequential": (nn.Sequential, "forward"),
    }[owner]
    plain = getattr(kind, name)

    def noting(module, x, *args):
        if kind is nn.Sequential:
            for child in module:
                x = child(x)
                if child is first:
                    watch(x, noted.append)
            return x
        out = plain(module, x, *args)
        if module is first:
            watch(out, noted.append)
        return out

    monkeypatch.setattr(kind, name, noting)
    out = t.fused(draw(2, 4, 5, 6, dtype=torch.float64).requires_grad_())
    out.backward(incoming_gradient(out))
    torch.testing.assert_close(noted, [expected], atol=1e-9, rtol=1e-7)


def with_hooks(net: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return net(x)


def saved_on_cpu(net: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return net(x)


SAVED = {
    "hooks of saved tensors": with_hooks,
    "save_on_cpu": saved_on_cpu,
    "checkpoint": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "reentrant checkpoint": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "a checkpoint of each block": lambda net, x: functools.reduce(
        lambda y, block: checkpoint(block, y, use_reentrant=False), net, x
    ),
}


@fused_alone
@pytest.mark.parametrize("run", SAVED.values(), ids=SAVED)
def test_what_is_kept_otherwise_gives_eagers_gradients(any_backend, run):
    t, results = chain(CHAINS["basic blocks"]), []
    for net in (t.fused, t.exact):
        out = run(net, x := inputs([BASIC]).requires_grad_())
        out.backward(incoming_gradient(out))
        results.append((out, x.grad, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


@fused_alone
def test_hooks_of_saved_tensors_are_called_for_each_block_alone(own_convolutions, reduced):
    """What they give may be no tensor that a neighbour could read."""
    fused, x = chain([BASIC] * 3).fused, inputs([BASIC]).requires_grad_()
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = fused(x)
    out.sum().backward()
    assert len(reduced) == 3
