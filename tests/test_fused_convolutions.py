"""The modules on fused Triton convolutions, forward and backward, each way that `resnet.convolution` offers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet
from kernels import batch_norm, batch_norm_max_pool
from kernels.add_masked_grad import add_masked_grad
from resnet import FusedResidual, Residual, Stem
from resnet.backends import VARIANTS
from tests.blocks import (  # noqa: F401
    DTYPES,
    HALF,
    assert_parity,
    draw,
    name_of,
    one_thread,
    rounding_interpreter,
    same,
    snapshot,
    step,
    trio,
)
from tests.conftest import DEVICE
from tests.test_training import losses, pair, small_net

# (module, constructor's arguments, input shape): ragged tiles in every dimension
MODULES = {
    "identity": (Residual, (20, 20), (2, 20, 6, 5)),
    "1x1, stride 2": (Residual, (6, 17, True, 2), (2, 6, 7, 6)),
    "1x1, stride 1": (Residual, (3, 6, True), (1, 3, 5, 4)),
    "stem": (Stem, (1, 8), (2, 1, 17, 15)),
    "stem of 3 channels": (Stem, (3, 20), (1, 3, 18, 13)),
}
per_module = pytest.mark.parametrize("kind, arguments, shape", MODULES.values(), ids=MODULES)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.fixture(params=VARIANTS)
def variant(request):
    with resnet.backend("triton"), resnet.convolution(request.param):
        yield request.param


@pytest.fixture
def fused_backend():
    """The Triton backend as it comes: "auto" is "triton" where nothing can be timed."""
    with resnet.backend("triton"), resnet.convolution("triton"):
        yield


def without_cancelled_biases(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Behind batch statistics a convolution's bias has no effect: eager's gradient is what rounding leaves of zero."""
    return {name: v for name, v in results.items() if name not in ("d conv1.bias", "d conv2.bias", "d 0.bias")}


@per_module
@pytest.mark.parametrize("train", (True, False), ids=("training", "frozen statistics"))
def test_every_way_is_as_exact_as_eager(variant, kind, arguments, shape, train):
    draws = []
    for seed in range(2):
        modules, x = trio(kind, *arguments, seed=seed, train=train), draw(*shape, seed=seed)
        results = [step(module, x) for module in modules.all]
        draws.append(tuple(without_cancelled_biases(r) if train else r for r in results))
    assert_parity(draws)


@per_module
@pytest.mark.parametrize("dtype", (*HALF, torch.float64), ids=name_of)
def test_every_type_is_as_exact_as_eager(fused_backend, kind, arguments, shape, dtype):
    draws = []
    for seed in range(2):
        modules, x = trio(kind, *arguments, seed=seed, dtype=dtype), draw(*shape, seed=seed, dtype=dtype)
        draws.append(tuple(without_cancelled_biases(step(module, x)) for module in modules.all))
    assert_parity(draws, relu_flips=dtype in HALF)


@per_module
def test_inference_is_as_exact_as_eager(variant, kind, arguments, shape):
    draws = []
    for seed in range(2):
        modules, x = trio(kind, *arguments, seed=seed, train=False), draw(*shape, seed=seed)
        with torch.no_grad():
            eager, fused, exact = modules.eager(x), modules.fused(x), modules.exact(x.double())
        draws.append(({"out": eager}, {"out": fused}, {"out": exact}))
    assert_parity(draws)


