from __future__ import annotations

import pytest
import torch

from benchmarks import common
from resnet.data import FashionMNIST, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 2 if common.QUICK else 5
ROUND_SECONDS = 0.02 if common.QUICK else 0.1  # a round has as many calls as last so long, at least one


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = common.rows(DEVICE)
        metafunc.parametrize("row", rows, ids=[row.name for row in rows])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=common.CudaClock()))


@pytest.fixture(autouse=True)
def _row_scope(request: pytest.FixtureRequest):
    """Runs each row under its backend, and skips, with the reason, one that cannot run here."""
    if "row" not in request.fixturenames:
        yield
        return
    row = request.getfixturevalue("row")
    if reason := common.unavailable(row):
        pytest.skip(reason)
    with row.scope():
        yield


@pytest.fixture(scope="session")
def data() -> FashionMNIST:
    return load()


@pytest.fixture
def measure(benchmark):
    """measure(function, row, group, examples=None, **extra): times `function()` and notes what it depends on.

    `examples` per call adds examples_per_second, by the median round. `extra` goes into extra_info.
    """

    def run(function, row: common.Row, group: str, examples: int | None = None, **extra) -> None:
        benchmark.group = f"{group}, {str(row.dtype).removeprefix('torch.')}"
        benchmark.extra_info.update(common.environment(DEVICE), row=row.name, backend=row.backend, **extra)
        calls = common.calls_lasting(ROUND_SECONDS, function, common.clock(DEVICE))
        benchmark.pedantic(function, rounds=ROUNDS, iterations=calls, warmup_rounds=1 if DEVICE.type == "cuda" else 0)
        if examples is not None and benchmark.stats is not None:  # None under --benchmark-disable
            benchmark.extra_info["examples_per_second"] = examples / benchmark.stats.stats.median

    return run


@pytest.hookimpl(trylast=True)  # after the tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What pytest-benchmark's tables leave out: examples per second, against eager, and bytes saved for backward."""
    groups: dict[str, list] = {}
    for measured in config._benchmarksession.benchmarks:
        if "examples_per_second" in measured.extra_info:
            groups.setdefault(measured.group, []).append(measured)
    if not groups:
        return
    terminalreporter.section("examples/sec, and bytes saved for backward")
    for group, members in groups.items():
        terminalreporter.write_line(group)
        rows = {measured.extra_info["row"]: measured for measured in members}
        eager = next((m for name, m in rows.items() if name.startswith("eager") and "nchw" not in name), None)
        for name, measured in rows.items():
            line = f"    {name:<22} {measured.extra_info['examples_per_second']:>12,.1f}/s"
            if eager is not None:
                line += f"  {measured.stats.median / eager.stats.median:>7.3f} of eager's time"
            saved = [value for key, value in measured.extra_info.items() if key.startswith("saved_bytes")]
            terminalreporter.write_line(line + "".join(f"  {value:>14,} B saved" for value in saved))
