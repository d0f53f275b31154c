"""`resnet.kernels.tuning`: what the table holds, what is pruned of it, what makes a key, and who gets to run it."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from resnet.kernels import tuning
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning import (
    ANY,
    DEVICES,
    GFX942,
    SM_80,
    SM_90,
    SM_100,
    TABLE,
    Config,
    Epilogue,
    candidates,
    devices,
    gemm,
    memory,
    model,
    timing,
)
from resnet.kernels.tuning.model import shared_bytes
from resnet.kernels.tuning.table import parse_config

HALF = torch.float16
EVERY_DEVICE = {"any": ANY, **DEVICES}
STAGES = [  # of ResNet-18 at 96x96
    ConvShape(256, 24, 24, 64, 64, 3, 3, 1, 1),
    ConvShape(256, 24, 24, 64, 128, 3, 3, 2, 1),
    ConvShape(256, 12, 12, 128, 128, 3, 3, 1, 1),
    ConvShape(256, 6, 6, 256, 256, 3, 3, 1, 1),
    ConvShape(256, 3, 3, 512, 512, 3, 3, 1, 1),
]
SMALL = [
    ConvShape(2, 5, 5, 3, 6, 3, 3, 1, 1),
    ConvShape(1, 1, 1, 1, 1, 1, 1, 1, 0),
    ConvShape(0, 4, 4, 3, 6, 3, 3, 2, 1),
]
PRECISIONS = [
    (HALF, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float64, "ieee"),
]


def every_key():
    for operation, shape, (dtype, precision), prologue in itertools.product(
        TABLE, STAGES + SMALL, PRECISIONS, (False, True)
    ):
        yield gemm(operation, shape, dtype, precision=precision, flat=shape.C < 16, prologue=prologue)


# ---- the table -----------------------------------------------------------------------------------------------------


def test_every_block_is_one_that_a_product_takes():
    for config in itertools.chain(*(table for kinds in TABLE.values() for table in kinds.values())):
        for block in (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K):
            assert block >= 16 and block & (block - 1) == 0, config
        assert config.num_warps in (1, 2, 4, 8) and config.num_stages >= 1, config


def test_no_configuration_is_there_twice():
    for operation, kinds in TABLE.items():
        for kind, table in kinds.items():
            assert len(set(table)) == len(table), (operation, kind)


# ---- what is pruned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", EVERY_DEVICE.values(), ids=EVERY_DEVICE.keys())
def test_each_key_has_one_to_eight_candidates_that_the_device_can_run(device):
    for key in every_key():
        found = candidates(key, device)
        assert 1 <= len(found) <= 8 and len(set(found)) == len(found), key
        assert set(found) <= set(TABLE[key.operation][key.kind])
        for config in found:
            assert shared_bytes(config, key, device) <= device.shared_memory, (key, config)


def test_a_device_with_less_shared_memory_gets_smaller_tiles():
    key = gemm("forward", STAGES[2], HALF, precision="ieee")
    small = dataclasses.replace(SM_90, shared_memory=32 * 1024)
    assert Config(128, 128, 64, 8, 3) in candidates(key, SM_90)
    for config in candidates(key, small):
        assert (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * 2 * config.num_stages <= 32 * 1024


def test_a_tile_is_less_than_twice_as_wide_as_the_matrix():
    for key in every_key():
        if len(TABLE[key.operation][key.kind]) == 1:
            continue  # one fixed tile
        rows, columns, _, reduction = key.problem
        for config in candidates(key):
            assert config.BLOCK_M == 16 or 2 * rows > config.BLOCK_M, (key, config)
            assert config.BLOCK_N == 16 or 2 * columns > config.BLOCK_N, (key, config)
            assert config.BLOCK_K == 16 or 2 * reduction > config.BLOCK_K, (key, config)


def test_a_tile_that_would_spill_is_not_tried(monkeypatch):
    spilling = Config(128, 128, 32, 4, 3)  # 128 accumulators per thread and as many in the epilogue
    monkeypatch.setitem(TABLE["forward"], "16-bit", (*TABLE["forward"]["16-bit"], spilling))
    assert spilling not in candidates(gemm("forward", STAGES[2], HALF, precision="tf32", new_table=True))


def test_a_row_of_bfloat16_beside_its_scale_and_shift_is_not_tried_where_a_thread_computes_it_whole():
    tile = Config(128, 64, 64, 4, 3)
    key = lambda dtype, **switches: gemm("forward", STAGES[0], dtype, **switches)  # noqa: E731
    assert tile not in candidates(key(torch.bfloat16, prologue=True), SM_100)
    assert tile in candidates(key(torch.bfloat16, prologue=True), SM_90)
    assert tile in candidates(key(torch.bfloat16, prologue=False), SM_100)
    assert tile in candidates(key(HALF, prologue=True), SM_100)


def test_a_tile_that_holds_much_of_a_strided_shortcut_s_gradient_is_not_tried():
    tile, strided = Config(128, 64, 64, 4, 3), dataclasses.replace(STAGES[0], stride=2)

    def tried(epilogue: Epilogue, shape: ConvShape, shortcut_channels: int) -> bool:
        key = gemm("grad_input", shape, HALF, epilogue=epilogue, shortcut_channels=shortcut_channels)
        return tile in candidates(key)

    for with_shortcut, without in (
        (Epilogue.SHORTCUT_GRAD, Epilogue.IDENTITY_GRAD),
        (Epilogue.BLOCK_END, Epilogue.BLOCK_END),
    ):
        assert not tried(with_shortcut, strided, 64)
        assert tried(with_shortcut, STAGES[0], 64)
        assert tried(without, strided, 0)


def test_a_wide_tile_that_holds_much_beside_a_relu_s_mask_is_not_tried():
    tile = Config(64, 128, 64, 4, 3)
    key = lambda epilogue: gemm("grad_input", STAGES[2], HALF, epilogue=epilogue)  # noqa: E731
    assert tile not in candidates(key(Epilogue.RELU_MASK))
    assert tile in candidates(key(Epilogue.IDENTITY_GRAD))


def test_a_tile_that_holds_much_beside_the_sums_of_a_block_s_end_is_not_tried():
    wide, tall = Config(64, 128, 64, 4, 3), Config(128, 64, 64, 4, 3)
    whole, ragged = ConvShape(64, 24, 24, 128, 128, 3, 3, 1, 1), ConvShape(64, 24, 24, 100, 200, 3, 3, 1, 1)

    def tried(tile: Config, shape: ConvShape, epilogue: Epilogue = Epilogue.BLOCK_END, shortcut_channels: int = 64):
        key = gemm("grad_input", shape, HALF, epilogue=epilogue, shortcut_channels=shortcut_channels)
        return model._fits(tile, key, SM_80)

    strided = dataclasses.replace(whole, stride=2), dataclasses.replace(ragged, stride=2)
    assert tried(tall, whole) and tried(wide, strided[0])
    for tile, shape in ((wide, whole), (wide, ragged), (tall, ragged), (wide, strided[1])):
        assert not tried(tile, shape)
        assert tried(tile, shape, shortcut_channels=0) == (shape is whole)
        assert tried(tile, shape, Epilogue.SHORTCUT_GRAD)
        assert tried(dataclasses.replace(tile, num_warps=8), shape)


def test_a_tile_that_holds_much_of_a_gradient_of_some_pixels_is_not_tried():
    key = lambda stride: gemm("grad_input", STAGES[0], HALF, epilogue=Epilogue.IDENTITY_GRAD, branch_stride=stride)  # noqa: E731
    tile = Config(128, 64, 64, 4, 3)
    assert tile in candidates(key(1)) and tile not in candidates(key(2))
    assert dataclasses.replace(tile, BLOCK_K=32, num_stages=4) in candidates(key(2))


def test_in_tensor_memory_a_block_s_end_in_tf32_has_tiles_of_fewer_accumulators():
    key = gemm("grad_input", STAGES[0], torch.float32, epilogue=Epilogue.BLOCK_END, precision="tf32")
    tile = Config(128, 64, 32, 4, 3)
    assert tile in candidates(key, SM_90) and tile not in candidates(key, SM_100)


def test_a_tile_of_grad_weight_that_spills_on_an_a100_only_is_tried_elsewhere():
    tile = Config(64, 64, 64, 4, 3)
    key = lambda prologue: gemm("grad_weight", STAGES[0], HALF, prologue=prologue)  # noqa: E731
    assert tile in candidates(key(True), SM_90)
    assert tile not in candidates(key(True), SM_80)
    assert tile in candidates(key(False), SM_80)


def test_a_tile_beside_which_its_recomputed_operand_does_not_fit_is_not_tried():
    """Compiled for an RTX it takes 114,688 bytes with a prologue, 81,920 without, and a block may have 101,376."""
    tile = Config(256, 64, 64, 8, 3)
    key = lambda prologue: gemm("forward", STAGES[0], HALF, prologue=prologue)  # noqa: E731
    for name in ("sm_86", "sm_120"):
        assert tile not in candidates(key(True), DEVICES[name])
        assert tile in candidates(key(False), DEVICES[name])
    assert tile in candidates(key(True), SM_80)


# ---- the devices ---------------------------------------------------------------------------------------------------

H100 = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 132,
    "sm_clock_rate": 1755000,
    "mem_clock_rate": 2619000,
    "mem_bus_width": 5120,
}


def described(monkeypatch, properties: dict[str, int], capability: tuple[int, int]) -> tuning.Device:
    """What the model makes of an NVIDIA GPU that is not here, by what Triton's driver and PyTorch say of it."""
    from triton.runtime import driver

    stand_in = SimpleNamespace(utils=SimpleNamespace(get_device_properties=lambda index: properties))
    monkeypatch.setattr(driver, "_active", stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    return devices.device_facts.__wrapped__(torch.device("cuda", 0))


def test_a_device_is_what_its_driver_says(monkeypatch):
    assert dataclasses.replace(described(monkeypatch, H100, (9, 0)), bandwidth=SM_90.bandwidth) == SM_90
    assert described(monkeypatch, H100, (9, 0)).bandwidth == pytest.approx(SM_90.bandwidth, rel=0.01)
    assert described(monkeypatch, H100, (10, 0)).tensor_memory
    assert not described(monkeypatch, H100, (12, 0)).asynchronous


@pytest.mark.parametrize(
    "capability, name",
    [((7, 5), "sm_75"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)
def test_a_consumer_gpu_holds_as_many_warps_as_its_own_generation(monkeypatch, capability, name):
    device = described(monkeypatch, H100, capability)
    assert (device.name, device.warps, device.blocks) == (name, DEVICES[name].warps, DEVICES[name].blocks)
    assert device.warps < SM_80.warps


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (10, 1), (12, 0)])
def test_a_smaller_gpu_than_its_generation_s_largest_has_slower_tensor_cores(monkeypatch, capability):
    assert described(monkeypatch, H100, capability).products < SM_80.products


def test_a_device_that_tells_no_clock_has_candidates_all_the_same(monkeypatch):
    device = described(monkeypatch, H100 | {"sm_clock_rate": 0, "mem_clock_rate": 0}, (12, 1))
    assert candidates(gemm("forward", STAGES[0], HALF), device)


# ---- the order -----------------------------------------------------------------------------------------------------


def test_programs_that_fit_beside_each_other_come_before_one_large_program():
    """As measured on an H100: such a tile was the fastest, or 5% slower at most, in 18 forwards with 128 columns."""
    for shape in STAGES[1:]:
        ranked = candidates(gemm("forward", shape, torch.bfloat16, moments=True), SM_90)
        assert ranked[0] in (Config(64, 128, 64, 4, 3), Config(64, 128, 64, 4, 4))


def test_a_prologue_costs_time_that_no_product_hides():
    config = Config(64, 128, 64, 4, 3)
    for shape in STAGES[2:]:
        with_it, without = (
            model._time(config, gemm("forward", shape, HALF, prologue=prologue), SM_90)[0] for prologue in (True, False)
        )
        assert with_it > 1.2 * without


@pytest.mark.parametrize("device", [SM_80, SM_90], ids=["sm_80", "sm_90"])
def test_with_many_pixels_the_first_tile_covers_all_columns_up_to_128(device):
    assert candidates(gemm("forward", STAGES[0], HALF), device)[0].BLOCK_N == 64
    assert candidates(gemm("forward", STAGES[2], HALF), device)[0].BLOCK_N == 128


def test_with_few_pixels_the_first_tile_leaves_more_programs():
    area = lambda config: config.BLOCK_M * config.BLOCK_N  # noqa: E731
    few = ConvShape(4, 3, 3, 512, 512, 3, 3, 1, 1)
    first_of_few, first_of_many = (candidates(gemm("forward", shape, HALF), SM_80)[0] for shape in (few, STAGES[3]))
    assert area(first_of_few) < area(first_of_many)


# ---- keys ----------------------------------------------------------------------------------------------------------

SHAPE = ConvShape(256, 24, 24, 64, 64, 3, 3, 1, 1)


@pytest.mark.parametrize("operation", TABLE)
def test_batches_of_the_same_power_of_two_of_pixels_share_a_key(operation):
    key = lambda N: gemm(operation, dataclasses.replace(SHAPE, N=N), HALF, relu=True)  # noqa: E731
    assert key(120) == key(128) == key(200) == key(224)  # 2^17 = 131072 is 227 maps of 24x24, 2^16 is 113
    assert len({key(113), key(224), key(256)}) == 3


@pytest.mark.parametrize("operation", TABLE)
def test_the_candidates_of_such_batches_are_the_same_object(operation):
    sizes = [dataclasses.replace(SHAPE, N=N) for N in (120, 224)]
    assert candidates(gemm(operation, sizes[0], HALF)) is candidates(gemm(operation, sizes[1], HALF))


@pytest.mark.parametrize("field", ["C", "K", "R", "S", "stride", "padding"])
@pytest.mark.parametrize("operation", TABLE)
def test_channels_and_window_are_exact(operation, field):
    other = dataclasses.replace(SHAPE, **{field: getattr(SHAPE, field) + 1})
    assert gemm(operation, other, HALF) != gemm(operation, SHAPE, HALF)


def test_type_operation_and_every_switch_are_part_of_the_key():
    key = gemm("forward", SHAPE, HALF, relu=True, moments=False)
    assert key == gemm("forward", SHAPE, HALF, relu=True, moments=False)
    others = [
        gemm("grad_input", SHAPE, HALF, relu=True, moments=False),
        gemm("forward", SHAPE, torch.bfloat16, relu=True, moments=False),
        gemm("forward", SHAPE, HALF, relu=False, moments=False),
        gemm("forward", SHAPE, HALF, relu=True, moments=True),
        gemm("forward", SHAPE, HALF, relu=True),
    ]
    assert len({key, *others}) == 6


def test_a_key_names_the_epilogue():
    key = gemm("grad_input", SHAPE, HALF, epilogue=Epilogue.SHORTCUT_GRAD)
    assert "('epilogue', Epilogue.SHORTCUT_GRAD)" in repr(key)
    assert key != gemm("grad_input", SHAPE, HALF, epilogue=Epilogue.IDENTITY_GRAD)


# ---- the choice ------------------------------------------------------------------------------------------------------

CPU = torch.zeros(1)


def test_on_the_cpu_the_model_s_first_is_taken_and_none_runs():
    def run(config):
        raise AssertionError("ran")

    config = tuning.gemm_config("forward", SHAPE, CPU, run, precision="ieee")
    assert config == candidates(gemm("forward", SHAPE, CPU.dtype, precision="ieee"))[0]
    assert tuning.gemm_config("forward", SHAPE, CPU, run, precision="ieee") == config


def test_the_fastest_is_taken_where_there_is_a_clock(monkeypatch):
    monkeypatch.setattr(memory, "choose", memory.Choices(None).choose)
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda runs, device: [float(run() or 1) for run in runs])
    table = (Config(64, 64, 32, 4, 3), Config(32, 32, 32, 4, 3), Config(16, 16, 16, 4, 3))
    assert tuning.best(("key",), table, lambda config: abs(config.BLOCK_M - 32) + 0.5, CPU.device) == table[1]


