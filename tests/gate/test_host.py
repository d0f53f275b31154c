"""What the host does in a replayed step: functions that Python calls and kernels that it launches, counted.

The modules, the plans, the launcher and Triton are what runs on a GPU, and the kernels are compiled. The driver is a
stand-in that makes no launch, so results are what memory held; a GPU's own takes four calls more, once a plan, to name
the current device. Nothing is timed to choose a way, so each convolution goes the way that fuses most.

What PyTorch does in C++ is one call, however long it takes, so a ratio of calls is none of times. It rises where a plan
is not replayed, and where a call asks anew what an earlier one has answered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

import resnet
from benchmarks.compiled import launches
from resnet import (
    BasicBlock,
    Bottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    FusedResidual,
    FusedSequential,
    Residual,
)
from resnet.kernels.host import plan
from resnet.kernels.tuning import DEVICES
from tests.helpers.written_blocks import PreActivated

SM_90 = DEVICES["sm_90"]
BATCH = 256


def fused_by_reading(*args: int) -> nn.Module:
    block = PreActivated(*args)
    resnet.fuse(block)
    return block


BLOCKS = {  # fused, eager, and the constructor's arguments
    "identity": (FusedResidual, Residual, (64, 64)),
    "projected": (FusedResidual, Residual, (64, 128, True, 2)),
    "gated": (*(partial(kind, squeeze_excite=True) for kind in (FusedBasicBlock, BasicBlock)), (64, 64)),
    "pre-activation": (fused_by_reading, PreActivated, (64, 64)),
    "pre-activation, projected": (fused_by_reading, PreActivated, (64, 128, 2)),
}
HALVING = [block for C in (64, 128, 256) for block in ((C, 2 * C, True, 2), (2 * C, 2 * C))]
RESNET18 = [(64, 64), (64, 64), *HALVING]  # the arguments of its eight blocks


# ---- a GPU that makes no launch ----------------------------------------------------------------------------------

_enqueue = "".format  # a function in C that takes any arguments and does next to nothing, in place of Triton's


class _Driver(launches.Driver):
    """The driver of a GPU that takes launches and makes none."""

    def get_current_device(self) -> str:
        return "idle"

    def load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple[int, int, int, int, int]:
        most_threads = 1024
        return 0, 0, 0, 0, most_threads

    def launcher_cls(self, source: object, metadata: NamedTuple) -> CudaLauncher:
        """Triton's own launcher, but for what it takes from a library of the driver's."""
        launcher = object.__new__(CudaLauncher)
        launcher.launch, launcher.arg_annotations, launcher.kernel_signature = _enqueue, None, None
        for name in ("num_ctas", "launch_cooperative_grid", "launch_pdl"):
            setattr(launcher, name, getattr(metadata, name))
        for name in ("global_scratch", "profile_scratch"):
            setattr(launcher, f"{name}_size", getattr(metadata, f"{name}_size"))
            setattr(launcher, f"{name}_align", getattr(metadata, f"{name}_align"))
        return launcher


@pytest.fixture
def idle_gpu(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(torch.nn.functional, "conv2d", torch.conv2d)  # eager's own: see tests/conftest.py
    monkeypatch.setattr(driver, "_active", _Driver(SM_90.target, SM_90.properties))
    plan.forget()
    torch.compiler.reset()
    with resnet.backend("triton"):
        yield
    plan.forget()


# ---- what is counted ---------------------------------------------------------------------------------------------


class Work(NamedTuple):
    calls: int  # of functions in Python and in C, by Python
    launches: int  # of kernels, which are among them


_INLINED = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # calls in some versions of Python


def work(step: Callable[[], object]) -> Work:
    calls = launched = 0

    def watch(frame, event, called):
        nonlocal calls, launched
        if event == "call":
            calls += frame.f_code.co_name not in _INLINED
        elif event == "c_call":
            calls += called is not sys.setprofile
            launched += called is _enqueue

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return Work(calls, launched)


def replayed(step: Callable[[], object]) -> Work:
    """The work of a step after one that compiles, one that records, and one that replays."""
    for _ in range(3):
        step()
    return work(step)


def block_and_input(
    kind: type[nn.Module], args: tuple, batch: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, Tensor]:
    block = kind(*args).to(dtype, memory_format=torch.channels_last)
    x = torch.zeros(batch, args[0], size, size, dtype=dtype)
    return block, x.contiguous(memory_format=torch.channels_last)


def training_forward(block: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    x.requires_grad_()
    return lambda: block(x)


def training_step(block: nn.Module, x: Tensor) -> Callable[[], None]:
    return forward_backward(training_forward(block, x), [x, *block.parameters()])


def autocast_step(block: nn.Module, x: Tensor) -> Callable[[], None]:
    block.float()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    return forward_backward(forward, [x.requires_grad_(), *block.parameters()])


def forward_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    dout = torch.empty_like(forward()).detach()

    def step() -> None:
        torch.autograd.backward(forward(), dout, inputs=leaves)
        for leaf in leaves:
            leaf.grad = None

    return step


def evaluation(block: nn.Module, x: Tensor) -> Callable[[], None]:
    block.eval()

    def forward() -> None:
        with torch.inference_mode():
            block(x)

    return forward


def compiled(step: Callable[[nn.Module, Tensor], Callable]) -> Callable[[nn.Module, Tensor], Callable]:
    """The step of a module that torch.compile has traced: PyTorch's dispatcher calls the operators."""
    return lambda block, x: step(torch.compile(block, backend="eager", fullgraph=True), x)


STEPS = {
    "training forward": training_forward,
    "training step": training_step,
    "autocast step": autocast_step,
    "evaluation": evaluation,
    "compiled step": compiled(training_step),
    "compiled evaluation": compiled(evaluation),
}


