"""benchmarks.models: its table, its JSON, its errors. No time is asserted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import main
from benchmarks.turns import Turns
from benchmarks.verdict import busy_note
from resnet import BasicBlock, ResNet
from tests.helpers.runs import as_typed

SMALL = ["--batch-size", "4", "--size", "16", "--pairs", "2", "--device", "cpu"]


def net() -> nn.Module:
    return ResNet(BasicBlock, depths=(1, 1), widths=(8, 16), num_classes=3)


class Configured(nn.Module):
    """As a class of transformers: made from a configuration, and its logits are a part of what it gives."""

    config_class = dict

    def __init__(self, configuration: dict):
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(x))


def trained_in_part() -> nn.Module:
    model = net()
    next(model.parameters()).requires_grad_(False)
    return model


def headless() -> nn.Module:
    return nn.Linear(4, 4)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_a_row_and_a_report_say_what_was_fused_how_exact_it_is_and_what_it_keeps(tmp_path, capsys):
    models, report = [f"{__name__}:net", f"{__name__}:Configured"], tmp_path / "models.json"
    state = torch.get_rng_state()
    assert main([*models, *SMALL, "--json", str(report)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| tests.")]
    assert [(row[0].removeprefix("| "), row[1], row[2]) for row in rows] == [(name, "3", "0, 0") for name in models]

    found = json.loads(report.read_text())
    assert (found["batch_size"], found["size"], found["pairs"], found["dtype"]) == (4, 16, 2, "float32")
    assert found["interrupted"] is False
    first, second = found["results"]
    assert (first["errors"], first["saved_bytes"]) == (second["errors"], second["saved_bytes"])
    for error in first["errors"].values():
        assert 0 < error["logits"] < 1e-4 and 0 < error["gradients"] < 1e-2
    assert first["saved_bytes"]["fused"] < first["saved_bytes"]["eager"]
    assert len(first["training"]) == len(first["inference"]) == 2
    assert 0 <= first["waited_for_cpu"] <= 1


def test_a_net_may_be_trained_in_part(capsys):
    assert main([f"{__name__}:trained_in_part", *SMALL]) == 0
    assert "trained_in_part | 3 | 0, 0 |" in capsys.readouterr().out


def test_a_busy_machine_is_said_as_benchmarks_compare_says_it(monkeypatch, capsys):
    monkeypatch.setattr(Turns, "waited_share", 0.3)
    assert main([f"{__name__}:net", *SMALL]) == 0
    assert capsys.readouterr().out.endswith(f"\n{busy_note(0.3)}\n")


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("last", "status"), [("interrupted", 130), ("headless", 2)])
def test_the_models_before_one_that_does_not_end_are_in_the_report(tmp_path, last, status):
    report = tmp_path / "models.json"
    try:
        ended = main([f"{__name__}:net", f"{__name__}:{last}", *SMALL, "--json", str(report)])
    except SystemExit as stopped:
        ended = stopped.code
    assert ended == status
    found = json.loads(report.read_text())
    assert [result["model"] for result in found["results"]] == [f"{__name__}:net"]
    assert found["interrupted"] is True


def test_standard_output_gets_one_report_of_all_models(capfd):
    assert main([f"{__name__}:net", f"{__name__}:net", *SMALL, "--json", "/dev/stdout"]) == 0
    _, start, report = capfd.readouterr().out.partition("\n{\n")
    found, _ = json.JSONDecoder().raw_decode(start + report, 1)
    assert len(found["results"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet18"], "MODEL: expected module:callable, got resnet18"),
        ([f"{__name__}:nothing"], "has no attribute 'nothing'"),
        (["torch.nn:Conv2d"], "MODEL: expected a callable that needs no arguments, got torch.nn:Conv2d"),
        ([f"{__name__}:headless"], "MODEL: expected a net with a convolution, got Linear"),
        ([f"{__name__}:Pair"], "MODEL: expected a net that gives a tensor, got tuple"),
        ([f"{__name__}:net", "--batch-size", "1", "--size", "2"], "MODEL: expected one that trains on 1 images of 2x2"),
        ([f"{__name__}:net", "--size", "0"], "--size: expected at least 1, got 0"),
        ([f"{__name__}:net", "--pairs", "0"], "--pairs: expected at least 1, got 0"),
        ([f"{__name__}:net", "--json", "no/such/folder/out.json"], "--json: expected a path in an existing folder"),
    ],
    ids=as_typed,
)
def test_what_cannot_be_used_is_an_error_of_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks.models: error: ") and words in line


def test_a_wrong_name_is_refused_before_another_model_is_measured(capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, f"{__name__}:net", f"{__name__}:nothing"])
    assert capsys.readouterr().out == ""
