"""Plans of the operators on the Triton kernels: what they depend on beside their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from resnet import settings
from resnet.kernels import tuning
from resnet.kernels.host import plan
from resnet.kernels.host.facts import Known
from resnet.triton_backend import convolution


def run(function: Callable[..., list], arguments: Sequence, known: Known | None = None) -> list[Tensor | None]:
    """function(*arguments), replayed from a plan where there is one; arguments[0] is a tensor."""
    chosen = settings.current_backend(), settings.current_convolution(), tuning.choice.state()
    return plan.run(function, arguments, (*chosen, convolution.tf32(arguments[0])), known)
