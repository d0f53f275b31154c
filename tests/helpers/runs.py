"""Short runs of the training command."""

from __future__ import annotations

import functools

import pytest

from resnet import training
from resnet.data import load

load_once = functools.cache(load)  # half a second, for half a hundred runs


@pytest.fixture(autouse=True)
def small_runs(one_thread, monkeypatch, tmp_path):
    """The whole set where the machine has it, or else the sample; files of a run go into an empty folder."""
    monkeypatch.setattr(training, "load", load_once)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the commands
