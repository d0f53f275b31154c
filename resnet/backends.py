"""Which code runs the fused operations, the Triton kernels or plain PyTorch: the only place that decides."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from resnet import torch_backend
from resnet.settings import check_importable, check_launchable, current_backend

_triton: ModuleType | None = None  # imported at first use, and Triton with it


def implementation(x: Tensor) -> ModuleType:
    """`triton_backend` or `torch_backend`, for tensors on x's device."""
    global _triton
    chosen, on_cpu = current_backend(), x.device.type == "cpu"
    if chosen == "torch" or (chosen == "auto" and (on_cpu or x.is_meta)):  # of "meta" nothing runs
        return torch_backend
    if _triton is not None and (not on_cpu or _triton.active_driver() is not None):
        return _triton
    if on_cpu:
        check_launchable()
    else:
        check_importable()
    from resnet import triton_backend

    _triton = triton_backend
    return triton_backend
