"""The modules on fused Triton convolutions, forward and backward: what they launch, keep and give.

tests/emulated has every choice of convolution, every type and whole nets: a convolution takes a tenth of the
interpreter's time there.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resnet
from resnet import FusedBottleneck, FusedResidual, Residual, Stem
from resnet.triton_backend import block as triton_block
from resnet.triton_backend import convolution
from resnet.triton_backend import stem as triton_stem
from tests.conftest import DEVICE
from tests.helpers.blocks import (
    DTYPES,
    draw,
    incoming_gradient,
    infer,
    keep_norms_constant,
    name_of,
    trio,
    weights_dtype,
)
from tests.helpers.fused_cases import assert_trios_parity
from tests.helpers.kept import kept

# (module, constructor's arguments, input shape): ragged tiles in every dimension
MODULES = {
    "identity": (Residual, (20, 20), (2, 20, 6, 5)),
    "1x1, stride 2": (Residual, (6, 17, True, 2), (2, 6, 7, 6)),
    "stem": (Stem, (1, 8), (2, 1, 17, 15)),
}
per_module = pytest.mark.parametrize("kind, arguments, shape", MODULES.values(), ids=MODULES)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.mark.core
@per_module
def test_training_on_fused_convolutions_is_as_exact_as_eager(own_convolutions, kind, arguments, shape):
    assert_trios_parity([trio(kind, *arguments)], shape)


@per_module
def test_inference_on_fused_convolutions_is_as_exact_as_eager(own_convolutions, kind, arguments, shape):
    assert_trios_parity([trio(kind, *arguments, train=False)], shape, infer)


@pytest.mark.parametrize("kind, arguments, shape", [MODULES["identity"], MODULES["1x1, stride 2"]])
def test_a_step_with_norms_of_constants_on_fused_convolutions_is_as_exact_as_eager(
    own_convolutions, kind, arguments, shape
):
    assert_trios_parity([trio(kind, *arguments).each(keep_norms_constant)], shape)


def test_a_stride_may_be_numpys(own_convolutions):
    assert_trios_parity([trio(Residual, 2, 3, True, np.int64(2))], (2, 2, 4, 3))


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the launches in order, without the merges of partials, which are of per-channel size."""
    names: list[str] = []

    def record(module, *functions):
        for function in functions:
            original = getattr(module, function)

            def recorded(*args, _original=original, _name=function, **kwargs):
                names.append(_name)
                return _original(*args, **kwargs)

            monkeypatch.setattr(module, function, recorded)

    record(convolution, "conv_forward", "conv_grad_input", "conv_grad_weight", "convolve", "convolve_backward")
    record(convolution, "batch_norm_statistics", "batch_norm_add_relu", "batch_norm_backward_reduce")
    record(triton_block, "batch_norm_add_relu", "batch_norm_backward_reduce", "batch_norm_backward_apply")
    record(triton_stem, "batch_norm_max_pool", "conv_grad_weight_max_pool")
    return names


@pytest.mark.parametrize("arguments", ((4, 4), (4, 8, True, 2)), ids=("identity", "1x1, stride 2"))
def test_a_training_step_launches_each_fused_pass_once_in_order(own_convolutions, launches, arguments):
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
def test_a_step_with_norms_of_constants_launches_convolutions_alone(own_convolutions, launches, arguments):
    block = keep_norms_constant(FusedResidual(*arguments).to(DEVICE))
    out = block(draw(2, 4, 4, 4).requires_grad_())
    assert launches == ["conv_forward"] * 2
    launches.clear()
    out.backward(draw(*out.shape, seed=1))
    shortcut = ["conv_grad_weight"] if len(arguments) > 2 else []
    assert launches == ["conv_grad_weight", "conv_grad_input"] * 2 + shortcut


@pytest.mark.parametrize("arguments", ((4, 4), (4, 8, True, 2)), ids=("identity", "1x1, stride 2"))
def test_a_block_in_inference_is_two_launches(own_convolutions, launches, arguments):
    block = FusedResidual(*arguments).to(DEVICE).eval()
    with torch.no_grad():
        block(draw(2, 4, 4, 4))
    assert launches == ["conv_forward"] * 2


