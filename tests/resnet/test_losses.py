"""Whole nets beside eager ones: losses of many steps of a small net, logits and gradient of ResNet-18."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import nn

import resnet
from resnet import resnet18
from resnet.kernels import conv_grad_weight, tuning
from tests.conftest import DEVICE
from tests.helpers.blocks import draw
from tests.helpers.training import logits_and_gradient, losses, pair, small_net

STEPS = 20


@pytest.mark.long
def test_losses_of_20_steps_follow_eagers(any_backend):
    """Rounding differs from the first step and grows. In float64 it stays far below the effect of a wrong gradient."""
    eager, fused = (net.double() for net in pair(small_net))
    x, labels = draw(8, 1, 16, 16, dtype=torch.float64), torch.arange(8, device=DEVICE) % 4
    expected = losses(eager, x, labels, STEPS)
    got = losses(fused, x, labels, STEPS)
    assert expected[-1] < 0.2 * expected[0]
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    # Tolerances for the biases before BatchNorm: their gradient is zero, in eager what rounding leaves of it.
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-8)


@pytest.fixture
def whole_tiles(monkeypatch):
    """Interpreted kernels get tiles as large as the matrix: the interpreter takes as long for a small one."""
    if not triton.knobs.runtime.interpret:
        return

    def block(length: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(length)))

    def whole(gemm: tuning.Gemm, *_) -> tuple[tuning.Config]:
        rows, columns, _, reduction = gemm.problem
        return (tuning.Config(block(rows, 256), block(columns, 512), block(reduction, 512), 4, 1),)

    monkeypatch.setattr(tuning.choice, "candidates", whole)
    monkeypatch.setattr(conv_grad_weight, "fit", lambda config, *_: config)


def a_block_of_each_stage(block: type[nn.Module]) -> nn.Sequential:
    """ResNet-18 with half of its blocks."""
    net = resnet18(block=block)
    for stage in net[1:5]:
        del stage[1]
    return net


NETS = {"torch": resnet18, "triton": resnet18 if DEVICE.type == "cuda" else a_block_of_each_stage}


@pytest.mark.long
@pytest.mark.parametrize("backend", NETS)
def test_resnet18_gives_eagers_logits_and_gradient(whole_tiles, backend):
    """The convolutions are fused too. Interpreted, half of the blocks take long enough."""
    eager, fused = (net.double() for net in pair(lambda block: NETS[backend](block=block)))
    x, labels = draw(2, 1, 40, 40, dtype=torch.float64), torch.tensor([1, 7], device=DEVICE)
    with resnet.backend(backend), resnet.convolution("triton"):
        got = logits_and_gradient(fused, x, labels)
    torch.testing.assert_close(got, logits_and_gradient(eager, x, labels), rtol=1e-8, atol=1e-8)
