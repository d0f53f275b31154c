"""The published blocks and the bottlenecks on fused operators, beside eager: every chain of units, every shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet
from resnet import BasicBlock, Bottleneck, ResidualBottleneck
from tests.helpers.blocks import (
    GATED,
    POOLED,
    SIXTEEN_BIT,
    draw,
    incoming_gradient,
    infer,
    name_of,
    same,
    snapshot,
    step,
    trio,
)
from tests.helpers.fused_cases import assert_exact, assert_trios_parity, fused_alone, train_and_eval

pytestmark = fused_alone

# (class, constructor's arguments). A norm of two channels would leave the error of its sums to luck.
CASES = {
    "basic, identity": (BasicBlock, (8, 8)),
    "basic, normed shortcut": (BasicBlock, (8, 12)),
    "basic, normed shortcut of stride 2": (BasicBlock, (8, 12, 2)),
    "basic, pooled shortcut": (BasicBlock, (8, 12, 2, POOLED)),
    "bottleneck, identity": (Bottleneck, (16, 4)),
    "bottleneck, normed shortcut": (Bottleneck, (8, 4)),
    "bottleneck, normed shortcut of stride 2": (Bottleneck, (8, 4, 2)),
    "bottleneck, pooled shortcut": (Bottleneck, (8, 4, 2, POOLED)),
    "bottleneck, groups": (Bottleneck, (16, 4, 1, {"groups": 2})),
    "bottleneck, groups and a stride": (Bottleneck, (8, 8, 2, {"groups": 2})),
    "bottleneck, depthwise": (Bottleneck, (8, 4, 2, {"groups": 4})),
    "bottleneck, groups and a pooled shortcut": (Bottleneck, (8, 8, 2, {"groups": 2, **POOLED})),
    "bottleneck, dilation": (Bottleneck, (16, 4, 1, {"dilation": 2})),
    "bottleneck, dilation and a stride": (Bottleneck, (8, 4, 2, {"dilation": 3})),
    "bottleneck, a dilation beyond 32-bit offsets": (Bottleneck, (16, 4, 1, {"dilation": 10**7})),
    "bottleneck, groups and dilation": (Bottleneck, (16, 4, 1, {"groups": 2, "dilation": 2})),
    "basic, gates": (BasicBlock, (8, 8, GATED)),
    "basic, gates and a normed shortcut of stride 2": (BasicBlock, (8, 12, 2, GATED)),
    "bottleneck, gates": (Bottleneck, (16, 4, GATED)),
    "bottleneck, gates and a pooled shortcut": (Bottleneck, (8, 4, 2, {**GATED, **POOLED})),
    "textbook's bottleneck, identity": (ResidualBottleneck, (16, 16)),
    "textbook's bottleneck, 1x1": (ResidualBottleneck, (8, 16, True)),
    "textbook's bottleneck, 1x1 of stride 2": (ResidualBottleneck, (8, 16, True, 2)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FROZEN = {
    "all": lambda m: m.eval(),
    "first": lambda m: m.bn1.eval(),
    "last": lambda m: (m.bn3 if hasattr(m, "bn3") else m.bn2).eval(),
    "shortcut's": lambda m: getattr(m, "downsample", None) is None or m.downsample.eval(),
}


def trio_of(case: tuple, **options):
    kind, arguments = case
    return trio(kind, *arguments, **options)


@cases
@train_and_eval
def test_a_block_gives_eagers_values_in_float64(any_backend, case, train):
    assert_exact(trio_of(case, dtype=torch.float64, train=train), draw(3, case[1][0], 7, 6))


@pytest.mark.parametrize("stride", [None, 2, (2, 2), [2]], ids=str)
def test_a_pool_takes_its_stride_in_all_forms_that_pytorch_takes(stride):
    t = trio(BasicBlock, 4, 6, 2, POOLED, dtype=torch.float64)
    assert_exact(t.each(lambda m: setattr(m.downsample[0], "stride", stride)), draw(2, 4, 7, 6))


@cases
@pytest.mark.parametrize("frozen", FROZEN)
def test_a_block_of_partly_frozen_statistics_gives_eagers_values(any_backend, case, frozen):
    t = trio_of(case, dtype=torch.float64).each(FROZEN[frozen])
    assert_exact(t, draw(3, case[1][0], 5, 6))


@cases
def test_a_block_is_as_exact_as_eager(any_backend, case):
    assert_trios_parity([trio_of(case, seed=seed) for seed in range(4)], (8, case[1][0], 7, 6))


# Wider: with two channels one value that rounds to the other side of a ReLU decides the error of a sum.
WIDE = {
    "basic": (BasicBlock, (16, 16)),
    "basic, normed shortcut": (BasicBlock, (8, 16, 2)),
    "bottleneck, normed shortcut": (Bottleneck, (16, 8, 2)),
    "bottleneck, pooled shortcut": (Bottleneck, (16, 8, 2, POOLED)),
    "bottleneck, groups": (Bottleneck, (16, 8, 2, {"groups": 2})),
    "bottleneck, dilation": (Bottleneck, (16, 8, 1, {"dilation": 2})),
    "basic, gates": (BasicBlock, (16, 16, GATED)),
    "bottleneck, gates and a normed shortcut": (Bottleneck, (16, 8, 2, GATED)),
    "textbook's bottleneck": (ResidualBottleneck, (16, 32, True, 2)),
}


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_a_block_of_a_16_bit_type_on_pytorchs_operators_is_as_exact_as_eager(dtype, case):
    """The compiled kernels have the same test in tests/emulated."""
    trios = [trio_of(case, seed=seed, dtype=dtype) for seed in range(6)]
    assert_trios_parity(trios, (8, case[1][0], 24, 24))


@cases
def test_inference_of_a_block_is_as_exact_as_eager(any_backend, case):
    trios = [trio_of(case, seed=seed, train=False) for seed in range(4)]
    assert_trios_parity(trios, (4, case[1][0], 7, 6), infer)


@pytest.mark.parametrize("case", [case for case in CASES.values() if 2 in case[1]], ids=str)
def test_own_convolutions_give_eagers_values(case):
    with resnet.backend("triton"), resnet.convolution("triton"):
        t, x = trio_of(case, dtype=torch.float64), draw(2, case[1][0], 6, 5)
        assert_exact(t, x)
        t.each(nn.Module.eval)
        torch.testing.assert_close(infer(t.fused, x), infer(t.exact, x), atol=1e-9, rtol=1e-7)


TRAINED = {
    "the last norm": ("bn3",),
    "the second norm and its convolution": ("bn2", "conv2"),
    "the second norm": ("bn2",),
    "the first convolution": ("conv1",),
    "the shortcut": ("downsample",),
    "the shortcut's norm": ("downsample.1",),
}


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_what_is_frozen_changes_no_other_gradient(any_backend, trained):
    t, x = trio(Bottleneck, 4, 2, 2, dtype=torch.float64), draw(2, 4, 6, 5, dtype=torch.float64)
    grads = []
    for block in (t.fused, t.exact):
        for name, p in block.named_parameters():
            p.requires_grad_(name.startswith(trained))
        out = block(x)
        grads.append(
            torch.autograd.grad(out, [p for p in block.parameters() if p.requires_grad], incoming_gradient(out))
        )
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@cases
def test_a_second_step_of_a_block_gives_the_same_bits(any_backend, case):
    block, x = trio_of(case).fused, draw(2, case[1][0], 6, 5)
    state = snapshot(block)
    first = step(block, x)
    block.load_state_dict(state)
    same(first, step(block, x))
