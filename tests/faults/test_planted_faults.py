"""The suite catches known faults: each is planted in a copy of the sources, in which the named tests then fail.

To add a fault, add a row: the file, the text to replace, its replacement, the test that has to catch it, and what the
failure says. The rest of the suite shows that these tests pass on the untouched sources.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

BATCH_NORM = "tests/kernels/test_batch_norm.py::"
FORWARD = "tests/kernels/test_conv_forward.py::"
GRAD_INPUT = "tests/kernels/test_conv_grad_input.py::"
GRAD_WEIGHT = "tests/kernels/test_conv_grad_weight.py::"
SQUEEZE_EXCITE = "tests/kernels/test_squeeze_excite.py::"
EMULATED = "tests/emulated/"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the faults are looked for in interpreted kernels")


@dataclass(frozen=True)
class Fault:
    file: str
    old: str  # every occurrence is replaced
    new: str
    test: str
    says: str  # a regular expression found in the report of the failure
    only: str = ""  # pytest's -k, which selects some of the test's parameters


FAULTS = {
    "a store without its mask": Fault(
        "kernels/batch_norm_add_relu.py",
        "tl.store(out + offsets, z, mask=mask)",
        "tl.store(out + offsets, z)",
        BATCH_NORM + "test_every_form_of_the_shortcut_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, program .* writes .* outside its tensor",
        "float32",
    ),
    "a load without its mask": Fault(
        "kernels/batch_norm_add_relu.py",
        "z = affine(tl.load(x + offsets, mask=mask)",
        "z = affine(tl.load(x + offsets)",
        BATCH_NORM + "test_every_form_of_the_shortcut_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, program .* reads .* outside its tensor",
        "float32",
    ),
    "a wrong stride": Fault(
        "kernels/batch_norm_add_relu.py",
        "offsets = rows[:, None] * C + cols[None, :]",
        "offsets = rows[:, None] * BLOCK_C + cols[None, :]",
        BATCH_NORM + "test_every_form_of_the_shortcut_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, program .* outside its tensor",
        "float32",
    ),
    "the ragged last tile of a reduction left out": Fault(
        "kernels/batch_norm_backward_reduce.py",
        "range(tl.cdiv(valid, BLOCK_M))",
        "range(valid // BLOCK_M)",
        BATCH_NORM + "test_backward_reduce_without_relu_is_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "float32",
    ),
    "a column tile left out": Fault(
        "kernels/batch_norm_add_relu.py",
        "triton.cdiv(C, t.BLOCK_C)",
        "C // t.BLOCK_C",
        BATCH_NORM + "test_apply_is_as_exact_as_eager",
        "MemoryFault: apply_kernel, .* elements stay unwritten",
        "two and column",
    ),
    "a float16 accumulator": Fault(
        "kernels/batch_norm_backward_reduce.py",
        "sum_g += g\n",
        "sum_g = (sum_g + g).to(tl.float16).to(ACC)\n",
        BATCH_NORM + "test_backward_reduce_without_relu_is_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "float16",
    ),
    "rows beyond the end counted into the variance": Fault(
        "kernels/batch_norm_statistics.py",
        "tl.where(mask, value - mean, 0.0)",
        "value - mean",
        BATCH_NORM + "test_statistics_and_running_statistics_are_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "ragged",
    ),
    "a ReLU mask that stops NaN": Fault(
        "kernels/device/pointwise.py",
        "return is_not_positive(z) == 0",
        "return z > 0",
        BATCH_NORM + "test_a_nan_output_passes_its_gradient_and_minus_infinity_stops_it",
        "assert",
        "float32",
    ),
    "a 32-bit row offset": Fault(
        "kernels/batch_norm_add_relu.py",
        "row0 = tl.program_id(0).to(tl.int64) * BLOCK_M",
        "row0 = tl.program_id(0) * BLOCK_M",
        "tests/kernels/test_large_offsets.py",
        "MemoryFault: apply_kernel, program .* outside its tensor",
        "large_tensor and not reduce and apply and not pool and not backward",
    ),
    "a pooling window one pixel to the right": Fault(
        "kernels/batch_norm_max_pool.py",
        "w = 2 * q - 1 + s",
        "w = 2 * q + s",
        "tests/kernels/test_batch_norm_max_pool.py::test_out_and_tap_equal_pytorchs_ties_included",
        "assert",
        "float32",
    ),
    "a mean over tiles with rows beyond the image": Fault(
        "kernels/batch_norm_squeeze.py",
        "sum_h += tl.where(counted, h, 0.0)",
        "sum_h += h",
        SQUEEZE_EXCITE + "test_pooled_and_what_backward_needs_of_it_are_as_exact_as_eager",
        "AssertionError: pooled: error .* against float64, eager's",
        "float32",
    ),
    "every image gated as the first": Fault(
        "kernels/batch_norm_excite.py",
        "tl.load(gate + n * C + cols, mask=live)",
        "tl.load(gate + cols, mask=live)",
        SQUEEZE_EXCITE + "test_out_is_as_exact_as_eager",
        "AssertionError: out: error .* against float64, eager's",
        "float32",
    ),
    "a gate's gradient of what the inner ReLU stops": Fault(
        "kernels/batch_norm_excite_backward.py",
        "relu_of(h) if INNER else h",
        "h",
        SQUEEZE_EXCITE + "test_the_gates_gradient_and_the_sums_of_an_image_are_as_exact_as_eager",
        "AssertionError: dgate: error .* against float64, eager's",
        "float32",
    ),
    "a gate's gradient that leaves out what the inner ReLU stops": Fault(
        "kernels/batch_norm_excite_backward.py",
        "sum_gh = tl.fma(g, relu_of(h) if INNER else h, sum_gh)",
        "sum_gh = tl.fma(tl.where(relu_passes(h), g, 0.0), h, sum_gh)",
        SQUEEZE_EXCITE + "test_an_infinite_gradient_at_a_stopped_pixel_reaches_the_gate_and_not_the_norm",
        "assert",
    ),
    "the gradient of pooled shared by no pixels": Fault(
        "kernels/batch_norm_squeeze_backward.py",
        ".to(ACC) * share)[None, :]",
        ".to(ACC))[None, :]",
        SQUEEZE_EXCITE + "test_sums_and_the_gradient_of_the_norms_input_are_as_exact_as_eager",
        "AssertionError: dy: error .* against float64, eager's",
        "float32",
    ),
    "a 32-bit offset of an image": Fault(
        "kernels/batch_norm_excite_backward.py",
        "n = (tl.program_id(0) // T).to(tl.int64)",
        "n = tl.program_id(0) // T",
        "tests/kernels/test_large_offsets.py",
        "MemoryFault: excite_backward_kernel, program .* outside its tensor",
        "large_tensor and excite and backward",
    ),
    "statistics of the first tile only": Fault(
        "kernels/batch_norm_statistics.py",
        "        x += BLOCK_M * C\n",
        "",
        BATCH_NORM + "test_statistics_and_running_statistics_are_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "several",
    ),
    "padding before the prologue": Fault(
        "kernels/device/prologue.py",
        'bound = tl.where(inside, float("inf"), 0.0)',
        'bound = tl.where(inside, float("inf"), float("inf"))',
        FORWARD + "test_padding_is_zero_after_the_prologue",
        "assert",
    ),
    "a convolution's output without its mask": Fault(
        "kernels/conv_forward.py",
        "tl.store(y + out, value, mask=mask)",
        "tl.store(y + out, value)",
        FORWARD + "test_the_same_bits_twice",
        "MemoryFault: conv_forward_kernel, program .* writes",
    ),
    "a convolution's input without its mask": Fault(
        "kernels/conv_forward.py",
        "(tap // S * W + tap % S) * (DILATION * C) + c0), mask=mask, other=0.0)",
        "(tap // S * W + tap % S) * (DILATION * C) + c0))",
        FORWARD + "test_the_same_bits_twice",
        "MemoryFault: conv_forward_kernel, program .* reads .* outside its tensor",
    ),
    "a convolution of the wrong stride": Fault(
        "kernels/conv_forward.py",
        "h0 = p * STRIDE - PADDING",
        "h0 = p - PADDING",
        FORWARD + "test_as_exact_as_eager_with_any_two_options",
        "AssertionError: .*against float64, eager's",
    ),
    "a dilated window's last tap that lies in the image left out": Fault(
        "kernels/device/implicit_gemm.py",
        "(tl.maximum(pixels, 0) + DILATION - 1) // DILATION",
        "tl.maximum(pixels, 0) // DILATION",
        FORWARD + "test_as_exact_as_eager_with_any_two_options",
        "AssertionError: .*against float64, eager's",
    ),
    "the last channels of a reduction left out": Fault(
        "kernels/conv_forward.py",
        "CHANNEL_STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K",
        "CHANNEL_STEPS: tl.constexpr = C // BLOCK_K",
        FORWARD + "test_as_exact_as_eager_with_any_two_options",
        "AssertionError: .*against float64, eager's",
        "100",
    ),
    "a float16 accumulator of products": Fault(
        "kernels/device/implicit_gemm.py",
        "return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)",
        "return (acc + tl.dot(a, b, input_precision=PRECISION)).to(tl.float16).to(acc.dtype)",
        FORWARD + "test_a_long_reduction_is_accumulated_in_float32",
        "assert",
    ),
    "operands left to tensor cores that cut their last bits": Fault(
        "kernels/device/implicit_gemm.py",
        'if PRECISION == "tf32":',
        'if PRECISION == "none":',
        EMULATED + "test_conv_forward.py::test_ragged_tiles_are_as_exact_as_eager",
        "AssertionError: .*against float64, eager's",
        "TensorFloat and sm_90",
    ),
    "the shortcut's gradient stored without its mask": Fault(
        "kernels/batch_norm_backward_reduce.py",
        "            tl.store(g_stored + offsets, g, mask=mask)",
        "            tl.store(g_stored + offsets, tl.load(dout + offsets, mask=mask), mask=mask)",
        BATCH_NORM + "test_the_gradient_of_the_shortcut_is_dout_behind_the_mask",
        "AssertionError: Tensor-likes are not equal",
        "float32",
    ),
    "a parity class that takes its neighbour's taps": Fault(
        "kernels/conv_grad_input.py",
        "r0 = (ph + PADDING) % STRIDE",
        "r0 = ph % STRIDE",
        GRAD_INPUT + "test_a_kernel_need_not_be_square",
        "AssertionError: Tensor-likes are not close",
    ),
    "sums of half of the rows": Fault(
        "kernels/device/reductions.py",
        "x = a + b",
        "x = a",
        GRAD_INPUT + "test_sums_are_of_the_gradient_as_stored_and_reach_the_parameters",
        "AssertionError: Tensor-likes are not close",
    ),
    "a block's end that lets every gradient pass": Fault(
        "kernels/conv_grad_input.py",
        "passes = relu_passes(tl.load(a + image + offsets, mask=mask, other=0.0))\n        value",
        "passes = mask\n        value",
        GRAD_INPUT + "test_a_block_s_end_is_the_two_launches_that_it_replaces",
        "AssertionError: Tensor-likes are not equal",
        "identity and float32",
    ),
    "a block's end that lets pixels beyond the last one pass": Fault(
        "kernels/conv_grad_input.py",
        "passes = relu_passes(tl.load(a + image + offsets, mask=mask, other=0.0))\n        value",
        "passes = relu_passes(tl.load(a + image + offsets, mask=mask, other=1.0))\n        value",
        GRAD_INPUT + "test_beyond_the_last_pixel_a_block_s_end_sums_nothing",
        "assert",
    ),
    "a block's end that masks before the branch is added": Fault(
        "kernels/conv_grad_input.py",
        "            acc += tl.load(g + image + offsets, mask=mask, other=0.0).to(ACC)\n        else",
        "            if a is not None:\n"
        "                passes = relu_passes(tl.load(a + image + offsets, mask=mask, other=0.0))\n"
        "                acc = tl.where(passes, acc, 0.0)\n"
        "                acc += tl.load(g + image + offsets, mask=mask, other=0.0).to(ACC)\n"
        "                a = None\n        else",
        GRAD_INPUT + "test_a_block_s_end_is_the_two_launches_that_it_replaces",
        "AssertionError: Tensor-likes are not equal",
        "identity and float32",
    ),
    "a gradient of some pixels that lands on all": Fault(
        "kernels/conv_grad_input.py",
        "mask=mask & (met >= 0)[:, None], other=0.0",
        "mask=mask, other=0.0",
        GRAD_INPUT + "test_what_meets_some_pixels_is_added_to_these_and_to_no_other",
        "Tensor-likes are not equal|MemoryFault",
    ),
    "sums of a gradient before it is rounded": Fault(
        "kernels/conv_grad_input.py",
        "g = tl.where(passes, acc.to(STORED).to(ACC), 0.0)",
        "g = tl.where(passes, acc, 0.0)",
        GRAD_INPUT + "test_a_block_s_end_sums_the_gradient_as_stored",
        "AssertionError: Tensor-likes are not close",
    ),
    "a shortcut's mean left out of its sum": Fault(
        "kernels/conv_grad_input.py",
        "sum_gz = column_sums(g * (value - tl.load(z_stats + cols[None, :], mask=live[None, :])))",
        "sum_gz = column_sums(g * value)",
        GRAD_INPUT + "test_every_pair_of_options_is_as_exact_as_eager",
        "AssertionError: sum g \\* zhat: error .* against float64, eager's",
        "normed",
    ),
    "a shortcut's sum normed as the other": Fault(
        "kernels/conv_grad_input.py",
        "tl.load(z_stats + C + cols, mask=live)",
        "tl.load(stats + C + cols, mask=live)",
        GRAD_INPUT + "test_every_pair_of_options_is_as_exact_as_eager",
        "AssertionError: sum g \\* zhat: error .* against float64, eager's",
        "normed",
    ),
    "a third sum in the place of the second": Fault(
        "kernels/conv_grad_input.py",
        "partial + 2 * plane",
        "partial + plane",
        GRAD_INPUT + "test_partial_sums_are_those_of_each_row_tile_in_order",
        "MemoryFault: grad_input_kernel, program .* writes again .* of partial",
        "normed",
    ),
    "a 32-bit offset of a plane of partial sums": Fault(
        "kernels/conv_grad_input.py",
        "plane = T.to(tl.int64) * C",
        "plane = T * C",
        "tests/kernels/test_large_offsets.py::test_the_partial_sums_of_a_block_s_end_may_be_2_to_the_31_elements_each",
        "MemoryFault: grad_input_kernel, program .* outside its tensor|assert",
    ),
    "a partial sum at a 32-bit offset": Fault(
        "kernels/conv_grad_input.py",
        "partial += tile.to(tl.int64) * C + cols",
        "partial += tile * C + cols",
        "tests/kernels/test_large_offsets.py::test_the_partial_sums_of_a_block_s_end_may_be_2_to_the_31_elements_each",
        "MemoryFault: grad_input_kernel, program .* outside its tensor",
    ),
    "the third plane of partials left out of a merge": Fault(
        "kernels/batch_norm_backward_reduce.py",
        "tl.load(partial + 2 * plane + offsets, mask=mask, other=0.0)",
        "tl.load(partial + plane + offsets, mask=mask, other=0.0)",
        BATCH_NORM + "test_any_number_of_partial_sums_is_merged",
        "AssertionError: Tensor-likes are not close",
    ),
    "a 32-bit offset of a plane that is merged": Fault(
        "kernels/batch_norm_backward_reduce.py",
        "plane = T.to(tl.int64) * C",
        "plane = T * C",
        "tests/kernels/test_large_offsets.py::test_partials_of_2_to_the_31_elements_each_are_merged",
        "MemoryFault: backward_finalize_kernel, program .* outside its tensor",
    ),
    "the same of moments": Fault(
        "kernels/device/moments.py",
        "plane = tl.cast(T, tl.int64) * C",
        "plane = T * C",
        "tests/kernels/test_large_offsets.py::test_partials_of_2_to_the_31_elements_each_are_merged",
        "MemoryFault: merge_kernel, program .* outside its tensor",
    ),
    "the ragged last step of a split left out": Fault(
        "kernels/conv_grad_weight.py",
        "range(tl.cdiv(left, BLOCK_K))",
        "range(left // BLOCK_K)",
        GRAD_WEIGHT + "test_every_split_and_tile_is_added_once",
        "AssertionError: .*against float64, eager's",
    ),
    "taps of a dilated window that are neighbours": Fault(
        "kernels/conv_grad_weight.py",
        "offsets = (moved - t * DILATION)",
        "offsets = (moved - t)",
        GRAD_WEIGHT + "test_as_exact_as_eager_for_every_shape",
        "MemoryFault: conv_grad_weight_kernel, program .* reads .* outside its tensor",
        "dilation",
    ),
    "padding before a recomputed activation": Fault(
        "kernels/conv_grad_weight.py",
        "value = keep(affine_relu(value, scale, shift), inside)",
        "value = affine_relu(value, scale, shift)",
        GRAD_WEIGHT + "test_padding_is_zero_after_the_activation",
        "AssertionError: Tensor-likes are not close",
    ),
    "a ReLU that is a plain maximum": Fault(
        "kernels/device/pointwise.py",
        "return tl.where(is_not_positive(z), 0.0, z)",
        "return tl.maximum(z, 0.0)",
        EMULATED + "test_batch_norm.py::test_relu_keeps_nan_and_a_nan_output_passes_its_gradient",
        "AssertionError",
    ),
}


def copy_of_the_sources(to: Path) -> Path:
    for name in ("kernels", "resnet", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "fashion_mnist_sample")
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignored, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "pyproject.toml", to / "pyproject.toml")
    return to


# A process of its own runs this with `sources`, `environment` and `arguments`. It must not import the tests beside this
# file in place of those in `sources`.
_PYTEST = """
import os, sys
os.chdir(sources)
for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):  # tests/conftest.py chooses
    os.environ.pop(name, None)
