"""Short runs of the training command."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch

from resnet.commands import find_device
from resnet.data import load
from resnet.training import TrainConfig, interrupts, loop, preparation
from tests.conftest import ROOT

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
load_once = functools.cache(load)  # half a second, for half a hundred runs


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """The whole set where the machine has it, or else the sample."""
    monkeypatch.setattr(preparation, "load", load_once)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the commands


def begun(config: TrainConfig) -> loop._Run:
    """A run before its first step."""
    device = find_device(config.device)
    batches, evaluation = preparation.batches_of(config, load_once(None), device)
    graph = preparation.wants_graph(config, device)
    return loop._Run(config, device, graph, batches, evaluation, interrupts.Interrupt())


def options(config: TrainConfig) -> list[str]:
    """The command line that means `config`."""
    given = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(config).items() if v not in (None, False)}
    return [word for k, v in given.items() for word in ([k] if v is True else [k, str(v)])]


def command(
    config: TrainConfig, *more: str, launcher=("-m",), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *launcher, "resnet.train", *options(config), *more],
        env={**os.environ, "PYTHONPATH": path},
        stdout=stdout,
        stderr=stderr,
        text=True,
        **kwargs,
    )


def as_typed(value: list[str] | str) -> str:
    """A test's id for the arguments of a command, and for the words of its error."""
    return " ".join(value) if isinstance(value, list) else value
