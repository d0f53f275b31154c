"""The nets that the commands know: `--model` names the net, `--impl` what runs its blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from resnet.fused import FusedResidual, FusedResidualBottleneck
from resnet.reference import Residual, ResidualBottleneck, resnet18, resnet34, resnet50

MODELS = ("resnet18", "resnet34", "resnet50")
IMPLS = ("eager", "fused", "compile")  # compile: torch.compile of the eager net

# A builder takes the arguments of `resnet18`. All nets of a model have the same `state_dict`.
BUILDERS: dict[tuple[str, str], Callable[..., nn.Sequential]] = {
    ("resnet18", "eager"): partial(resnet18, block=Residual),
    ("resnet18", "fused"): partial(resnet18, block=FusedResidual),
    ("resnet18", "compile"): partial(resnet18, block=Residual),
    ("resnet34", "eager"): partial(resnet34, block=Residual),
    ("resnet34", "fused"): partial(resnet34, block=FusedResidual),
    ("resnet34", "compile"): partial(resnet34, block=Residual),
    ("resnet50", "eager"): partial(resnet50, block=ResidualBottleneck),
    ("resnet50", "fused"): partial(resnet50, block=FusedResidualBottleneck),
    ("resnet50", "compile"): partial(resnet50, block=ResidualBottleneck),
}

OLD_MODEL = "resnet18"  # what there was when `--model` was one of IMPLS
