"""Choices and where they are in force: `resnet.backend` and `resnet.convolution`, called and in a `with`."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import save_on_cpu
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

import resnet
from resnet import BasicBlock, FusedResidual, FusedStem, Residual, current_backend, current_convolution
from resnet.functional import batch_norm_add_relu
from resnet.kernels.host import launcher, plan
from resnet.triton_backend import plans
from tests.conftest import DEVICE
from tests.helpers.blocks import GATED, draw, infer, step, trio
from tests.helpers.replays import replays

pytestmark = pytest.mark.core

NAMES = {
    resnet.backend: ("auto", "triton", "torch"),
    resnet.convolution: ("auto", "triton", "epilogue", "pytorch"),
}
CURRENT = {resnet.backend: current_backend, resnet.convolution: current_convolution}
BARRED_FOR = 60  # seconds, after which a thread that waits for one that has failed fails too


@pytest.fixture(autouse=True)
def restored():
    before = {choice: current() for choice, current in CURRENT.items()}
    yield
    for choice, name in before.items():
        choice(name)


@pytest.fixture(params=NAMES, ids=lambda choice: choice.__name__)
def choice(request) -> type:
    """The choice, which is "auto" to begin with."""
    request.param("auto")
    return request.param


@pytest.fixture
def current(choice) -> Callable[[], str]:
    return CURRENT[choice]


@pytest.fixture
def names(choice) -> tuple[str, str]:
    """Two names of the choice, neither of which is "auto"."""
    return NAMES[choice][-2:]


def in_thread(*functions: Callable[[], object]) -> list:
    """What the functions return, each in a new thread, side by side."""
    results: dict[int, object] = {}

    def run(i: int) -> None:
        results[i] = functions[i]()

    threads = [Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(functions))]


# ---- a call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "name"), [(c, n) for c, names in NAMES.items() for n in names], indirect=["choice"])
def test_a_call_chooses_for_all_threads_from_then_on(choice, current, name):
    choice(name)
    assert current() == name
    assert in_thread(current) == [name]


def test_a_call_in_a_thread_counts_in_the_others(choice, current, names):
    def choose() -> None:
        choice(names[0])

    in_thread(choose)
    assert current() == names[0]


def test_a_call_whose_object_is_kept_counts_as_long_as_no_later_one(choice, current, names):
    kept = choice(names[0])
    assert in_thread(current) == [names[0]]
    choice(names[1])
    assert current() == names[1]
    del kept
    assert current() == names[1]


def test_one_choice_leaves_the_other_as_it_is(choice, names):
    others = [current for other, current in CURRENT.items() if other is not choice]
    before = [other() for other in others]
    choice(names[0])
    with choice(names[1]):
        assert [other() for other in others] == before


@pytest.mark.parametrize("name", ["cuda", "Triton", "cudnn", "", None, 3, ["torch"]], ids=repr)
def test_an_unknown_name_is_an_error_that_lists_the_names_and_leaves_the_choice(choice, current, names, name):
    choice(names[0])
    with pytest.raises(ValueError) as error:
        choice(name)
    listed = ", ".join(map(repr, NAMES[choice]))
    assert str(error.value) == f"{choice.__name__}: expected one of {listed}, got {name!r}"
    assert current() == names[0]


@pytest.mark.parametrize("entered", [False, True], ids=["called", "entered"])
def test_a_thousand_choices_leave_nothing_in_memory(choice, names, entered):
    def choose() -> None:
        for name in 500 * names:
            made = choice(name)
            if entered:
                with made:
                    pass

    choose()
    gc.collect()
    before = len(gc.get_objects())
    choose()
    gc.collect()
    grown = len(gc.get_objects()) - before
    assert grown < 50


# ---- a with ----------------------------------------------------------------------------------------------------


def test_a_with_restores_the_old_choice(choice, current, names):
    choice(names[0])
    with choice(names[1]):
        assert current() == names[1]
        with choice("auto"):
            assert current() == "auto"
        assert current() == names[1]
    assert current() == names[0]


def test_an_exception_in_a_with_restores_the_old_choice(choice, current, names):
    with pytest.raises(KeyError), choice(names[0]), choice(names[1]):
        raise KeyError
    assert current() == "auto"


def test_an_object_may_be_made_before_it_is_entered(choice, current, names):
    made = choice(names[0])
    choice("auto")
    with made:
        assert current() == names[0]
    assert current() == "auto"


def test_an_object_that_is_entered_chooses_for_the_process_no_more(choice, current, names):
    made = choice(names[0])
    with made:
        assert in_thread(current) == ["auto"]
    assert current() == "auto"


def test_an_object_may_be_entered_again_inside_and_after(choice, current, names):
    made = choice(names[0])
    for _ in range(2):
        with made, choice(names[1]):
            with made:
                assert current() == names[0]
            assert current() == names[1]
        assert current() == "auto"


def test_a_call_in_a_with_counts_for_the_process_and_here_when_the_with_ends(choice, current, names):
    with choice(names[0]):
        choice(names[1])
        assert current() == names[0]
        assert in_thread(current) == [names[1]]
    assert current() == names[1]


def test_of_two_generators_the_first_may_end_first(choice, current, names):
    def inside(name: str) -> Iterator[None]:
        with choice(name):
            yield

    first, second = map(inside, names)
    next(first)
    next(second)
    first.close()
    assert current() == names[1]
    second.close()
    assert current() == "auto"


def test_an_exit_in_another_context_changes_none(choice, current, names):
    made = choice(names[0])
    with choice(names[1]):
        context = copy_context()
        context.run(made.__enter__)
        made.__exit__(None, None, None)
        assert current() == names[1]
    assert current() == "auto" and context.run(current) == names[0]


# ---- threads and coroutines ------------------------------------------------------------------------------------


def test_threads_that_overlap_have_each_its_own_choice(choice, current, names):
    turn = Barrier(2, timeout=BARRED_FOR).wait

    def first() -> list[str]:
        with choice(names[0]):
            turn()
            turn()
            seen = current()
        turn()
        turn()
        return [seen, current()]

    def second() -> list[str]:
        turn()
        with choice(names[1]):
            turn()
            turn()
            seen = current()
        turn()
        return [seen, current()]

    assert in_thread(first, second) == [[names[0], "auto"], [names[1], "auto"]]
    assert current() == "auto"


def test_one_object_may_be_entered_in_threads_that_overlap(choice, current, names):
    made, together = choice(names[0]), Barrier(2, timeout=BARRED_FOR)

    def inside() -> list[str]:
        with made:
            together.wait()
            seen = current()
            together.wait()
        return [seen, current()]

    assert in_thread(inside, inside) == [[names[0], "auto"]] * 2


def test_coroutines_that_overlap_have_each_its_own_choice(choice, current, names):
    async def inside(name: str, turns: int) -> list[str]:
        seen = []
        with choice(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append(current())
        await asyncio.sleep(0)
        return [*seen, current()]

    async def both() -> list[list[str]]:
        return await asyncio.gather(inside(names[0], 2), inside(names[1], 4))

    assert asyncio.run(both()) == [[*[name] * turns, "auto"] for name, turns in zip(names, (2, 4))]
    assert current() == "auto"


def test_a_thread_started_in_a_with_has_the_choice_of_the_process_and_a_coroutine_the_withs(choice, current, names):
    async def ask() -> str:
        return current()

    async def ask_in_a_task() -> str:
        with choice(names[0]):
            task = asyncio.create_task(ask())
        return await task

    with choice(names[0]):
        assert in_thread(current) == ["auto"]
        assert in_thread(partial(copy_context().run, current)) == [names[0]]  # unless it is given this context
    assert asyncio.run(ask_in_a_task()) == names[0]


# ---- what runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that were launched, by whichever thread, other than by a plan."""
    names = []
    launch = launcher._launch

    def record(kernel, *args):
        names.append(kernel.__name__)
        return launch(kernel, *args)

    monkeypatch.setattr(launcher, "_launch", record)
    plan.forget()
    return names