# Of a bottleneck's convolutions forward and backward: what its 3x3 is, with groups and with a dilation.
BOTTLENECKS = {
    "dilation": (
        {"dilation": 2},
        ["conv_forward"],
        ["conv_grad_input", "conv_grad_weight"],
    ),
    "groups": (
        {"groups": 2},
        ["batch_norm_add_relu", "convolve", "batch_norm_statistics"],
        ["convolve_backward", "batch_norm_backward_reduce", "batch_norm_add_relu", "convolve_backward"],
    ),
    "a dilation and a stride, which grad-input does not know": (
        {"dilation": 2, "stride": 2},
        ["batch_norm_add_relu", "convolve", "batch_norm_statistics"],
        ["convolve_backward", "batch_norm_backward_reduce", "batch_norm_add_relu", "convolve_backward"],
    ),
}


@pytest.mark.parametrize("options, forward, backward", BOTTLENECKS.values(), ids=BOTTLENECKS)
def test_a_convolution_with_a_dilation_is_fused_and_one_with_groups_is_pytorchs_between_fused_ones(
    own_convolutions, launches, options, forward, backward
):
    block = FusedBottleneck(8, 2, **options).to(DEVICE)
    out = block(draw(2, 8, 5, 5).requires_grad_())
    assert launches == [
        *["conv_forward"] * (1 + ("stride" in options)),
        *forward,
        "conv_forward",
        "batch_norm_add_relu",
    ]
    launches.clear()
    out.backward(draw(*out.shape, seed=1))
    assert launches[:4] == [
        *("batch_norm_backward_reduce", "batch_norm_backward_apply"),
        *("conv_grad_input", "conv_grad_weight"),
    ]
    assert launches[4 : 5 + len(backward)] == ["batch_norm_backward_apply", *backward]
    assert not [name for name in launches[5 + len(backward) :] if name.startswith("convolve")]


def test_batches_of_the_same_power_of_two_share_their_choices(own_convolutions, monkeypatch):
    """What "auto" timed for one batch size holds for those, but not with TensorFloat-32, which changes the times."""
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


def test_images_of_as_many_pixels_share_their_choices(monkeypatch):
    """A net that is given images of many sizes would else time each of them, and keep a choice for each."""
    keys = []
    monkeypatch.setattr(convolution, "pick", lambda direction, key, variants, device: keys.append(key) or variants["a"])
    for H, W in ((60, 60), (40, 90), (64, 64), (65, 64)):
        x, weight = torch.empty(1).expand(2, 4, H, W), torch.empty(8, 4, 3, 3)
        convolution.run_picked("forward", x, 4, weight, (1, 1, 1), (), a=lambda: None)
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize(
    ("direction", "x", "weight", "stride", "way"),
    [
        ("forward", (2, 64, 2896, 2896), (64, 64, 3, 3), 1, "triton"),
        ("forward", (2, 64, 2897, 2897), (64, 64, 3, 3), 1, "pytorch"),
        ("forward", (2, 32, 2897, 2897), (64, 32, 3, 3), 1, "pytorch"),
        ("grad_input", (2, 64, 1448, 1448), (64, 64, 3, 3), 2, "triton"),
        ("grad_weight", (2, 64, 1449, 1449), (64, 64, 3, 3), 2, "pytorch"),
        ("inference", (2, 64, 2896, 2896), (64, 64, 3, 3), 2, "triton"),
        ("inference", (2, 64, 2897, 2897), (64, 64, 3, 3), 2, "pytorch"),
        ("grad_input", (2, 8, 64, 64), (8, 3, 16, 16), 1, "pytorch"),
        ("grad_input", (2, 8, 64, 64), (8, 3, 30, 30), 2, "triton"),
        ("grad_input", (2, 8, 64, 64), (8, 3, 31, 31), 2, "pytorch"),
        ("forward", (2, 16, 64, 64), (8, 16, 9, 9), 1, "pytorch"),
        ("forward", (2, 3, 64, 64), (8, 3, 9, 9), 1, "triton"),
    ],
)
def test_images_and_windows_that_no_kernel_takes_are_pytorchs(direction, x, weight, stride, way):
    """A kernel would refuse them, the last one in backward, after the running statistics have changed."""
    x, weight = torch.empty(1).expand(x), torch.empty(1).expand(weight)
    ways = {name: lambda name=name: name for name in ("triton", "pytorch")}
    with resnet.convolution("auto"):
        assert convolution.run_picked(direction, x, weight.shape[1], weight, (stride, 1, 1), (), **ways) == way


