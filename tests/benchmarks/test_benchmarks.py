"""The benchmarks' own claims: what is counted, what is collected, what the report holds. No time is asserted."""

import dataclasses
import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_batch_norm, common, compare, history, models, passes, plot, roofline, turns, verdict
from benchmarks.common import Implementation
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import publish
from resnet import FusedResidual, Residual, current_backend
from resnet.kernels import tuning
from tests.conftest import ROOT

TINY = ["--pairs", "2", "--batch-size", "4", "--resize", "28", "--rivals", "eager", "--device", "cpu"]
CPU = torch.device("cpu")


def run(*arguments, **variables):
    # What pytest prints depends on a user's options, on the terminal's width, and on whether it is a worker: to
    # pytest-benchmark a command that a worker started is one, and measures nothing.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outside, "COLUMNS": "1000", **variables}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


# ---- bytes saved for backward ---------------------------------------------------------------------------------


def test_saved_bytes_counts_what_backward_keeps():
    x, y = (torch.ones(100, requires_grad=True) for _ in range(2))
    assert common.saved_bytes(lambda: x * y) == 2 * 400
    assert common.saved_bytes(lambda: x + y) == 0
    assert common.saved_bytes(lambda: torch.exp(x)) == 400  # its output


def test_saved_bytes_counts_a_storage_once_and_in_full():
    x = torch.ones(100, requires_grad=True)
    assert common.saved_bytes(lambda: x * x) == 400
    assert common.saved_bytes(lambda: x[:10] * x[50:60]) == 400


def test_saved_bytes_leaves_out_what_it_is_told_to():
    x, weight = (torch.ones(100, requires_grad=True) for _ in range(2))
    assert common.saved_bytes(lambda: x * weight, exclude=[weight]) == 400


def test_saved_bytes_counts_tensors_that_only_backward_holds():
    x = torch.ones(100, requires_grad=True)
    # Freed at once but for backward: a new tensor at an address just freed would hide an old one.
    assert common.saved_bytes(lambda: torch.exp(torch.exp(torch.exp(x)))) == 3 * 400


@pytest.mark.parametrize(("kind", "activations"), [("eager", 4), ("fused", 3)])
def test_an_identity_block_keeps_so_many_activations_besides_its_input(kind, activations):
    implementation = Implementation(kind, CPU)
    with implementation.scope():
        block, forward = common.residual(implementation, 16, 16, stride=1)
        x = common.activations(implementation, 4, 16, 8, 8)
        saved = common.block_saved_bytes(implementation, block, forward, x)
    size = x.numel() * x.element_size()
    assert activations * size <= saved <= activations * size + 16 * 16 * 4  # and some vectors of 16 channels


# ---- implementations ------------------------------------------------------------------------------------------


def test_implementations_start_from_the_same_weights():
    fused, eager = (common.residual(Implementation(kind, CPU), 3, 6, stride=2)[0] for kind in ("fused", "eager"))
    assert type(fused) is FusedResidual
    assert type(eager) is Residual
    torch.testing.assert_close(dict(fused.state_dict()), dict(eager.state_dict()), rtol=0, atol=0)