@pytest.mark.parametrize("mode, count", [("on", 3), ("full", 5)])
def test_the_mode_says_how_many_tiles_are_timed(monkeypatch, mode, count):
    ran = set()
    monkeypatch.setattr(memory, "mode", mode)
    monkeypatch.setattr(memory, "choose", memory.Choices(None).choose)
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda runs, device: [float(run() or 1) for run in runs])
    table = tuple(Config(16, 16, 16, 4, stages) for stages in range(1, 6))
    tuning.best(("key",), table, ran.add, CPU.device)
    assert ran == set(table[:count])


def test_a_recorder_runs_every_candidate_of_its_device():
    ran = []
    for device in (SM_90, GFX942):
        ran.clear()
        with tuning.every_candidate(device):
            config = tuning.gemm_config("forward", SHAPE, CPU, ran.append, precision="tf32")
        expected = candidates(gemm("forward", SHAPE, CPU.dtype, precision="tf32"), device)
        assert tuple(ran) == expected and config == expected[0]
    ran.clear()
    tuning.gemm_config("forward", SHAPE, CPU, ran.append, precision="tf32")
    assert not ran


def test_a_configuration_is_found_again_by_its_name():
    for config in itertools.chain(*(table for kinds in TABLE.values() for table in kinds.values())):
        assert parse_config(str(config)) == config
