"""BatchNorm's statistics on PyTorch's operators."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet.norm import Norm, statistics_dtype
from resnet.torch_backend import batch_norm
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, draw, name_of
from tests.helpers.parity import assert_as_exact_as_eager

pytestmark = pytest.mark.core


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("conv_bias", [False, True], ids=["", "conv_bias"])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_statistics_averaged_by_a_tensor_are_those_averaged_by_a_number(dtype, conv_bias, count):
    C, acc = 5, statistics_dtype(dtype)
    x, bias = draw(3, C, 4, 6, dtype=dtype), draw(C, seed=1, dtype=dtype) if conv_bias else None

    def averaged(momentum: float, batches: Tensor | None) -> list[Tensor]:
        running = draw(C, seed=2, dtype=acc), draw(C, seed=3, dtype=acc).abs()
        norm = Norm(None, None, *running, bias, True, momentum, 1e-5, batches)
        return [*running, *batch_norm.forward(x, norm)]

    got, expected = averaged(0.0, torch.tensor(count, device=DEVICE)), averaged(1.0 / count, None)
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(acc).eps, atol=torch.finfo(acc).eps)


MANY = {
    "whole groups": (10, 64, 8, 8),
    "smaller groups, none left over": (1, 16, 24, 24),
    "no whole group": (7, 40, 23, 31),
    "one group at a time": (1, 8200, 19, 27),
    "few channels": (16, 4, 96, 96),
    "large maps": (2, 16, 211, 201),
    "a few hundred pixels": (2, 64, 16, 16),
}
FEW = {"as many as PyTorch adds up with one thread": (1, 16, 8, 9), "less than half a group": (3, 32, 3, 5)}
SHAPES = MANY | FEW
FAR = 1.0, 4.0, 10.0, 20.0  # means, of a deviation of 1.5
SUMS_OF_FEW = [*product(FEW, [0.0, *FAR, 1000.0])]
SUMS = [*product(MANY, FAR), *SUMS_OF_FEW]

loses_digits = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="PyTorch's sums over pixels lose digits on the CPU alone"
)


def assert_as_exact_as_eager_in_the_default_layout(name, mean, dtype, training, fused, relu=False):
    """`fused` takes x, dout, weight, bias and the running statistics, which are made those of the batch, and gives
    out, dx, dweight and dbias. Eager in channels_last is no measure for itself.
    """
    shape = SHAPES[name]

    def results(function, d: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
        x, dout = (t.to(d).contiguous(memory_format=layout) for t in given)
        acc = statistics_dtype(d)
        weight, bias, running_mean, running_var = (v.to(acc, copy=True) for v in vectors)
        out, *grads = function(x, dout, weight, bias, running_mean, running_var)
        return [out, running_mean, running_var, *grads]

    def eager(x, dout, weight, bias, *running):
        wanted = [t.requires_grad_() for t in (x, weight, bias)]
        out = F.batch_norm(x, *running, weight, bias, training, momentum=1.0)
        out = out.relu() if relu else out
        return out.detach(), *torch.autograd.grad(out, wanted, dout)

    given = [t.to(dtype) for t in (1.5 * draw(*shape) + mean, draw(*shape, seed=1))]
    vectors = [1 + draw(shape[1], seed=2).abs(), draw(shape[1], seed=3), mean + draw(shape[1], seed=4) / 4]
    vectors.append(1 + draw(shape[1], seed=5).abs())
    got = results(fused, dtype, torch.channels_last)
    expected = results(eager, dtype, torch.contiguous_format)
    exact = results(eager, torch.float64, torch.contiguous_format)
    names = "out", "running_mean", "running_var", "dx", "dweight", "dbias"
    for name, *values in zip(names, got, expected, exact, strict=True):
        assert_as_exact_as_eager(name, *([v] for v in values))


@loses_digits
@pytest.mark.parametrize(("name", "mean"), SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_number_of_pixels_is_as_exact_as_eager_in_the_default_layout(name, dtype, mean, training):
    def fused(x, dout, weight, bias, *running):
        norm = Norm(weight, bias, *running, None, training, 1.0, 1e-5)
        out, stats = batch_norm.forward(x, norm, relu=False)
        grad = batch_norm.backward(dout, x, out, stats, norm, relu=False)
        return out, grad.dx, grad.dweight, grad.dbias

    assert_as_exact_as_eager_in_the_default_layout(name, mean, dtype, training, fused)


@loses_digits
@pytest.mark.parametrize(("name", "mean"), SUMS_OF_FEW)
def test_operators_that_pytorch_records_are_as_exact_as_eager_in_the_default_layout(name, mean):
    def fused(x, dout, weight, bias, *running):
        wanted = [t.requires_grad_() for t in (x, weight, bias)]
        norm = Norm(weight, bias, *running, None, True, 1.0, 1e-5)
        assert batch_norm.is_eager_as_good(x, norm)
        out = batch_norm.eager(x, norm, None)
        return out.detach(), *torch.autograd.grad(out, wanted, dout)

    assert_as_exact_as_eager_in_the_default_layout(name, mean, torch.float32, True, fused, relu=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_norm_of_one_channel_has_eagers_gradients(training):
    """What is expanded over one channel has a stride of 0."""
    x, dout = (draw(2, 1, 16, 15, seed=seed, dtype=torch.float64) for seed in (0, 1))
    weight, bias, mean, var = (1 + draw(1, seed=seed, dtype=torch.float64).abs() for seed in (2, 3, 4, 5))
    norm = Norm(weight, bias, mean.clone(), var.clone(), None, training, 0.1, 1e-5)
    out, stats = batch_norm.forward(x, norm, relu=False)
    grad = batch_norm.backward(dout, x, out, stats, norm, relu=False)
    wanted = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.batch_norm(x, mean, var, weight, bias, training), wanted, dout)
    torch.testing.assert_close((grad.dx, grad.dweight, grad.dbias), expected)


def test_backward_asks_no_device_for_a_value_where_processes_share_their_statistics(monkeypatch):
    """A GPU would be waited for, and no CUDA graph could be captured. On meta it is an error."""
    monkeypatch.setattr(batch_norm, "merge_sums", lambda sums, rows, group: sums)
    x = torch.empty((2, 4, 3, 3), device="meta", memory_format=torch.channels_last)
    stats = torch.empty(4, 4, device="meta")
    norm = Norm(*stats, None, True, 0.1, 1e-5, group="all")
    assert batch_norm.backward(x, x, x, stats, norm.kept()).dx.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mean", [0.0, 1000.0], ids=["near zero", "far from zero"])
@pytest.mark.parametrize("shortcut", ["none", "added", "normed"])
def test_a_few_images_at_a_time_give_the_bits_of_all(monkeypatch, shortcut, mean, dtype):
    x, dout, z = (draw(5, 13, 18, 18, seed=seed, dtype=dtype) for seed in range(3))
    x += mean
    norm = Norm(None, None, None, None, None, True, 0.0, 1e-5)

    def results() -> list[Tensor]:
        if shortcut == "normed":
            out, stats, z_stats = batch_norm.forward_normed(x, norm, z, norm)
        else:
            out, stats = batch_norm.forward(x, norm, z if shortcut == "added" else None)
            z_stats = stats
        grad = batch_norm.backward(dout, x, out, stats, norm, shortcut=shortcut != "none")
        return [out, stats, z_stats, batch_norm.recompute(x, stats), *grad[:4]]

    expected = results()
    splits = []
    split = Tensor.split
    monkeypatch.setattr(Tensor, "split", lambda t, size: splits.append(size) or split(t, size))
    monkeypatch.setattr(batch_norm, "_LARGE", 1)
    monkeypatch.setattr(batch_norm, "_PART", 2 * x[0].numel())
    for got, value in zip(results(), expected, strict=True):
        assert (got is None and value is None) or torch.equal(got, value)
    assert set(splits) == ({2} if DEVICE.type == "cpu" else set())
