"""The suite catches known faults: each is planted in a copy of the sources, in which the named tests then fail.

To add a fault is to add a row: the file, the text to replace, what by, the tests that have to catch it, and what they
say. That they pass on the untouched sources is what the rest of the suite shows.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BATCH_NORM = "tests/test_batch_norm_kernels.py::"
EMULATED = "tests/emulated/"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the faults are looked for in interpreted kernels")


@dataclass(frozen=True)
class Fault:
    file: str
    old: str  # every occurrence of it is replaced
    new: str
    test: str
    says: str  # in the report of the failure, as a regular expression
    only: str = ""  # of the test's parameters, pytest's -k


FAULTS = {
    "a store without its mask": Fault(
        "kernels/batch_norm.py",
        "tl.store(out + offsets, z, mask=mask)",
        "tl.store(out + offsets, z)",
        BATCH_NORM + "test_every_form_of_the_shortcut_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, program .* writes .* outside its tensor",
        "float32",
    ),
    "a load without its mask": Fault(
        "kernels/batch_norm.py",
        "z = affine(tl.load(x + offsets, mask=mask)",
        "z = affine(tl.load(x + offsets)",
        BATCH_NORM + "test_every_form_of_the_shortcut_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, program .* reads .* outside its tensor",
        "float32",
    ),
    "a wrong stride": Fault(
        "kernels/batch_norm.py",
        "offsets = rows[:, None] * C + cols[None, :]",
        "offsets = rows[:, None] * BLOCK_C + cols[None, :]",
        BATCH_NORM + "test_every_form_of_the_shortcut_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, program .* outside its tensor",
        "float32",
    ),
    "the ragged last tile of a reduction left out": Fault(
        "kernels/batch_norm.py",
        "range(tl.cdiv(valid, BLOCK_M))",
        "range(valid // BLOCK_M)",
        BATCH_NORM + "test_backward_reduce_without_relu_is_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "float32",
    ),
    "a column tile left out": Fault(
        "kernels/batch_norm.py",
        "triton.cdiv(C, t.BLOCK_C)",
        "C // t.BLOCK_C",
        BATCH_NORM + "test_apply_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, .* elements stay unwritten",
        "two and column",
    ),
    "a float16 accumulator": Fault(
        "kernels/batch_norm.py",
        "sum_g += g\n",
        "sum_g = (sum_g + g).to(tl.float16).to(ACC)\n",
        BATCH_NORM + "test_backward_reduce_without_relu_is_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "float16",
    ),
    "rows beyond the end counted into the variance": Fault(
        "kernels/batch_norm.py",
        "tl.where(mask, value - mean, 0.0)",
        "value - mean",
        BATCH_NORM + "test_statistics_and_running_statistics_are_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "ragged",
    ),
    "a ReLU mask that stops NaN": Fault(
        "kernels/pointwise.py",
        "return is_not_positive(z) == 0",
        "return z > 0",
        BATCH_NORM + "test_a_nan_output_passes_its_gradient_and_minus_infinity_stops_it",
        "assert",
        "float32",
    ),
    "a 32-bit row offset": Fault(
        "kernels/batch_norm.py",
        "row0 = tl.program_id(0).to(tl.int64) * BLOCK_M",
        "row0 = tl.program_id(0) * BLOCK_M",
        "tests/test_large_offsets.py",
        "MemoryFault: apply_kernel, program .* outside its tensor",
        "large_tensor and not reduce and apply and not pool and not backward",
    ),
    "a pooling window one pixel to the right": Fault(
        "kernels/batch_norm_max_pool.py",
        "w = 2 * q - 1 + s",
        "w = 2 * q + s",
        "tests/test_batch_norm_max_pool_kernels.py::test_out_and_tap_equal_pytorchs_ties_included",
        "assert",
        "float32",
    ),
    "statistics of the first tile only": Fault(
        "kernels/batch_norm.py",
        "        x += BLOCK_M * C\n",
        "",
        BATCH_NORM + "test_statistics_and_running_statistics_are_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "several",
    ),
    "a ReLU that is a plain maximum": Fault(
        "kernels/pointwise.py",
        "return tl.where(is_not_positive(z), 0.0, z)",
        "return tl.maximum(z, 0.0)",
        EMULATED + "test_batch_norm.py::test_relu_keeps_nan_and_a_nan_output_passes_its_gradient",
        "AssertionError",
    ),
}


def copy_of_the_sources(to: Path) -> Path:
    for name in ("kernels", "resnet", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "fashion_mnist_sample"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def run(sources: Path, test: str, only: str) -> subprocess.CompletedProcess[str]:
    """The tests on these sources, in a process of their own up to the first failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # tests/conftest.py chooses
    environment["TRITON_CACHE_DIR"] = str(sources / "cache")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", test]
    if only:
        command += ["-k", only]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, timeout=300)


def skip_where_it_cannot_be_seen(fault: Fault) -> None:
    if fault.test.startswith(EMULATED) and importlib.util.find_spec("ptxsim") is None:
        pytest.skip("seen in compiled code only, and the optional module ptxsim, which executes it, is not installed")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(tmp_path, name):
    fault = FAULTS[name]
    skip_where_it_cannot_be_seen(fault)
    sources = copy_of_the_sources(tmp_path)
    text = (sources / fault.file).read_text()
    assert fault.old in text, f"{fault.file} has no {fault.old!r} any more: bring the row up to date"
    (sources / fault.file).write_text(text.replace(fault.old, fault.new))
    result = run(sources, fault.test, fault.only)
    assert result.returncode == 1, f"not caught:\n{result.stdout}{result.stderr}"
    assert re.search(fault.says, result.stdout), result.stdout
