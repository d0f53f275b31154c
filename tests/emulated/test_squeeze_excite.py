"""The kernels of squeeze-and-excitation as compiled code: parity, and what they ask of the machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet import reference
from resnet.kernels.batch_norm_excite import batch_norm_excite
from resnet.kernels.batch_norm_excite_backward import batch_norm_excite_backward
from resnet.kernels.batch_norm_squeeze import batch_norm_squeeze
from resnet.kernels.batch_norm_squeeze_backward import (
    batch_norm_squeeze_backward_apply,
    batch_norm_squeeze_backward_reduce,
)
from resnet.kernels.host.tiling import tiling
from tests.helpers.blocks import SIXTEEN_BIT, draw, name_of
from tests.helpers.emulated_limits import (
    ACCESS_BYTES,
    INSTRUCTIONS_PER_ELEMENT,
    SECTOR_EFFICIENCY,
    TRAFFIC_OVER_FLOOR,
    WAVEFRONTS_OVER_IDEAL,
    Floor,
    wavefronts_over_ideal,
)
from tests.helpers.pairs import each_pair_compiled
from tests.helpers.parity import assert_as_exact_as_eager
from tests.helpers.squeeze_excite_launches import LAUNCHES, Case

FLOATS = (*SIXTEEN_BIT, torch.float32)


FLOORS = {
    "squeeze": Floor("squeeze_kernel", 1, 0),
    "squeeze, relu": Floor("squeeze_kernel", 1, 0),
    "excite": Floor("excite_kernel", 1, 1),
    "excite, both relus": Floor("excite_kernel", 1, 1),
    "excite, add": Floor("excite_kernel", 2, 1),
    "excite, inner relu, add": Floor("excite_kernel", 2, 1),
    "excite'": Floor("excite_backward_kernel", 3, 1),
    "excite', both relus": Floor("excite_backward_kernel", 3, 1),
    "excite', inner relu": Floor("excite_backward_kernel", 2, 0),
    "excite', no relu": Floor("excite_backward_kernel", 2, 0),
    "squeeze'": Floor("squeeze_backward_apply_kernel", 2, 1),
    "squeeze', relu": Floor("squeeze_backward_apply_kernel", 2, 1),
    "frozen squeeze'": Floor("squeeze_backward_apply_kernel", 1, 1),
    "frozen squeeze', relu": Floor("squeeze_backward_apply_kernel", 2, 1),
}
MERGES = [name for name in LAUNCHES if name not in FLOORS]
TRAFFIC_SHAPE = (8, 64, 24, 24)
per_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)


def launch(emulate, name: str, shape: tuple[int, ...], dtype: torch.dtype):
    """The report of the launch, without the merge of an image's splits, and the bytes of one activation."""
    case = Case.of(shape, dtype)
    with emulate() as launches:
        LAUNCHES[name](case)
    (report,) = (report for report in launches if report.name != "merge_images_kernel")
    return report, case.y.numel() * case.y.element_size()


# ---- traffic, accesses, instructions -------------------------------------------------------------------------------


@each_pair_compiled(name=tuple(FLOORS), dtype=FLOATS)
def test_bytes_moved_are_at_the_floor_without_bank_conflicts(emulate, name, dtype):
    report, activation = launch(emulate, name, TRAFFIC_SHAPE, dtype)
    floor = FLOORS[name]
    assert report.name == floor.kernel
    for sectors, passes in (
        (report.unique_read_sectors, floor.reads),
        (report.unique_read_sectors + report.unique_write_sectors, floor.reads + floor.writes),
    ):
        assert passes * activation <= 32 * sectors <= TRAFFIC_OVER_FLOOR * passes * activation
    assert wavefronts_over_ideal(report) <= WAVEFRONTS_OVER_IDEAL


