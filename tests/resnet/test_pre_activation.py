"""Blocks with pre-activation on one operator, beside eager: values, gradients, what is kept, what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet import fuse
from tests.conftest import DEVICE
from tests.helpers.blocks import (
    SIXTEEN_BIT,
    Trio,
    averaged,
    draw,
    infer,
    keep_norms_constant,
    name_of,
    randomize,
    same,
    step,
    trio,
)
from tests.helpers.fused_cases import assert_exact, assert_refused, assert_trios_parity, fused_alone, train_and_eval
from tests.helpers.kept import kept_bytes
from tests.helpers.written_blocks import PreActivated, PreActivatedInSequence, PreActivatedNarrow, Wide

CASES = {
    "identity": (PreActivated, 8, 8),
    "convolution of what is activated": (PreActivated, 8, 12),
    "convolution of what is activated, stride 2": (PreActivated, 8, 12, 2),
    "bottleneck, identity": (PreActivatedNarrow, 8, 8),
    "bottleneck, convolution of what is activated, stride 2": (PreActivatedNarrow, 8, 12, 2),
    "wide, stride 2": (Wide, 8, 12, 2),
    "biases, identity": (PreActivatedInSequence, 8, 8),
    "biases, convolution of x": (PreActivatedInSequence, 8, 12),
    "biases, convolution of x, stride 2": (PreActivatedInSequence, 8, 12, 2),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
one = CASES["identity"]
pytestmark = fused_alone


def input_of(case: tuple, *size: int, **options) -> Tensor:
    N, H, W = size or (3, 7, 6)
    return draw(N, case[1], H, W, **options)


# ---- values and gradients ------------------------------------------------------------------------------------------


@cases
@train_and_eval
def test_a_block_gives_eagers_values_in_float64(any_backend, case, train):
    t, x = trio(*case, dtype=torch.float64, train=train), input_of(case, dtype=torch.float64)
    assert_exact(t, x)
    assert_exact(t.each(nn.Module.eval), x, infer)


@cases
@train_and_eval
def test_a_block_is_as_exact_as_eager(any_backend, case, train):
    trios = [trio(*case, seed=seed, train=train) for seed in range(4)]
    assert_trios_parity(trios, (4, case[1], 7, 6))


@cases
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_a_block_of_a_16_bit_type_on_pytorchs_operators_is_as_exact_as_eager(dtype, case):
    kind, C, K, *stride = case
    trios = [trio(kind, 2 * C, 2 * K, *stride, seed=seed, dtype=dtype) for seed in range(6)]
    assert_trios_parity(trios, (8, 2 * C, 24, 24))


@pytest.mark.parametrize("wants_dx", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize(
    "trained",
    [("bn1", "norm1"), ("conv1",), ("bn2", "norm2"), ("conv2",), ("shortcut", "downsample"), ("conv", "shortcut")],
    ids=lambda names: names[0],
)
@pytest.mark.parametrize("case", [(PreActivated, 8, 12, 2), (PreActivatedNarrow, 8, 8), (PreActivated, 8, 8)])
def test_each_gradient_may_be_wanted_alone(any_backend, case, trained, wants_dx):
    t, x, grads = trio(*case, dtype=torch.float64), input_of(case, dtype=torch.float64).requires_grad_(wants_dx), []
    for block in (t.fused, t.exact):
        for name, p in block.named_parameters():
            p.requires_grad_(name.startswith(trained))
        leaves = [p for p in block.parameters() if p.requires_grad] + [x] * wants_dx
        grads.append(torch.autograd.grad(block(x).square().sum(), leaves) if leaves else ())
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


@cases
@pytest.mark.parametrize("change", [keep_norms_constant, averaged], ids=["norms of constants", "averages"])
def test_other_modes_of_the_norms_give_eagers_values(any_backend, case, change):
    assert_exact(trio(*case, dtype=torch.float64).each(change), input_of(case, dtype=torch.float64))


@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_one_norm_may_be_in_evaluation(any_backend, name):
    t = trio(*one, dtype=torch.float64).each(lambda block: getattr(block, name).eval())
    assert_exact(t, input_of(one, dtype=torch.float64))


@pytest.mark.parametrize("change", [{"groups": 4}, {"dilation": 2, "padding": 2}], ids=["groups", "dilation"])
def test_convolutions_may_have_groups_or_a_dilation(any_backend, change):
    torch.manual_seed(0)
    eager = PreActivated(8, 8)
    eager.conv2 = nn.Conv2d(8, 8, 3, **{"padding": 1, **change})
    randomize(eager)
    eager.to(DEVICE, torch.float64)
    fused = copy.deepcopy(eager)
    assert len(fuse(fused).fused) == 1
    assert_exact(Trio(eager, fused, eager), input_of(one, dtype=torch.float64))


def test_an_empty_batch_gives_empty_maps_and_gradients_of_zeros(any_backend):
    t, x = trio(*one, train=False), input_of(one)[:0].requires_grad_()
    for block in (t.fused, t.eager):
        block.got = block(x), *torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    torch.testing.assert_close(t.fused.got, t.eager.got)


# ---- how it is called ----------------------------------------------------------------------------------------------


def test_a_block_compiles_into_one_graph(any_backend):
    torch.compiler.reset()
    t, x = trio(*CASES["convolution of what is activated"], dtype=torch.float64), input_of(one, dtype=torch.float64)
    compiled = torch.compile(t.fused, backend="aot_eager", fullgraph=True)
    got = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x).items()}
    torch.testing.assert_close(got, step(t.exact, x), atol=1e-9, rtol=1e-7)


def test_a_block_under_a_checkpoint_does_what_eager_does(any_backend):
    t, x = trio(*one, dtype=torch.float64), input_of(one, dtype=torch.float64)

    def again(call: Callable[[], Tensor]) -> Tensor:
        return checkpoint(call, use_reentrant=False)

    torch.testing.assert_close(step(t.fused, x, again), step(t.exact, x, again), atol=1e-9, rtol=1e-7)


STRIDED = CASES["convolution of what is activated, stride 2"]
BIASED = CASES["biases, convolution of x, stride 2"]


@pytest.mark.parametrize("case", [one, STRIDED, BIASED], ids=["identity", "strided", "biases"])
def test_a_block_behind_a_convolution_under_autocast_is_as_exact_as_eager(case):
    def run(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return step(block, x)

    trios = []
    for seed in range(6):
        conv = nn.Conv2d(case[1], case[1], 1).to(DEVICE)
        blocks = trio(*case, seed=seed).all
        trios.append(Trio(*(nn.Sequential(copy.deepcopy(conv), block) for block in blocks)))
        trios[-1].exact.double()
    assert_trios_parity(trios, (8, case[1], 12, 12), run)


@pytest.mark.parametrize("case", [one, STRIDED], ids=["identity", "strided"])
def test_a_wider_input_under_autocast_is_left_to_eager(monkeypatch, case):
    """Its first norm and the add would keep float32's digits."""
    monkeypatch.setattr("resnet.fused.module._warned", set())
    t, x = trio(*case), input_of(case)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with pytest.warns(UserWarning, match="autocast leaves the input torch.float32"):
            got = t.fused(x)
        torch.testing.assert_close(got, t.eager(x), rtol=0, atol=0)


