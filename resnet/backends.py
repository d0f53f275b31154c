"""Which code runs the fused operations, the Triton kernels or plain PyTorch: the only place that decides."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from resnet import torch_backend
from resnet.settings import check_importable, check_launchable, current_backend


def implementation(x: Tensor) -> ModuleType:
    """`triton_backend` or `torch_backend`, for tensors on x's device."""
    if current_backend() == "torch" or (current_backend() == "auto" and x.device.type == "cpu"):
        return torch_backend
    if x.device.type == "cpu":
        check_launchable()
    else:
        check_importable()
    from resnet import triton_backend  # at first use: it imports Triton

    return triton_backend


def ensure_available(x: Tensor) -> None:
    """Raises what `implementation` would raise, for callers that are about to change something."""
    if not torch.compiler.is_compiling():
        implementation(x)
