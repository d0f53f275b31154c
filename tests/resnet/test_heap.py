"""In the training command's process a tensor gets the memory of the one before it. Backward leaves the heap whole."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# The command, and then the fewest pages that the system hands out for a tensor of 256 MB after one that is freed.
PROGRAM = """
import resource, runpy, sys, torch
sys.argv = ["resnet.train", "--help"]
try:
    runpy.run_module("resnet.train", run_name="__main__")
except SystemExit:
    pass
pages = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(pages[1:]))
"""

OWN_SETTINGS = [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("settings", [{}, *OWN_SETTINGS], ids=lambda settings: " ".join(settings) or "none")
def test_the_training_command_keeps_freed_memory_where_the_environment_does_not_say_what_to_do(settings):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    pages = int(done.stdout.splitlines()[-1])
    assert pages < 32 if not settings else pages > 64, "a page has 2 MB at most"


BACKWARD_OF_FEW_CHANNELS = """
import torch
from resnet import FusedResidual
for C in (1, 4, 8, 12, 15):
    block = FusedResidual(C, 2 * C, use_1x1conv=True, strides=2)
    x = torch.randn(4, C, 112, 112, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = block(x).square().sum()
        out.backward()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_strided_shortcut_of_few_channels_leaves_the_heap_whole():
    """The process dies where a block of memory was written past its end, as oneDNN does: see `overruns`."""
    checks = {"MALLOC_CHECK_": "3", "LD_PRELOAD": "libc_malloc_debug.so.0"}
    program = [sys.executable, "-c", BACKWARD_OF_FEW_CHANNELS]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | checks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
