"""`FusedResidual` and `FusedStem` take any memory format and, under autocast, cast as the eager modules do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import resnet
from resnet import FusedBottleneck, FusedResidual, FusedStem, Residual, SqueezeExcite
from tests.conftest import DEVICE
from tests.helpers.blocks import SIXTEEN_BIT, assert_parity, draw, infer, keep_norms_constant, name_of, same, step, trio
from tests.helpers.fused_cases import (
    KINDS,
    STRIDED,
    assert_refused,
    convolved,
    images,
    inference_trio,
    kinds,
    train_and_eval,
)
from tests.helpers.layouts import LAYOUTS, is_channels_last

# ---- memory formats ---------------------------------------------------------------------------------------------


INCOMING = {
    **{name: LAYOUTS[name] for name in ("nchw", "sliced pixels", "transposed")},
    "that of a sum": lambda dout: dout.new_ones(()).expand(dout.shape),
    "expanded": lambda dout: dout[:, :, :1, :1].expand(dout.shape),
}


@pytest.mark.parametrize("incoming", INCOMING)
@kinds
def test_any_layout_of_the_incoming_gradient_gives_the_same_bits(any_backend, kind, incoming):
    fused = inference_trio(kind).fused.train()
    x = images(kind, (2, 7, 6)).requires_grad_()
    out = fused(x)
    dout = draw(*out.shape, seed=3)
    dout = INCOMING[incoming](dout)
    leaves = (x, *fused.parameters())
    got = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    dense = torch.empty_like(out, memory_format=torch.channels_last).copy_(dout)
    same(dict(enumerate(got)), dict(enumerate(torch.autograd.grad(out, leaves, dense))))


@convolved
@train_and_eval
def test_hooks_of_saved_tensors_may_lose_their_layout(any_backend, train, kind):
    """As those of `save_on_cpu` with pinned memory do."""
    fused, x = inference_trio(kind).fused.train(train), images(kind, (2, 7, 6))

    def run(call):
        with save_on_cpu(pin_memory=True):
            return call()

    same(step(copy.deepcopy(fused), x, run), step(fused, x))


@kinds
@train_and_eval
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced pixels", "transposed"])
def test_any_layout_of_the_input_gives_the_same_bits_channels_last(any_backend, layout, train, kind):
    fused = inference_trio(kind).fused.train(train)
    x = images(kind, (2, 7, 6))
    got = step(copy.deepcopy(fused), LAYOUTS[layout](x))
    same(got, step(fused, x))
    assert is_channels_last(got["out"])
    if "stem" not in kind:
        assert is_channels_last(got["dx"])


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]


def test_weights_are_made_as_pytorchs_convolution_makes_them_and_stay_as_the_user_lays_them_out():
    for module in (FusedResidual(*STRIDED), FusedStem(3, 4)):
        assert all(p.is_contiguous() for p in module.parameters())
        assert len(nn.utils.parameters_to_vector(module.parameters())) == sum(p.numel() for p in module.parameters())
        module.to(memory_format=torch.channels_last)
        module.load_state_dict({k: v.contiguous() for k, v in module.state_dict().items()})
        assert all(is_channels_last(w) for w in weights_of(module))
        module.to(memory_format=torch.contiguous_format)
        assert all(w.is_contiguous() for w in weights_of(module))


@convolved
@pytest.mark.parametrize(
    "backend, convolution, layout",
    [
        *(("torch", "auto", layout) for layout in ("nchw", "transposed", "every other")),
        ("triton", "pytorch", "every other"),
        ("triton", "triton", "nchw"),
    ],
)
def test_any_layout_of_the_weights_gives_the_same_values_and_gradients_laid_out_alike(
    backend, convolution, layout, kind
):
    fused = inference_trio(kind, dtype=torch.float64).fused
    other = copy.deepcopy(fused)
    for w in weights_of(other):
        w.data = LAYOUTS[layout](w.data)
    x = images(kind, (2, 5, 4), dtype=torch.float64)
    with resnet.backend(backend), resnet.convolution(convolution):
        torch.testing.assert_close(infer(other, x), infer(fused, x), atol=1e-11, rtol=1e-9)
        got = step(other.train(), x)
        torch.testing.assert_close(got, step(fused.train(), x), atol=1e-11, rtol=1e-9)
    for name, w in other.named_parameters():
        grad, dense = got[f"d {name}"], torch.empty_like(w)
        assert all(n == 1 or s == t for n, s, t in zip(w.shape, grad.stride(), dense.stride(), strict=True)), name


@kinds
def test_weights_may_be_assigned_in_another_layout(any_backend, kind):
    fused = inference_trio(kind).fused.to(memory_format=torch.channels_last)
    x = images(kind, (2, 7, 6))
    expected = step(copy.deepcopy(fused), x)
    fused.load_state_dict({k: v.contiguous() for k, v in fused.state_dict().items()}, assign=True)
    assert all(w.is_contiguous() for w in weights_of(fused))
    torch.testing.assert_close(step(fused, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_a_weights_gradient_has_the_weights_strides_of_single_values_too(any_backend, layout):
    """`DistributedDataParallel` compares all strides with its bucket's, and warns where one differs."""
    fused = inference_trio("strided").fused.train().to(memory_format=layout)
    fused(images("strided", (2, 7, 6))).sum().backward()
    assert fused.conv3.weight.shape[2:] == (1, 1)
    assert all(p.grad.stride() == p.stride() for p in fused.parameters())