def kind_of(launched: list[str]) -> str:
    """The backend and the convolutions that launch these kernels, which are then forgotten."""
    convolutions = any(name.startswith("conv_") for name in launched)
    kind = "torch" if not launched else "triton, epilogue" if convolutions else "triton, pytorch"
    launched.clear()
    return kind


@contextmanager
def chosen(kind: str) -> Iterator[None]:
    """A `with` of what `kind_of` tells apart."""
    backend, _, convolution = kind.partition(", ")
    with resnet.backend(backend), resnet.convolution(convolution or "pytorch"):
        yield


KINDS = ("torch", "triton, pytorch", "triton, epilogue")
per_pair = pytest.mark.parametrize(("inside", "outside"), [(a, b) for a in KINDS for b in KINDS if a != b])


def small(seed: int = 0) -> Tensor:
    return draw(1, 4, 3, 2, seed=seed, dtype=torch.float64)


@pytest.fixture
def block() -> nn.Module:
    return trio(Residual, 4, 4, dtype=torch.float64).fused


@pytest.mark.parametrize("mode", [nullcontext, BaseTorchFunctionMode], ids=["direct", "dispatched"])
@pytest.mark.parametrize("kind", [(Residual, 4, 4), (BasicBlock, 4, 4, GATED)], ids=["textbook", "gates"])
@per_pair
def test_backward_runs_on_what_its_forward_ran_on(launched, inside, outside, kind, mode):
    blocks = trio(*kind, dtype=torch.float64)

    def forward(call: Callable[[], Tensor]) -> Tensor:
        with chosen(inside):
            out = call()
        assert kind_of(launched) == inside
        return out

    with mode(), chosen(outside):
        got = step(blocks.fused, small(), forward)
    assert kind_of(launched) == inside
    torch.testing.assert_close(got, step(blocks.exact, small()))


