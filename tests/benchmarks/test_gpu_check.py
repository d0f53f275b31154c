"""`make gpu-check`: its stages rehearsed on the CPU, what it notes, and the documents' tables that are made of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import history
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import (
    environment,
    launches,
    parity,
    plots,
    processes,
    publish,
    report,
    sanitizer,
    scale,
    times,
)
from benchmarks.gpu_check.__main__ import Check
from tests.helpers.runs import as_typed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "results")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "."], "--out: expected a folder that does not exist yet, got ."),
        (["--out", "link"], "--out: expected a folder that does not exist yet, got link"),
        (["--out", "file/folder"], "--out: expected a folder that can be made, got "),
        (["--out", "n" * 256], "--out: expected a folder that can be made, got "),
        (["--minutes", "nan"], "--minutes: expected a positive number, got nan"),
        (["--minutes", "-1"], "--minutes: expected a positive number, got -1.0"),
    ],
    ids=as_typed,
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--rehearse", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line
    assert {p.name for p in tmp_path.iterdir()} == {"file", "link"}


def test_the_environment_names_what_a_result_depends_on():
    found = json.loads(json.dumps(environment.environment()))
    release = torch.__version__.partition("+")[0]  # what is built for CUDA calls itself so, its package may not
    assert found["packages"]["torch"] == environment.version_of("torch")
    assert found["packages"]["torch"].partition("+")[0] == release
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(found["devices"]) == torch.cuda.device_count()


# ---- a run -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_rehearsal_runs_every_stage_and_leaves_a_report(tmp_path, monkeypatch, capsys):
    """The rows and the tasks are fewer than a user's, for time's sake."""
    monkeypatch.setattr(times, "ROWS", times.ROWS[:2])
    monkeypatch.setattr(times, "BLOCK_ROWS", times.ROWS[:2])
    monkeypatch.setattr(times, "MODEL_ROWS", times.ROWS[:2])
    monkeypatch.setattr(times, "SLOW_ROWS", ())
    tasks = parity.tasks(scale.rehearsal())[:2]
    monkeypatch.setattr(parity, "tasks", lambda scale: tasks)
    monkeypatch.setattr(gpu_check.memory.process_choices, "path", None)
    monkeypatch.setenv("FUSED_RESIDUAL_CACHE", "off")
    folder = tmp_path / "results"
    status = gpu_check.main(["--rehearse", "--minutes", "20", "--out", str(folder)])
    said = capsys.readouterr().out
    assert status == 0, said
    results = json.loads((folder / "results.json").read_text())
    assert list(results["seconds"]) == [
        *("environment", "parity", "net", "textbook", "blocks", "model", "sanitizer", "tests", "max-autotune")
    ]
    assert set(results["parity"]) == {task.name for task in tasks}
    assert set(results["net"]) == {f"{case}, {kind}" for case in report.NET_CASES for kind in ("fused", "eager")}
    assert set(results["model"]) == {
        f"resnet18 {case}, {kind}" for case in ("training", "inference") for kind in ("fused", "eager")
    }
    assert all(len(row["launched_ms"]) == 3 for row in (results["net"] | results["model"]).values())
    assert results["textbook"]["fused"]["said"][0].startswith("loss ")
    assert results["sanitizer"]["sample alone"]["status"] == 0
    assert results["tests"]["tests/resnet/test_schema.py"]["status"] == 0
    text = (folder / "report.md").read_text()
    assert "| fused |" in text and "| eager |" in text
    assert text.count("\n\nNothing.\n") == 2  # failed, and was left out
    pictures = [folder / f"report-{name}.png" for name in ("training", "inference", "textbook")]
    assert all(picture.stat().st_size > 5000 and f"({picture.name})" in text for picture in pictures)


def check(folder, seconds: float = 60.0) -> Check:
    return Check(folder, scale.rehearsal(), seconds)


def failing():
    raise ValueError("out of luck")


def test_what_fails_is_noted_at_once_and_the_next_one_runs(tmp_path):
    run = check(tmp_path)
    run.stage("net", 0, [("first", failing), ("second", lambda: {"launched_ms": [1.0, 1.0, 1.0]})])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["net"]["first"] == {"error": "ValueError: out of luck"} and "second" in kept["net"]
    assert list(report.failures(run.results)) == ["net: first: ValueError: out of luck"]


def test_a_stage_that_cannot_begin_is_noted(tmp_path):
    run = check(tmp_path)
    run.stage("net", 0, (failing() for _ in range(1)))
    assert run.results["net"]["stage"] == {"error": "ValueError: out of luck"}


def test_a_stage_ends_where_the_time_does(tmp_path):
    run = check(tmp_path, seconds=5.0)
    run.stage("net", 10.0, [("first", failing)])
    assert run.results["net"] == {"not all of it": "less than 10 s were left"}
    assert not list(report.failures(run.results))


def test_what_was_left_out_is_in_the_report_and_in_the_summary():
    results = {
        "net": {"not all of it": "less than 162 s were left"},
        "sanitizer": {"memcheck": {"status": 0, "end": "0 errors"}, "racecheck": {"status": None, "end": "not ended"}},
    }
    lines = ["net: less than 162 s were left", "sanitizer: racecheck: not ended"]
    assert "## What was left out\n\n* {}\n\n* {}\n".format(*lines) in report.markdown(results)
    assert report.summary(results).splitlines() == ["nothing failed", *(f"left out: {line}" for line in lines)]


def test_an_environment_that_cannot_be_measured_fails_the_run():
    results = {"environment": {"environment": environment.environment(), "ceilings": {"error": "OutOfMemoryError"}}}
    assert list(report.failures(results)) == ["environment: ceilings: OutOfMemoryError"]


@pytest.mark.parametrize(
    "result",
    [
        {"passed": False, "share_of_allowed": 1.5, "of": "dx", "with": "forward 64x64x64"},
        {"error": "RuntimeError: no"},
    ],
    ids=["an error above what is allowed", "an exception"],
)
def test_parity_that_fails_fails_the_run(result):
    assert len(list(report.failures({"parity": {"a block": result}}))) == 1


class Lost:
    """The result of a process that has ended without one."""

    def wait(self, seconds: float) -> None:
        pass

    def ready(self) -> bool:
        return False


def test_a_task_whose_process_has_ended_is_an_error_that_says_so():
    with pytest.raises(TimeoutError, match=r"no result in another 3 s.*its process has ended"):
        parity._waited(Lost(), 3.0)


def test_cudnn_times_its_convolutions_in_the_row_of_that_name_alone():
    set_in = {}
    for row in times.ROWS:
        with row.scope(scale.rehearsal()):
            set_in[row.name] = torch.backends.cudnn.benchmark
    assert [name for name, on in set_in.items() if on] == ["eager cudnn.benchmark"]
    assert not torch.backends.cudnn.benchmark


OTHERS = [task for task in parity.tasks(scale.rehearsal()) if task.kind != "Residual"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("task", OTHERS, ids=[task.name for task in OTHERS])
def test_a_task_of_another_module_runs_each_of_its_tiles_on_the_kernels(monkeypatch, task):
    """A rehearsal runs PyTorch's operators. So few images leave the error to luck, so it is asked to be small alone."""
    monkeypatch.setattr(scale.Scale, "on_gpu", True)
    result = parity.check(task, replace(scale.rehearsal(), block_batch=2))
    assert "error" not in result, result
    assert result["with"], "no product was launched with a tile"
    assert result["share_of_allowed"] < 4, result


