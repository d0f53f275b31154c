"""In a chain of fused blocks each but the last saves a pass, and keeps nothing more."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from resnet import Bottleneck
from tests.helpers.blocks import step
from tests.helpers.chains import CHAINS, RESIDUAL, apart, chain, inputs
from tests.helpers.fused_cases import fused_alone

SAVING = {
    **{name: CHAINS[name] for name in ("identities", "a 1x1 shortcut after a strided one", "basic blocks", "stages")},
    "bottlenecks": [(Bottleneck, (8, 4)), (Bottleneck, (16, 4)), (Bottleneck, (16, 4))],
    "textbook's bottlenecks": CHAINS["textbook's bottlenecks"],
}


@fused_alone
@pytest.mark.parametrize("blocks", SAVING.values(), ids=SAVING)
def test_the_last_block_of_a_chain_alone_takes_its_sums_in_a_pass(own_convolutions, reduced, blocks):
    fused, x = chain(blocks).fused, inputs(blocks)
    out = step(fused, x)["out"]
    assert reduced == [tuple(out.shape)]
    reduced.clear()
    step(apart(fused), x)
    assert len(reduced) == len(apart(fused)) > 1


@fused_alone
def test_a_shortcut_of_another_stride_than_the_first_convolution_s_is_no_hindrance(own_convolutions, reduced):
    blocks = [(Bottleneck, (8, 4)), (Bottleneck, (16, 4, 2))]
    step(chain(blocks).fused, inputs(blocks))
    assert len(reduced) == 1


def live_bytes() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]  # other kinds may have no storage
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_a_chain_keeps_what_its_blocks_keep(on_kernels):
    fused = chain([RESIDUAL] * 3).fused
    kept = []
    for net in (fused, apart(fused)):
        for _ in range(3):  # what is recorded once is kept
            step(net, inputs([RESIDUAL]))
        x = inputs([RESIDUAL]).requires_grad_()
        before = live_bytes()
        out = net(x)
        forward = live_bytes() - before
        torch.autograd.grad(out.sum(), x, retain_graph=True)
        kept.append((forward, live_bytes() - before))
        del out
        assert live_bytes() == before
    assert kept[0] == kept[1] and kept[0][0] == kept[0][1] > 0


def test_a_gradient_that_no_block_takes_is_not_kept(on_kernels):
    """In a backward that ends before it reaches the block that it is meant for, while the graph stays."""
    fused = chain([RESIDUAL] * 2).fused
    wanted = fused[1].conv1.weight
    for _ in range(3):  # what is recorded once is kept
        torch.autograd.grad(fused(inputs([RESIDUAL])).sum(), wanted)
    out = fused(inputs([RESIDUAL]))
    before = live_bytes()
    torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    out.sum().backward(inputs=[wanted], retain_graph=True)
    wanted.grad = None
    assert live_bytes() - before < out.numel() * out.element_size()


@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "without backward"])
def test_a_graph_goes_with_its_output_and_needs_no_garbage_collector(on_kernels, backward):
    fused = chain([RESIDUAL] * 3).fused
    gc.collect()
    gc.disable()
    try:
        out = fused(inputs([RESIDUAL]))
        first = out.grad_fn
        while any(type(above) is type(first) for above, _ in first.next_functions):
            first = first.next_functions[0][0]
        assert first is not out.grad_fn
        first = weakref.ref(first)
        if backward:
            out.sum().backward()
        del out
        assert first() is None
    finally:
        gc.enable()
