"""`nn.SyncBatchNorm` in fused modules: two processes give what one gives with both their batches."""

from __future__ import annotations

import copy
import datetime
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import resnet
from resnet import (
    BasicBlock,
    Bottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    FusedResidual,
    FusedStem,
    Residual,
    ResidualBottleneck,
    SmallStem,
    Stem,
    fuse,
)
from resnet.collectives import merge_moments, merge_sums
from resnet.kernels.batch_norm_statistics import batch_norm_statistics
from resnet.norm import Norm
from resnet.triton_backend.batch_norm import batch_stats
from tests.conftest import DEVICE
from tests.helpers.blocks import FUSED, averaged, deep_stems, draw, randomize, same, snapshot, step
from tests.helpers.gated import FusedInner, Inner
from tests.helpers.written_blocks import Layer, PreActivated, PreActivatedNarrow, Unit

PROCESSES = 2
Result = dict[str, Tensor]


def frozen(*names: str) -> Callable[[nn.Module], None]:
    """A change after which these modules and the input want no gradient."""

    def change(module: nn.Module) -> None:
        module.needs_no_dx = True
        for name in names:
            module.get_submodule(name).requires_grad_(False)

    return change


def untracked(module: nn.Module) -> None:
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.track_running_stats, bn.running_mean, bn.running_var, bn.num_batches_tracked = False, None, None, None


def without_bias(stem: nn.Module) -> None:
    stem[0].bias = None


def unchanged(module: nn.Module) -> None:
    pass


def deep_stem(in_channels: int) -> nn.Module:
    return deep_stems(in_channels=in_channels).eager


def chain(in_channels: int) -> nn.Module:
    return nn.Sequential(BasicBlock(in_channels, 6, 2), BasicBlock(6, 6), BasicBlock(6, 4))


# (class, the constructor's arguments, a change of the module)
CASES = {
    "identity": (Residual, (4, 4), unchanged),
    "1x1, averaged": (Residual, (4, 6, True, 2), averaged),
    "bottleneck, 1x1": (ResidualBottleneck, (4, 8, True), unchanged),
    "normed shortcut": (BasicBlock, (4, 6, 2), unchanged),
    "three units, normed shortcut": (Bottleneck, (4, 2), unchanged),
    "pooled shortcut": (partial(BasicBlock, avg_down=True), (4, 6, 2), unchanged),
    "gates": (partial(BasicBlock, squeeze_excite=True), (4, 6, 2), unchanged),
    "gates, identity": (partial(BasicBlock, squeeze_excite=True), (4, 4), averaged),
    "gates before the last convolution": (Inner, (4, 4), unchanged),
    "pre-activation": (PreActivated, (4, 6, 2), unchanged),
    "pre-activation, the second norm is not trained": (PreActivatedNarrow, (4, 4), frozen("conv1", "norm1", "norm2")),
    "stem": (Stem, (3, 4), unchanged),
    "deep stem": (deep_stem, (3,), unchanged),
    "stem, untracked": (Stem, (3, 4), untracked),
    "small stem": (SmallStem, (3, 4), unchanged),
    "small stem, no bias": (SmallStem, (3, 4), without_bias),
    "a chain of blocks": (chain, (4,), unchanged),
    "the last norm alone is trained": (BasicBlock, (4, 6, 2), frozen("conv1", "bn1", "conv2", "downsample")),
    "the first convolution is not trained": (Bottleneck, (4, 2), frozen("conv1")),
    "the shortcut alone is trained": (Bottleneck, (4, 2), frozen("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")),
}
REPEATED = ("three units, normed shortcut",)
INTERPRETED = (
    "1x1, averaged",
    "three units, normed shortcut",
    "pooled shortcut",
    "gates, identity",
    "gates before the last convolution",
    "pre-activation",
    "stem",
    "deep stem",
    "small stem",
    "a chain of blocks",
    "the last norm alone is trained",
)
# Images of each process, step by step. The first process has as many in three steps, the other one never has.
SHARES = [(2, 1), (2, 0), (2, 2), (1, 3), (0, 2)]
STEPS = {"torch": 5, "triton": 4}
MANY = {"identity": (20, 16)}  # pixels, of which PyTorch's operators sum up groups where a process has 2 images or more


def made(case: str) -> nn.Module:
    kind, arguments, change = CASES[case]
    torch.manual_seed(0)
    module = kind(*arguments)
    randomize(module)
    change(module)
    return module.to(DEVICE, torch.float64)


def synchronized(case: str) -> nn.Module:
    fused = made(case)
    if type(fused) is Inner:
        fused.__class__ = FusedInner
    else:
        assert fuse(fused).fused
    return nn.SyncBatchNorm.convert_sync_batchnorm(fused)