def test_a_prologue_before_a_window_that_its_mask_has_no_bits_for_is_a_pass_of_its_own():
    x = torch.randn(2, 4, 10, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3, 4, 9, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    stats = torch.randn(4, 4, dtype=torch.float64)
    with resnet.convolution("triton"):
        y = convolution.forward(x, weight, (1, 4, 1), False, stats).y
    a = (x * stats[2].view(-1, 1, 1) + stats[3].view(-1, 1, 1)).relu()
    torch.testing.assert_close(y, torch.conv2d(a, weight, padding=4))


def forget_devices(monkeypatch) -> None:
    """What is known of a device for good is asked each time."""
    monkeypatch.setattr(convolution, "_has_tensor_cores", convolution._has_tensor_cores.__wrapped__)


def test_a_gpu_before_sm_80_takes_pytorchs_convolutions_without_timing_others(monkeypatch):
    """On a T4 Triton has no tensor-core product, and a kernel without one spills thousands of registers."""
    forget_devices(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ways = {name: lambda name=name: name for name in ("triton", "epilogue", "pytorch")}
    device = torch.device("cuda", 0)
    with resnet.convolution("auto"):
        assert convolution.pick("forward", (), ways, device)() == "pytorch"
    with resnet.convolution("triton"):
        assert convolution.pick("forward", (), ways, device)() == "triton"


@pytest.mark.parametrize(
    "capability, hip, precision, dtype, expected",
    [
        ((8, 0), None, "tf32", torch.float32, True),
        ((9, 0), None, "tf32", torch.float32, True),
        ((7, 5), None, "tf32", torch.float32, False),
        ((9, 4), "6.4", "tf32", torch.float32, False),
        ((9, 0), None, "ieee", torch.float32, False),
        ((9, 0), None, "tf32", torch.bfloat16, False),
    ],
    ids=["A100", "H100", "T4", "MI300X", "switched off", "bfloat16"],
)
def test_tf32_is_used_where_pytorchs_convolution_would_use_it(monkeypatch, capability, hip, precision, dtype, expected):
    """The switch is on by default. On a T4 cuDNN has no such product, MIOpen's of float32 are exact, and so are
    those that PyTorch takes where cuDNN is off.
    """
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    forget_devices(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=precision))
    x = SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0))
    assert convolution.tf32(x) is expected
    assert not convolution.tf32(torch.empty(1, dtype=dtype))
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert not convolution.tf32(x)


def test_the_stem_stores_no_gradient_of_its_convolution(own_convolutions, launches):
    stem = trio(Stem, 1, 8).fused
    stem(draw(2, 1, 17, 15)).sum().backward()
    assert launches == ["conv_forward", "batch_norm_max_pool", "conv_grad_weight_max_pool"]


def weight_gradient(stem: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = stem(x.to(weights_dtype(stem)))
    return {"dweight": torch.autograd.grad(out, stem[0].weight, incoming_gradient(out))[0]}


@pytest.mark.parametrize("way", ["triton", "epilogue", "pytorch"])
def test_the_gradient_of_a_stems_weight_alone_is_as_exact_as_eager(way):
    with resnet.backend("triton"), resnet.convolution(way):
        assert_trios_parity([trio(Stem, 1, 8)], (2, 1, 17, 15), weight_gradient)


def test_a_block_keeps_four_activations_and_vectors_for_backward(own_convolutions):
    block, x = FusedResidual(16, 16).to(DEVICE), draw(2, 16, 6, 5).requires_grad_()
    _, tensors = kept(block, x)
    activations = [t for t in tensors if t.numel() == x.numel()]
    assert len(activations) == 4
    assert x.data_ptr() in {t.data_ptr() for t in activations}
    assert all(t.numel() <= 4 * 16 for t in tensors if t.numel() != x.numel())


def test_nothing_is_launched_for_gradients_that_nobody_wants(own_convolutions, launches):
    block = FusedResidual(4, 4).to(DEVICE)
    for name, p in block.named_parameters():
        p.requires_grad_(name.startswith("bn2"))
    block(draw(2, 4, 4, 4)).sum().backward()
    assert launches == ["conv_forward", "conv_forward", "batch_norm_add_relu", "batch_norm_backward_reduce"]
    assert block.bn2.weight.grad is not None
