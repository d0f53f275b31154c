"""Training, not single calls: losses over many steps follow eager's, through a small net and through ResNet-18."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import nn
from torch.nn import functional as F

import resnet
from resnet import FusedResidual, Residual, resnet18, resnet_block
from resnet.kernels import conv_grad_weight, tuning
from resnet.reference import Stem
from tests.conftest import DEVICE
from tests.helpers.blocks import draw, one_thread  # noqa: F401

STEPS = 20


def small_net(block: type[nn.Module]) -> nn.Sequential:
    """Stem, a stage with an identity shortcut and one with a 1x1 convolution, classifier."""
    return nn.Sequential(
        getattr(block, "stem", Stem)(1, 8),
        resnet_block(8, 8, 1, first_block=True, block=block),
        resnet_block(8, 16, 1, block=block),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def pair(build) -> tuple[nn.Module, nn.Module]:
    """(eager, fused) with the same first weights."""
    torch.manual_seed(3)
    eager, fused = build(Residual), build(FusedResidual)
    fused.load_state_dict(eager.state_dict(), strict=True)
    return eager.to(DEVICE), fused.to(DEVICE)


def losses(net: nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    values = []
    for _ in range(steps):
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.long
def test_losses_of_20_steps_follow_eagers(any_backend):
    """Rounding differs from step 1 and grows with every step: float64 keeps it far below what a wrong gradient does."""
    eager, fused = (net.double() for net in pair(small_net))
    x, labels = draw(8, 1, 16, 16, dtype=torch.float64), torch.arange(8, device=DEVICE) % 4
    expected = losses(eager, x, labels, STEPS)
    got = losses(fused, x, labels, STEPS)
    assert expected[-1] < 0.2 * expected[0]
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    state, reference = fused.state_dict(), eager.state_dict()
    for name, value in reference.items():
        # A bias before BatchNorm has no gradient, but for rounding in eager; the mean that it shifts follows.
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def logits_and_gradient(net: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """And the gradient of the first weight, behind everything else."""
    weight = next(net.parameters())
    logits = net(x.to(weight.dtype))
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, labels), weight)[0]


@pytest.fixture
def whole_tiles(monkeypatch):
    """Where kernels are interpreted, tiles as large as the matrix: the interpreter takes as long for a small one."""
    if not triton.knobs.runtime.interpret:
        return

    def block(length: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(length)))

    def whole(gemm: tuning.Gemm, *_) -> tuple[tuning.Config]:
        rows, columns, _, reduction = gemm.problem
        return (tuning.Config(block(rows, 256), block(columns, 512), block(reduction, 512), 4, 1),)

    monkeypatch.setattr(tuning.choice, "candidates", whole)
    monkeypatch.setattr(conv_grad_weight, "fit", lambda config, *_: config)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_resnet18_gives_eagers_logits_and_gradient(whole_tiles, backend):
    """Whole, its convolutions fused too."""
    eager, fused = (net.double() for net in pair(lambda block: resnet18(block=block)))
    x, labels = draw(2, 1, 40, 40, dtype=torch.float64), torch.tensor([1, 7], device=DEVICE)
    with resnet.backend(backend), resnet.convolution("triton"):
        got = logits_and_gradient(fused, x, labels)
    torch.testing.assert_close(got, logits_and_gradient(eager, x, labels), rtol=1e-8, atol=1e-8)