def batch(case: str, i: int) -> Tensor:
    """The images of all processes. The means are far from zero, and each image has another."""
    images = sum(SHARES[i])
    x = draw(images, CASES[case][1][0], *MANY.get(case, (4, 3)), seed=i, dtype=torch.float64)
    return x + torch.arange(images, device=DEVICE).add(10).view(-1, 1, 1, 1)


def trained(module: nn.Module, x: Tensor, dout: Tensor) -> Result:
    """What a step gives: the output, the gradients that are wanted, and the buffers."""
    x = x.detach().requires_grad_(not hasattr(module, "needs_no_dx"))
    module.zero_grad()
    out = module(x)
    out.backward(dout)
    return {
        "out": out.detach(),
        "dx": torch.zeros_like(x) if x.grad is None else x.grad,
        **{f"d {name}": p.grad.clone() for name, p in module.named_parameters() if p.requires_grad},
        **{name: buffer.clone() for name, buffer in module.named_buffers()},
    }


def incoming(case: str, i: int) -> Tensor:
    """The gradient of the output of all processes."""
    with torch.no_grad():
        size = made(case)(batch(case, i)).shape
    return draw(*size, seed=100 + i, dtype=torch.float64)


def own_share(whole: Tensor, i: int, rank: int) -> Tensor:
    return whole.split(SHARES[i])[rank]


# ---- what each process runs ------------------------------------------------------------------------------------------


def in_a_group(rank: int, folder: str) -> None:
    """What `test_two_processes_...` compares, in a file; what concerns one process alone is asserted here."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".* one by one")
    warnings.simplefilter("error", FutureWarning)
    settings = {"init_method": f"file://{folder}/rendezvous", "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, **settings)
    found = {}
    for backend in ("torch", "triton"):
        with resnet.backend(backend), resnet.convolution("pytorch"):
            for case in CASES if backend == "torch" else INTERPRETED:
                found[backend, case] = steps_of(case, rank, STEPS[backend])
                if case in REPEATED:
                    same(found[backend, case][0], steps_of(case, rank, 1)[0])
    found["far"] = far_statistics(far_values().split(200)[rank], dist.group.WORLD.group_name)
    assert_frozen_statistics_are_not_shared(rank)
    assert_a_small_group_is_one_process(rank)
    assert_a_graph_gives_the_same(rank)
    assert_nothing_anywhere_changes_nothing()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def steps_of(case: str, rank: int, count: int) -> list[Result]:
    """The first steps of training, with this process's share of each batch."""
    module = synchronized(case)
    return [
        trained(
            module,
            own_share(batch(case, i), i, rank),
            own_share(incoming(case, i), i, rank) * PROCESSES,  # since gradients are averaged, and these are of a sum
        )
        for i in range(count)
    ]


def far_values() -> Tensor:
    """Enough for several partials in each process, with means of up to 1e6 deviations, which differ between both."""
    x = draw(400, 4, 5, 5) + torch.tensor([0.0, 1e2, 1e4, 1e6], device=DEVICE).view(1, -1, 1, 1)
    x[:200] += 1
    return x


def far_statistics(x: Tensor, group: str) -> tuple[Tensor, ...]:
    """Stats, and the running statistics, as the kernels take them."""
    running = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    norm = Norm(None, None, *running, None, True, 0.5, 1e-5, group=group)
    return batch_stats(batch_norm_statistics(x), norm), *running


def assert_frozen_statistics_are_not_shared(rank: int) -> None:
    if rank == 0:  # the other one does not answer
        expected, module = made("normed shortcut").eval(), synchronized("normed shortcut").eval()
        x = batch("normed shortcut", 0)
        torch.testing.assert_close(step(module, x), step(expected, x))


def assert_a_small_group_is_one_process(rank: int) -> None:
    groups = [dist.new_group([i]) for i in range(PROCESSES)]
    expected = made("identity")
    module = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected), groups[rank])
    fused = FusedResidual(4, 4).double().to(DEVICE)
    fused.bn1, fused.bn2 = module.bn1, module.bn2
    fused.load_state_dict(expected.state_dict())
    x = batch("identity", rank)[: 2 + rank]
    torch.testing.assert_close(step(fused, x), step(expected, x))


def assert_a_graph_gives_the_same(rank: int) -> None:
    module = synchronized("normed shortcut")
    compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
    x = own_share(batch("normed shortcut", 1), 1, rank)
    same(step(module, x), {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x).items()})


