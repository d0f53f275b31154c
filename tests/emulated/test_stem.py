"""`FusedStem` on compiled kernels, forward and backward, beside the eager stem."""

from __future__ import annotations

import pytest
import torch

import resnet
from resnet import Stem
from tests.helpers.blocks import assert_parity, draw, name_of, one_thread, step, trio  # noqa: F401
from tests.helpers.pairs import each_pair_compiled


@each_pair_compiled(dtype=(torch.float32, torch.float64), train={"training": True, "frozen statistics": False})
def test_output_gradients_and_buffers_are_as_exact_as_eager(emulate, dtype, train):
    draws = []
    for seed in range(3):
        stems, x = trio(Stem, 3, 8, seed=seed, dtype=dtype, train=train), draw(3, 3, 13, 10, seed=seed, dtype=dtype)
        with emulate(dtype) as launches, resnet.backend("triton"):
            fused = step(stems.fused, x)
        assert {"pool_kernel", "pool_backward_reduce_kernel", "pool_backward_apply_kernel"} <= {
            r.name for r in launches
        }
        eager, exact = step(stems.eager, x), step(stems.exact, x)
        if train:  # behind batch statistics a bias has no effect: eager's gradient is what rounding leaves of zero
            assert not fused.pop("d 0.bias").any()
            del eager["d 0.bias"], exact["d 0.bias"]
        draws.append((eager, fused, exact))
    assert_parity(draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_inference_in_half_precision_is_as_exact_as_eager(emulate, dtype):
    draws = []
    for seed in range(3):
        stems, x = trio(Stem, 3, 8, seed=seed, dtype=dtype, train=False), draw(3, 3, 13, 10, seed=seed, dtype=dtype)
        with torch.no_grad(), emulate(), resnet.backend("triton"):
            fused = stems.fused(x)
        with torch.no_grad():
            draws.append(({"out": stems.eager(x)}, {"out": fused}, {"out": stems.exact(x.double())}))
    assert_parity(draws)
