"""`FusedResidual` on compiled kernels, forward and backward, beside the eager block."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import resnet
from benchmarks import passes, roofline
from resnet import BasicBlock, Bottleneck, Residual, ResidualBottleneck, resnet18
from tests.helpers.blocks import (
    DTYPES,
    GATED,
    POOLED,
    SIXTEEN_BIT,
    assert_parity,
    draw,
    infer,
    keep_norms_constant,
    same,
    snapshot,
    step,
    trio,
)
from tests.helpers.chains import CHAINS, chain, inputs
from tests.helpers.emulated_limits import (
    PARTIALS_OVER_SUMMED,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    wavefronts_over_ideal,
)
from tests.helpers.emulated_modules import compare
from tests.helpers.pairs import each_pair_compiled
from tests.helpers.parity import assert_as_exact_as_eager, rms
from tests.helpers.training import logits_and_gradient, losses, pair, small_net

# (class, constructor's arguments, input shape)
BLOCKS = {
    "identity": (Residual, (8, 8), (2, 8, 6, 5)),
    "1x1, stride 2": (Residual, (6, 16, True, 2), (2, 6, 7, 6)),
    "basic, normed shortcut": (BasicBlock, (6, 16, 2), (2, 6, 7, 6)),
    "basic, pooled shortcut": (BasicBlock, (6, 16, 2, POOLED), (2, 6, 7, 6)),
    "bottleneck, normed shortcut": (Bottleneck, (8, 8), (2, 8, 6, 5)),
    "bottleneck, normed shortcut of stride 2": (Bottleneck, (8, 8, 2), (2, 8, 7, 6)),
    "bottleneck, dilation": (Bottleneck, (32, 8, 1, {"dilation": 2}), (2, 32, 6, 5)),
    "textbook's bottleneck, 1x1 of stride 2": (ResidualBottleneck, (16, 32, True, 2), (4, 16, 12, 11)),
}
GROUPED = {"bottleneck, groups": (Bottleneck, (8, 8, 1, {"groups": 2}), (2, 8, 6, 5))}  # a convolution is PyTorch's
GATED_BLOCKS = {  # what makes the gates is PyTorch's
    "basic, gates": (BasicBlock, (8, 8, GATED), (2, 8, 6, 5)),
    "bottleneck, gates and a normed shortcut of stride 2": (Bottleneck, (8, 8, 2, GATED), (2, 8, 7, 6)),
}


FEWER = {name: BLOCKS[name] for name in ("identity", "1x1, stride 2", "bottleneck, normed shortcut of stride 2")}
per_block = pytest.mark.parametrize("kind, arguments, shape", FEWER.values(), ids=FEWER)


@pytest.mark.core
@each_pair_compiled(
    dtype=DTYPES, block={**BLOCKS, **GROUPED, **GATED_BLOCKS}, train={"training": True, "frozen statistics": False}
)
def test_a_blocks_output_gradients_and_buffers_are_as_exact_as_eager(emulate, dtype, block, train):
    (kind, arguments, shape), draws = block, []
    # BatchNorm is written over what PyTorch's convolution has given.
    in_place = "apply_kernel" if block in GROUPED.values() and not train else ""
    for seed in range(3):
        blocks = trio(kind, *arguments, seed=seed, dtype=dtype, train=train)
        results, _ = compare(emulate, blocks, draw(*shape, seed=seed, dtype=dtype), in_place=in_place)
        draws.append(results)
    assert_parity(draws)


# The launches of a block of two units with norms of constants and an identity: the activations read and written.
OF_CONSTANTS = [
    ("conv_forward_kernel", 1, 1),
    ("conv_forward_kernel", 2, 1),
    ("conv_grad_weight_kernel", 2, 0),
    ("grad_input_kernel", 2, 1),
    ("conv_grad_weight_kernel", 2, 0),
    ("grad_input_kernel", 2, 1),
]
PER_CHANNEL = ("freeze_kernel", "merge_splits_kernel")


@pytest.mark.core
@each_pair_compiled(dtype=(torch.bfloat16, torch.float32, torch.float64), block=BLOCKS)
def test_a_block_with_norms_of_constants_is_as_exact_as_eager_in_its_convolutions_alone(emulate, dtype, block):
    kind, arguments, shape = block
    draws = []
    for seed in range(3):
        blocks = trio(kind, *arguments, seed=seed, dtype=dtype).each(keep_norms_constant)
        results, launches = compare(emulate, blocks, draw(*shape, seed=seed, dtype=dtype))
        assert {*launches} - {*PER_CHANNEL} == {kernel for kernel, *_ in OF_CONSTANTS}
        draws.append(results)
    assert_parity(draws)


def test_the_launches_of_a_block_with_norms_of_constants_move_each_activation_once(emulate):
    dtype, shape = torch.bfloat16, (8, 64, 14, 14)
    block = keep_norms_constant(trio(Residual, 64, 64, dtype=dtype).fused)
    with emulate() as reports, resnet.backend("triton"):
        block(draw(*shape, dtype=dtype).requires_grad_()).sum().backward()
    moving = [report for report in reports if report.name not in PER_CHANNEL]
    activation, weight = (dtype.itemsize * t.numel() for t in (torch.empty(shape), block.conv1.weight))
    for report, (kernel, read, written) in zip(moving, OF_CONSTANTS, strict=True):
        assert report.name == kernel
        of_weight = 0 if kernel == "conv_grad_weight_kernel" else weight
        floor = read * activation + of_weight
        assert floor <= 32 * report.unique_read_sectors <= TRAFFIC_OVER_FLOOR * floor, report
        if written:
            assert written * activation == 32 * report.unique_write_sectors, report


@each_pair_compiled(dtype=DTYPES, block=BLOCKS)
def test_a_block_in_inference_is_as_exact_as_eager_in_a_launch_per_convolution(emulate, dtype, block):
    kind, arguments, shape = block
    draws = []
    for seed in range(3):
        blocks = trio(kind, *arguments, seed=seed, dtype=dtype, train=False)
        results, launches = compare(emulate, blocks, draw(*shape, seed=seed, dtype=dtype), infer)
        convolutions = [m for m in blocks.fused.modules() if isinstance(m, nn.Conv2d)]
        riding = kind is Residual and blocks.fused.conv3 is not None
        assert launches == ["conv_forward_kernel"] * (len(convolutions) - riding)
        draws.append(results)
    assert_parity(draws)


@per_block
def test_a_second_step_of_a_block_gives_the_same_bits(emulate, kind, arguments, shape):
    block, x = trio(kind, *arguments, dtype=torch.float16).fused, draw(*shape, dtype=torch.float16)
    state = snapshot(block)
    runs = []
    for _ in range(2):
        block.load_state_dict(state)
        with emulate(), resnet.backend("triton"):
            runs.append(step(block, x))
    same(*runs)


@pytest.mark.parametrize("variant", ["epilogue", "pytorch"])
@per_block
def test_every_other_choice_of_convolution_is_as_exact_as_eager(emulate, kind, arguments, shape, variant):
    with resnet.convolution(variant):
        results, _ = compare(emulate, trio(kind, *arguments), draw(*shape))
    assert_parity([results])


@pytest.mark.long
@pytest.mark.parametrize(
    ("emulate", "name"),
    [*((80, name) for name in passes.BLOCKS), (90, "textbook")],
    ids=[*(f"sm_80-{name}" for name in passes.BLOCKS), "sm_90-textbook"],
    indirect=["emulate"],
)
def test_each_launch_of_a_block_moves_the_activations_of_its_floor(emulate, name):
    """Each is read and written once, beside vectors per channel and partial sums. No launch has bank conflicts."""
    block, channels, dtype = passes.BLOCKS[name], 64, torch.float16
    with emulate() as reports:
        chain = roofline.step(block, block.input_shape(channels, 8, 14), channels, dtype)
    for report in reports:
        assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL, str(report)
    launches, counted = passes.launches(chain), roofline.counted(reports, chain, dtype)
    assert [count.kernel for count in counted] == [launch.kernel for launch in launches]
    for launch, count in zip(launches, counted):
        read, written, summed = (
            dtype.itemsize * chain.elements(*names) for names in (launch.reads, launch.writes, launch.sums)
        )
        assert read <= count.read <= TRAFFIC_OVER_FLOOR * read, (launch, count.read / read)
        assert written <= count.written <= written + PARTIALS_OVER_SUMMED * summed, (launch, count.written, written)
    activation = dtype.itemsize * chain.maps["out"]
    floor, moved = chain.passes(*launches), sum(count.unique for count in counted) / activation
    assert moved <= TRAFFIC_OVER_FLOOR * floor
    *_, total = roofline.table(chain, {80: counted}, dtype.itemsize)
    assert total.startswith(f"| **sum** | {moved:.2f} of {passes.number(floor)} |")


LINKED = {
    name: CHAINS[name]
    for name in (
        "identities",
        "a strided 1x1 shortcut",
        "normed shortcuts alone",
        "bottlenecks",
        "pooled shortcuts",
    )
}


@pytest.mark.core
@each_pair_compiled(
    dtype=(torch.float32, torch.float64), blocks=LINKED, train={"training": True, "frozen statistics": False}
)
def test_a_chain_of_blocks_is_as_exact_as_eager(emulate, dtype, blocks, train):
    draws = []
    for seed in range(3):
        modules = chain(blocks, seed=seed, dtype=dtype, train=train)
        results, launches = compare(emulate, modules, inputs(blocks, dtype))
        assert launches.count(passes.BACKWARD_REDUCE) == 1
        draws.append(results)
    assert_parity(draws)


@each_pair_compiled(dtype=SIXTEEN_BIT, blocks=LINKED)
def test_a_chain_of_blocks_gives_what_they_give_apart(emulate, dtype, blocks):
    """But for sums in another order, from which a rounding may follow."""
    linked = chain(blocks, dtype=dtype).fused
    apart, x = nn.Sequential(*copy.deepcopy(linked)), inputs(blocks, dtype)
    with emulate(), resnet.backend("triton"):
        torch.testing.assert_close(step(linked, x), step(apart, x), rtol=1e-2, atol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("emulate", "name"),
    [(80, "textbook"), (90, "textbook"), (80, "bottleneck")],
    ids=["sm_80-textbook", "sm_90-textbook", "sm_80-bottleneck"],
    indirect=["emulate"],
)
def test_a_block_that_another_one_follows_saves_two_passes(emulate, name):
    """The gradient that the next block would write, and this one's last sums would read with out, is read no more."""
    block, channels, dtype = passes.BLOCKS[name], 64, torch.float16
    shape, moved = block.input_shape(channels, 8, 14), []
    for length in (1, 2, 3):
        blocks = [block.fused(*block.arguments(channels)).to(dtype) for _ in range(length)]
        x = draw(*shape, dtype=dtype).requires_grad_()
        with emulate() as reports, resnet.backend("triton"), resnet.convolution("triton"):
            resnet.FusedSequential(*blocks)(x).sum().backward()
        assert [report.name for report in reports].count(passes.BACKWARD_REDUCE) == 1
        sectors = sum(
            report.unique_read_sectors + report.unique_write_sectors * (report.name != passes.GRAD_WEIGHT)
            for report in reports
            if report.name not in roofline.MERGES
        )
        moved.append(32 * sectors)
    chain = passes.Chain.of(blocks[0], shape)
    floor = dtype.itemsize * x.numel() * (chain.passes(*passes.fused(chain)) - 2)
    weights = dtype.itemsize * sum(step.weights for step in passes.launches(chain))
    for shorter, longer in itertools.pairwise(moved):
        assert floor <= longer - shorter - weights <= TRAFFIC_OVER_FLOOR * floor


