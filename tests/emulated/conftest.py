"""The kernels as compiled code, executed on the CPU by the optional module `ptxsim`, an emulator of Triton's PTX.

Tests take the fixture `emulate`, which skips them where the kernels cannot be emulated.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from resnet.kernels.batch_norm_add_relu import apply_kernel
from tests.helpers.blocks import unwritten_memory_is_nan  # noqa: F401

# The results of each kernel count as uninitialised until the launch itself has written them. `dx` is not among them,
# since it may be `dout`.
_RESULTS = {
    "statistics_kernel": ("partial",),
    "finalize_kernel": ("stats",),
    "freeze_kernel": ("stats",),
    "apply_kernel": ("out",),
    "backward_reduce_kernel": ("partial", "g_stored"),
    "backward_finalize_kernel": (
        "sums",
        "dweight",
        "dbias",
        "dconv_bias",
        "shortcut_dweight",
        "shortcut_dbias",
        "shortcut_dconv_bias",
    ),
    "backward_apply_kernel": ("dshortcut",),
    "squeeze_kernel": ("pooled", "link", "partial"),
    "merge_images_kernel": ("to", "link"),
    "excite_kernel": ("out",),
    "excite_backward_kernel": ("g_stored", "dgate", "link", "partial"),
    "squeeze_backward_reduce_kernel": ("sums", "dweight", "dbias", "dconv_bias"),
    "squeeze_backward_apply_kernel": ("dy",),
    "grad_input_kernel": ("dx", "partial"),
    "conv_forward_kernel": ("y", "partial", "shortcut_y", "shortcut_partial"),
}


def _no_machine_code(backend=None, stages=None, *_):
    """Triton's hook into its stages: it leaves out ptxas, a sixth of the time, since the emulator executes PTX."""
    if stages is None:
        return "PTX only", "PTX only"  # in the key of Triton's cache, where no other program shall find such a kernel
    stages["cubin"] = lambda ptx, metadata: b""


def _reason_to_skip() -> str | None:
    if importlib.util.find_spec("ptxsim") is None:
        return "the optional module ptxsim, which emulates compiled kernels, is not installed"
    if isinstance(apply_kernel, InterpretedFunction):
        return "the kernels are interpreted in this process (TRITON_INTERPRET); run pytest tests/emulated on its own"
    if torch.cuda.is_available():
        return "a GPU is here, on which the other tests run compiled; the emulator takes CPU tensors"
    return None


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def emulate(request, monkeypatch) -> Callable[..., AbstractContextManager[list]]:
    """`with emulate() as launches:` runs launches as code compiled for the device and collects a report of each.

    With `dtype` float64 the test is skipped where the emulator has no product of that type. `in_place` names a kernel
    whose result may be written over what it reads. Other keywords are those of `ptxsim.capture`, such as `select`, the
    programs of a launch that run.

    On leaving, no report may hold a race, a stray, misaligned or uninitialised access, or any other error or warning.
    """
    reason = _reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    import ptxsim

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", _no_machine_code)

    @contextmanager
    def launches(dtype: torch.dtype | None = None, in_place: str = "", **options) -> Iterator[list]:
        if dtype == torch.float64 and request.param == 90:
            pytest.skip("the emulator has no float64 product of sm_90")
        uninitialised = lambda kernel, argument: kernel != in_place and argument in _RESULTS.get(kernel, ())  # noqa: E731
        with ptxsim.capture(arch=request.param, strict=False, poison=uninitialised, **options) as captured:
            yield captured.reports
        assert captured.reports, "nothing was launched"
        for report in captured.reports:
            assert not report.errors and not report.warnings, str(report)

    return launches
