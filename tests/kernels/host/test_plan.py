"""Plans: replayed functions give what they would have given, and what cannot be replayed is run."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet.kernels.host import launcher, plan
from resnet.kernels.host.launcher import launch
from tests.conftest import DEVICE
from tests.helpers.replays import replays


@triton.jit
def scaled_kernel(x, out, COUNT, factor: tl.float64, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < COUNT) * factor, mask=i < COUNT)


def scaled(x: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    launch(scaled_kernel, (triton.cdiv(x.numel(), 16),), x, out, x.numel(), factor, BLOCK=16)
    return out


def run(function: Callable[..., list], *arguments, environment: tuple = ()) -> tuple[list[Tensor | None], int]:
    """The outputs, and how many functions of plans were called for them."""
    with replays() as calls:
        outputs = plan.run(function, arguments, environment)
    return outputs, len(calls)


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, device=DEVICE)


@pytest.fixture(autouse=True)
def no_plans():
    plan.forget()


def views(x: Tensor, y: Tensor, factor: float) -> list[Tensor | None]:
    sums = torch.empty((2, *x.shape), device=x.device)
    scaled(x.contiguous(), factor, sums[0])  # which copies, or does not
    scaled(y, 2.0, sums[1])
    added = sums[0] + sums[1]
    return [scaled(added, 3.0), None, sums[1], added.t(), y]


def expected(x: Tensor, y: Tensor, factor: float) -> list[Tensor | None]:
    return [3 * (x * factor + y * 2), None, y * 2, (x * factor + y * 2).t(), y]


@pytest.fixture(params=[True, False], ids=["the compiler's allocations", "public allocations"])
def any_allocation(request, monkeypatch):
    """A plan allocates with functions that PyTorch keeps for its compiler, where it has them."""
    assert plan._EMPTY, "this PyTorch has them no more"
    if not request.param:
        monkeypatch.setattr(plan, "_EMPTY", {})


def test_from_the_third_call_on_a_function_is_replayed_with_the_arguments_of_the_call(any_allocation):
    replayed = []
    for _ in range(4):
        x, y = draw(3, 5), draw(3, 5)
        outputs, calls = run(views, x, y, 0.5)
        replayed.append(calls)
        torch.testing.assert_close(outputs, expected(x, y, 0.5))
    assert replayed == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x[:2], y[:2], 0.5),
        lambda x, y: (x.t().contiguous().t(), y, 0.5),
        lambda x, y: (torch.cat([x.flatten(), x[0]])[1:16].view(3, 5), y, 0.5),  # at another place among 16 bytes
        lambda x, y: (x, y, 0.25),
        lambda x, y: (x, x, 0.5),
        lambda x, y: (torch.nn.Parameter(x, requires_grad=False), y, 0.5),
    ],
    ids=["shape", "strides", "alignment", "setting", "one tensor twice", "a parameter"],
)
def test_arguments_of_another_kind_are_not_taken_for_the_same(other):
    for _ in range(3):
        run(views, draw(3, 5), draw(3, 5), 0.5)
    arguments = other(draw(3, 5), draw(3, 5))
    for _ in range(4):
        torch.testing.assert_close(run(views, *arguments)[0], expected(*arguments))


def test_one_tensor_twice_is_not_replayed_since_its_two_names_cannot_be_told_apart():
    x = draw(3, 5)
    assert [run(views, x, x, 0.5)[1] for _ in range(4)] == [0] * 4
    run(views, x, draw(3, 5), 0.5)


def test_views_of_one_memory_are_told_apart():
    for _ in range(4):
        both = draw(2, 4, 8)
        x, y = both.unbind()
        torch.testing.assert_close(run(views, x, y, 0.5)[0], expected(x, y, 0.5))


def made(x: Tensor) -> list[Tensor]:
    like = {"device": x.device}
    images = torch.empty((2, 3, 4, 5), dtype=torch.bfloat16, memory_format=torch.channels_last, **like)
    counts = torch.empty((), dtype=torch.int64, **like)
    host = torch.empty((3,), dtype=torch.float64)
    return [
        scaled(x, 2.0),
        images.zero_(),
        counts.zero_(),
        host.zero_(),
        torch.empty_strided((2, 3), (1, 4), **like).zero_(),
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_replay_allocates_is_of_the_kind_that_the_function_allocates(any_allocation, mode):
    for _ in range(3):
        with mode():
            outputs, calls = run(made, draw(3, 5))
            for found, expected in zip(outputs[1:], made(draw(3, 5))[1:], strict=True):
                torch.testing.assert_close(found, expected, check_stride=True)
                assert found.is_inference() == expected.is_inference() and not found.requires_grad
    assert calls == 1


def test_another_environment_is_another_plan():
    for environment in (("a",), ("b",), ("a",)):
        for _ in range(3):
            x, y = draw(3, 5), draw(3, 5)
            torch.testing.assert_close(run(views, x, y, 0.5, environment=environment)[0], expected(x, y, 0.5))
    assert run(views, draw(3, 5), draw(3, 5), 0.5, environment=("b",))[1] == 1
    plan.forget()
    assert run(views, draw(3, 5), draw(3, 5), 0.5, environment=("b",))[1] == 0


NOT_REPLAYED = {
    "a value that is read": lambda x: [scaled(x, float(x.flatten()[0]))],
    "random numbers": lambda x: [scaled(torch.rand_like(x), 1.0)],
    "a tensor of its own": lambda x: [scaled(OWN[0], 2.0) + x],
}
OWN = [torch.ones(3, 5, device=DEVICE)]


@pytest.mark.parametrize("function", NOT_REPLAYED.values(), ids=NOT_REPLAYED)
def test_what_does_not_follow_from_the_key_is_run_each_time(function):
    assert [run(function, draw(3, 5))[1] for _ in range(4)] == [0] * 4
    x = draw(3, 5)
    torch.testing.assert_close(run(NOT_REPLAYED["a value that is read"], x)[0], [x * float(x.flatten()[0])])


def in_place(x: Tensor, total: Tensor) -> list[Tensor]:
    total.add_(scaled(x, 2.0))
    return [total[0]]


def test_writes_in_place_are_repeated():
    total, sums = torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 5, device=DEVICE)
    for _ in range(4):
        x = draw(3, 5)
        sums += 2 * x
        outputs, _ = run(in_place, x, total)
        torch.testing.assert_close(total, sums)
        assert outputs[0].data_ptr() == total.data_ptr()


def test_an_operator_that_is_watched_is_run_each_time():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for _ in range(3):
        run(views, draw(3, 5), draw(3, 5), 0.5)
    with Watching():
        assert run(views, draw(3, 5), draw(3, 5), 0.5)[1] == 0
    assert run(views, draw(3, 5), draw(3, 5), 0.5)[1] == 1


def test_a_plan_keeps_the_kernels_whose_code_it_calls(monkeypatch):
    """Triton 3.8 and later unload a kernel's code where nothing has the kernel any more."""
    made = []

    class Compiled:
        def __init__(self, launched):
            made.append(weakref.ref(self))

    launch_once = launcher._launch
    monkeypatch.setattr(launcher, "_launch", lambda *arguments: Compiled(launch_once(*arguments)))
    for _ in range(2):
        run(views, draw(3, 5), draw(3, 5), 0.5)
    recorded = made[len(made) // 2 :]
    assert run(views, draw(3, 5), draw(3, 5), 0.5)[1] == 1
    assert recorded and all(kernel() is not None for kernel in recorded)
