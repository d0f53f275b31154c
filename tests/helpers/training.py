"""Nets in training: eager and fused ones with the same first weights, and what their steps give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet import FusedResidual, Residual, resnet_block
from resnet.reference import Stem
from tests.conftest import DEVICE


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


def pair(build: Callable[[type[nn.Module]], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """(eager, fused) with the same first weights."""
    torch.manual_seed(3)
    eager, fused = build(Residual), build(FusedResidual)
    fused.load_state_dict(eager.state_dict(), strict=True)
    return eager.to(DEVICE), fused.to(DEVICE)


def losses(net: nn.Module, x: Tensor, labels: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    values = []
    for _ in range(steps):
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def logits_and_gradient(net: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of the first weight, which every other layer's backward has reached before."""
    weight = next(net.parameters())
    logits = net(x.to(weight.dtype))
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, labels), weight)[0]
