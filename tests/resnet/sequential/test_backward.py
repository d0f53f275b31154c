"""Autograd's other ways through a chain of blocks, and blocks that are linked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import resnet
from resnet import Residual
from resnet.registration import link
from tests.helpers.blocks import Trio, incoming_gradient
from tests.helpers.chains import CHAINS, RESIDUAL, STRIDED, chain, grads_of, inputs, watch
from tests.helpers.fused_cases import assert_exact, fused_alone
from tests.helpers.replays import replays

# ---- autograd's other ways -------------------------------------------------------------------------------------------


def twice(out: Tensor, wanted: list[Tensor]) -> list:
    """The second one's gradient is another, and arrives where the first one's sums were."""
    first = torch.autograd.grad(out, wanted, incoming_gradient(out), retain_graph=True)
    return [first, torch.autograd.grad(out, wanted, 2 * incoming_gradient(out) + 1)]


def batched(out: Tensor, wanted: list[Tensor]) -> tuple:
    douts = torch.stack([incoming_gradient(out) + i for i in range(2)])
    return torch.autograd.grad(out, wanted, douts, is_grads_batched=True)


def mapped(out: Tensor, wanted: list[Tensor]) -> tuple:
    douts = torch.stack([incoming_gradient(out) + i for i in range(2)])
    return torch.func.vmap(lambda dout: torch.autograd.grad(out, wanted, dout, retain_graph=True))(douts)


def with_anomalies_detected(out: Tensor, wanted: list[Tensor]) -> tuple:
    with torch.autograd.detect_anomaly(check_nan=True):
        return torch.autograd.grad(out, wanted, incoming_gradient(out))


def recorded(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return [g.detach() for g in torch.autograd.grad(out, wanted, incoming_gradient(out), create_graph=True)]


WAYS = [twice, batched, mapped, with_anomalies_detected, recorded]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__.replace("_", " "))
def test_each_way_through_a_graph_gives_eagers_gradients(any_backend, way):
    t, x = chain([RESIDUAL, STRIDED, (Residual, (6, 6))]), inputs([RESIDUAL])
    torch.testing.assert_close(grads_of(t.fused, x, way), grads_of(t.exact, x, way), atol=1e-9, rtol=1e-7)


@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="PyTorch 2.11 has no gradient from the edge of an autograd.Function",
)
def test_a_backward_in_two_parts_gives_eagers_gradients(any_backend):
    """As a pipeline has it: first those of all inputs, then block by block those of the weights."""
    t, results = chain([RESIDUAL] * 3), []
    for net in (t.fused, t.exact):
        x = inputs([RESIDUAL]).requires_grad_()
        out = net(x)
        (dx,), groups = stage_backward_input([out], [incoming_gradient(out)], [x], iter(net.parameters()))
        stage_backward_weight(iter(net.parameters()), groups)
        results.append((dx, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


def test_a_node_that_is_called_outside_of_a_backward_gives_its_inputs_gradient(on_kernels):
    t, x = chain([RESIDUAL] * 2), inputs([RESIDUAL])
    out, mid = t.fused(x), t.exact[0](x)
    (expected,) = torch.autograd.grad(t.exact[1](mid), mid, incoming_gradient(out))
    with torch.no_grad():
        _, dx, *_ = out.grad_fn.apply(incoming_gradient(out))
    torch.testing.assert_close(dx, expected, atol=1e-9, rtol=1e-7)


@fused_alone
@pytest.mark.parametrize("name", ["identities", "basic blocks"])
def test_a_chain_that_is_replayed_gives_eagers_values(on_kernels, name):
    t, x = chain(CHAINS[name]), inputs(CHAINS[name])
    for _ in range(4):
        with replays() as calls:
            assert_exact(t, x)
    assert len(calls) == 2 * len(t.fused)


@fused_alone
def test_a_second_backward_of_a_graph_saves_as_much(own_convolutions, reduced):
    fused, x = chain([RESIDUAL] * 3).fused, inputs([RESIDUAL])
    grads_of(fused, x, twice)
    assert len(reduced) == 2


def test_a_second_backward_of_a_graph_that_is_gone_is_refused_as_in_eager(on_kernels):
    out = chain([RESIDUAL] * 2).fused(inputs([RESIDUAL]))
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_double_backward_is_refused_as_that_of_one_block(any_backend):
    fused, x = chain([RESIDUAL] * 2).fused, inputs([RESIDUAL]).requires_grad_()
    (grad,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through the fused operators is not supported"):
        grad.sum().backward()


def test_a_weight_that_was_written_to_is_refused_as_in_eager(on_kernels):
    t = chain([RESIDUAL] * 3)
    for net in (t.fused, t.exact):
        out = net(inputs([RESIDUAL]).requires_grad_())
        with torch.no_grad():
            net[0].conv2.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_backward_that_fails_between_two_blocks_leaves_the_next_one_right(on_kernels):
    """The sums that were meant for the block before are of another gradient than the next backward's."""
    t = chain([RESIDUAL] * 3)
    x, results = inputs([RESIDUAL]), []

    for net in (t.fused, t.exact):
        fails = [False, True]

        def hook(grad, fails=fails):
            if fails.pop():
                raise KeyError

        handle = net[1].conv1.weight.register_hook(hook)
        out = net(leaf := x.clone().requires_grad_())
        with pytest.raises(KeyError):
            out.backward(incoming_gradient(out), retain_graph=True)
        net.zero_grad(), setattr(leaf, "grad", None)
        out.backward(3 * incoming_gradient(out))
        handle.remove()
        results.append((leaf.grad, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


# ---- `link` alone ----------------------------------------------------------------------------------------------------


def are_linked(out: Tensor, mid: Tensor) -> bool:
    return mid.grad_fn is not None and getattr(out.grad_fn, "before", None) is mid.grad_fn


def linked(t: Trio, use: Callable[[Tensor], Tensor | None], last: str = "triton") -> list[tuple]:
    """What two linked blocks give, and two eager ones, where `use` sees the tensor between them."""
    results = []
    for net in (t.fused, t.exact):
        x = inputs([RESIDUAL]).requires_grad_()
        mid = net[0](x)
        other = use(mid)
        with resnet.backend(last):
            out = net[1](mid)
        link(out.grad_fn, mid.grad_fn)
        assert are_linked(out, mid) == (net is t.fused)
        outputs = [out, *([] if other is None else [other])]
        torch.autograd.backward(outputs, [incoming_gradient(o) for o in outputs])
        results.append((x.grad, [p.grad for p in net.parameters()]))
    return results


def doubled_in_place(mid: Tensor) -> None:
    mid.register_hook(lambda g: g.mul_(2))


def replaced(mid: Tensor) -> None:
    mid.register_hook(lambda g: 2 * g)


def added_to(mid: Tensor) -> Tensor:
    return mid.exp()


@fused_alone
@pytest.mark.parametrize("use", [doubled_in_place, replaced, added_to], ids=lambda f: f.__name__.replace("_", " "))
def test_sums_of_another_gradient_than_the_one_that_arrives_are_not_used(own_convolutions, reduced, use):
    torch.testing.assert_close(*linked(chain([RESIDUAL] * 2), use), atol=1e-9, rtol=1e-7)
    assert len(reduced) == 2


@fused_alone
def test_linked_blocks_give_eagers_gradients(own_convolutions, reduced):
    torch.testing.assert_close(*linked(chain([RESIDUAL] * 2), lambda mid: None), atol=1e-9, rtol=1e-7)
    assert len(reduced) == 1


@fused_alone
@pytest.mark.parametrize("backends", [("torch", "triton"), ("triton", "torch")], ids=" then ".join)
def test_linked_blocks_on_two_backends_give_eagers_gradients(backends):
    first, last = backends
    with resnet.backend(first), resnet.convolution("pytorch"):
        results = linked(chain([RESIDUAL] * 2), lambda mid: None, last)
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)


def test_what_passes_between_linked_blocks_is_the_gradient_behind_the_relu(on_kernels):
    """So that a test which looks there would see a link."""
    t, noted, mids = chain([RESIDUAL] * 2), [], []
    linked(t, lambda mid: mids.append(mid) or watch(mid, noted.append))
    (got, expected), mid = noted, mids[1]
    assert expected[mid == 0].any()
    torch.testing.assert_close(got, expected * (mid > 0), atol=1e-9, rtol=1e-7)


def test_what_is_no_block_is_not_linked(on_kernels):
    x = inputs([RESIDUAL]).requires_grad_()
    fused = chain([RESIDUAL]).fused
    mid = fused(x)
    other = mid.relu()
    last = fused(other)
    for node, before in ((mid, x), (other, mid), (last, other)):
        link(node.grad_fn, before.grad_fn)
        assert not are_linked(node, before)
