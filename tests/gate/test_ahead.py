"""Kernels compiled ahead, side by side, for a device that is not here."""

import pytest
import torch
from triton import knobs
from triton.compiler import CompilationError, CompiledKernel
from triton.runtime import driver

from benchmarks.compiled.launches import record
from resnet.kernels.host.launcher import compile_ahead, launch
from resnet.kernels.tuning import SM_90
from tests.gate.planted_kernels import copy_kernel


@pytest.fixture
def x(monkeypatch) -> torch.Tensor:
    """For launches that are compiled, by Triton's own way, and cannot be made."""
    with record(SM_90.target, SM_90.properties):
        monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
        yield torch.zeros(256)
        monkeypatch.undo()
        copy_kernel.device_caches.clear()


def compiled() -> list:
    kernels, *_ = copy_kernel.device_caches[driver.active.get_current_device()]
    return [kernel for kernel in kernels.values() if isinstance(kernel, CompiledKernel)]


def test_all_are_compiled_when_it_returns(x):
    compile_ahead([lambda n=n: launch(copy_kernel, (1,), x, x, ORDER="plain", BLOCK=n) for n in (32, 64, 128)])
    assert len(compiled()) == 3 and all("cubin" in kernel.asm for kernel in compiled())


def test_one_that_does_not_compile_is_an_error_of_its_launch_alone(x):
    sizes = 32, 33, 64
    compile_ahead([lambda n=n: launch(copy_kernel, (1,), x, x, ORDER="plain", BLOCK=n) for n in sizes])
    with pytest.raises(CompilationError, match="power of 2"):
        launch(copy_kernel, (1,), x, x, ORDER="plain", BLOCK=33)
    assert len(compiled()) == 2
