"""Plans of the operators on the Triton kernels: what they depend on beside their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import index

import torch
from torch import Tensor

from resnet import settings
from resnet.kernels import tuning
from resnet.kernels.host import plan
from resnet.kernels.host.facts import Known
from resnet.triton_backend import convolution


def run(function: Callable[..., list], arguments: Sequence, known: Known | None = None) -> list[Tensor | None]:
    """function(*arguments), replayed from a plan where there is one; arguments[0] is a tensor."""
    # Without cuDNN PyTorch's convolutions give maps of another layout, which a plan would not notice.
    cudnn = torch._C._get_cudnn_enabled()
    environment = tuning.choice.state(), convolution.tf32(arguments[0]), cudnn
    return plan.run(_with_choices(function, settings.current_convolution()), arguments, environment, known)


@cache
def _with_choices(function: Callable[..., list], convolution: str) -> Callable[..., list]:
    """The function on this backend, with these convolutions: what another thread chooses meanwhile is not recorded."""

    def run(*arguments) -> list:
        # A stride may be NumPy's number. It equals Python's, but the key of a choice is written as text.
        plain = [tuple(map(index, a)) if type(a) is tuple else a for a in arguments]
        with settings.both(("triton", convolution)):
            return function(*plain)

    return run