def test_each_candidate_of_a_product_is_taken_in_turn():
    from resnet.kernels import tuning
    from resnet.kernels.host.shapes import ConvShape

    shape, x = ConvShape(8, 12, 12, 64, 64, 3, 3, 1, 1), torch.empty(1, dtype=torch.bfloat16)
    switches = {"precision": "ieee", "flat": False}
    found = tuning.candidates(tuning.gemm("forward", shape, x.dtype, **switches))
    taken = []
    for index in range(len(found) + 1):
        with parity.candidate(index) as used:
            taken.append(tuning.gemm_config("forward", shape, x, lambda config: None, **switches))
        assert list(used.values()) == [(str(taken[-1]), len(found))]
    assert tuple(taken) == (*found, found[0])


def test_a_report_says_how_the_tests_ended_and_stands_without_them():
    assert "tests/kernels: 3 failed" in report.markdown({"tests": {"tests/kernels": {"status": 1, "end": "3 failed"}}})
    assert report.markdown({"tests": {"not all of it": "less than 0 s were left"}})


PROGRESS = "bringing up nodes...\n\n..sF [ 50%]\n.xE [ 99%]\n.F"
TRACEBACKS = "\n=== ERRORS ===\nE\nEF\n! Ctrl-C !\n2 failed, 1 error\n"


