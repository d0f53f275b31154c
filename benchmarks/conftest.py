from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import common, turns, verdict
from benchmarks.common import Implementation, Workload
from resnet.data import ImageSet, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The suite's defaults of pytest-benchmark's own options. A group of n rows takes turns for n * MAX_SECONDS, compiling
# and warming up aside, and longer only where MIN_ROUNDS rounds last longer: on a CPU that is ResNet-18's training.
MIN_ROUNDS = 2 if common.QUICK else 11
MAX_SECONDS = 0.0 if common.QUICK else 1.0
TURN_SECONDS = 0.0 if common.QUICK else 0.05  # a turn has as many calls as last so long, at least one


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    # Before the command line is read, whose --benchmark-min-rounds and --benchmark-max-time override these.
    options = pluginmanager.get_plugin("pytestconfig").option
    options.benchmark_min_rounds, options.benchmark_max_time = MIN_ROUNDS, MAX_SECONDS


def pytest_report_header() -> list[str]:
    lines = [f"fused-residual benchmarks on {common.device_name(DEVICE)}"]
    if DEVICE.type == "cpu":
        lines.append(
            "no Triton rows: PyTorch finds no GPU here, and Triton's interpreter is no measurement; "
            "the fused rows are the torch backend's"
        )
    if common.QUICK:
        lines.append("BENCH_QUICK is set: few rounds of small batches, to see that all of it runs; no measurement")
    return lines


@pytest.hookimpl(trylast=True)  # after the shapes, so that the rows of a group follow each other
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        implementations = common.implementations(DEVICE)
        metafunc.parametrize("implementation", implementations, ids=[each.name for each in implementations])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):  # a suite's own mark comes before this one
            item.add_marker(pytest.mark.benchmark(timer=turns.clock(DEVICE), disable_gc=True))


@pytest.fixture(scope="session")
def data() -> ImageSet:
    return load()


# ---- groups of rows that take turns ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One row: what its implementation took in the rounds of its group."""

    group: str
    calls: int  # per turn
    turns: turns.Turns
    extra_info: dict[str, Any]

    def enter(self, benchmark) -> None:
        """Enters the turns as pytest-benchmark's own rounds, for its tables and its JSON.

        The library has no public way to enter times that it did not take itself.
        """
        benchmark.group = self.group
        benchmark.extra_info.update(self.extra_info)
        stats = benchmark._make_stats(self.calls)
        for seconds in self.turns.seconds:
            stats.update(seconds * self.calls)
        benchmark.extra_info["examples_per_second"] = self.extra_info["examples"] / stats.stats.median


@pytest.fixture(scope="session")
def _waiting() -> dict[tuple, Measured | Exception]:
    """What was measured, by group and implementation, until its row takes it."""
    return {}


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, implementation: Implementation, _waiting):
    """measure(build): times `build(implementation).run`, in turns with the other rows of the group.

    A turn has as many calls as last TURN_SECONDS, or `calls` where that is given.

    Rows of a group differ in nothing but the implementation. The first of them to run measures all that were selected;
    each row then enters its own times, or raises its own error.
    """
    if reason := common.unavailable(implementation):
        pytest.skip(reason)

    def run(build: Callable[[Implementation], Workload], calls: int | None = None) -> None:
        if benchmark.disabled:
            with implementation.scope():
                benchmark.pedantic(build(implementation).run)
            return
        benchmark._mode = "turns"  # else pytest-benchmark warns, after an error, that its fixture was not used
        group = _group(request.node)
        if (*group, implementation) not in _waiting:
            peers = [item for item in request.session.items if _group(item) == group]
            selected = [item.callspec.params["implementation"] for item in peers]
            usable = [each for each in selected if not common.unavailable(each)]
            options = request.config._benchmarksession.options
            rounds, seconds = options["min_rounds"], float(options["max_time"])
            results = _measure_group(build, usable, rounds, seconds, benchmark._timer, calls)
            _waiting.update({(*group, each): result for each, result in results.items()})
        result = _waiting.pop((*group, implementation))
        if isinstance(result, Exception):
            raise result
        result.enter(benchmark)

    return run


