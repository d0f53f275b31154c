"""NVIDIA's compute-sanitizer over a training step and an inference: accesses, unwritten memory, races, barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gpu_check import processes
from benchmarks.gpu_check.scale import Scale

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
_SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)
_FINDING = re.compile(r"^=+ ((?:Invalid|Uninitialized|Error|Warning|Barrier|Race|Program hit).*)$", re.MULTILINE)
# Each tensor is an allocation of its own, so that an access beside one is beside all.
_VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def checks(scale: Scale, folder: Path, seconds: float) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """(tool, what waits for its result). All of them run from the first one on, for so long, with a log in `folder`.

    Where compute-sanitizer is not installed, or there is no GPU for it, the sample runs by itself.
    """
    sample = [sys.executable, "-m", "benchmarks.gpu_check.sample"]
    if not scale.on_gpu:
        commands = {"sample alone": [*sample, "--rehearse"]}
    elif (program := shutil.which("compute-sanitizer")) is None:
        commands = {"sample alone (no compute-sanitizer on the path)": sample}
    else:
        commands = {tool: [program, "--tool", tool, "--error-exitcode", "9", *sample] for tool in TOOLS}
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            log = folder / f"sanitizer-{name.partition(' ')[0]}.log"
            started[name] = stack.enter_context(processes.running(command, log, os.environ | _VARIABLES)), log
        for name, (process, log) in started.items():
            yield name, lambda process=process, log=log: _result(process, log, end - time.monotonic())


def _result(process: subprocess.Popen, log: Path, seconds: float) -> dict[str, object]:
    return found(processes.status(process, seconds), log.read_text())


def found(status: int | None, text: str) -> dict[str, object]:
    """What a log says: its summary, and the kinds of what was found; without a status, before the time ended."""
    lines = text.splitlines()
    summary = _SUMMARY.findall(text) or lines[-1:] or ["no output"]
    kinds = list(dict.fromkeys(_FINDING.findall(text)))[:10]
    if status is None:
        end = "; ".join(["not ended in time", *kinds])
        return {"status": None, "failed": len(kinds), "end": end, "found": kinds}
    return {"status": status, "end": summary[-1], "found": kinds}