@pytest.mark.parametrize("log", [PROGRESS, PROGRESS + TRACEBACKS], ids=["killed at once", "after Ctrl-C"])
def test_tests_that_failed_before_the_time_ended_fail_the_run(tmp_path, log):
    (tmp_path / "tests.log").write_text(log)
    kept = report.ended(None, tmp_path / "tests.log")
    expected = "tests: tests/kernels: 3 tests had failed when the time ended; see tests.log"
    assert list(report.failures({"tests": {"tests/kernels": kept}})) == [expected]


def test_tests_that_had_all_passed_when_the_time_ended_do_not_fail_the_run(tmp_path):
    (tmp_path / "tests.log").write_text(
        "FAILED or ERROR is a word of a warning's\n..s. [ 50%]\n.\n!!! Ctrl-C !!!\nFE\n"
    )
    kept = report.ended(None, tmp_path / "tests.log")
    assert (kept["status"], kept["failed"]) == (None, 0)
    assert not list(report.failures({"tests": {"tests/kernels": kept}}))


CAUGHT = """import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("two of them failed")
"""


def test_a_command_whose_time_has_ended_may_say_what_it_had_found(tmp_path):
    log = tmp_path / "log"
    with processes.running((sys.executable, "-c", CAUGHT), log, os.environ) as process:
        while "ready" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        assert processes.status(process, 0) is None
        processes.interrupt(process)
    assert log.read_text() == "ready\ntwo of them failed\n"


# ---- compute-sanitizer -------------------------------------------------------------------------------------------

