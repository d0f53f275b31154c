"""`FusedStem` on compiled kernels, forward and backward, beside the eager stem."""

from __future__ import annotations

import pytest
import torch

from resnet import Stem
from tests.helpers.blocks import assert_parity, draw, infer, name_of, trio
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