os.environ.update(environment)
output = os.open("output", os.O_WRONLY | os.O_CREAT)
os.dup2(output, 1)
os.dup2(output, 2)
sys.path.insert(0, sources)
sys.argv = ["pytest", *arguments]
import pytest
status = pytest.main(arguments)
sys.stdout.flush()  # which `os._exit` would not do
os._exit(status)
"""
# Imports take half of such a process's time, so a server makes them once for all that interpret. Among them is
# `torch._inductor`: `torch.use_deterministic_algorithms` imports it, and it imports Triton.
_INTERPRETED = multiprocessing.get_context("forkserver")
_INTERPRETED.set_forkserver_preload(["hypothesis", "numpy", "pytest", "torch", "torch._inductor"])
_COMPILED = multiprocessing.get_context("spawn")


def run(sources: Path, test: str, only: str) -> tuple[int, str]:
    """Exit status and output of the tests on these sources, in a process of their own, up to the first failure."""
    arguments = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", test, *(["-k", only] if only else [])]
    environment = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(sources / "cache")}
    names = {"sources": str(sources), "environment": environment, "arguments": arguments}
    process = (_COMPILED if test.startswith(EMULATED) else _INTERPRETED).Process(target=exec, args=(_PYTEST, names))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    return process.exitcode, (sources / "output").read_text()


IN_COMPILED_CODE = [name for name, fault in FAULTS.items() if fault.test.startswith(EMULATED)]


def check_that_it_is_caught(fault: Fault, tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path)
    text = (sources / fault.file).read_text()
    assert fault.old in text, f"{fault.file} has no {fault.old!r} any more: bring the row up to date"
    (sources / fault.file).write_text(text.replace(fault.old, fault.new))
    status, output = run(sources, fault.test, fault.only)
    assert status == 1, f"not caught:\n{output}"
    assert re.search(fault.says, output), output


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in IN_COMPILED_CODE])
def test_a_planted_fault_is_caught(tmp_path, name):
    check_that_it_is_caught(FAULTS[name], tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("ptxsim") is None, reason="needs ptxsim, which executes compiled code")
@pytest.mark.parametrize("name", IN_COMPILED_CODE)
def test_a_planted_fault_that_only_compiled_code_shows_is_caught(tmp_path, name):
    check_that_it_is_caught(FAULTS[name], tmp_path)