LOG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at conv_forward_kernel+0x2d0
========= Invalid __global__ read of size 4 bytes
=========     at conv_forward_kernel+0x310
========= ERROR SUMMARY: 2 errors
"""


def test_what_the_sanitizer_found_is_kept_once_with_its_summary_and_fails_the_run():
    kept = sanitizer.found(9, LOG)
    assert kept == {
        "status": 9,
        "end": "ERROR SUMMARY: 2 errors",
        "found": ["Invalid __global__ read of size 4 bytes"],
    }
    assert list(report.failures({"sanitizer": {"memcheck": kept}})) == ["sanitizer: memcheck: ERROR SUMMARY: 2 errors"]


def test_a_sanitizer_that_found_nothing_passes():
    kept = sanitizer.found(0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert kept == {"status": 0, "end": "ERROR SUMMARY: 0 errors", "found": []}
    assert not list(report.failures({"sanitizer": {"memcheck": kept}}))


def test_what_the_sanitizer_found_before_the_time_ended_fails_the_run():
    kept = sanitizer.found(None, LOG.partition("========= ERROR SUMMARY")[0])
    assert list(report.failures({"sanitizer": {"memcheck": kept}})) == [
        "sanitizer: memcheck: not ended in time; Invalid __global__ read of size 4 bytes"
    ]
    kept = sanitizer.found(None, "========= COMPUTE-SANITIZER\n")
    assert kept["end"] == "not ended in time"
    assert not list(report.failures({"sanitizer": {"memcheck": kept}}))


# ---- kernels ---------------------------------------------------------------------------------------------------

CEILINGS = {"bytes_per_second": 1e12, "operations_per_second": 1e14}


def test_a_launch_moves_each_of_its_tensors_once():
    x = torch.zeros(4, 8)
    found = launches.describe("apply_kernel", {"x": x, "again": x, "out": torch.zeros(4, 8), "M": 4, "BLOCK_M": 16})
    assert (found.bytes, found.operations) == (2 * x.nbytes, 0)
    assert found.what == "4x8 BLOCK_M=16"
    assert found.least_microseconds(CEILINGS) == pytest.approx(1e6 * 2 * x.nbytes / 1e12)


def test_a_product_has_two_operations_for_each_value_of_a_window():
    y = torch.zeros(2, 16, 5, 5)
    arguments = {"x": torch.zeros(2, 8, 5, 5), "y": y, "C": 8, "R": 3, "S": 3, "num_warps": 4}
    found = launches.describe("conv_forward_kernel", arguments)
    assert found.operations == 2 * y.numel() * 8 * 9


def test_kernels_that_ran_stand_beside_the_launches_that_were_recorded():
    launch = launches.Launch("apply_kernel", 1000, 0, "4x8")
    rows = launches.table([("memset", 1.0), ("apply_kernel", 2.0)], [launch], CEILINGS)
    assert "least_microseconds" not in rows[0] and rows[1]["what"] == "4x8"
    with pytest.raises(ValueError, match="apply_kernel where the device ran pool_kernel"):
        launches.table([("pool_kernel", 2.0)], [launch, launches.Launch("pool_kernel", 1, 0, "")], CEILINGS)


def test_the_largest_gaps_come_first_and_equal_launches_are_one():
    launch = launches.Launch("apply_kernel", 1_000_000, 0, "4x8")  # 1 us at least
    other = launches.Launch("pool_kernel", 1_000_000, 0, "4x8")
    events = [("apply_kernel", 2.0), ("pool_kernel", 2.5), ("apply_kernel", 4.0)]
    first, second = launches.largest_gaps(launches.table(events, [launch, other, launch], CEILINGS))
    assert (first["kernel"], first["count"], first["microseconds"]) == ("apply_kernel", 2, 3.0)
    assert (second["kernel"], second["count"]) == ("pool_kernel", 1)


def test_each_of_the_largest_gaps_has_a_bar_of_its_own_and_its_least_within_it():
    kept = next(results for results in publish.kept_results() if "kernels" in results)
    gaps = kept["kernels"]["training"]["gaps"]
    (axes,) = dict(plots.figures({"kernels": {"training": {"gaps": gaps}}}))["kernels-training"].axes
    measured, least = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert measured == [gap["microseconds"] for gap in gaps]
    assert least == [gap["least_microseconds"] for gap in gaps]


# ---- documents -------------------------------------------------------------------------------------------------


def test_tables_replace_what_stands_between_their_marks_and_nothing_else():
    text = "before\n<!-- gpu: summary -->\nold\n<!-- end -->\nafter\n"
    once = publish.rewritten(text, {"summary": "| new |"})
    assert once == "before\n<!-- gpu: summary -->\n| new |\n<!-- end -->\nafter\n"
    assert publish.rewritten(once, {"summary": "| new |"}) == once


@pytest.mark.parametrize("content", [None, "no JSON"])
def test_a_folder_without_results_is_an_error_of_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        publish.main([str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and f"folder: expected one that benchmarks.gpu_check wrote, got {tmp_path} (" in line


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A copy of the documents and of what is kept, which a test may publish into."""
    shutil.copytree(publish.KEPT, tmp_path / "results", ignore=shutil.ignore_patterns("training"))
    documents = [shutil.copy(document, tmp_path) for document in publish.DOCUMENTS]
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "KEPT", tmp_path / "results")
    monkeypatch.setattr(publish, "DOCUMENTS", [Path(document) for document in documents])
    return tmp_path


def checked(folder: Path, moment: str = "2100-01-01T12:00:00+0000", commit: str = "abc", **stages: object) -> Path:
    """The folder of a check of that time, with the first results that have all of the tables but the model's."""
    whole = ("net", "kernels", "textbook", "blocks", "parity")
    results = next(found for found in publish.kept_results() if all(publish.is_whole(found, name) for name in whole))
    results["environment"]["environment"] |= {"time": moment, "commit": commit}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results | stages))
    return folder


def published() -> list[str]:
    return sorted(path.name for path in publish.KEPT.iterdir())


