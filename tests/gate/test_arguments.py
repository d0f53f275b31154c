"""The errors of the report's command, which looks for the kernels that it is to compile."""

from __future__ import annotations

import re

import pytest

from benchmarks.compiled import report


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--cases", "none"], "--cases: expected a pattern that fits one of resnet18 float16, .*, got 'none'"),
        (["--kernels", "none"], "--kernels: expected a pattern that fits a kernel, such as conv_.*, got 'none'"),
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
        (["--json", "nowhere/new.json"], "--json: expected a path in an existing folder, got nowhere/new.json"),
        (
            ["--compare", "old.json"],
            "--compare: expected a file that --json wrote, got old.json: not a list",
        ),
        (["--devices", "sm_1"], "argument --devices: invalid choice: 'sm_1'"),
    ],
    ids=["cases", "kernels", "processes", "json", "compare", "devices"],
)
def test_a_bad_argument_is_an_error_of_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(says, error) and error.count("\n") == 1
