"""Training, not single calls: losses over many steps follow eager's, through a small net and through ResNet-18."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from resnet import FusedResidual, Residual, resnet18, resnet_block
from resnet.reference import Stem
from tests.blocks import draw, one_thread  # noqa: F401
from tests.conftest import DEVICE

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


def test_resnet18_trains_as_eager_does(any_backend):
    eager, fused = (net.double() for net in pair(lambda block: resnet18(block=block)))
    x, labels = draw(2, 1, 40, 40, dtype=torch.float64), torch.tensor([1, 7], device=DEVICE)
    torch.testing.assert_close(losses(fused, x, labels, 2), losses(eager, x, labels, 2), rtol=1e-8, atol=1e-8)
