"""`FusedStem` on compiled kernels, forward and backward, beside the eager stem."""

from __future__ import annotations

import pytest
import torch

from resnet import Stem
from tests.helpers.blocks import DTYPES, assert_parity, deep_stems, draw, infer, name_of, trio
from tests.helpers.emulated_modules import compare
from tests.helpers.pairs import each_pair_compiled


@each_pair_compiled(dtype=(torch.float32, torch.float64), train={"training": True, "frozen statistics": False})
def test_a_stems_output_gradients_and_buffers_are_as_exact_as_eager(emulate, dtype, train):
    draws = []
    for seed in range(3):
        stems = trio(Stem, 3, 8, seed=seed, dtype=dtype, train=train)
        results, launches = compare(emulate, stems, draw(3, 3, 13, 10, seed=seed, dtype=dtype))
        assert {"pool_kernel", "pool_backward_reduce_kernel", "pool_backward_apply_kernel"} <= set(launches)
        draws.append(results)
    assert_parity(draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_a_stem_of_a_16_bit_type_in_inference_is_as_exact_as_eager(emulate, dtype):
    draws = []
    for seed in range(3):
        stems = trio(Stem, 3, 8, seed=seed, dtype=dtype, train=False)
        results, _ = compare(emulate, stems, draw(3, 3, 13, 10, seed=seed, dtype=dtype), infer)
        draws.append(results)
    assert_parity(draws)


@each_pair_compiled(dtype=DTYPES, train={"training": True, "frozen statistics": False})
def test_a_deep_stems_output_gradients_and_buffers_are_as_exact_as_eager(emulate, dtype, train):
    draws = []
    for seed in range(3):
        stems = deep_stems(seed=seed, dtype=dtype, train=train)
        results, launches = compare(emulate, stems, draw(3, 3, 19, 14, seed=seed, dtype=dtype))
        assert launches.count("conv_forward_kernel") == launches.count("conv_grad_weight_kernel") == 3
        draws.append(results)
    assert_parity(draws)


def test_a_deep_stem_in_inference_is_a_launch_per_convolution_and_one_for_the_pool(emulate):
    draws = []
    for seed in range(3):
        stems = deep_stems(seed=seed, dtype=torch.bfloat16, train=False)
        results, launches = compare(emulate, stems, draw(3, 3, 19, 14, seed=seed, dtype=torch.bfloat16), infer)
        assert launches == [*["conv_forward_kernel"] * 3, "freeze_kernel", "pool_kernel"]
        draws.append(results)
    assert_parity(draws)