@pytest.mark.parametrize("module", [FusedStem, FusedResidual])
def test_backward_of_a_stem_and_a_projected_block_too(launched, module):
    fused = module(4, 5, **({"use_1x1conv": True, "strides": 2} if module is FusedResidual else {})).to(DEVICE)
    with chosen("triton, pytorch"):
        out = fused(draw(2, 4, 9, 8).requires_grad_())
    launched.clear()
    with chosen("torch"):
        out.sum().backward()
    assert kind_of(launched) == "triton, pytorch"


def test_backward_of_the_function_too(launched):
    x = small().requires_grad_()
    with chosen("triton, pytorch"):
        out = batch_norm_add_relu(x, None, None, training=True)
    launched.clear()
    with chosen("torch"):
        out.sum().backward()
    assert kind_of(launched) == "triton, pytorch"


@pytest.mark.parametrize("inside", KINDS)
def test_backward_in_another_thread_runs_on_what_its_forward_ran_on(launched, block, inside):
    with chosen(inside):
        out = block(small().requires_grad_())
        launched.clear()
        in_thread(out.sum().backward)
    assert kind_of(launched) == inside


def test_each_backward_of_a_graph_that_is_retained_runs_on_what_its_forward_ran_on(launched, block):
    with chosen("triton, pytorch"):
        out = block(small().requires_grad_()).sum()
    launched.clear()
    for outside in ("torch", "triton, epilogue"):
        with chosen(outside):
            out.backward(retain_graph=True)
        assert kind_of(launched) == "triton, pytorch"


def test_backward_from_tensors_saved_on_the_cpu_runs_on_what_its_forward_ran_on(launched, block):
    with chosen("triton, pytorch"), save_on_cpu():
        out = block(small().requires_grad_()).sum()
    launched.clear()
    with chosen("torch"):
        out.backward()
    assert kind_of(launched) == "triton, pytorch"


@pytest.mark.parametrize(
    ("reentrant", "expected"), [(False, "triton, pytorch"), (True, "torch")], ids=["not reentrant", "reentrant"]
)
def test_a_checkpointed_block_is_run_again_on_its_forwards_choice_or_if_reentrant_on_backwards(
    launched, block, reentrant, expected
):
    with chosen("triton, pytorch"):
        out = checkpoint(block, small().requires_grad_(), use_reentrant=reentrant)
    launched.clear()
    with chosen("torch"), torch.autograd.set_multithreading_enabled(False):  # backward in this thread, on a GPU too
        out.sum().backward()
    assert ("statistics_kernel" in launched) == (expected != "torch")
    assert kind_of(launched) == expected  # backward, too, of what was run again


