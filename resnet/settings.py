"""What a user may choose: the backend of the fused operations, and the convolutions among them."""

from __future__ import annotations

import os
from typing import ClassVar

VARIANTS = ("triton", "epilogue", "pytorch")  # each falls back on the next one where it does not exist


def check_importable() -> None:
    """RuntimeError unless Triton can be imported: where it cannot, the PyTorch backend works without it."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"backend 'triton' needs the package triton, which cannot be imported here ({error}); it is made for "
            "Linux; backends 'auto' on the CPU and 'torch' do without"
        ) from error


def check_launchable() -> None:
    """RuntimeError unless Triton can launch: a driver for a GPU is active, or the kernels are interpreted."""
    check_importable()
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from resnet.kernels.batch_norm_add_relu import apply_kernel

    if isinstance(apply_kernel, InterpretedFunction):
        return
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        raise RuntimeError(
            "backend 'triton' needs a GPU that Triton supports, and none was found; to run the kernels on the CPU "
            "in Triton's interpreter (slow), set TRITON_INTERPRET=1 in the environment before Python starts; for "
            "speed on the CPU use backend 'auto' or 'torch'"
        ) from error


class _Choice:
    """A setter, and a context manager that restores the old choice. Its start value comes from the environment.

    Raises:
        ValueError: an unknown name.
    """

    names: ClassVar[tuple[str, ...]]
    current: ClassVar[str]

    def __init_subclass__(cls, names: tuple[str, ...], variable: str):
        cls.names = names
        cls.current = cls._checked(os.environ.get(variable) or "auto", variable)

    @classmethod
    def _checked(cls, name: str, source: str) -> str:
        if name not in cls.names:
            raise ValueError(f"{source}: expected one of {', '.join(map(repr, cls.names))}, got {name!r}")
        return name

    def __init__(self, name: str):
        cls = type(self)
        cls._checked(name, cls.__name__)
        self._previous, cls.current = cls.current, name

    def __enter__(self) -> _Choice:
        return self

    def __exit__(self, *_) -> None:
        type(self).current = self._previous


class backend(_Choice, names=("auto", "triton", "torch"), variable="FUSED_RESIDUAL_BACKEND"):
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
        if name == "triton":
            check_launchable()
        super().__init__(name)


class convolution(_Choice, names=("auto", *VARIANTS), variable="FUSED_RESIDUAL_CONV"):
    """Choose what runs the convolutions of the fused operations on the Triton backend; a setter and a context manager.

    `"pytorch"`: PyTorch's convolution (cuDNN), and BatchNorm's kernels before and after it. `"epilogue"`: a Triton
    convolution that also does what follows it (BatchNorm's statistics or sums, ReLU, the add); what precedes it is a
    pass of its own. `"triton"`: what precedes it too is done by the convolution, as it loads its input. `"auto"` (the
    default, or what `FUSED_RESIDUAL_CONV` says at import): the first call of each shape, type, device and direction
    times all three, and the fastest is remembered (`python -m resnet.kernels.tuning`); on the CPU nothing is timed,
    and "auto" is "triton".

        resnet.convolution("pytorch")          # from now on
        with resnet.convolution("triton"):     # in this block
            ...

    Where a convolution has nothing before it, "triton" is "epilogue"; where the Triton kernels do not cover it
    (groups, dilation), all of them are "pytorch".

    Raises:
        ValueError: an unknown name.
    """


def current_convolution() -> str:
    """The choice in force: "auto", "triton", "epilogue" or "pytorch"."""
    return convolution.current


def current_backend() -> str:
    """The choice in force: "auto", "triton" or "torch"."""
    return backend.current
