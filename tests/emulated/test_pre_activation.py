"""Blocks with pre-activation on compiled kernels, forward and backward, beside eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet
from benchmarks import roofline
from tests.helpers.blocks import DTYPES, assert_parity, draw, infer, trio
from tests.helpers.emulated_limits import PARTIALS_OVER_SUMMED, TRAFFIC_OVER_FLOOR
from tests.helpers.emulated_modules import compare
from tests.helpers.pairs import each_pair_compiled
from tests.helpers.written_blocks import PreActivated, PreActivatedInSequence, PreActivatedNarrow

# (class, constructor's arguments)
BLOCKS = {
    "identity": (PreActivated, 8, 8),
    "convolution of what is activated": (PreActivated, 8, 16),
    "convolution of what is activated, stride 2": (PreActivated, 8, 16, 2),
    "bottleneck, identity": (PreActivatedNarrow, 16, 16),
    "bottleneck, convolution of what is activated, stride 2": (PreActivatedNarrow, 16, 32, 2),
    "biases, convolution of x, stride 2": (PreActivatedInSequence, 8, 16, 2),
}


@pytest.mark.core
@each_pair_compiled(dtype=DTYPES, block=BLOCKS, train={"training": True, "frozen statistics": False})
def test_a_blocks_output_gradients_and_buffers_are_as_exact_as_eager(emulate, dtype, block, train):
    draws = []
    for seed in range(3):
        blocks = trio(*block, seed=seed, dtype=dtype, train=train)
        results, _ = compare(emulate, blocks, draw(4, block[1], 7, 6, seed=seed, dtype=dtype))
        draws.append(results)
    assert_parity(draws)


@each_pair_compiled(dtype=DTYPES, block=BLOCKS)
def test_a_block_in_inference_is_as_exact_as_eager_in_a_launch_per_convolution(emulate, dtype, block):
    """Norm and ReLU of the input are stored where the shortcut's convolution reads them, too."""
    draws = []
    for seed in range(3):
        blocks = trio(*block, seed=seed, dtype=dtype, train=False)
        x = draw(4, block[1], 7, 6, seed=seed, dtype=dtype)
        with resnet.convolution("triton"):
            results, launches = compare(emulate, blocks, x, infer)
        convolutions = [m for m in blocks.fused.modules() if isinstance(m, nn.Conv2d)]
        stored = ["apply_kernel"] * (block[0] is not PreActivatedInSequence and block[1] != block[2])
        assert launches == ["freeze_kernel", *stored, *["conv_forward_kernel"] * len(convolutions)]
        draws.append(results)
    assert_parity(draws)


# Of a step of a block of two convolutions and the identity: activations read, written, and summed up per channel.
LAUNCHES = [
    ("statistics_kernel", 1, 0, 1),
    ("conv_forward_kernel", 1, 1, 1),
    ("conv_forward_kernel", 2, 1, 0),
    ("grad_input_kernel", 2, 1, 1),
    ("conv_grad_weight_kernel", 2, 0, 0),
    ("backward_apply_kernel", 2, 1, 0),
    ("grad_input_kernel", 2, 1, 1),
    ("conv_grad_weight_kernel", 2, 0, 0),
    ("backward_apply_kernel", 3, 1, 0),
]


@pytest.mark.long
def test_each_launch_of_a_block_moves_the_activations_of_its_floor(emulate):
    dtype, shape = torch.float16, (8, 64, 14, 14)
    block = trio(PreActivated, 64, 64, dtype=dtype).fused
    with emulate() as reports, resnet.backend("triton"), resnet.convolution("triton"):
        block(draw(*shape, dtype=dtype).requires_grad_()).sum().backward()
    moving = [report for report in reports if report.name not in roofline.MERGES]
    activation, weight = (dtype.itemsize * t.numel() for t in (torch.empty(shape), block.conv1.weight))
    for report, (kernel, read, written, summed) in zip(moving, LAUNCHES, strict=True):
        assert report.name == kernel
        floor = read * activation + weight * (kernel in ("conv_forward_kernel", "grad_input_kernel"))
        assert floor <= 32 * report.unique_read_sectors <= TRAFFIC_OVER_FLOOR * floor, report
        if kernel != "conv_grad_weight_kernel":  # what it writes is no activation
            most = (written + PARTIALS_OVER_SUMMED * summed) * activation
            assert written * activation <= 32 * report.unique_write_sectors <= most, report
    assert sum(read + written for _, read, written, _ in LAUNCHES) == 23
