"""A trace of some training steps, which chrome://tracing and https://ui.perfetto.dev show."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from resnet.commands import write_output

SKIPPED, RECORDED = 3, 5  # steps of a run: the first ones may still allocate what later ones have


class Trace:
    """Records some steps of a run into a file that a user has named; nothing where the path is None."""

    def __init__(self, path: str | None, device: torch.device):
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.path = path
        self._profile = None if path is None else profile(activities=activities)
        self._steps = 0

    def step(self) -> None:
        """To be called after each step of a run; OutputError where the trace cannot be written."""
        self._steps += 1
        if self._profile is None:
            return
        if self._steps == SKIPPED:
            self._profile.start()
        elif self._steps == SKIPPED + RECORDED:
            recorded, self._profile = self._profile, None
            recorded.stop()
            write_output(self.path, _chrome_trace(recorded))

    def close(self) -> None:
        """Leaves no profiler on after a run that ended before the last step that is recorded."""
        if self._profile is not None and self._steps >= SKIPPED:
            self._profile.stop()
            self._profile = None


def _chrome_trace(recorded: profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        return path.read_bytes()