class Limit(NamedTuple):
    calls: float  # fused's over eager's
    launches: int


# 2 to 4% above the calls that a replayed step made, in the comments, with Python 3.11, torch 2.13.0 and triton 3.7.1.
# The launches are those of a fused block in bfloat16 with 256 images of 24x24.
LIMITS = {
    ("training forward", "identity"): Limit(2.05, 7),  # 145 against 73
    ("training forward", "projected"): Limit(1.90, 5),  # 153 against 83
    ("training step", "identity"): Limit(2.12, 19),  # 317 against 154
    ("training step", "projected"): Limit(2.07, 18),  # 341 against 170
    ("autocast step", "identity"): Limit(2.03, 19),  # 355 against 180
    ("autocast step", "projected"): Limit(2.01, 18),  # 382 against 196
    ("evaluation", "identity"): Limit(1.82, 2),  # 127 against 72
    ("evaluation", "projected"): Limit(1.72, 2),  # 137 against 82
    ("training forward", "gated"): Limit(2.46, 8),  # 292 against 122
    ("training step", "gated"): Limit(2.70, 20),  # 549 against 209
    ("autocast step", "gated"): Limit(2.69, 20),  # 614 against 235
    ("evaluation", "gated"): Limit(2.20, 6),  # 259 against 121
    ("training forward", "pre-activation"): Limit(2.24, 6),  # 163 against 75
    ("training step", "pre-activation"): Limit(2.21, 18),  # 324 against 150
    ("training step", "pre-activation, projected"): Limit(2.06, 19),  # 340 against 169
    ("autocast step", "pre-activation"): Limit(2.12, 18),  # 364 against 176
    ("evaluation", "pre-activation"): Limit(2.13, 3),  # 153 against 74
    ("compiled step", "identity"): Limit(2.47, 19),  # 489 against 203
    ("compiled step", "projected"): Limit(2.48, 18),  # 507 against 210
    ("compiled evaluation", "identity"): Limit(1.57, 2),  # 188 against 123
    ("compiled evaluation", "projected"): Limit(1.57, 2),  # 190 against 124
}


@pytest.mark.parametrize(("step", "block"), LIMITS)
def test_a_replayed_step_asks_no_more_of_the_host_than_it_did(idle_gpu, step, block):
    fused_kind, eager_kind, args = BLOCKS[block]
    fused = replayed(STEPS[step](*block_and_input(fused_kind, args, BATCH, 24)))
    eager = replayed(STEPS[step](*block_and_input(eager_kind, args, 2, 2)))  # it calls the same for any size
    limit = LIMITS[step, block]
    assert fused.launches == limit.launches
    assert fused.calls <= limit.calls * eager.calls, f"{fused.calls} calls of fused, {eager.calls} of eager"


# 3% above the calls that a step made on PyTorch's operators, in the comments: with float32 and too many pixels for
# PyTorch's own sums. Each small operator is one, and one that follows a convolution takes 20 us.
ON_THE_CPU = {
    "two units": (FusedBasicBlock, BasicBlock, (8, 8), 4.03),  # 649 against 166
    "three units": (FusedBottleneck, Bottleneck, (8, 2), 4.04),  # 863 against 220
}


@pytest.mark.parametrize(("fused_kind", "eager_kind", "args", "limit"), ON_THE_CPU.values(), ids=ON_THE_CPU)
def test_a_step_on_the_cpu_asks_no_more_of_the_host_than_it_did(fused_kind, eager_kind, args, limit):
    with resnet.backend("torch"):
        fused, eager = (
            replayed(training_step(*block_and_input(kind, args, 2, 24, torch.float32)))
            for kind in (fused_kind, eager_kind)
        )
    assert fused.calls <= limit * eager.calls, f"{fused.calls} calls of fused, {eager.calls} of eager"


def test_what_a_plan_saves_is_counted(idle_gpu):
    step = training_step(*block_and_input(FusedResidual, (64, 64), BATCH, 24))
    with_plan = replayed(step)
    plan.forget()
    without = work(step)
    assert without.launches == with_plan.launches
    assert without.calls > 5 * with_plan.calls


# 18 or 19 a block, fewer where few pixels leave no partial results to merge. In a chain 7 launches for the sums of last
# norms are saved, and 3 come to merge many partial results first.
@pytest.mark.parametrize(("kind", "made"), [(nn.Sequential, 136), (FusedSequential, 132)])
def test_a_step_of_the_blocks_of_resnet18_makes_so_many_launches(kind, made):
    with launches.record(SM_90.target, SM_90.properties) as recorded, resnet.backend("triton"):
        blocks = kind(*[FusedResidual(*args) for args in RESNET18])
        blocks.to(torch.bfloat16, memory_format=torch.channels_last)
        _, x = block_and_input(Residual, RESNET18[0], BATCH, 24)
        step = training_step(blocks, x)
        recorded.clear()
        step()
    assert len(recorded) == made


def test_a_block_more_in_a_chain_asks_hardly_more_of_the_host_than_without_links(idle_gpu):
    calls = {}
    for kind in (nn.Sequential, FusedSequential):
        steps = []
        for length in (2, 3):
            _, x = block_and_input(Residual, (64, 64), BATCH, 24)
            blocks = kind(*[FusedResidual(64, 64) for _ in range(length)])
            steps.append(training_step(blocks.to(torch.bfloat16, memory_format=torch.channels_last), x))
        shorter, longer = map(replayed, steps)
        calls[kind] = longer.calls - shorter.calls
    assert calls[FusedSequential] <= 1.08 * calls[nn.Sequential], calls  # 286 against 269