def every_other(v: Tensor) -> Tensor:
    """v as every other value of a larger tensor, whose other values are NaN."""
    return torch.stack((v, torch.full_like(v, torch.nan)), dim=1)[:, 0]


@kinds
@train_and_eval
@pytest.mark.parametrize("backend, convolution", [("torch", "auto"), ("triton", "pytorch"), ("triton", "triton")])
def test_vectors_with_strides_give_the_same_values_and_are_updated_in_place(backend, convolution, train, kind):
    fused = inference_trio(kind, dtype=torch.float64).fused.train(train)
    other = copy.deepcopy(fused)
    for m in other.modules():
        for p in m.parameters(recurse=False):
            if p.dim() == 1:
                p.data = every_other(p.data)
        for name, b in m.named_buffers(recurse=False):
            if b.dim() == 1:
                setattr(m, name, every_other(b))
    before = {name: b.data_ptr() for name, b in other.named_buffers()}
    x = images(kind, (2, 5, 4), dtype=torch.float64)
    with resnet.backend(backend), resnet.convolution(convolution):
        torch.testing.assert_close(step(other, x), step(fused, x), atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(infer(other.eval(), x), infer(fused.eval(), x), atol=1e-11, rtol=1e-9)
    assert {name: b.data_ptr() for name, b in other.named_buffers()} == before
    for name, b in other.named_buffers():
        if b.dim() == 1:
            assert b.as_strided(b.shape, b.stride(), 1).isnan().all(), f"{name}: what lies between was written"


@kinds
def test_an_expanded_running_statistic_is_refused_where_it_would_be_updated(any_backend, kind):
    """All its values are one in memory. PyTorch refuses to write to such a tensor."""
    fused = inference_trio(kind).fused
    bn = fused[1] if "stem" in kind else fused.bn2
    bn.running_mean = torch.zeros(1, device=DEVICE).expand(bn.num_features)
    x = images(kind, (2, 5, 4))
    infer(fused, x)
    assert_refused(fused.train(), x, ValueError, f"running_mean: expected {bn.num_features} values in memory")


# ---- autocast ---------------------------------------------------------------------------------------------------


def with_weights_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose convolutions have weights of `dtype`; all else stays as it is.

    PyTorch's own convolutions, which make gates, want a bias of their weight's type.
    """
    module = copy.deepcopy(module)
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.to(dtype)
        if isinstance(m, SqueezeExcite):
            m.to(dtype)
    return module


def assert_autocast_casts(fused: nn.Module, eager: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Results are bit-equal to those of weights and input that were cast by hand, in the types of eager's results."""

    def autocast(call):
        with torch.autocast(DEVICE.type, dtype):
            return call()

    by_hand = step(with_weights_in(fused, dtype), x)
    got, types = step(fused, x, autocast), step(eager, x, autocast)
    assert got["out"].dtype == dtype
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in types.items()}
    same(got, {name: value.to(got[name].dtype) for name, value in by_hand.items()})


