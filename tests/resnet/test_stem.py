"""`FusedStem`: the reference's first stage in every respect but the bytes it keeps and moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet import FusedStem, Stem
from tests.conftest import DEVICE
from tests.helpers.blocks import HALF, assert_parity, draw, name_of, one_thread, same, snapshot, step, trio  # noqa: F401
from tests.helpers.parity import assert_as_exact_as_eager

SAVED_OF_EAGER = 0.6
# Of NaN and Inf on purpose, by the interpreter's NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPES = {"even": (2, 1, 12, 8), "odd, three channels": (2, 3, 9, 7), "tiny": (3, 1, 3, 2)}


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Of what backward keeps, each storage once, without the parameters and the input."""
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    for t in (*module.parameters(), x):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(sizes.values())


def assert_steps_parity(shape: tuple[int, int, int, int], dtype: torch.dtype, train: bool, draws: int) -> None:
    results = []
    for seed in range(draws):
        modules = trio(Stem, shape[1], 4, seed=seed, dtype=dtype, train=train)
        x = draw(*shape, seed=seed, dtype=dtype)
        steps = tuple(step(module, x) for module in modules.all)
        if train:  # the bias cancels: zero, where eager has what rounding leaves of it
            assert not steps[1]["d 0.bias"].any()
            for values in steps:
                del values["d 0.bias"]
        results.append(steps)
    assert_parity(results)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_gradients_and_statistics_as_exact_as_eager(any_backend, shape, dtype, train):
    assert_steps_parity(shape, dtype, train, draws=3)


def test_a_window_larger_than_the_fused_grad_weight_takes(any_backend):
    modules, conv = trio(Stem, 1, 4), nn.Conv2d(1, 4, 31, 2, 15)
    gradients = []
    for module in modules.all:
        module[0] = copy.deepcopy(conv).to(module[1].weight)
        module(draw(2, 1, 12, 10).to(module[1].weight)).square().sum().backward()
        gradients.append([module[0].weight.grad])
    eager, fused, exact = gradients
    assert_as_exact_as_eager("d 0.weight", fused, eager, exact)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_half_precision_as_exact_as_eager(any_backend, dtype, train):
    """Of values enough: two maxima of a window within a rounding send the gradient one way or the other by chance."""
    assert_steps_parity((8, 1, 48, 40), dtype, train, draws=1)


def test_inference_as_exact_as_eager(any_backend):
    results = []
    for seed in range(3):
        modules = trio(Stem, 1, 8, seed=seed, train=False)
        x = draw(8, 1, 20, 16, seed=seed)
        with torch.no_grad():
            results.append(tuple({"out": m(x.to(m[0].weight.dtype))} for m in modules.all))
    assert_parity(results)


def test_state_dict_is_the_references_both_ways():
    eager, fused = Stem(1, 8), FusedStem(1, 8)
    fused.load_state_dict(eager.state_dict(), strict=True)
    eager.load_state_dict(fused.state_dict(), strict=True)
    assert isinstance(fused, Stem) and [type(m) for m in fused] == [type(m) for m in eager]


def test_backward_keeps_at_most_six_tenths_of_eagers_bytes(any_backend):
    x = draw(2, 1, 16, 16)
    fused, eager = (kind(1, 8).to(DEVICE, memory_format=torch.channels_last) for kind in (FusedStem, Stem))
    assert saved_bytes(fused, x) <= SAVED_OF_EAGER * saved_bytes(eager, x)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_nan_and_inf_come_out_where_they_do_in_eager(any_backend, bad, train):
    modules = trio(Stem, 1, 4, train=train)
    x = draw(4, 1, 16, 16)
    x[0, 0, 9, 9] = bad
    with torch.no_grad():
        eager, fused = modules.eager(x), modules.fused(x)
    for kind in (torch.isnan, torch.isposinf):
        assert torch.equal(kind(fused), kind(eager))


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_empty_batch_gives_an_empty_output_and_zero_gradients(any_backend, train):
    fused = FusedStem(1, 4).to(DEVICE).train(train)
    before = snapshot(fused)
    out = fused(torch.empty(0, 1, 8, 8, device=DEVICE))
    out.sum().backward()
    assert out.shape == (0, 4, 2, 2)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in fused.parameters())
    running = {name: value for name, value in snapshot(fused).items() if "num_batches" not in name}
    same(running, {name: before[name] for name in running})


def test_change_of_the_output_before_backward_is_detected(any_backend):
    out = FusedStem(1, 4).to(DEVICE)(draw(2, 1, 8, 8))
    loss = out.sum()
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused_by_name(any_backend):
    x = draw(2, 1, 8, 8).requires_grad_()
    fused = FusedStem(1, 4).to(DEVICE)
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_another_pool_is_run_by_pytorch_with_one_warning():
    torch.manual_seed(0)
    eager, fused = Stem(1, 4).to(DEVICE), FusedStem(1, 4).to(DEVICE)
    fused.load_state_dict(eager.state_dict())
    eager[3] = fused[3] = nn.MaxPool2d(2)
    x = draw(2, 1, 8, 8)
    with pytest.warns(UserWarning, match="3.kernel_size is 2, not 3"):
        out = fused(x)
    torch.testing.assert_close(out, eager(x))


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(1, 8, 8), ValueError, "4 axes"),
        (torch.zeros(2, 3, 8, 8), ValueError, "expected 1 channels, got 3"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int32), TypeError, "torch.int32"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), TypeError, "0.weight: expected the input's type"),
        (torch.zeros(1, 1, 2, 2), ValueError, "more than 1 value per channel"),
    ],
    ids=("rank", "channels", "integers", "mixed types", "one value per channel"),
)
def test_bad_input_is_named_before_anything_changes(any_backend, x, error, message):
    fused = FusedStem(1, 4).to(DEVICE)
    before = snapshot(fused)
    with pytest.raises(error, match=message):
        fused(x.to(DEVICE))
    same(snapshot(fused), before)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_operators_pass_opcheck(any_backend, train):
    ops = torch.ops.fused_residual
    C = 4
    vectors = [draw(C, seed=i).abs().add(0.1).requires_grad_(i < 2) for i in range(5)]
    weight, bias, mean, var, conv_bias = vectors
    x, kernel = draw(2, 1, 9, 7), draw(C, 1, 3, 3, seed=9)
    norm = (weight, bias, mean, var, conv_bias, train, 0.1, 1e-5)
    torch.library.opcheck(ops.stem.default, (x, kernel.requires_grad_(), 2, 1, *norm))
    kernel = kernel.detach()
    frozen = (*(v.detach() for v in vectors), False, 0.1, 1e-5)
    torch.library.opcheck(ops.stem_inference.default, (draw(2, 1, 6, 5), kernel, 2, 1, *frozen))
