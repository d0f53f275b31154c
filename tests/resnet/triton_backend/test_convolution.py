"""The modules on fused Triton convolutions, forward and backward: what they launch, keep and give.

Every way, every type and whole nets are in tests/emulated, where a convolution takes a tenth of the interpreter's time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet
from resnet import FusedResidual, Residual, Stem
from resnet.kernels import batch_norm_max_pool
from resnet.kernels.add_masked_grad import add_masked_grad
from resnet.triton_backend import block as triton_block
from resnet.triton_backend import convolution
from resnet.triton_backend import stem as triton_stem
from tests.conftest import DEVICE
from tests.helpers.blocks import (  # noqa: F401
    DTYPES,
    HALF,
    assert_parity,
    draw,
    name_of,
    one_thread,
    same,
    snapshot,
    step,
    trio,
)

# (module, constructor's arguments, input shape): ragged tiles in every dimension
MODULES = {
    "identity": (Residual, (20, 20), (2, 20, 6, 5)),
    "1x1, stride 2": (Residual, (6, 17, True, 2), (2, 6, 7, 6)),
    "stem": (Stem, (1, 8), (2, 1, 17, 15)),
}
per_module = pytest.mark.parametrize("kind, arguments, shape", MODULES.values(), ids=MODULES)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.fixture
def fused_backend():
    """The Triton backend as it comes: "auto" is "triton" where nothing can be timed."""
    with resnet.backend("triton"), resnet.convolution("triton"):
        yield


def without_cancelled_biases(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Behind batch statistics a convolution's bias has no effect: eager's gradient is what rounding leaves of zero."""
    return {name: v for name, v in results.items() if name not in ("d conv1.bias", "d conv2.bias", "d 0.bias")}


@pytest.mark.core
@per_module
def test_training_is_as_exact_as_eager(fused_backend, kind, arguments, shape):
    modules, x = trio(kind, *arguments), draw(*shape)
    assert_parity([tuple(without_cancelled_biases(step(module, x)) for module in modules.all)])


@per_module
def test_inference_is_as_exact_as_eager(fused_backend, kind, arguments, shape):
    modules, x = trio(kind, *arguments, train=False), draw(*shape)
    with torch.no_grad():
        eager, fused, exact = modules.eager(x), modules.fused(x), modules.exact(x.double())
    assert_parity([({"out": eager}, {"out": fused}, {"out": exact})])


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

    record(convolution, "conv_forward", "conv_grad_input", "conv_grad_weight")
    record(convolution, "batch_norm_statistics", "batch_norm_add_relu", "batch_norm_backward_reduce")
    record(triton_block, "batch_norm_add_relu", "batch_norm_backward_reduce", "batch_norm_backward_apply")
    record(triton_stem, "conv_grad_input", "conv_grad_weight_max_pool")
    record(batch_norm_max_pool, "apply_pool")
    return names


@pytest.mark.parametrize("arguments", ((4, 4), (4, 8, True, 2)), ids=("identity", "1x1, stride 2"))
def test_training_launches_in_the_order_of_the_design(fused_backend, launches, arguments):
    block = FusedResidual(*arguments).to(DEVICE)
    out = block(draw(2, 4, 4, 4).requires_grad_())
    assert launches == ["conv_forward", "conv_forward", "batch_norm_add_relu"]
    launches.clear()
    out.backward(draw(*out.shape, seed=1))
    assert launches == [
        *("batch_norm_backward_reduce", "batch_norm_backward_apply"),
        *("conv_grad_input", "conv_grad_weight", "batch_norm_backward_apply"),
        *("conv_grad_input", "conv_grad_weight"),
        *(("conv_grad_weight",) if len(arguments) > 2 else ()),
    ]


@pytest.mark.parametrize("arguments", ((4, 4), (4, 8, True, 2)), ids=("identity", "1x1, stride 2"))
def test_inference_is_two_launches(fused_backend, launches, arguments):
    block = FusedResidual(*arguments).to(DEVICE).eval()
    with torch.no_grad():
        block(draw(2, 4, 4, 4))
    assert launches == ["conv_forward"] * 2


def test_a_batch_of_the_same_power_of_two_is_the_same_choice(fused_backend, monkeypatch):
    """What "auto" timed for one batch holds for the next, but not with TensorFloat-32, which changes the times."""
    keys: list[list[tuple]] = []

    def pick(direction, key, variants, device):
        keys[-1].append((direction, *key))
        return next(iter(variants.values()))

    monkeypatch.setattr(convolution, "pick", pick)
    block = FusedResidual(4, 4).to(DEVICE)
    for N, tf32 in ((5, False), (8, False), (9, False), (8, True)):
        monkeypatch.setattr(convolution, "tf32", lambda _, on=tf32: on)
        keys.append([])
        block(draw(N, 4, 4, 4)).sum().backward()
    assert keys[0] == keys[1] and len(keys[0]) >= 5
    assert not set(keys[0]) & set(keys[2]) and not set(keys[0]) & set(keys[3])


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
    assert launches == ["conv_forward", "conv_forward", "batch_norm_add_relu", "batch_norm_backward_reduce"]
    assert block.bn2.weight.grad is not None


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