def _group(item: pytest.Item) -> tuple | None:
    """What the rows of a group have in common: everything but the implementation, of which only the type counts."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    implementation = params.pop("implementation", None)
    return implementation and (item.path, item.originalname, tuple(params.items()), implementation.dtype)


def _measure_group(
    build: Callable[[Implementation], Workload],
    implementations: list[Implementation],
    min_rounds: int,
    max_seconds: float,
    now: Callable[[], float],
    asked_calls: int | None,
) -> dict[Implementation, Measured | Exception]:
    """Builds and measures a group; an implementation that fails has its error, and the others go on without it."""
    results: dict[Implementation, Measured | Exception] = {}
    members: dict[Implementation, tuple[Workload, turns.Side, float]] = {}
    for implementation in implementations:
        try:
            with implementation.scope():
                workload = build(implementation)
            side = turns.Side(workload.run, implementation.scope)
            members[implementation] = workload, side, side.warm_seconds(now)
        except Exception as error:
            results[implementation] = error
    while members:
        workloads, sides, warm_seconds = zip(*members.values())
        calls = asked_calls or turns.calls_per_turn(TURN_SECONDS, warm_seconds)
        budget = max_seconds * len(sides)
        try:
            taken = turns.take_turns(sides, calls=calls, rounds=min_rounds, now=now, budget=budget)
        except turns.SideFailed as failure:
            failed = list(members)[failure.index]
            results[failed] = failure.__cause__
            del members[failed]
            continue
        for implementation, workload, own in zip(members, workloads, taken):
            results[implementation] = _noted(implementation, workload, calls, own)
        break
    return results


def _noted(implementation: Implementation, workload: Workload, calls: int, taken: turns.Turns) -> Measured:
    extra_info = {
        **common.environment(DEVICE),
        "implementation": implementation.name,
        "backend": implementation.backend,
        "examples": workload.examples,
        "started": taken.started,
        "waited_for_cpu": taken.waited_share,
        **workload.saved,
    }
    if workload.source is not None:
        extra_info["data"] = workload.source
    if workload.title is not None:
        extra_info["title"] = workload.title
    return Measured(f"{workload.group}, {common.dtype_name(implementation.dtype)}", calls, taken, extra_info)


# ---- the verdict ----------------------------------------------------------------------------------------------

FIRST = ("ResNet-18", "block")  # the order of the lines, by their beginnings


@pytest.hookimpl(trylast=True)  # after the tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Fused against the best of its rivals, a line per workload that has a title."""
    groups: dict[str, list] = {}
    for measured in config._benchmarksession.benchmarks:
        if "title" in measured.extra_info:
            groups.setdefault(measured.group, []).append(measured)
    lines = [line for members in groups.values() if (line := _verdict_line(members)) is not None]
    if not lines:
        return
    lines.sort(key=lambda line: next((i for i, what in enumerate(FIRST) if line.workload.startswith(what)), len(FIRST)))
    terminalreporter.section("fused against the best of its rivals")
    for text in verdict.table(lines):
        terminalreporter.write_line(text)
    terminalreporter.write_line("interval: of the median, over rounds, of fused's time / the rival's in the same round")
    terminalreporter.write_line("bytes kept: for backward, by fused / by eager")
    if note := verdict.busy_note(max(line.comparison.waited for line in lines)):
        terminalreporter.write_line(note, yellow=True)


def _verdict_line(members: list) -> verdict.Line | None:
    """The line of a group's rows; None unless fused and a rival were measured."""
    by_implementation = {measured.params["implementation"]: measured for measured in members}
    fused = next((measured for each, measured in by_implementation.items() if each.kind == "fused"), None)
    rivals = {each: measured for each, measured in by_implementation.items() if each.kind != "fused"}
    if fused is None or not rivals:
        return None
    comparisons = [
        verdict.Comparison.of_rounds(
            each.label,
            fused.stats.data,
            measured.stats.data,
            max(fused.extra_info["waited_for_cpu"], measured.extra_info["waited_for_cpu"]),
        )
        for each, measured in rivals.items()
    ]
    eager_saved = next((_saved(measured) for each, measured in rivals.items() if each.kind == "eager"), None)
    kept = _saved(fused) / eager_saved if eager_saved else None
    title = fused.extra_info["title"]
    if DEVICE.type == "cuda":
        title += f", {common.dtype_name(fused.params['implementation'].dtype)}"
    return verdict.Line(title, verdict.best_rival(comparisons), kept, fused.extra_info["examples_per_second"])


def _saved(measured) -> int | None:
    return next((size for name, size in measured.extra_info.items() if name.startswith("saved_bytes")), None)
