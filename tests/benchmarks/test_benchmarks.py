"""The benchmarks' own claims: what is counted, what is collected, what the report holds. No time is asserted."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import common, compare, roofline
from resnet import FusedResidual, Residual
from resnet.kernels import tuning
from tests.conftest import ROOT

TINY = ["--pairs", "2", "--batch-size", "4", "--resize", "28", "--rivals", "eager", "--device", "cpu"]
CPU = torch.device("cpu")


def run(*arguments):
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}  # a user's own would change what pytest prints
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


@pytest.mark.parametrize(("implementation", "activations"), [("eager", 4), ("fused", 3)])
def test_an_identity_block_keeps_so_many_activations_besides_its_input(implementation, activations):
    row = common.Row(implementation, CPU)
    with row.scope():
        block, forward = common.residual(row, 16, 16, stride=1)
        x = common.activations(row, 4, 16, 8, 8)
        saved = common.block_saved_bytes(row, block, forward, x)
    size = x.numel() * x.element_size()
    assert activations * size <= saved <= activations * size + 16 * 16 * 4  # and some vectors of 16 channels


# ---- rows -----------------------------------------------------------------------------------------------------


def test_rows_start_from_the_same_weights():
    fused, eager = (common.residual(common.Row(i, CPU), 3, 6, stride=2)[0] for i in ("fused", "eager"))
    assert type(fused) is FusedResidual
    assert type(eager) is Residual
    torch.testing.assert_close(dict(fused.state_dict()), dict(eager.state_dict()), rtol=0, atol=0)


def test_a_cpu_has_no_triton_row():
    rows = common.rows(CPU)
    assert {row.implementation for row in rows} == {"eager", "compile", "fused"}
    assert all(row.backend == "torch" for row in rows)


# ---- the suites -----------------------------------------------------------------------------------------------


def test_every_suite_is_collected():
    result = run("pytest", "benchmarks", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    for suite in (ROOT / "benchmarks").glob("bench_*.py"):
        for implementation in ("eager", "compile", "fused"):
            lines = [line for line in result.stdout.splitlines() if f"{suite.name}::" in line]
            assert any(implementation in line for line in lines), f"{suite.name} has no row {implementation}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there are Triton rows")
def test_the_report_says_why_there_are_no_triton_rows():
    result = run("pytest", "benchmarks", "--collect-only")
    assert "no Triton rows" in result.stdout


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
        assert r["speedup"] == pytest.approx(1 / r["ratio_median"])
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
        (["--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(arguments, names, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main([*arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert names in error
    assert error.count("\n") == 1
    assert error.startswith("python -m benchmarks.compare: error: ")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(SystemExit):
        compare.main(["--plot", "out.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- benchmarks.roofline --------------------------------------------------------------------------------------


def test_a_launch_is_bound_by_what_takes_most_clocks():
    device = tuning.Target(0, processors=10, products=1024, clock=2.0, bandwidth=1000)
    count = roofline.Counted("", unique=5000, requested=8000, instructions=1600, products=100, wavefronts=300)
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
