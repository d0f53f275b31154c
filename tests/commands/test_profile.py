"""--profile: a trace of steps after the first ones, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resnet.commands import ConfigError
from resnet.training import TrainConfig, UnfinishedError, loop, train
from tests.helpers.runs import small_runs  # noqa: F401


def config(**changes) -> TrainConfig:
    settings = {"impl": "eager", "device": "cpu", "epochs": 1, "batch_size": 2, "resize": 33, "lr": 0.01}
    return TrainConfig(**{**settings, "limit_train": 16, "limit_test": 2, "profile": "trace.json", **changes})


def test_the_trace_has_five_steps_and_changes_nothing():
    result = train(config())
    names = [event.get("name") for event in json.loads(Path("trace.json").read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names if name) == 5
    assert "aten::conv2d" in names and [path.name for path in Path().iterdir()] == ["trace.json"]
    assert result.loss == train(config(profile=None)).loss


def test_a_run_that_ends_earlier_leaves_no_trace_and_no_profiler(monkeypatch):
    monkeypatch.setattr(loop, "_LOOK_SECONDS", 0.0)  # however fast the machine, the losses are looked at in time
    with pytest.raises(ArithmeticError):
        train(config(lr=1e30))
    assert not Path("trace.json").exists() and not torch.autograd.profiler._is_profiler_enabled


def test_too_few_steps_are_one_line():
    with pytest.raises(ConfigError, match=r"^--profile: expected 8 steps or more in an epoch, of which it .*, got 7$"):
        train(config(limit_train=14))
    with pytest.raises(ConfigError, match=r"^--profile: expected a path in an existing folder, got nowhere/a"):
        config(profile="nowhere/a")


def test_a_trace_that_cannot_be_written_ends_the_run_and_keeps_the_weights():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UnfinishedError, match=r"^/dev/full: cannot be written .*; the weights are in net.pt$"):
        train(config(profile="/dev/full", save="net.pt"))
