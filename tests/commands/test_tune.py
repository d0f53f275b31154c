"""resnet.tune: what it leaves in the file of choices, what it prints, its errors. A CPU gets a clock, as a GPU has."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import resnet
from resnet import FusedResidual, Residual
from resnet.kernels.tuning import memory, timing
from resnet.tune import main
from tests.conftest import DEVICE
from tests.helpers.runs import as_typed

NET = f"{__name__}:net"
SMALL = ["--device", DEVICE.type, "--batch", "2", "--size", "4", "--channels", "32"]


def net() -> nn.Module:
    return FusedResidual(32, 32)


def eager_net() -> nn.Module:
    return Residual(32, 32)


def no_net() -> int:
    return 18


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture(autouse=True)
def own_choices(monkeypatch, tmp_path):
    """Choices of the test, none of the user's."""
    choices = memory.Choices(tmp_path / "own" / "choices.json")
    for name, value in ("process_choices", choices), ("choose", choices.choose), ("remembered", choices.remembered):
        monkeypatch.setattr(memory, name, value)
    return choices


@pytest.fixture
def timed(monkeypatch):
    """Here, too, kernels are launched and choices timed; on a CPU by a clock for which all are alike."""
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda runs, device: [1.0] * len(runs))
    with resnet.backend("triton"), resnet.convolution("triton"):  # what "auto" picks differs by device
        yield


def keys(path) -> set[str]:
    """The operations whose tiles were chosen."""
    [section] = json.loads(path.read_text()).values()
    return {key.split("'")[1] for key in section}


def test_a_step_and_an_evaluation_leave_their_choices_in_the_user_s_file(own_choices, timed, capsys):
    assert main([NET, *SMALL]) == 0
    assert keys(own_choices.path) == {"forward", "grad_input", "grad_weight"}
    out, err = capsys.readouterr()
    assert out == f"choices are in {own_choices.path}\n"
    compilation, step, evaluation = (line for line in err.splitlines() if not line.startswith("so far"))
    assert compilation.startswith("compilation: 0 choices timed, ")
    assert re.match(r"training step: [1-9]\d* choices timed, \d+ kernels compiled, \d+ s$", step)
    assert evaluation.startswith("evaluation: ")


def test_another_file_is_written_in_its_place_and_what_it_holds_is_not_timed_again(
    own_choices, timed, tmp_path, capsys
):
    user, other = own_choices.path, tmp_path / "other.json"
    for _ in range(2):
        assert main([NET, *SMALL, "--eval", "--choices", str(other)]) == 0
    assert keys(other) == {"forward"} and not user.exists()
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation: "))
    assert not first.startswith("evaluation: 0 choices") and second.startswith("evaluation: 0 choices")


def test_a_net_of_eager_blocks_is_fused(own_choices, timed):
    assert main([f"{__name__}:eager_net", *SMALL, "--eval"]) == 0
    assert keys(own_choices.path) == {"forward"}


def test_the_training_step_alone(own_choices, timed, capsys):
    assert main([NET, *SMALL, "--train"]) == 0
    assert "evaluation" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([NET, "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["resnet19"], "MODEL: expected resnet18, resnet34, resnet50 or module:callable, got resnet19"),
        ([f"{__name__}:nothing"], "has no attribute 'nothing'"),
        ([f"{__name__}:no_net"], "MODEL: expected a callable that gives an nn.Module, got int"),
        (
            [f"{__name__}:Pair"],
            "MODEL: expected a net that gives a tensor, got tuple",
        ),
        ([NET, "--choices", "/nowhere/choices.json"], "--choices: expected a path in an existing folder"),
        ([NET, "--choices", "/dev/null"], "--choices: expected a regular file, which is read too, got the character"),
        ([NET, "--batch", "9223372036854775808"], "--batch: expected at most 2**63 - 1"),
        ([NET, "--dtype", "int8"], "--dtype"),
        ([], "MODEL"),
    ],
    ids=as_typed,
)
def test_what_cannot_be_used_is_an_error_of_one_line(arguments, words, timed, capsys):
    check_error([*SMALL, *arguments], words, capsys)


def check_error(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_without_a_gpu_likewise(device, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_error(["resnet18", "--device", device], "--device: expected", capsys)


def test_where_nothing_is_timed_or_kept_likewise(own_choices, timed, monkeypatch, capsys):
    monkeypatch.setattr(own_choices, "path", None)
    check_error([NET, *SMALL], "--choices: expected a file, since FUSED_RESIDUAL_CACHE is off", capsys)
    monkeypatch.setattr(memory, "mode", "off")
    check_error([NET, *SMALL], "FUSED_RESIDUAL_TUNING: expected on or full", capsys)


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "usage: python -m resnet.tune" in capsys.readouterr().out