def assert_nothing_anywhere_changes_nothing() -> None:
    module = synchronized("normed shortcut")
    before = snapshot(module)
    module(torch.empty(0, 4, 5, 4, device=DEVICE, dtype=torch.float64)).sum().backward()
    counted = {name: value + 1 if name.endswith("num_batches_tracked") else value for name, value in before.items()}
    same(snapshot(module), counted)


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path):
    """Bit-identical from run to run, uneven and empty batches too: a process that waited in vain would fail in it."""
    torch.multiprocessing.spawn(in_a_group, (str(tmp_path),), PROCESSES)
    ranks = [torch.load(tmp_path / f"{rank}.pt", map_location=DEVICE) for rank in range(PROCESSES)]
    for rank in ranks:  # a merge keeps the digits of large means
        torch.testing.assert_close(rank["far"], far_statistics(far_values(), ""), rtol=2e-6, atol=1e-6)
    for case in CASES:
        eager = made(case)
        for i in range(STEPS["torch"]):
            expected = trained(eager, batch(case, i), incoming(case, i))
            for backend in ("torch", "triton") if case in INTERPRETED and i < STEPS["triton"] else ("torch",):
                assert_together([rank[backend, case][i] for rank in ranks], expected, f"{backend}, {case}, step {i}")


def assert_together(found: list[Result], expected: Result, place: str) -> None:
    """Outputs and dx, joined, parameters' gradients, averaged, and each process's buffers are those expected."""
    joined = {}
    for name, value in found[0].items():
        values = [result[name] for result in found]
        if name in ("out", "dx"):
            joined[name] = torch.cat(values)
        elif name.startswith("d "):
            joined[name] = torch.stack(values).mean(0)
        else:
            assert all(torch.equal(other, value) for other in values), f"{place}: {name} differs between processes"
            joined[name] = value
    joined["dx"] = joined["dx"] / PROCESSES
    torch.testing.assert_close(joined, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{place}: {text}")


@pytest.mark.parametrize("case", ["normed shortcut", "stem", "small stem"])
@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_an_ordinary_batch_norm(any_backend, recwarn, case, training):
    module, x = synchronized(case).train(training), batch(case, 0)
    ordinary = FUSED[CASES[case][0]](*CASES[case][1]).to(DEVICE, torch.float64).train(training)
    ordinary.load_state_dict(module.state_dict())
    same(step(module, x), step(ordinary, x))
    assert not [w for w in recwarn if "one by one" in str(w.message)]


def test_one_value_per_channel_is_refused_in_one_process():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(FusedResidual(4, 4)).to(DEVICE)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        module(torch.rand(1, 4, 1, 1, device=DEVICE))


def test_a_model_may_be_converted_before_or_after_it_is_fused():
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    eager = nn.Sequential(Stem(3, 4), BasicBlock(4, 6, 2), Bottleneck(6, 2)).to(DEVICE)
    before, after = convert(copy.deepcopy(eager)), copy.deepcopy(eager)
    reports = [fuse(before), fuse(after)]
    after = convert(after)
    reports.append(fuse(after))
    assert [len(report.fused) for report in reports] == [3, 3, 3]
    for module in (before, after):
        assert [type(part) for part in module] == [FusedStem, FusedBasicBlock, FusedBottleneck]
        assert type(module[1].downsample[1]) is nn.SyncBatchNorm
    x = draw(2, 3, 16, 16)
    same(step(before, x), step(after, x))


class Derived(nn.SyncBatchNorm):
    """May do anything."""


def test_a_class_derived_from_it_is_left_alone():
    block = BasicBlock(4, 4)
    block.bn2 = Derived(4)
    (left,) = fuse(block).left
    assert left.reason == "bn2 is a Derived, not a BatchNorm2d"


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[str]:
    """The name of a group that gathers from this process alone."""
    backend = "nccl" if DEVICE.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [Unit, lambda: Layer(3, 8, 3)], ids=["written", "sequence"])
def test_a_layer_that_fuse_found_is_synchronized_where_pytorchs_own_norm_refuses(any_backend, group_of_one, make):
    eager, x = make().to(DEVICE), draw(2, 3, 9, 8)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager))
    assert fuse(model).fused
    torch.testing.assert_close(model(x), eager(x))


def test_what_one_process_gathers_is_what_it_gave(group_of_one):
    mean, variance = draw(2, 6).abs().unbind()
    *merged, rows = merge_moments(mean, variance, 8, group_of_one)
    torch.testing.assert_close([v.float() for v in merged], [mean, variance], rtol=0, atol=0)
    assert rows == 8
    sums = draw(2, 6)
    same({"sums": merge_sums(sums, 8, group_of_one)}, {"sums": sums})
