"""`kernels/conv_forward.py` as compiled code: parity, and what it asks of memory, shared memory and issue slots.

Float64 is emulated for sm_80 alone: the emulator lacks the tensor-core instruction that sm_90 has for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from resnet.kernels import conv_forward as kernels
from resnet.kernels import tuning
from tests.helpers.convolutions import Case
from tests.helpers.emulated_limits import (
    INSTRUCTIONS_PER_PRODUCT,
    SECTOR_EFFICIENCY,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    wavefronts_over_ideal,
)
from tests.helpers.parity import assert_as_exact_as_eager

SIXTEEN_BIT_TILE = tuning.Config(128, 64, 32, 4, 4)
SMALL_TILE = tuning.Config(64, 16, 16, 4, 2)


@dataclass(frozen=True)
class Launch:
    """Arguments of `Case.of`, and the tile."""

    shape: tuple[int, int, int, int]
    K: int
    R: int
    stride: int
    padding: int
    dtype: torch.dtype
    tile: tuning.Config
    options: tuple[str, ...] = ()
    dilation: int = 1

    def case(self) -> Case:
        options = {"dilation": self.dilation, **dict.fromkeys(self.options, True)}
        return Case.of(self.shape, self.K, self.R, self.stride, self.padding, self.dtype, **options)


# No tile divides their rows, columns and channels. Every type and every option is there.
RAGGED = {
    "prologue and moments": Launch(
        (2, 40, 7, 9), 24, 3, 1, 1, torch.float16, SIXTEEN_BIT_TILE, ("prologue", "moments", "bias")
    ),
    "shortcut with its moments": Launch(
        (2, 100, 6, 7), 72, 3, 2, 1, torch.bfloat16, SIXTEEN_BIT_TILE, ("shortcut", "shortcut_moments", "moments")
    ),
    "inference with skip": Launch((1, 6, 9, 8), 20, 3, 1, 1, torch.float32, SMALL_TILE, ("frozen", "skip", "relu")),
    "TensorFloat-32": Launch((2, 20, 5, 6), 20, 3, 3, 1, torch.float32, SMALL_TILE, ("prologue", "tf32")),
    "dilation": Launch(
        (2, 40, 7, 9), 24, 3, 1, 2, torch.bfloat16, SIXTEEN_BIT_TILE, ("prologue", "moments", "shortcut"), dilation=2
    ),
    "flattened axis, dilation": Launch((1, 3, 9, 8), 20, 3, 2, 3, torch.float32, SMALL_TILE, ("moments",), dilation=3),
    "flattened axis": Launch((2, 3, 15, 13), 20, 7, 2, 3, torch.bfloat16, SIXTEEN_BIT_TILE, ("moments",)),
    "one pixel, one channel": Launch((1, 1, 1, 1), 1, 1, 1, 0, torch.float16, SMALL_TILE, ("moments",)),
}
DOUBLE = Launch((1, 6, 5, 5), 5, 3, 2, 1, torch.float64, SMALL_TILE, ("prologue", "moments", "shortcut"))


def run(emulate, monkeypatch, launch: Launch):
    monkeypatch.setattr(tuning.choice, "candidates", lambda *_: (launch.tile,))
    case = launch.case()
    with emulate() as reports:
        out = case.run()
    return case, out, reports[-1]


def assert_parity(case: Case, out: kernels.ConvOutput) -> None:
    sides = ((out.y, out.shortcut), case.reference(exact=False), case.reference(exact=True))
    for name, *values in zip(("y", "shortcut"), *sides):
        if values[0] is not None:
            assert_as_exact_as_eager(name, *([v] for v in values))
    for moments, y in ((out.moments, out.y), (out.shortcut_moments, out.shortcut)):
        if moments is not None:
            tiles = y.double().permute(0, 2, 3, 1).flatten(0, 2).split(moments.rows)
            exact = [torch.stack([t.mean(0) for t in tiles]), torch.stack([t.var(0, False) * len(t) for t in tiles])]
            eps = torch.finfo(moments.partial.dtype).eps
            for got, expected in zip(moments.partial.double(), exact):
                torch.testing.assert_close(got, expected, rtol=32 * eps, atol=32 * eps * expected.abs().max().item())


@pytest.mark.core
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_tiles_are_as_exact_as_eager(emulate, monkeypatch, name):
    case, out, _ = run(emulate, monkeypatch, RAGGED[name])
    assert_parity(case, out)


@pytest.mark.parametrize("emulate", [80], indirect=True, ids=["sm_80"])
def test_float64_is_as_exact_as_eager(emulate, monkeypatch):
    case, out, _ = run(emulate, monkeypatch, DOUBLE)
    assert_parity(case, out)


# ---- the limits ----------------------------------------------------------------------------------------------------

BULK = Launch((4, 64, 16, 16), 64, 3, 1, 1, torch.float16, tuning.Config(128, 64, 64, 4, 3))  # whole tiles


def bulk(*options: str, **changes: object) -> Launch:
    return Launch(**{**vars(BULK), "options": options, **changes})


BULKS = {
    "plain": bulk(),
    "prologue, moments": bulk("prologue", "moments"),
    "prologue in steps, moments": bulk(
        "prologue", "moments", shape=(2, 128, 16, 16), K=128, tile=tuning.Config(128, 128, 64, 8, 3)
    ),
    "prologue, moments, dilation": bulk("prologue", "moments", padding=2, dilation=2),
    "shortcut, moments": bulk("shortcut", "moments", K=128, stride=2),
    "inference": bulk("frozen", "skip", "relu"),
}


@pytest.mark.parametrize("name", BULKS)
def test_whole_tiles_move_each_byte_once_in_whole_sectors(emulate, monkeypatch, request, name):
    case, out, report = run(emulate, monkeypatch, BULKS[name])
    assert_parity(case, out)
    assert report.gld_efficiency >= SECTOR_EFFICIENCY and report.gst_efficiency >= SECTOR_EFFICIENCY
    assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL
    shortcut = case.options.get("shortcut")
    activations = (case.x, out.y, out.shortcut, case.options.get("skip"))
    weights = (case.weight, shortcut and shortcut.weight)
    floor, read = (sum(t.nbytes for t in ts if t is not None) for ts in (activations, weights))
    assert floor <= report.dram_bytes - read <= TRAFFIC_OVER_FLOOR * floor
    limit = INSTRUCTIONS_PER_PRODUCT["forward"][name][request.node.callspec.params["emulate"]]
    assert sum(report.instr.values()) <= limit * report.mma


def test_the_flattened_axis_has_no_bank_conflicts_and_instructions_stay_within_the_limit(emulate, monkeypatch, request):
    launch = bulk("moments", shape=(1, 3, 64, 64), R=7, stride=2, padding=3)
    case, out, report = run(emulate, monkeypatch, launch)
    assert_parity(case, out)
    assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL
    limit = INSTRUCTIONS_PER_PRODUCT["forward"]["flattened axis, moments"][request.node.callspec.params["emulate"]]
    assert sum(report.instr.values()) <= limit * report.mma
