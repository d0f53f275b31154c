"""`FusedResidual` on compiled kernels, forward and backward, beside the eager block."""

from __future__ import annotations

import pytest
import torch

import resnet
from resnet import Residual
from tests.blocks import (  # noqa: F401
    DTYPES,
    Trio,
    assert_parity,
    draw,
    name_of,
    one_thread,
    same,
    snapshot,
    step,
    trio,
)

# (constructor's arguments, input shape)
BLOCKS = {
    "identity": ((8, 8), (2, 8, 6, 5)),
    "1x1, stride 2": ((6, 16, True, 2), (2, 6, 7, 6)),
}
per_block = pytest.mark.parametrize("arguments, shape", BLOCKS.values(), ids=BLOCKS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

# Activations that the kernels of an identity block move in training: statistics and apply twice, the second with the
# shortcut; backward: reduce and apply' with mask and shortcut's gradient, the activation again, reduce and apply'.
PASSES_FORWARD = 1 + 2 + 1 + 3
PASSES_BACKWARD = 3 + 5 + 2 + 2 + 3
TRAFFIC_OVER_FLOOR = 1.03


def compare(emulate, blocks: Trio, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[dict, ...]:
    """(eager, fused, exact): what `step` gives for each; the fused block's launches are emulated."""
    x = draw(*shape, seed=seed, dtype=dtype)
    with emulate(), resnet.backend("triton"):
        fused = step(blocks.fused, x)
    eager, exact = step(blocks.eager, x), step(blocks.exact, x)
    if blocks.fused.training:
        # behind batch statistics a bias has no effect: eager's gradient is what rounding leaves of zero
        for bias in ("d conv1.bias", "d conv2.bias"):
            assert not fused.pop(bias).any()
            del eager[bias], exact[bias]
    return eager, fused, exact


@pytest.mark.core
@pytest.mark.parametrize("train", [True, False], ids=["training", "frozen statistics"])
@per_block
@per_dtype
def test_output_gradients_and_buffers_are_as_exact_as_eager(emulate, dtype, arguments, shape, train):
    draws = []
    for seed in range(3):
        blocks = trio(Residual, *arguments, seed=seed, dtype=dtype, train=train)
        draws.append(compare(emulate, blocks, shape, dtype, seed))
    assert_parity(draws)


@per_block
@per_dtype
def test_inference_is_as_exact_as_eager(emulate, dtype, arguments, shape):
    draws = []
    for seed in range(3):
        blocks, x = (
            trio(Residual, *arguments, seed=seed, dtype=dtype, train=False),
            draw(*shape, seed=seed, dtype=dtype),
        )
        with torch.no_grad(), emulate() as launches, resnet.backend("triton"):
            fused = blocks.fused(x)
        assert [report.name for report in launches] == ["freeze_kernel", "apply_kernel"] * 2
        with torch.no_grad():
            draws.append(({"out": blocks.eager(x)}, {"out": fused}, {"out": blocks.exact(x.double())}))
    assert_parity(draws)


@per_block
def test_a_second_run_gives_the_same_bits(emulate, arguments, shape):
    block, x = trio(Residual, *arguments, dtype=torch.float16).fused, draw(*shape, dtype=torch.float16)
    state = snapshot(block)
    runs = []
    for _ in range(2):
        block.load_state_dict(state)
        with emulate(), resnet.backend("triton"):
            runs.append(step(block, x))
    same(*runs)


def test_an_identity_block_moves_the_activations_of_its_floor(emulate):
    shape, dtype = (8, 64, 24, 24), torch.float16
    block = trio(Residual, 64, 64, dtype=dtype).fused
    x = draw(*shape, dtype=dtype).requires_grad_()
    activation = x.numel() * x.element_size()
    with emulate() as launches, resnet.backend("triton"):
        out = block(x)
        forward = len(launches)
        out.backward(draw(*shape, seed=1, dtype=dtype))
    for part, passes in ((launches[:forward], PASSES_FORWARD), (launches[forward:], PASSES_BACKWARD)):
        moved = sum(report.dram_bytes for report in part)
        assert passes * activation <= moved <= TRAFFIC_OVER_FLOOR * passes * activation