def test_backward_leaves_the_choice_that_it_was_called_under(block):
    with chosen("triton, pytorch"):
        out = block(small().requires_grad_()).sum()
    with chosen("torch"):
        out.backward()
        assert (current_backend(), current_convolution()) == ("torch", "pytorch")


# ---- plans -----------------------------------------------------------------------------------------------------


def called(kind: str) -> AbstractContextManager:
    """`chosen` by calls, so that it stays."""
    backend, _, convolution = kind.partition(", ")
    resnet.backend(backend)
    resnet.convolution(convolution or "pytorch")
    return nullcontext()


@pytest.mark.parametrize("scope", [chosen, called])
def test_a_plan_is_replayed_only_under_the_choice_that_it_was_recorded_under(launched, scope):
    blocks = trio(Residual, 4, 4, dtype=torch.float64, train=False)
    for kind in KINDS:  # on a GPU a first run chooses tiles, and is of no plan
        with scope(kind):
            infer(blocks.fused, small())
    plan.forget()
    launched.clear()
    runs: Counter[str] = Counter()
    for kind in (*["triton, pytorch"] * 3, *["triton, epilogue"] * 3, "torch", "triton, pytorch", "triton, epilogue"):
        with scope(kind), replays() as calls:
            got = infer(blocks.fused, small())
        torch.testing.assert_close(got, infer(blocks.exact, small()))
        runs[kind] += 1
        replayed = runs[kind] > 2
        assert len(calls) == replayed
        assert kind_of(launched) == ("torch" if replayed else kind)


def test_an_operator_keeps_the_choices_that_it_began_with_when_another_thread_chooses():
    seen = []

    def operator(x: Tensor) -> list[Tensor]:
        in_thread(lambda: called("torch"))
        seen.append((current_backend(), current_convolution()))
        return [x + 1]

    called("triton, epilogue")
    plans.run(operator, [small()])
    assert seen == [("triton", "epilogue")]
    assert (current_backend(), current_convolution()) == ("torch", "pytorch")


# ---- torch.compile ---------------------------------------------------------------------------------------------


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


@per_pair
def test_a_compiled_block_runs_each_time_on_what_is_in_force(launched, counter, inside, outside):
    blocks = trio(Residual, 4, 4, dtype=torch.float64)
    compiled = torch.compile(blocks.fused, fullgraph=True, backend=counter)

    def forward(call: Callable[[], Tensor]) -> Tensor:
        with chosen(inside):
            out = call()
        assert kind_of(launched) == inside
        return out

    with chosen(outside), torch.autograd.set_multithreading_enabled(False):  # backward in this thread, on a GPU too
        got = step(compiled, small(), forward)
    assert kind_of(launched) == outside
    expected = step(blocks.exact, small())
    torch.testing.assert_close({name.replace("_orig_mod.", ""): value for name, value in got.items()}, expected)


def test_what_is_compiled_once_runs_on_any_choice(launched, counter):
    x = small()
    compiled = torch.compile(lambda: batch_norm_add_relu(x, None, None, training=True), fullgraph=True, backend=counter)
    expected = compiled()
    for kind in ("triton, pytorch", "torch", "triton, pytorch"):
        launched.clear()
        with chosen(kind):
            torch.testing.assert_close(compiled(), expected)
        assert kind_of(launched) == kind
    assert counter.frame_count == 1


def test_a_with_in_a_compiled_function_counts(launched, counter, block):
    def function(x: Tensor) -> Tensor:
        with resnet.backend("triton"), resnet.convolution("pytorch"):
            return block(x) + 1

    compiled = torch.compile(function, backend=counter)
    called("torch")
    torch.testing.assert_close(compiled(small()), block(small()) + 1)
    assert kind_of(launched) == "triton, pytorch"
    assert (current_backend(), current_convolution()) == ("torch", "pytorch")
