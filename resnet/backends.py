"""Which code runs the fused operations: the Triton kernels or plain PyTorch. The only place that decides."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from resnet import torch_batch_norm

_NAMES = ("auto", "triton", "torch")
_VARIABLE = "FUSED_RESIDUAL_BACKEND"


def _triton() -> ModuleType:
    """`triton_batch_norm`, imported at first use: where there is no Triton the rest works without it."""
    try:
        from resnet import triton_batch_norm
    except ImportError as error:
        raise RuntimeError(
            f"backend 'triton' needs the package triton, which cannot be imported here ({error}); it is made for "
            "Linux; backends 'auto' on the CPU and 'torch' do without"
        ) from error
    return triton_batch_norm


def _check_launchable() -> None:
    """RuntimeError unless Triton can launch: a driver for a GPU is active, or the kernels are interpreted."""
    _triton()
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from kernels import batch_norm

    if isinstance(batch_norm.apply_kernel, InterpretedFunction):
        return
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        raise RuntimeError(
            "backend 'triton' needs a GPU that Triton supports, and none was found; to run the kernels on the CPU "
            "in Triton's interpreter (slow), set TRITON_INTERPRET=1 in the environment before Python starts; for "
            "speed on the CPU use backend 'auto' or 'torch'"
        ) from error


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    return name


_current = _checked(os.environ.get(_VARIABLE, "auto"), _VARIABLE)


class backend:
    """Choose what runs the fused operations: a setter, and a context manager that restores the old choice.

    `"auto"` (the default, or what `FUSED_RESIDUAL_BACKEND` says at import): Triton for tensors on a GPU, PyTorch for
    tensors on the CPU. `"triton"`: the Triton kernels wherever the tensors are. `"torch"`: PyTorch's operators.

        resnet.backend("torch")            # from now on
        with resnet.backend("triton"):     # in this block
            ...

    Raises:
        ValueError: an unknown name.
        RuntimeError: `"triton"` where there is neither a GPU nor Triton's interpreter.
    """

    def __init__(self, name: str):
        global _current
        _checked(name, "backend")
        if name == "triton":
            _check_launchable()
        self._previous, _current = _current, name

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._previous


def current_backend() -> str:
    """The choice in force: "auto", "triton" or "torch"."""
    return _current


def implementation(x: Tensor) -> ModuleType:
    """`triton_batch_norm` or `torch_batch_norm`, for tensors on x's device."""
    if _current == "torch" or (_current == "auto" and x.device.type == "cpu"):
        return torch_batch_norm
    if x.device.type == "cpu":
        _check_launchable()
    return _triton()


def ensure_available(x: Tensor) -> None:
    """Raises what `implementation` would raise, for callers that are about to change something."""
    if not torch.compiler.is_compiling():
        implementation(x)