CUT = {"not all of it": "less than 54 s were left"}
ERROR = {"error": "OutOfMemoryError: CUDA out of memory"}
TIMED = {"launched_ms": [1.0, 1.0, 1.0], "replayed_ms": [1.0, 1.0, 1.0]}
SUMMARY = {f"{case}, {kind}": TIMED for case in report.NET_CASES for kind in publish.SIDES}
LAST = f"{report.NET_CASES[1]}, compile"


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        ("net", CUT),
        ("net", {**dict(list(SUMMARY.items())[:-1]), **CUT}),
        ("net", SUMMARY | {LAST: ERROR}),
        ("net", SUMMARY | {LAST: TIMED | ERROR}),
        ("net", SUMMARY | {LAST: {"launched_ms": [1.0, 1.0, 1.0]}}),
        ("kernels", {"training": ERROR}),
        ("kernels", CUT),
        ("textbook", CUT),
        ("textbook", {"fused": {"loss": 0.1}, "eager": ERROR}),
        ("blocks", CUT),
        ("blocks", {"block 64->64, stride 1, 24x24, fused": TIMED, **CUT}),
        ("model", {"stage": ERROR}),
        ("parity", CUT),
        ("parity", {"stage": ERROR}),
    ],
    ids=repr,
)
def test_a_stage_that_is_not_whole_leaves_the_documents_the_tables_that_they_had(shelf, stage, found):
    of_stage = {"net": ("summary", "training", "inference"), "kernels": ("gaps",)}.get(stage, (stage,))
    before = publish.tables(publish.kept_results())
    assert publish.main([str(checked(shelf / "check", **{stage: found}))]) == 0
    after = publish.tables(publish.kept_results())
    assert {name for name in of_stage if before[name] != after[name]} == set()
    assert "2100-01-01" in after["setting parity" if stage != "parity" else "setting"]
    texts = [document.read_text() for document in publish.DOCUMENTS]
    assert [publish.rewritten(text, after) for text in texts] == texts


def test_a_table_that_no_check_has_says_so():
    assert set(publish.tables([]).values()) == {publish.NOT_YET}


def test_a_net_whose_other_rows_were_cut_is_whole():
    assert publish.is_whole({"net": SUMMARY | CUT}, "net")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"environment": {"time": "2100", "devices": []}, "ceilings": {}}, "expected a check of a GPU, got "),
        ({"environment": ERROR, "ceilings": {}}, "expected one that benchmarks.gpu_check wrote, got "),
        (
            {"environment": {"time": "2100", "devices": [{"name": "a GPU"}]}, "ceilings": ERROR},
            "expected a check that measured the device's ceilings, got ",
        ),
    ],
    ids=["no GPU", "no environment", "no ceilings"],
)
def test_a_check_that_names_no_device_is_refused_in_one_line_and_not_kept(shelf, capsys, environment, message):
    kept = published()
    with pytest.raises(SystemExit) as stopped:
        publish.main([str(checked(shelf / "check", environment=environment))])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and f"folder: {message}" in line
    assert published() == kept


def test_nothing_is_kept_where_a_document_cannot_be_written(shelf):
    kept = published()
    publish.DOCUMENTS[1].write_text("<!-- gpu: sumary -->\n<!-- end -->")
    with pytest.raises(KeyError, match="sumary"):
        publish.main([str(checked(shelf / "check"))])
    assert published() == kept


def test_a_check_takes_no_others_place_and_its_own_when_published_again(shelf):
    kept = set(published())
    times = [f"2100-01-01T12:0{minute}:00+0000" for minute in range(4)]
    for moment, commit in (*zip(times, "aabb"), (times[0], "a")):
        publish.main([str(checked(shelf / "check", moment, commit))])
    device = next(iter(publish.kept_results()))["environment"]["environment"]["devices"][0]["name"].lower()
    name = f"{device.replace(' ', '-')}-2100-01-01"
    assert set(published()) - kept == {f"{name}{end}.json" for end in ("", "-a", "-b", "-b-120300")}
    assert {point.time for point in history.read(publish.KEPT.glob("*.json"))} >= set(times)


def test_a_block_that_no_table_is_for_is_an_error():
    with pytest.raises(KeyError, match="sumary"):
        publish.rewritten("<!-- gpu: sumary -->\n<!-- end -->", {"summary": ""})


def test_the_documents_tables_are_those_of_the_newest_results_that_have_them():
    """Fails where a table was typed, or left behind by newer results."""
    blocks = publish.tables(publish.kept_results())
    for document in publish.DOCUMENTS:
        text = document.read_text()
        assert publish.rewritten(text, blocks) == text, document.name