@kinds
@train_and_eval
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_autocast_casts_the_input_and_convolution_weights_alone(any_backend, dtype, train, kind):
    t = inference_trio(kind).each(lambda m: m.train(train))
    assert_autocast_casts(t.fused, t.eager, images(kind, (2, 6, 7)), dtype)


@kinds
def test_inference_under_autocast_is_as_exact_as_eager(any_backend, kind):
    results = []
    for seed in range(4):
        t = inference_trio(kind, seed=seed)
        x = images(kind, (4, 9, 9), seed=seed)
        with torch.no_grad():
            exact = t.exact(x.double())
            with torch.autocast(DEVICE.type, torch.bfloat16):
                results.append(({"out": t.eager(x)}, {"out": t.fused(x)}, {"out": exact}))
    assert results[0][1]["out"].dtype == torch.bfloat16
    assert_parity(results)


def test_autocast_casts_the_input_and_convolution_weights_alone_in_a_chain_of_blocks(any_backend):
    """The activations between the blocks are bfloat16, the parameters stay float32."""
    first, second = trio(Residual, *STRIDED), trio(Residual, 6, 6, seed=1)
    eager, fused, _ = (nn.Sequential(a, b) for a, b in zip(first.all, second.all))
    assert_autocast_casts(fused, eager, draw(2, 4, 7, 6), torch.bfloat16)


class Casts(TorchDispatchMode):
    """Notes the names of the operators that give a weight another type, and how many they cast."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = args[0] if args else None
        if func is torch.ops.aten._foreach_copy_.default:
            assert all(to.stride() == from_.stride() for to, from_ in zip(*args)), "which would be a launch each"
            self.found.append(("_foreach_copy_", len(first)))
        elif func is torch.ops.aten._to_copy.default and isinstance(first, nn.Parameter):
            self.found.append(("_to_copy", 1))
        return func(*args, **(kwargs or {}))


@train_and_eval
@pytest.mark.parametrize(
    ("made", "weights"),
    [
        (lambda: FusedResidual(4, 4), 2),
        (lambda: FusedResidual(4, 6, use_1x1conv=True, strides=2), 3),
        (lambda: FusedBottleneck(4, 2, 2), 4),
    ],
    ids=["identity", "1x1", "three units, normed shortcut"],
)
def test_under_autocast_a_block_s_weights_are_cast_at_once(made, weights, train):
    block = made().to(DEVICE, memory_format=torch.channels_last).train(train)
    with torch.autocast(DEVICE.type, torch.bfloat16), Casts() as casts:
        block(draw(2, 4, 6, 6))
    assert casts.found == [("_foreach_copy_", weights)]


@convolved
@pytest.mark.parametrize("change", [lambda m: m, keep_norms_constant], ids=["trained norms", "norms of constants"])
def test_weight_gradients_under_autocast_are_float32_and_never_rounded(kind, change):
    """The product's accumulators are float32. Eager rounds them to the type of the product first."""
    fused = change(trio(*KINDS[kind]).fused)
    with resnet.backend("triton"), resnet.convolution("triton"), torch.autocast(DEVICE.type, torch.bfloat16):
        out = fused(images(kind, (2, 6, 7)))
    out.backward(torch.ones_like(out))
    for name, weight in fused.named_parameters():
        if weight.dim() == 4 and not name.startswith("se."):  # whose convolutions are PyTorch's
            assert weight.grad.dtype == torch.float32
            assert not torch.equal(weight.grad, weight.grad.bfloat16().float()), name


@kinds
def test_a_weight_may_be_written_before_backward_under_autocast(any_backend, kind):
    """As in eager, whose products keep the copy that they read. Its own gradient does not depend on it."""
    x = images(kind, (2, 6, 7))
    grads = []
    for write in (False, True):
        fused = trio(*KINDS[kind]).fused
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = fused(x)
        if write:
            with torch.no_grad():
                for weight in fused.parameters():
                    if weight.dim() == 4:
                        weight.add_(1)
        out.backward(torch.ones_like(out))
        grads.append({name: weight.grad for name, weight in fused.named_parameters()})
    same(*grads)
