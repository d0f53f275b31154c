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