def test_a_pickled_block_is_fused():
    t, x = trio(*CASES["wide, stride 2"]), input_of(one)
    twin = pickle.loads(pickle.dumps(t.fused))
    assert type(twin) is type(t.fused)
    same(step(twin, x), step(t.fused, x))


# ---- what is kept, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PreActivated, PreActivatedNarrow])
def test_the_input_and_all_convolutions_but_the_last_are_kept(any_backend, kind):
    """Eager keeps what each norm reads and what each ReLU gives, twice as many."""
    widths = [8, 8] if kind is PreActivated else [8, 4, 4]
    x = draw(2, 8, 24, 24)
    maps, stats = sum(widths[1:]) * 2 * 24 * 24 * 4, sum(widths) * 4 * 4
    assert kept_bytes(trio(kind, 8, 8).fused, x) == maps + stats


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 5, 6, 6), ValueError, "expected 8 channels, got 5"),
        (torch.ones(2, 8, 6), ValueError, "4"),
        (torch.ones(2, 8, 6, 6, dtype=torch.float64), TypeError, "float64"),
        (torch.ones(1, 8, 1, 1), ValueError, "more than 1 value per channel"),
        ("image", TypeError, "str"),
    ],
    ids=["channels", "rank", "type", "one value per channel", "no tensor"],
)
def test_a_bad_input_is_refused_before_anything_changes(any_backend, x, error, message):
    assert_refused(trio(*one).fused, x.to(DEVICE) if isinstance(x, Tensor) else x, error, message)


def test_a_bad_later_norm_is_refused_before_the_first_has_changed(any_backend):
    block = trio(*one).fused
    block.bn2.running_var = torch.ones(5, device=DEVICE)
    assert_refused(block, input_of(one), ValueError, "bn2.running_var")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: block.bn1.register_forward_hook(lambda *_: None), "bn1 has hooks"),
        (lambda block: setattr(block, "bn2", nn.GroupNorm(2, 8)), "bn2 is a GroupNorm"),
        (lambda block: setattr(block, "conv2", nn.Conv2d(8, 8, 5, padding=2)), "conv2.kernel_size"),
        (lambda block: setattr(block, "conv1", nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")), "padding_mode"),
    ],
)
def test_what_is_not_fused_runs_pytorchs_operators_and_says_why(monkeypatch, change, reason):
    monkeypatch.setattr("resnet.fused.module._warned", set())
    t = trio(*one)
    for block in (t.fused, t.eager):
        torch.manual_seed(0)
        change(block)
        block.to(DEVICE)
    with pytest.warns(UserWarning, match=reason):
        torch.testing.assert_close(t.fused(input_of(one)), t.eager(input_of(one)), rtol=0, atol=0)
