"""A chain of fused blocks gives what eager's gives."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import resnet
from resnet import Residual
from tests.conftest import DEVICE
from tests.helpers.blocks import averaged, draw, incoming_gradient, infer, keep_norms_constant, same, snapshot, step
from tests.helpers.chains import CHAINS, RESIDUAL, STRIDED, chain, inputs
from tests.helpers.fused_cases import assert_exact, assert_trios_parity, fused_alone

chains = pytest.mark.parametrize("blocks", CHAINS.values(), ids=CHAINS)


@fused_alone
@chains
def test_a_chain_gives_eagers_values_in_float64(any_backend, blocks):
    assert_exact(chain(blocks), inputs(blocks))


@fused_alone
@chains
def test_a_chain_is_as_exact_as_eager(any_backend, blocks):
    trios = [chain(blocks, seed=seed, dtype=torch.float32) for seed in range(4)]
    assert_trios_parity(trios, (4, *inputs(blocks).shape[1:]))


@fused_alone
@pytest.mark.parametrize("convolution", ["triton", "epilogue", "pytorch"])
@pytest.mark.parametrize("name", ["a strided 1x1 shortcut", "basic blocks", "pooled shortcuts"])
def test_each_way_of_a_convolution_gives_eagers_values(convolution, name):
    with resnet.backend("triton"), resnet.convolution(convolution):
        assert_exact(chain(CHAINS[name]), inputs(CHAINS[name]))


FROZEN = {
    "all statistics, trained vectors": lambda m: m.eval(),
    "the first block's statistics": lambda m: m[0].eval(),
    "the middle block's statistics": lambda m: m[1].eval(),
    "each last norm's statistics": lambda m: [block.bn2.eval() for block in m],
    "all constants in the middle": lambda m: keep_norms_constant(m[1]),
    "averages over all batches": averaged,
}


@fused_alone
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("name", ["a strided 1x1 shortcut", "basic blocks"])
def test_a_chain_of_partly_frozen_statistics_gives_eagers_values(any_backend, name, frozen):
    assert_exact(chain(CHAINS[name]).each(frozen), inputs(CHAINS[name]))


TRAINED = {
    "the first block": ("0.",),
    "the middle block": ("1.",),
    "the last norm of the first block": ("0.bn2",),
    "the shortcut's norm of the middle block": ("1.downsample.1",),
    "the first convolution of the last block": ("2.conv1",),
    "the ends": ("0.", "2."),
}


@fused_alone
@pytest.mark.parametrize("to_x", [True, False], ids=["and x", "not x"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_what_is_frozen_changes_no_other_gradient(any_backend, trained, to_x):
    blocks, grads = CHAINS["basic blocks"], []
    t = chain(blocks).each(lambda m: [p.requires_grad_(n.startswith(trained)) for n, p in m.named_parameters()])
    for net in (t.fused, t.exact):
        out = net(x := inputs(blocks).requires_grad_(to_x))
        wanted = [*([x] * to_x), *(p for p in net.parameters() if p.requires_grad)]
        grads.append(torch.autograd.grad(out, wanted, incoming_gradient(out)))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@fused_alone
@pytest.mark.parametrize("name", ["0.conv1.weight", "1.bn2.weight", "1.downsample.0.weight", "2.bn1.bias"])
def test_one_parameters_gradient_is_eagers(any_backend, name):
    blocks, grads = CHAINS["basic blocks"], []
    t = chain(blocks)
    for net in (t.fused, t.exact):
        out = net(inputs(blocks))
        grads += torch.autograd.grad(out, net.get_parameter(name), incoming_gradient(out))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@fused_alone
def test_a_chain_under_autocast_gives_what_its_blocks_give_one_by_one(on_kernels):
    """The sums alone are in another order: they are of more digits than what they are sums of."""
    fused, x = chain([RESIDUAL, STRIDED, (Residual, (6, 6))], dtype=torch.float32).fused, draw(4, 4, 6, 6)
    apart, results = nn.Sequential(*copy.deepcopy(fused)), []
    for net in (fused, apart):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = net(leaf := x.clone().requires_grad_())
        out.backward(incoming_gradient(out))
        results.append((out, leaf.grad, [p.grad for p in net.parameters()], [*net.buffers()]))
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    assert results[0][0].dtype == torch.bfloat16


@fused_alone
def test_inference_gives_eagers_values(any_backend):
    blocks = CHAINS["stages"]
    t = chain(blocks, train=False)
    torch.testing.assert_close(infer(t.fused, inputs(blocks)), infer(t.exact, inputs(blocks)))
    with torch.inference_mode():
        torch.testing.assert_close(t.fused(inputs(blocks)), t.exact(inputs(blocks)))


@fused_alone
def test_an_empty_batch_gives_eagers_values(any_backend):
    t = chain([RESIDUAL, (Residual, (4, 4, True)), RESIDUAL])
    results = []
    for net in (t.fused.eval(), t.exact.eval()):
        x = draw(0, 4, 5, 6, dtype=torch.float64).requires_grad_()
        out = net(x)
        out.sum().backward()
        results.append((out, x.grad, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(*results)


@fused_alone
@chains
def test_a_second_step_gives_the_same_bits(any_backend, blocks):
    fused, x = chain(blocks, dtype=torch.float32).fused, inputs(blocks)
    state = snapshot(fused)
    first = step(fused, x)
    fused.load_state_dict(state)
    same(first, step(fused, x))


@fused_alone
@pytest.mark.parametrize("shared", ["a block", "a weight"])
def test_what_is_used_twice_gets_the_sum_of_its_gradients(any_backend, shared):
    def change(net: nn.Sequential) -> None:
        if shared == "a block":
            net[1] = net[0]
        else:
            net[1].conv2.weight = net[0].conv2.weight

    assert_exact(chain([RESIDUAL] * 3).each(change), inputs([RESIDUAL]))


@fused_alone
def test_a_backward_in_another_thread_gives_eagers_values(on_kernels):
    """A GPU's backward has one, without the choices of the forward."""
    t, x = chain([RESIDUAL] * 3), inputs([RESIDUAL])

    def elsewhere(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with ThreadPoolExecutor(1) as pool:
            net.zero_grad()
            out = net(x := x.clone().requires_grad_())
            pool.submit(out.backward, incoming_gradient(out)).result()
        return {"dx": x.grad, **{name: p.grad for name, p in net.named_parameters()}}

    torch.testing.assert_close(elsewhere(t.fused, x), elsewhere(t.exact, x), atol=1e-9, rtol=1e-7)