def test_the_operation_has_the_same_arguments_in_each_row():
    fused, eager = (bench_batch_norm.operation(Implementation(kind, CPU), "512@3x3") for kind in ("fused", "eager"))
    tensors = [(op.x, op.shortcut, *op.parameters) for op in (fused, eager)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_labels_are_of_several_classes_and_the_same_in_each_row():
    state = torch.get_rng_state()
    first, second = (common.labels(Implementation(kind, CPU), 32, 10) for kind in ("fused", "eager"))
    assert torch.equal(first, second)
    assert 1 < len(first.unique()) <= 10 and {*first.tolist()} <= {*range(10)}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_has_no_triton_implementation():
    implementations = common.implementations(CPU)
    assert {implementation.kind for implementation in implementations} == {"eager", "compile", "fused"}
    assert all(implementation.backend == "torch" for implementation in implementations)


# ---- taking turns ---------------------------------------------------------------------------------------------


def side(run):
    return turns.Side(run, nullcontext)


@pytest.mark.parametrize("sides", [2, 3, 4])
def test_every_second_round_is_the_mirror_image_of_the_one_before(sides):
    for number in range(0, 4 * sides, 2):
        assert turns.order(number + 1, sides) == turns.order(number, sides)[::-1]


@pytest.mark.parametrize("sides", [2, 3, 4])
def test_every_side_is_equally_often_in_each_place_of_a_round(sides):
    rounds = [turns.order(number, sides) for number in range(2 * sides)]
    for place in range(sides):
        assert sorted(order[place] for order in rounds) == sorted(2 * list(range(sides)))


def test_sides_take_turns_in_that_order_for_as_many_calls_each():
    log = []
    sides = [side(lambda i=i: log.append(i)) for i in range(3)]
    taken = turns.take_turns(sides, calls=2, rounds=5, now=time.perf_counter)
    warm_up, rounds = log[:3], log[3:]
    assert warm_up == [0, 1, 2]
    assert rounds == [i for number in range(5) for i in turns.order(number, 3) for _ in range(2)]
    assert all(len(own.seconds) == len(own.started) == 5 for own in taken)


def test_a_turn_is_timed_by_the_clock_it_is_given_per_call():
    hours = itertools.count()
    taken = turns.take_turns([side(lambda: next(hours)) for _ in range(2)], calls=3, rounds=2, now=lambda: next(hours))
    # Between the two readings are three calls, which read it too.
    assert [own.seconds for own in taken] == [[4 / 3] * 2] * 2


def test_the_hosts_clock_leaves_out_the_wait_for_what_it_queued(monkeypatch):
    hour, queued = [0], [3]

    def wait():
        hour[0] += queued.pop()

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: hour[0]))
    clock = turns.HostClock(wait)
    start = clock()
    hour[0] += 2
    queued.append(5)
    assert clock() - start == 2
    assert hour[0] == 3 + 2 + 5