@pytest.mark.long
def test_losses_of_20_steps_follow_eagers(emulate):
    eager, fused = (net.double() for net in pair(small_net))
    x, labels = draw(4, 1, 16, 16, dtype=torch.float64), torch.arange(4) % 4
    expected = losses(eager, x, labels, 20)
    with emulate(torch.float64), resnet.backend("triton"):
        got = losses(fused, x, labels, 20)
    assert expected[-1] < 0.2 * expected[0]
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("emulate", [80], ids=["sm_80"], indirect=True)
def test_a_float16_step_of_resnet18_is_as_exact_as_eager(emulate):
    results = []
    x, labels = draw(2, 1, 32, 32, dtype=torch.float16), torch.tensor([1, 7])
    eager, fused = (net.half() for net in pair(lambda block: resnet18(block=block)))
    for net in (eager, copy.deepcopy(eager).double()):
        results.append(logits_and_gradient(net, x, labels))
    with emulate(), resnet.backend("triton"):
        results.append(logits_and_gradient(fused, x, labels))
    (eager, d_eager), (exact, d_exact), (got, d_got) = results
    assert_as_exact_as_eager("logits", [got], [eager], [exact])
    errors = [rms([d.double() - d_exact]) for d in (d_got, d_eager)]
    assert errors[0] <= 2 * errors[1]