@each_pair_compiled(name=tuple(FLOORS), C=(8, 24, 40, 64, 72, 128), dtype=(torch.float16, torch.float32))
def test_whole_sectors_are_moved_by_wide_accesses(emulate, name, C, dtype):
    """Two launches differ in eight rows of an image's last tile, and so in activations' traffic alone."""
    cut = tiling(512, C)
    lanes = 32 * C / (-(-C // cut.BLOCK_C) * cut.BLOCK_C)  # in a warp; the columns of the others lie beyond C
    few, many = (launch(emulate, name, (1, C, 1, M), dtype)[0] for M in (513, 521))
    assert few.ptx == many.ptx and few.grid == many.grid
    for access in ("gld", "gst") if FLOORS[name].writes else ("gld",):
        requests, sectors, moved = (
            getattr(many, f"{access}_{unit}") - getattr(few, f"{access}_{unit}")
            for unit in ("requests", "sectors", "bytes")
        )
        assert moved >= SECTOR_EFFICIENCY * 32 * sectors > 0, access
        assert moved >= ACCESS_BYTES * lanes * requests, access


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
@pytest.mark.parametrize("name", FLOORS)
def test_instructions_stay_within_the_limit(emulate, name, dtype):
    report, activation = launch(emulate, name, TRAFFIC_SHAPE, dtype)
    instructions = 32 * report.warp_instr / (activation / 2)
    assert instructions <= INSTRUCTIONS_PER_ELEMENT[report.name], f"{name}: {instructions:.1f}"


@each_pair_compiled(name=MERGES, dtype=FLOATS, N=(8, 300))
def test_a_merge_of_images_moves_no_activation(emulate, name, dtype, N):
    report, activation = launch(emulate, name, (N, 64, 24, 24), dtype)
    assert 32 * (report.unique_read_sectors + report.unique_write_sectors) <= (TRAFFIC_OVER_FLOOR - 1) * activation


# ---- results ---------------------------------------------------------------------------------------------------------


def chain(shape: tuple[int, ...], dtype: torch.dtype, inner: bool, seed: int) -> tuple[list[Tensor], dict[str, tuple]]:
    """All results, and (fused, eager, exact) by name, with every launcher called once.

    Eager and exact take the inputs of the kernel, and the masks of the ReLUs from what it stored.
    """
    c = Case.of(shape, dtype)
    c.y = draw(*shape, seed=seed, dtype=dtype)
    pooled, link = batch_norm_squeeze(c.y, c.stats, inner)
    out = batch_norm_excite(c.y, c.stats, c.gate, c.shortcut, inner)
    g, dgate, dlink = batch_norm_excite_backward(c.dout, c.y, out, c.stats, c.gate, inner)
    dweight, dbias = torch.empty_like(c.stats[0]), torch.empty_like(c.stats[0])
    sums = batch_norm_squeeze_backward_reduce(dlink, link, c.dpooled, c.y, dweight, dbias)
    dy, frozen = (
        batch_norm_squeeze_backward_apply(g, c.y, c.stats, dlink, c.dpooled, used, inner) for used in (sums, None)
    )
    h = batch_norm_excite(c.y, c.stats, torch.ones_like(c.gate), None, inner, relu=False)
    stop = h <= 0 if inner else torch.zeros_like(h, dtype=torch.bool)

    def plain(d: torch.dtype) -> list[Tensor]:
        stored = dtype if d == c.stats.dtype else d
        y, stats, gate, dpooled, known = (t.to(d) for t in (c.y, c.stats, c.gate, c.dpooled, g))
        mean, invstd, scale, shift = stats
        h = torch.where(stop, 0, reference.batch_norm_apply(y, scale, shift, relu=False))
        z = torch.relu(gate[..., None, None] * h + c.shortcut)
        dh = gate[..., None, None] * known + dpooled[..., None, None] / (shape[2] * shape[3])
        dh = torch.where(stop, 0, dh)
        summed = reference.batch_norm_backward_reduce(dh, y, mean, invstd)
        grads = [
            reference.batch_norm_backward_apply(dh, y, mean, invstd, scale, *sums.to(d), training).to(stored)
            for training in (True, False)
        ]
        xhat = torch.where(stop, 0, (y - mean[:, None, None]) * invstd[:, None, None])
        means = (h.mean((2, 3)).to(stored), (~stop).to(d).mean((2, 3)), xhat.mean((2, 3)))
        return [*means, z.to(stored), (known * h).sum((2, 3)).to(stored), *summed, *grads]

    torch.testing.assert_close(g, torch.where(out <= 0, 0, c.dout), rtol=0, atol=0)
    torch.testing.assert_close(torch.stack((dbias, dweight)), sums, rtol=0, atol=0)
    names = "pooled", "passed", "mean of xhat", "out", "dgate", "sum dh", "sum dh * xhat", "dy", "frozen dy"
    fused = [pooled, *link[:2], out, dgate, *sums, dy, frozen]
    judged = dict(zip(names, zip(fused, plain(c.stats.dtype), plain(torch.float64), strict=True), strict=True))
    return [*fused, link[2], dlink, g], judged


SHAPES = {
    "one pixel": (2, 6, 1, 1),
    "one channel, several tiles": (3, 1, 41, 37),
    "several tiles, ragged": (3, 16, 10, 20),
    "a hundred channels": (2, 100, 5, 6),
    "several column tiles": (2, 64, 12, 12),
    "split rows, ragged": (1, 64, 33, 32),
}


@each_pair_compiled(shape=SHAPES, dtype=FLOATS, inner={"inner relu": True, "no inner relu": False})
def test_results_are_as_exact_as_eager_and_the_same_bits_twice(emulate, shape, dtype, inner):
    with emulate():
        first, *others = (chain(shape, dtype, inner, seed) for seed in (0, 10, 20))
        again, _ = chain(shape, dtype, inner, seed=0)
    draws = [judged for _, judged in (first, *others)]
    for name in draws[0]:
        assert_as_exact_as_eager(name, *zip(*(judged[name] for judged in draws)))
    for a, b in zip(first[0], again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_float64_is_float64_throughout(emulate):
    with emulate():
        _, judged = chain((2, 6, 7, 5), torch.float64, True, seed=0)
    for name, (fused, eager, exact) in judged.items():
        assert_as_exact_as_eager(name, [fused], [eager], [exact])


@per_dtype
def test_nan_and_infinity_go_where_pytorch_puts_them(emulate, dtype):
    y = draw(2, 3, 4, 5, dtype=dtype)
    y[0, :, 1, 2] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    stats, gate, dout = torch.ones(4, 3), torch.ones(2, 3, dtype=dtype), torch.ones_like(y)
    with emulate():
        pooled, link = batch_norm_squeeze(y, stats, relu=True)
        out = batch_norm_excite(y, stats, gate, inner_relu=True)
        g, dgate, dlink = batch_norm_excite_backward(dout, y, out, stats, gate, inner_relu=True)
        dy = batch_norm_squeeze_backward_apply(g, y, stats, dlink, gate, None, relu=True)
    h = torch.relu(y + 1)
    torch.testing.assert_close(out, h, rtol=0, atol=0, equal_nan=True)
    assert g[0, :, 1, 2].tolist() == [1, 1, 0]
    for sums in (pooled, dgate):
        assert sums[0, 0].isnan() and sums[0, 1].isinf() and sums[0, 2].isfinite() and sums[1].isfinite().all()
    passes = ~(h <= 0)
    torch.testing.assert_close(link[0], passes.float().mean((2, 3)))
    assert dlink[0].tolist() == passes.sum((2, 3)).tolist()
    assert torch.equal(dy != 0, passes)
