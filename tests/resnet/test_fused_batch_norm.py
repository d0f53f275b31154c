"""`FusedResidual` and `FusedStem` with BatchNorm's modes, settings and running statistics, beside the eager modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet import Residual, Stem
from resnet.graphs import Graphed
from tests.conftest import DEVICE
from tests.helpers.blocks import averaged, draw, named, same, snapshot, trio
from tests.helpers.fused_cases import (
    BAD_COUNTS,
    IDENTITY,
    MODES,
    STRIDED,
    assert_exact,
    assert_refused,
    blocks,
    modes,
    train_and_eval,
)


@blocks
@modes
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3], ids=named("momentum"))
def test_running_statistics_follow_eagers_over_several_batches(any_backend, momentum, mode, args):
    def configure(module):
        MODES[mode](module)
        module.bn1.momentum = module.bn2.momentum = momentum

    t = trio(Residual, *args, dtype=torch.float64).each(configure)
    for seed in range(3):
        assert_exact(t, draw(2, 4, 4, 5, seed=seed))


@pytest.mark.parametrize("name", ["bn1 and bn2", "their counts"])
def test_norms_that_share_a_count_each_average_over_what_is_counted_by_then(any_backend, name):
    def share(module: nn.Module) -> None:
        averaged(module)
        if name == "bn1 and bn2":
            module.bn2 = module.bn1
        else:
            module.bn2.num_batches_tracked = module.bn1.num_batches_tracked

    t = trio(Residual, 4, 4, dtype=torch.float64).each(share)
    for seed in range(3):
        assert_exact(t, draw(2, 4, 4, 5, seed=seed))
    assert t.fused.bn1.num_batches_tracked == 6


@pytest.mark.parametrize("wrong", BAD_COUNTS)
@pytest.mark.parametrize(("args", "name"), [((Residual, 4, 4), "bn2"), ((Stem, 4, 4), "1")], ids=["block", "stem"])
def test_a_count_that_a_cumulative_average_cannot_take_is_refused(any_backend, args, name, wrong):
    change, error, message = BAD_COUNTS[wrong]
    module = trio(*args).each(averaged).fused
    bn = module.get_submodule(name)
    bn.num_batches_tracked = change(bn.num_batches_tracked)
    assert_refused(module, draw(2, 4, 6, 6), error, rf"{name}\.num_batches_tracked: {message}")
    module.eval()(draw(2, 4, 6, 6))


ODD_COUNTS = {
    "of shape (1,)": lambda count: count.view(1),
    "of int32": lambda count: count.int(),
    "of float64": lambda count: count.double(),
    "on the CPU": lambda count: count.cpu(),
}


@pytest.mark.parametrize("odd", ODD_COUNTS)
@pytest.mark.parametrize("args", [(Residual, 4, 4), (Stem, 4, 4)], ids=["block", "stem"])
def test_a_count_that_is_no_more_than_counted_may_be_anything_that_eager_counts_in(any_backend, args, odd):
    def change(module: nn.Module) -> None:
        for bn in module.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.num_batches_tracked = ODD_COUNTS[odd](bn.num_batches_tracked)

    t = trio(*args, dtype=torch.float64).each(change)
    for seed in range(3):  # a plan is recorded in the second run, and replayed in the third
        assert_exact(t, draw(2, 4, 6, 6, seed=seed, dtype=torch.float64))
    assert all(count == 3 for name, count in t.fused.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("args", [(Residual, 4, 4), (Stem, 4, 4)], ids=["block", "stem"])
def test_a_cumulative_average_counts_on_in_each_replay_of_a_cuda_graph(any_backend, args):
    t = trio(*args, dtype=torch.float64).each(averaged)
    x = draw(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        step = Graphed(lambda x: (t.fused(x),), x)
        t.exact.load_state_dict(t.fused.state_dict())
        for seed in range(4):
            x = draw(2, 4, 6, 6, seed=seed, dtype=torch.float64)
            torch.testing.assert_close(step(x)[0], t.exact(x))
    torch.testing.assert_close(snapshot(t.fused), snapshot(t.exact))


SETTINGS = {
    "untracked": {"track_running_stats": False},
    "not affine": {"affine": False},
    "not affine, untracked": {"affine": False, "track_running_stats": False},
    "large eps": {"eps": 0.1},
}
STEM_SETTINGS = {
    "cumulative average": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "not affine": {"affine": False},
}


def replaced_norms(**options):
    """A change that replaces both BatchNorms by new ones with these options."""

    def change(module: nn.Module) -> None:
        training = module.training
        for name in ("bn1", "bn2"):
            bn = nn.BatchNorm2d(getattr(module, name).num_features, **options)
            setattr(module, name, bn.to(DEVICE, module.conv1.weight.dtype).train(training))

    return change


@blocks
@train_and_eval
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_block_gives_eagers_values_with_any_settings_of_batch_norm(any_backend, options, train, args):
    t = trio(Residual, *args, dtype=torch.float64, train=train).each(replaced_norms(**options))
    x = draw(2, 4, 5, 6)
    assert_exact(t, x)
    with torch.no_grad():
        torch.testing.assert_close(t.each(nn.Module.eval).fused(x.double()), t.exact(x.double()))


def test_statistics_that_are_tracked_no_longer_are_kept_and_used_in_evaluation(any_backend):
    """`track_running_stats` becomes False. Training then leaves the buffers, and evaluation still uses them."""

    def change(module):
        module.bn1.track_running_stats = module.bn2.track_running_stats = False

    t = trio(Residual, 4, 4, dtype=torch.float64).each(change)
    before = snapshot(t.fused)
    x = draw(2, 4, 5, 6)
    assert_exact(t, x)
    same(snapshot(t.fused), before)
    assert_exact(t.each(nn.Module.eval), x)


def test_training_under_no_grad_still_updates_the_running_statistics(any_backend):
    t = trio(Residual, *STRIDED, dtype=torch.float64)
    x = draw(2, 4, 5, 6).double()
    with torch.no_grad():
        torch.testing.assert_close(t.fused(x), t.exact(x))
    torch.testing.assert_close(snapshot(t.fused), snapshot(t.exact))


@pytest.mark.parametrize("options", STEM_SETTINGS.values(), ids=STEM_SETTINGS)
@train_and_eval
def test_a_stem_gives_eagers_values_with_any_settings_of_batch_norm(any_backend, train, options):
    def change(module):
        module[1] = nn.BatchNorm2d(4, **options).to(DEVICE, module[0].weight.dtype).train(train)

    t = trio(Stem, 3, 4, dtype=torch.float64, train=train).each(change)
    for seed in range(2):
        assert_exact(t, draw(2, 3, 10, 9, seed=seed))


@pytest.mark.parametrize(
    ("args", "shape", "mode"),
    [
        pytest.param(IDENTITY, (1, 4, 1, 1), "train", id="identity-train"),
        pytest.param(STRIDED, (1, 4, 2, 2), "train", id="1x1 stride 2-train"),
        pytest.param(IDENTITY, (1, 4, 1, 1), "bn1 eval", id="identity-bn1 eval"),
        pytest.param(IDENTITY, (1, 4, 1, 1), "bn2 eval", id="identity-bn2 eval"),
    ],
)
def test_one_value_per_channel_is_refused_by_a_block_in_training(any_backend, args, shape, mode):
    block = trio(Residual, *args).each(MODES[mode]).fused
    message = r"bn[12]: expected more than 1 value per channel when training, got input size \(1, \d, 1, 1\)"
    assert_refused(block, draw(*shape), ValueError, message)
    block.eval()(draw(*shape))


def test_one_value_per_channel_is_refused_by_a_stem_in_training(any_backend):
    stem = trio(Stem, 3, 4).fused
    assert_refused(stem, draw(1, 3, 2, 1), ValueError, r"1: expected more than 1 value .* \(1, 4, 1, 1\)")
    stem.eval()(draw(1, 3, 2, 1))