@pytest.mark.parametrize(
    ("command", "needs"), [(compare, []), (models, ["torchvision.models:resnet18"])], ids=["compare", "models"]
)
def test_the_device_that_is_timed_is_the_current_one(monkeypatch, command, needs):
    """A CUDA event is recorded on the current device: on another one it would time nothing."""

    class Chosen(Exception):
        pass

    def set_device(device):
        raise Chosen(device)

    monkeypatch.setattr(common, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(Chosen, match="cuda:1"):
        command.main([*needs, "--device", "cuda:1"])


def test_a_side_is_in_its_own_scope_when_it_runs():
    seen = []
    fused = turns.Side(lambda: seen.append(current_backend()), Implementation("fused", CPU).scope)
    turns.take_turns([fused], calls=1, rounds=1, now=time.perf_counter)
    assert seen == ["torch"] * 2
    assert current_backend() == "auto"


def test_garbage_is_collected_between_rounds_and_not_in_a_turn():
    enabled, collected = [], []
    gc.callbacks.append(callback := lambda phase, info: collected.append(len(enabled)) if phase == "stop" else None)
    try:
        turns.take_turns([side(lambda: enabled.append(gc.isenabled()))] * 2, calls=1, rounds=3, now=time.perf_counter)
    finally:
        gc.callbacks.remove(callback)
    assert not any(enabled)
    assert {2, 4, 6} <= set(collected)  # after the warm-up round and each of the others, of two turns
    assert not any(turn % 2 for turn in collected)
    assert gc.isenabled()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux tells how long a thread waited")
def test_the_time_on_a_cpu_is_counted_for_the_side_that_had_it():
    busy, idle = turns.take_turns(
        [side(lambda: sum(range(300_000))), side(lambda: None)], calls=10, rounds=3, now=time.perf_counter
    )
    assert busy.ran > idle.ran >= 0
    assert busy.waited >= 0
    assert 0 <= busy.waited_share <= 1


def test_a_failure_names_the_side_and_its_error():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(turns.SideFailed) as failure:
        turns.take_turns([side(lambda: None), side(fail)], calls=1, rounds=1, now=time.perf_counter)
    assert failure.value.index == 1
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    assert gc.isenabled()


def test_the_calls_of_a_turn_bound_a_rounds_length_however_much_the_sides_differ():
    assert turns.calls_per_turn(0.05, [0.01, 0.01]) == 5
    assert turns.calls_per_turn(0.05, [0.0005, 1.0]) == 1
    assert turns.calls_per_turn(0.05, [1e-9, 1e-9]) == 200


# ---- the verdict ----------------------------------------------------------------------------------------------


def compared(fused, rival):
    return verdict.Comparison.of_rounds("eager", fused, rival)


def around(ratio, rounds=11):
    """Rounds whose ratios differ a little, with `ratio` in the middle."""
    return compared([ratio * (1 + 0.002 * (i - rounds // 2)) for i in range(rounds)], [1.0] * rounds)


def test_a_drift_that_slows_some_rounds_does_not_tilt_the_ratio():
    # The machine is three times as slow in most of the rounds; in two it becomes so, or ends, between the two turns.
    speed = [(1, 1), (1, 1), (1, 1), (1, 3), *[(3, 3)] * 7, (3, 1), (1, 1)]
    drifting = compared([0.9 * slow for slow, _ in speed], [1.0 * slow for _, slow in speed])
    assert drifting.median == pytest.approx(0.9)
    assert drifting.interval == pytest.approx((0.9, 0.9))
    assert drifting.verdict == "fused 11% faster"


def test_one_after_the_other_the_same_drift_would_have_been_a_verdict():
    """That is, the test above is one that the former way of measuring fails."""
    slow_then_fast = compared([0.9 * 3] * 11, [1.0] * 11)
    assert slow_then_fast.verdict == "fused 2.7x slower"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1 / 1.14, "fused 14% faster"),
        (1.14, "fused 14% slower"),
        (1 / 1.03, "fused 3% faster"),
        (1 / 3.4, "fused 3.4x faster"),
        (3.4, "fused 3.4x slower"),
        (1.0, "no difference seen"),
        (1.005, "no difference seen"),
    ],
)
def test_the_verdict_says_who_is_faster_and_by_how_much(ratio, words):
    assert around(ratio).verdict == words


def test_there_is_no_winner_where_the_interval_has_one_in_it():
    ratios = [0.80, 0.84, 0.86, 0.88, 0.90, 0.90, 0.92, 0.94, 1.02, 1.05, 1.10]
    unsure = compared(ratios, [1.0] * 11)
    assert unsure.interval == (0.84, 1.05)
    assert unsure.verdict == "no difference seen"
    assert unsure.spread == "19% faster to 5% slower"
    sure = compared([ratio - 0.06 for ratio in ratios], [1.0] * 11)
    assert sure.verdict == "fused 19% faster"
    assert sure.spread == "1% to 28%"


def test_all_figures_are_in_percent_or_all_are_multiples():
    some_twice_as_fast = compared([0.4, 0.6, 0.6, 0.6, 0.6, 0.7], [1.0] * 6)
    assert some_twice_as_fast.verdict == "fused 1.7x faster"
    assert some_twice_as_fast.spread == "1.4x to 2.5x"
    assert compared([0.8, 1, 1, 1, 1, 5], [1.0] * 6).spread == "1.2x faster to 5.0x slower"
    assert around(1.2).spread == "19% to 21%"
    assert around(0.99).spread == "under 1% to 2%"


def test_a_verdict_of_a_busy_machine_comes_with_a_caution():
    assert verdict.busy_note(0.05) is None
    assert "busy with other work: threads waited for one up to 40% of their time" in verdict.busy_note(0.4)


def test_there_is_no_winner_where_threads_had_no_cpu_for_half_of_their_time():
    ratios = around(0.5).ratios
    assert verdict.Comparison("eager", ratios, waited=0.4).verdict == "fused 2.0x faster"
    too_busy = verdict.Comparison("eager", ratios, waited=0.5)
    assert (too_busy.verdict, too_busy.spread) == ("CPUs too busy", "")


def test_the_interval_holds_the_median_with_the_confidence_it_names():
    for rounds in range(6, 60):
        low, _ = compared(range(1, rounds + 1), [1] * rounds).interval
        skipped = int(low) - 1
        outside = 2 * sum(math.comb(rounds, below) for below in range(skipped + 1)) / 2**rounds
        one_more = outside + 2 * math.comb(rounds, skipped + 1) / 2**rounds
        assert outside <= 1 - verdict.CONFIDENCE < one_more


def test_five_rounds_are_too_few_for_a_verdict():
    assert around(0.5, rounds=5).verdict == "too few rounds"
    assert around(0.5, rounds=5).spread == ""
    assert around(0.5, rounds=6).verdict == "fused 2.0x faster"


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError):
        compared([1.0, 1.0], [1.0])
    with pytest.raises(ValueError):
        compared([], [])


def test_the_best_rival_is_the_one_that_fused_does_worst_against():
    rivals = [verdict.Comparison.of_rounds(name, [1.0] * 6, [t] * 6) for name, t in (("a", 2.0), ("b", 0.9), ("c", 1))]
    assert verdict.best_rival(rivals).rival == "b"


def test_the_lines_of_the_table_are_aligned():
    lines = [
        verdict.Line("ResNet-18 training", around(0.8), 0.64, 71.4),
        verdict.Line("block", around(1.0), None, 12345.6),
    ]
    head, first, second = verdict.table(lines)
    assert first.index("fused 25% faster") == second.index("no difference seen")
    assert first.index("eager") == second.index("eager") == head.index("best rival")
    for name, value in (("rounds", " 11"), ("bytes kept", "0.64"), ("examples/s", "71")):
        assert first.index(value, head.index(name)) + len(value) == head.index(name) + len(name)
    assert second.endswith("12,346")


# ---- the suites -----------------------------------------------------------------------------------------------


def test_every_suite_is_collected():
    result = run("pytest", "benchmarks", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    for suite in (ROOT / "benchmarks").glob("bench_*.py"):
        for implementation in ("eager", "compile", "fused"):
            lines = [line for line in result.stdout.splitlines() if f"{suite.name}::" in line]
            assert any(implementation in line for line in lines), f"{suite.name} has no row {implementation}"


ROUNDS = 6


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """(what pytest printed, the JSON's benchmarks) of some groups of the real suite, in the quick mode."""
    report = tmp_path_factory.mktemp("quick") / "out.json"
    options = ["--benchmark-only", f"--benchmark-json={report}", f"--benchmark-min-rounds={ROUNDS}"]
    done = run("pytest", "benchmarks", *options, "-k", "512 and not compile and not forward[", BENCH_QUICK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(report.read_text())["benchmarks"]


def groups_of(benchmarks):
    by_name = sorted(benchmarks, key=lambda each: each["group"])
    return {name: list(members) for name, members in itertools.groupby(by_name, key=lambda each: each["group"])}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there are Triton rows")
def test_the_report_says_why_there_are_no_triton_rows(quick_run):
    output, _ = quick_run
    assert "no Triton rows" in output


def test_every_row_is_a_benchmark_of_its_own(quick_run):
    _, benchmarks = quick_run
    assert len({each["fullname"] for each in benchmarks}) == len(benchmarks)
    groups = groups_of(benchmarks)
    suites = ("batch_norm_add_relu 4x512@3x3", "block 4x512@3x3")
    assert set(groups) == {
        f"{s} {mode}, float32" for s in suites for mode in ("inference", "training forward + backward")
    }
    for members in groups.values():
        assert len({each["extra_info"]["implementation"] for each in members}) == len(common.implementations(CPU)) - 1
        for each in members:
            data = each["stats"]["data"]
            assert len(data) == each["stats"]["rounds"] == ROUNDS
            assert min(data) > 0
            assert 0 <= each["extra_info"]["waited_for_cpu"] <= 1
            assert each["extra_info"]["examples_per_second"] == pytest.approx(4 / each["stats"]["median"])


def test_rows_of_a_group_take_turns(quick_run):
    _, benchmarks = quick_run
    for members in groups_of(benchmarks).values():
        begun = sorted((at, row) for row, each in enumerate(members) for at in each["extra_info"]["started"])
        rounds = [{row for _, row in begun[i : i + len(members)]} for i in range(0, len(begun), len(members))]
        assert rounds == [set(range(len(members)))] * ROUNDS


def test_the_run_ends_with_a_verdict_on_each_workload(quick_run):
    output, benchmarks = quick_run
    _, end = output.split("fused against the best of its rivals")
    lines = [line for line in end.splitlines() if "512@3x3" in line]
    names = [f"{what} 512@3x3 {mode}" for what in ("block", "BN+add+ReLU") for mode in ("training", "inference")]
    assert [re.split("  +", line)[0] for line in lines] == names
    for line in lines:
        assert re.search(r"  (fused \S+ (faster|slower)|no difference seen|CPUs too busy) +eager ", line)
        assert re.search(rf" {ROUNDS} ", line)
    eager, fused = (
        next(
            each["extra_info"]["saved_bytes_without_input"]
            for each in benchmarks
            if name in each["name"] and "block" in each["group"] and "backward" in each["group"]
        )
        for name in ("eager", "fused")
    )
    assert f" {fused / eager:.2f} " in lines[0]


MADE_UP_SUITE = """
from benchmarks.common import Workload

def bench_it(measure):
    def build(implementation):
        calls = []
        def run():
            calls.append(1)
            print("ran", implementation.kind)
            if implementation.kind == "eager" and len(calls) > 6:
                raise RuntimeError("out of luck")
        return Workload(run, "group", examples=1, title="it")
    measure(build)
"""


def run_suite(folder, source, *options):
    """pytest on a suite of that source; torch.compile finds no compiler."""
    suite = folder / "bench_made_up.py"
    suite.write_text(source)
    command = ["pytest", "-c", "pyproject.toml", "-p", "benchmarks.conftest", str(suite), "-v", "-rA"]
    return run(*command, *options, BENCH_QUICK="1", CXX=str(folder / "no-compiler"))


@pytest.fixture
def made_up_suite(tmp_path):
    """run(*options) of a suite whose eager row fails in its turns."""
    return lambda *options: run_suite(tmp_path, MADE_UP_SUITE, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch.compile needs no C++ compiler")
def test_a_row_that_fails_or_cannot_run_leaves_the_others_theirs(made_up_suite, tmp_path):
    report = tmp_path / "out.json"
    done = made_up_suite("--benchmark-only", "--benchmark-min-rounds=8", f"--benchmark-json={report}")
    assert re.search(r"FAILED \S*bench_it\[eager\] - RuntimeError: out of luck", done.stdout)
    assert re.search(r"bench_it\[compile\] SKIPPED \(torch.compile does not work here", done.stdout)
    assert re.search(r"bench_it\[fused-torch\] PASSED", done.stdout)
    (fused,) = json.loads(report.read_text())["benchmarks"]
    assert fused["extra_info"]["implementation"] == "fused-torch"
    assert fused["stats"]["rounds"] == 8
    assert "best of its rivals" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there are other rows")
def test_disabled_each_row_runs_once(made_up_suite):
    done = made_up_suite("--benchmark-disable", "-k", "not compile")
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("ran ")] == ["ran eager", "ran fused"]


HOST_SUITE = """
import pytest
from benchmarks import turns
from benchmarks.common import Workload

@pytest.mark.benchmark(timer=turns.HostClock(lambda: print("waited")), disable_gc=True)
def bench_it(measure):
    measure(lambda implementation: Workload(lambda: print("ran"), "group", examples=1), calls=3)
"""


def test_a_suite_may_have_a_clock_and_a_number_of_calls_of_its_own(tmp_path):
    report = tmp_path / "out.json"
    options = ["--benchmark-only", "--benchmark-min-rounds=2", f"--benchmark-json={report}", "-k", "not compile"]
    done = run_suite(tmp_path, HOST_SUITE, *options)
    assert done.returncode == 0, done.stdout
    benchmarks = json.loads(report.read_text())["benchmarks"]
    assert {(each["options"]["timer"], each["stats"]["iterations"]) for each in benchmarks} == {("HostClock", 3)}
    lines = [line for line in done.stdout.splitlines() if line in ("ran", "waited")]
    assert "".join(line[0] for line in lines).endswith("wrrrw" * 2 * len(benchmarks))


# ---- the commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [compare, gpu_check, history, models, passes, publish, roofline])
def test_help_prints_the_usage_once_and_succeeds(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # argparse breaks lines to the terminal's width
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    name = command.__name__.removesuffix(".__main__")
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m {name} ")
    described = " ".join(out.split("\n\n")[1].split())
    assert described and "`python -m" not in described and "`make" not in described


# ---- benchmarks.compare ---------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_json_and_a_plot(tmp_path):
    report, picture = tmp_path / "out.json", tmp_path / "out.png"
    cases = ["resnet18-train", "resnet18-inference", "block1-train", "block4-inference"]
    result = run("benchmarks.compare", *TINY, "--cases", *cases, "--json", str(report), "--plot", str(picture))
    assert result.returncode == 0, result.stderr

    figures = json.loads(report.read_text())
    names = {"environment", "backend", "data", "batch_size", "resize", "dtype", "pairs", "results", "saved_bytes"}
    assert names <= set(figures)
    assert {"device", "python", "torch", "triton"} <= set(figures["environment"])
    assert figures["backend"] == "torch"
    assert [(r["case"], r["rival"]) for r in figures["results"]] == [(case, "eager") for case in cases]
    for r in figures["results"]:
        ratios = [fused / rival for fused, rival in zip(r["fused_seconds"], r["rival_seconds"])]
        assert len(ratios) == 2
        assert (r["ratio_min"], r["ratio_max"]) == (min(ratios), max(ratios))
        assert r["ratio_median"] == pytest.approx(sum(ratios) / 2)
        assert 0 <= r["waited_for_cpu"] <= 1
        assert r["speedup"] == pytest.approx(1 / r["ratio_median"])
        assert (r["ratio_low"], r["ratio_high"]) == (None, None)
        assert r["verdict"] in ("too few rounds", "CPUs too busy")
    for saved in figures["saved_bytes"].values():
        assert 0 < saved["fused"] <= saved["eager"]  # equal where a stage is so small that vectors outweigh it
    assert figures["saved_bytes"]["block1"]["fused"] < figures["saved_bytes"]["block1"]["eager"]
    assert {"block1", "resnet18"} <= set(figures["saved_bytes"])

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(any(line.startswith(case) for line in result.stdout.splitlines()) for case in cases)
    assert sorted(tmp_path.iterdir()) == [report, picture]  # no partial file is left


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--pairs", "0"], "--pairs"),
        (["--pairs", "many"], "--pairs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "1000000"], "--batch-size"),
        (["--batch-size", "1", "--resize", "32"], "--batch-size"),
        (["--resize", "27"], "--resize"),
        (["--cases", "vgg"], "--cases"),
        (["--rivals", "jax"], "--rivals"),
        (["--device", "tpu9"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--json", "no/such/folder/out.json"], "--json"),
        (["--plot", "no/such/folder/out.png"], "--plot"),
        (["--plot", "out.xyz"], "--plot"),
        (["--plot", "out.png", "--json", "./out.png"], "--plot: expected another file than that of --json"),
        (["--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(arguments, names, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main([*arguments])
    assert exit_.value.code == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert error.startswith("python -m benchmarks.compare: error: ")
    assert names in error
    assert not any(line.startswith(("usage:", "python -m")) for line in before)  # where the data are from may be there


def test_the_plot_names_its_sides_and_has_a_legend_and_a_group_per_case():
    compared = [
        (case, verdict.Comparison.of_rounds(rival, [0.9] * 8, [1.0] * 8))
        for case in ("ResNet-18, training", "ResNet-18, inference")
        for rival in ("eager", "torch.compile")
    ]
    figure = plot.figure(compared, "what was measured")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert {"← fused faster", "slower →"} <= set(texts)
    assert texts.count("fused 11% faster") == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ResNet-18,\ntraining", "ResNet-18,\ninference"]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a pair with eager", "a pair with torch.compile", "median and its 95% interval"]


def test_an_outlier_does_not_squeeze_the_plot_and_is_marked_at_its_end():
    figure = plot.figure([("case", compared([0.9] * 19 + [50.0], [1.0] * 20))], "")
    (axes,) = figure.axes
    assert axes.get_xlim()[1] < 2
    assert any(line.get_marker() == plot.BEYOND_HIGH for line in axes.lines)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(SystemExit):
        compare.main(["--plot", "out.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- benchmarks.passes ----------------------------------------------------------------------------------------


def test_a_table_says_the_passes_of_each_block_and_is_the_documents():
    lines = list(passes.table())
    assert lines[2].startswith("| textbook | 64 → 64 → 64, identity | 17 + 27 = 44 | 7 + 20 = 27 | ")
    assert len(lines) == 2 + len(passes.BLOCKS)
    assert "\n".join(lines) in (ROOT / "docs" / "how-it-works.md").read_text()


def test_a_table_says_the_passes_that_torch_compile_counts_and_is_in_the_documents():
    *_, line = passes.compiled_table(["textbook"])
    assert f"\n{line}\n" in (ROOT / "docs" / "how-it-works.md").read_text()


def test_the_passes_of_a_block_do_not_depend_on_its_size():
    block = passes.BLOCKS["bottleneck-strided"]
    counts = set()
    for channels, batch, size in ((64, 8, 24), (4, 1, 6)):
        chain = passes.Chain.of(block.fused(*block.arguments(channels)), block.input_shape(channels, batch, size))
        counts.add((chain.passes(*passes.eager(chain)), chain.passes(*passes.fused(chain))))
    assert counts == {(68.75, 39.5)}


def test_the_steps_of_a_block_add_up_to_its_passes():
    block = passes.BLOCKS["textbook"]
    lines = list(passes.steps(passes.Chain.of(block.fused(*block.arguments(8)), block.input_shape(8, 1, 6))))
    assert "| bn2 + add + ReLU | y2, x → out | 3 |" in lines
    assert [line for line in lines if "**sum" in line] == ["| **sum, eager** | | 44 |", "| **sum, fused** | | 27 |"]


def test_the_passes_of_a_shortcut_without_a_norm_are_refused():
    with pytest.raises(ValueError, match="without a BatchNorm"):
        passes.Chain.of(FusedResidual(8, 16, True, 2), (1, 8, 6, 6))


# ---- benchmarks.roofline --------------------------------------------------------------------------------------


def test_a_launch_is_bound_by_what_takes_most_clocks():
    device = dataclasses.replace(tuning.SM_80, processors=10, products=1024, clock=2.0, bandwidth=1000)
    count = roofline.Counted(
        "", read=3000, written=2000, requested=8000, instructions=1600, products=100, wavefronts=300
    )
    clocks = count.clocks(device)
    assert clocks == {"memory": 10, "L2": 20, "issue": 40, "tensor": 20, "shared": 30}
    assert roofline.bound(clocks) == "issue 4.00"
    assert roofline.bound({**clocks, "issue": 5}) == "shared 3.00"


@pytest.mark.parametrize(
    ("missing", "arguments", "names"),
    [("ptxsim", [], "ptxsim"), (None, ["--batch", "0"], "--batch"), (None, ["--channels", "some"], "--channels")],
)
def test_roofline_names_what_it_lacks(missing, arguments, names, monkeypatch, capsys):
    monkeypatch.setattr(roofline.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SystemExit) as exit_:
        roofline.main(arguments)
    assert exit_.value.code == 2
    assert names in capsys.readouterr().err
