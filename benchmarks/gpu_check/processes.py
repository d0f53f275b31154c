"""A command with a log, in a session of its own: it is ended as a whole, with what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.gpu_check.environment import ROOT

GRACE = 20.0  # seconds: pytest-xdist waits for its workers for 10, and pytest prints its failures after that


@contextmanager
def running(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """The command at work, in the repository's root, with these environment variables alone; ended on leaving."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # of a session that has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C for the command, not for what it has started, and GRACE seconds to say what it had found."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)


def status(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status, None where the command has not ended in so many seconds."""
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
