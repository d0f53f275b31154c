"""`make gpu-check`: what it collects and how it ends; its steps on a GPU are the suites themselves."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "results")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_environment_names_what_a_result_depends_on():
    found = json.loads(json.dumps(gpu_check.environment()))
    release = torch.__version__.partition("+")[0]  # what is built for CUDA calls itself so, its package may not
    assert found["packages"]["torch"] == gpu_check.version_of("torch")
    assert found["packages"]["torch"].partition("+")[0] == release
    assert all(found["packages"].values()) and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(found["devices"]) == torch.cuda.device_count()


def test_every_step_runs_and_a_failed_one_fails_the_whole(tmp_path, monkeypatch):
    command = (sys.executable, "-c")
    planned = [
        gpu_check.Step("first", (*command, "print('said'); raise SystemExit(3)")),
        gpu_check.Step("second", (*command, "print('done')")),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda folder: planned)
    assert not gpu_check.check(tmp_path / "results")
    results = tmp_path / "results"
    assert (results / "first.log").read_text() == "said\n" and (results / "second.log").read_text() == "done\n"
    assert (results / "summary.txt").read_text().startswith("first: failed\nsecond: passed\n")
    assert json.loads((results / "environment.json").read_text())["commit"] == gpu_check.environment()["commit"]


def test_its_steps_are_the_suites_with_their_reports(tmp_path):
    names = [step.name for step in gpu_check.steps(tmp_path)]
    assert names[0] == "tests" and names[-1] == "benchmarks"
    for step, report in (
        (gpu_check.steps(tmp_path)[0], "tests.xml"),
        (gpu_check.steps(tmp_path)[-1], "benchmarks.json"),
    ):
        assert any(str(tmp_path / report) in argument for argument in step.command)


def test_the_whole_suite_can_be_collected_in_one_run(tmp_path):
    """As its first step runs it, where `make test` without a GPU has a run for each folder."""
    command = (*gpu_check.steps(tmp_path)[0].command, "--collect-only", "--quiet")
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    for folder in ("tests/kernels/test_", "tests/resnet/test_", "tests/emulated/test_", "tests/gate/test_"):
        assert f"\n{folder}" in done.stdout
