"""benchmarks.history: the results that are kept, as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_check.publish import KEPT
from benchmarks.history import MS, RATE, figure, main, points, read, table

CHECK = {
    "environment": {
        "environment": {"time": "2026-01-02T03:04:05+0000", "commit": "abc", "devices": [{"name": "a GPU"}]},
    },
    "net": {
        "ResNet-18 training, fused": {"launched_ms": [8.0, 7.0, 9.0], "replayed_ms": [2.0, 2.0, 2.0]},
        "ResNet-18 training, eager": {"launched_ms": [10.0, 9.0, 11.0]},
        "ResNet-18 inference, fused": {"error": "out of memory"},
    },
    "textbook": {"fused": {"examples_per_sec": 200.0}, "eager": {"examples_per_sec": 50.0}},
}


def test_a_point_is_what_was_measured_of_both_and_a_ratio_is_of_times():
    launched, rate = points(CHECK)
    assert (launched.what, launched.unit, launched.ratio) == ("ResNet-18 training, launched by Python", MS, 0.8)
    assert (rate.what, rate.unit, rate.ratio) == ("the textbook's training", RATE, 0.25)
    assert table([launched, rate]).splitlines() == [
        "date        commit  device  measured                                 fused  eager                fused/eager",
        "2026-01-02  abc     a GPU   ResNet-18 training, launched by Python    8.00  10.00  ms                  0.800",
        "2026-01-02  abc     a GPU   the textbook's training                 200.00  50.00  examples/sec        0.250",
    ]


def test_what_is_kept_is_in_the_table_and_in_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["--out", str(tmp_path / "history.png")]) == 0
    found = read(KEPT.glob("*.json"))
    assert [point.time for point in found] == sorted(point.time for point in found)
    assert capsys.readouterr().out == f"{table(found)}\n"
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    ratios, rates = figure(found).axes
    drawn = [value for line in ratios.get_lines()[1:] for value in line.get_ydata()]  # the first one is at 1
    assert sorted(drawn) == sorted(point.ratio for point in found)
    assert sum(len(line.get_ydata()) for line in rates.get_lines()) == 2 * sum(point.unit == RATE for point in found)


def test_without_rates_there_is_no_second_panel():
    pytest.importorskip("matplotlib")
    assert len(figure([point for point in points(CHECK) if point.unit == MS]).axes) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "file: expected results of benchmarks.gpu_check"),
        pytest.param("[" * 100_000, "file: expected results of benchmarks.gpu_check", id="too deep"),
        ("[]", "file: expected results of benchmarks.gpu_check"),
        ('{"environment": {}}', "file: expected results of benchmarks.gpu_check"),
        (json.dumps({"environment": CHECK["environment"]}), "no times of fused and of eager in file"),
        (None, "file: cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("file").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["file"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"python -m benchmarks.history: error: {message}\n"
