"""What the tests of the commands find, wherever they are run."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored():
    """A shell's background job ignores it, and a run would then ignore it too."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """What a command writes without a folder of its own goes there."""
    monkeypatch.chdir(tmp_path)
