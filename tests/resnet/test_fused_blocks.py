"""The published blocks and the bottlenecks on fused operators, beside eager: every chain of units, every shortcut."""

from __future__ import annotations

import pytest
import torch

import resnet
from resnet import BasicBlock, Bottleneck, ResidualBottleneck
from tests.helpers.blocks import SIXTEEN_BIT, draw, infer, same, snapshot, step, trio
from tests.helpers.fused_cases import assert_exact, assert_trios_parity, train_and_eval
from tests.helpers.pairs import each_pair

# (class, constructor's arguments)
CASES = {
    "basic, identity": (BasicBlock, (4, 4)),
    "basic, normed shortcut": (BasicBlock, (4, 6)),
    "basic, normed shortcut of stride 2": (BasicBlock, (4, 6, 2)),
    "bottleneck, identity": (Bottleneck, (8, 2)),
    "bottleneck, normed shortcut": (Bottleneck, (4, 2)),
    "bottleneck, normed shortcut of stride 2": (Bottleneck, (4, 2, 2)),
    "textbook's bottleneck, identity": (ResidualBottleneck, (8, 8)),
    "textbook's bottleneck, 1x1": (ResidualBottleneck, (4, 8, True)),
    "textbook's bottleneck, 1x1 of stride 2": (ResidualBottleneck, (4, 8, True, 2)),
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


@cases
@pytest.mark.parametrize("frozen", FROZEN)
def test_a_block_of_partly_frozen_statistics_gives_eagers_values(any_backend, case, frozen):
    t = trio_of(case, dtype=torch.float64).each(FROZEN[frozen])
    assert_exact(t, draw(3, case[1][0], 5, 6))


@cases
def test_a_block_is_as_exact_as_eager(any_backend, case):
    assert_trios_parity([trio_of(case, seed=seed) for seed in range(4)], (4, case[1][0], 7, 6))


# Wider: with two channels one value that rounds to the other side of a ReLU decides the error of a sum.
WIDE = {
    "basic": (BasicBlock, (16, 16)),
    "basic, normed shortcut": (BasicBlock, (8, 16, 2)),
    "bottleneck, normed shortcut": (Bottleneck, (16, 8, 2)),
    "textbook's bottleneck": (ResidualBottleneck, (16, 32, True, 2)),
}


@each_pair(any_backend=("torch", "triton"), indirect=["any_backend"], dtype=SIXTEEN_BIT, case=WIDE)
def test_a_block_of_a_16_bit_type_is_as_exact_as_eager(any_backend, dtype, case):
    trios = [trio_of(case, seed=seed, dtype=dtype) for seed in range(6)]
    assert_trios_parity(trios, (8, case[1][0], 24, 24))


@cases
def test_inference_of_a_block_is_as_exact_as_eager(any_backend, case):
    trios = [trio_of(case, seed=seed, train=False) for seed in range(4)]
    assert_trios_parity(trios, (4, case[1][0], 7, 6), infer)


@cases
@pytest.mark.parametrize("variant", ["triton", "epilogue"])
def test_own_convolutions_give_eagers_values(case, variant):
    with resnet.backend("triton"), resnet.convolution(variant):
        for train in (True, False):
            t = trio_of(case, dtype=torch.float64, train=train)
            x = draw(2, case[1][0], 6, 5)
            assert_exact(t, x)
            if not train:
                torch.testing.assert_close(infer(t.fused, x), infer(t.exact, x), atol=1e-9, rtol=1e-7)


@cases
def test_a_second_step_of_a_block_gives_the_same_bits(any_backend, case):
    block, x = trio_of(case).fused, draw(2, case[1][0], 6, 5)
    state = snapshot(block)
    first = step(block, x)
    block.load_state_dict(state)
    same(first, step(block, x))


@cases
def test_the_last_norm_alone_may_be_trained(any_backend, case):
    t = trio_of(case, dtype=torch.float64)
    grads = []
    for module in (t.fused, t.exact):
        module.requires_grad_(False)
        norm = (module.bn3 if hasattr(module, "bn3") else module.bn2).requires_grad_(True)
        module(draw(3, case[1][0], 7, 6, dtype=torch.float64)).square().sum().backward()
        grads.append([norm.weight.grad, norm.bias.grad])
    torch.testing.assert_close(*grads)