@pytest.mark.parametrize("name", ("identity", "stem"))
def test_a_second_run_gives_the_same_bits(fused_backend, name):
    kind, arguments, shape = MODULES[name]
    module, x = trio(kind, *arguments).fused, draw(*shape)
    state = snapshot(module)
    runs = []
    for _ in range(2):
        module.load_state_dict(state)
        runs.append(step(module, x))
    same(*runs)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the big launches, in order: the merges of partials, of per-channel size, aside."""
    names: list[str] = []

    def record(module, *functions):
        for function in functions:
            original = getattr(module, function)

            def recorded(*args, _original=original, _name=function, **kwargs):
                names.append(_name)
                return _original(*args, **kwargs)

            monkeypatch.setattr(module, function, recorded)

    record(batch_norm, "moments", "apply", "backward_reduce", "backward_apply")
    from resnet import triton_backend

    record(triton_backend, "conv_forward", "conv_grad_input", "conv_grad_weight", "conv_grad_weight_max_pool")
    record(batch_norm_max_pool, "apply_pool")
    return names


@pytest.mark.parametrize("arguments", ((4, 4), (4, 8, True, 2)), ids=("identity", "1x1, stride 2"))
def test_training_launches_in_the_order_of_the_design(fused_backend, launches, arguments):
    block = FusedResidual(*arguments).to(DEVICE)
    out = block(draw(2, 4, 4, 4).requires_grad_())
    assert launches == ["conv_forward", "conv_forward", "apply"]
    launches.clear()
    out.backward(draw(*out.shape, seed=1))
    assert launches == [
        *("backward_reduce", "backward_apply"),
        *("conv_grad_input", "conv_grad_weight", "backward_apply"),
        *("conv_grad_input", "conv_grad_weight"),
        *(("conv_grad_weight",) if len(arguments) > 2 else ()),
    ]


@pytest.mark.parametrize("arguments", ((4, 4), (4, 8, True, 2)), ids=("identity", "1x1, stride 2"))
def test_inference_is_two_launches(fused_backend, launches, arguments):
    block = FusedResidual(*arguments).to(DEVICE).eval()
    with torch.no_grad():
        block(draw(2, 4, 4, 4))
    assert launches == ["conv_forward"] * 2


def test_the_stem_stores_no_gradient_of_its_convolution(fused_backend, launches):
    stem = trio(Stem, 1, 8).fused
    stem(draw(2, 1, 17, 15)).sum().backward()
    assert launches == ["conv_forward", "apply_pool", "conv_grad_weight_max_pool"]


def test_a_block_keeps_four_activations_and_vectors(fused_backend):
    block, x = FusedResidual(16, 16).to(DEVICE), draw(2, 16, 6, 5).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(x)
    parameters = {p.data_ptr() for p in block.parameters()}
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel() and t.data_ptr() not in parameters}
    assert len(large) == 4
    assert x.data_ptr() in large
    others = [t for t in saved if t.data_ptr() not in parameters | large]
    assert all(t.numel() <= 4 * 16 for t in others)


def test_only_wanted_gradients_are_computed(fused_backend, launches):
    block = FusedResidual(4, 4).to(DEVICE)
    for name, p in block.named_parameters():
        p.requires_grad_(name.startswith("bn2"))
    block(draw(2, 4, 4, 4)).sum().backward()
    assert launches == ["conv_forward", "conv_forward", "apply", "backward_reduce"]
    assert block.bn2.weight.grad is not None


def test_losses_of_20_steps_follow_eagers(fused_backend):
    eager, fused = (net.double() for net in pair(small_net))
    x, labels = draw(4, 1, 16, 16, dtype=torch.float64), torch.arange(4, device=DEVICE) % 4
    expected, got = losses(eager, x, labels, 20), losses(fused, x, labels, 20)
    assert expected[-1] < 0.2 * expected[0]
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_resnet18_runs_whole(fused_backend):
    eager, fused = (net.double() for net in pair(lambda block: resnet.resnet18(block=block)))
    x, labels = draw(2, 1, 32, 32, dtype=torch.float64), torch.tensor([1, 7], device=DEVICE)
    torch.testing.assert_close(losses(fused, x, labels, 2), losses(eager, x, labels, 2), rtol=1e-8, atol=1e-8)
    for net in (eager, fused):
        net.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-7, atol=1e-7)


@per_dtype
@pytest.mark.parametrize("shape", ((2, 3, 5, 4), (1, 64, 9, 9)), ids=str)
def test_the_masked_gradient_is_added(fused_backend, dtype, shape):
    dx, dout, out = (draw(*shape, seed=seed, dtype=dtype) for seed in range(3))
    out[0, 0, 0, :2] = torch.tensor([0.0, float("nan")])
    expected = dx + torch.ops.aten.threshold_backward(dout, out, 0)
    assert add_masked_grad(dx, dout, out) is dx
    torch.testing.assert_close(dx, expected, rtol=0, atol=0)


def test_the_masked_gradient_has_dxs_shape():
    dx = draw(2, 3, 5, 4)
    with pytest.raises(ValueError, match="dout: expected shape"):
        add_masked_grad(dx, dx[:, :, :4].contiguous(memory_format=torch.channels_last), dx)
