"""Kernels that are compiled ahead of their launches. `tests/gate` has what is compiled."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from resnet.kernels.conv_forward import conv_forward_kernel
from resnet.kernels.host import launcher, plan
from resnet.kernels.host.launcher import compile_ahead, compiles_only, launch
from tests.conftest import DEVICE

pytestmark = pytest.mark.core


@triton.jit
def add_kernel(x, AMOUNT: tl.constexpr):
    tl.store(x, tl.load(x) + AMOUNT)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.zeros(1, device=DEVICE)


def test_what_is_compiled_ahead_is_not_launched(x):
    compile_ahead([lambda: launch(add_kernel, (1,), x, AMOUNT=1), lambda: launch(add_kernel, (1,), x, AMOUNT=2)])
    assert x.item() == 0
    launch(add_kernel, (1,), x, AMOUNT=2)
    assert x.item() == 2


def test_nor_is_what_is_compiled_ahead_within(x):
    def run():
        compile_ahead([lambda: launch(add_kernel, (1,), x, AMOUNT=1)])
        launch(add_kernel, (1,), x, AMOUNT=3)

    compile_ahead([run])
    assert x.item() == 0


def test_no_plan_is_made_of_it(x):
    def function(x):
        launch(add_kernel, (1,), x, AMOUNT=1)
        return [x]

    compile_ahead([lambda: plan.run(function, (x,), ())] * 3)
    assert x.item() == 0
    for count in range(1, 5):
        plan.run(function, (x,), ())
        assert x.item() == count


def test_after_an_error_launches_are_made_again(x):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ahead([fail])
    assert not compiles_only()
    launch(add_kernel, (1,), x, AMOUNT=1)
    assert x.item() == 1


def test_what_is_compiled_ahead_has_the_context_variables_of_its_caller():
    variable, seen = ContextVar("variable"), []
    token = variable.set("caller's")
    compile_ahead([lambda: seen.append(variable.get(None)), lambda: variable.set("its own")])
    assert seen == ["caller's"] and variable.get() == "caller's"
    variable.reset(token)


def test_it_may_be_asked_for_where_triton_compiles_asynchronously_already(x):
    with ThreadPoolExecutor(1) as threads, triton.AsyncCompileMode(threads):
        compile_ahead([lambda: launch(add_kernel, (1,), x, AMOUNT=4)])
    assert x.item() == 0


def test_threads_parse_kernels_at_once():
    """Python 3.11's own parser fails where threads meet in it. A collection that runs Python lets them."""
    kernel = JITFunction(conv_forward_kernel.fn)

    class Collected:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            sum(range(50))

    def parse(depth: int) -> int:
        if depth:
            return parse(depth - 1)
        for _ in range(15):
            _ = [Collected() for _ in range(20)]
            kernel.parse()
        return 15

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(parse, (0, 40, 80, 120))) == 60
    finally:
        sys.setswitchinterval(interval)


def test_launches_are_repeated_with_each_triton_of_the_matrix():
    """With one that the launcher does not know, a plan launches as anew: right, and twice as slow for the host."""
    stacks = re.search(r"^STACKS := (.*)$", (Path(__file__).parents[3] / "Makefile").read_text(), re.MULTILINE)
    versions = re.findall(r"\+([\d.]+)", stacks[1])
    assert versions and all(version.startswith(launcher._KNOWN) for version in versions)
