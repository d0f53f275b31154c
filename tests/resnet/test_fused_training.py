"""A training step of `FusedResidual` and `FusedStem` beside eager: results, gradients, and what backward keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet import FusedBatchNorm2d, FusedSmallStem, Residual, SmallStem, Stem
from resnet.reference import BatchNormAddRelu2d
from tests.helpers.blocks import (
    SIXTEEN_BIT,
    Trio,
    draw,
    incoming_gradient,
    name_of,
    name_of_block,
    same,
    snapshot,
    step,
    trio,
)
from tests.helpers.fused_cases import (
    BLOCKS,
    IDENTITY,
    MODES,
    STRIDED,
    assert_exact,
    assert_trios_parity,
    blocks,
    images,
    inference_trio,
    kinds,
    modes,
    train_and_eval,
)
from tests.helpers.kept import kept, kept_bytes
from tests.helpers.pairs import each_pair

# ---- parity -----------------------------------------------------------------------------------------------------


@blocks
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_block_is_as_exact_as_eager(any_backend, dtype, mode, args):
    trios = [trio(Residual, *args, seed=seed, dtype=dtype).each(MODES[mode]) for seed in range(4)]
    assert_trios_parity(trios, (4, 4, 7, 6))


@each_pair(indirect=["any_backend"], any_backend=("torch", "triton"), dtype=SIXTEEN_BIT, mode=tuple(MODES), args=BLOCKS)
def test_a_block_of_a_16_bit_type_is_as_exact_as_eager(any_backend, dtype, mode, args):
    """There are values enough: a share of about eps is a rounding from zero, and passes a ReLU or not by chance."""
    trios = [trio(Residual, *args, seed=seed, dtype=dtype).each(MODES[mode]) for seed in range(4)]
    assert_trios_parity(trios, (8, 4, 24, 24))


@blocks
@train_and_eval
@pytest.mark.parametrize("size", [(3, 1, 1), (1, 1, 9), (1, 4, 3), (2, 2, 1), (5, 1, 2)], ids=name_of)
def test_a_block_gives_eagers_values_on_odd_sizes(any_backend, size, train, args):
    n, h, w = size
    assert_exact(trio(Residual, *args, dtype=torch.float64, train=train), draw(n, 4, h, w))


@train_and_eval
@pytest.mark.parametrize(
    "args", [(1, 1), (3, 3), (1, 5, True, 2), (3, 6, True, 2), (16, 17, True), (6, 1, True, 3)], ids=name_of_block
)
def test_a_block_of_odd_channels_gives_eagers_values(any_backend, args, train):
    assert_exact(trio(Residual, *args, dtype=torch.float64, train=train), draw(2, args[0], 5, 7))


def test_a_block_on_a_small_map_of_many_channels_is_as_exact_as_eager(any_backend):
    """On the CPU this convolution is a matrix product."""
    assert_trios_parity([trio(Residual, 128, 128, seed=seed) for seed in range(2)], (2, 128, 3, 3))


@train_and_eval
@pytest.mark.parametrize("names", [("conv1", "conv2"), ("conv1", "conv2", "conv3"), ("conv3",)], ids=" and ".join)
def test_a_block_without_biases_of_its_convolutions_gives_eagers_values(any_backend, names, train):
    def change(module):
        for name in names:
            getattr(module, name).bias = None

    t = trio(Residual, *STRIDED, dtype=torch.float64, train=train).each(change)
    x = draw(2, 4, 5, 6)
    assert_exact(t, x)
    if not train:
        with torch.no_grad():
            torch.testing.assert_close(t.fused(x.double()), t.exact(x.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("args", [IDENTITY, STRIDED], ids=["identity", "strided"])
def test_nan_and_inf_pass_a_block_with_frozen_statistics_as_in_eager(any_backend, args, value):
    t = trio(Residual, *args, train=False)
    x = draw(2, 4, 9, 9)
    x[1, 2, 4, 4] = value
    got, expected = step(t.fused, x), step(t.eager, x)
    assert expected["out"].isfinite().any() and not expected["out"].isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


@kinds
@train_and_eval
def test_an_empty_batch_has_eagers_shapes_and_counter_and_zero_gradients(any_backend, train, kind):
    t = inference_trio(kind).each(lambda m: m.train(train))
    x = images(kind, (0, 7, 6))
    before = snapshot(t.fused)
    got, expected = step(t.fused, x), step(t.eager, x)
    assert got["out"].shape == expected["out"].shape and got["dx"].shape == x.shape
    for name, value in got.items():
        if name.startswith("d "):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "running" in name:
            assert torch.equal(value, before[name]), name
        elif "tracked" in name:
            assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert t.fused.eval()(x).shape == expected["out"].shape


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "strided", "stem"])
def test_biases_before_batch_statistics_have_gradients_of_exactly_zero(any_backend, kind):
    fused = inference_trio(kind).fused.train()
    result = step(fused, images(kind, (2, 6, 7)))
    for name in ("d 0.bias",) if kind == "stem" else ("d conv1.bias", "d conv2.bias"):
        assert torch.equal(result[name], torch.zeros_like(result[name]))


@pytest.mark.parametrize("kind", ["identity", "strided", "stem"])
def test_biases_before_frozen_statistics_have_eagers_gradients(any_backend, kind):
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, (2, 6, 7))
    expected, got = step(t.exact, x), step(t.fused, x)
    for name in ("d 0.bias",) if kind == "stem" else ("d conv1.bias", "d conv2.bias"):
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("args", [IDENTITY, STRIDED], ids=["identity", "strided"])
def test_gradients_are_the_numerical_derivatives(any_backend, args, mode):
    """They are those of the input and of all parameters in float64, projected on random directions."""
    block = trio(Residual, *args, dtype=torch.float64).each(MODES[mode]).fused
    x = draw(2, 4, 3, 3).double().requires_grad_()
    names = [name for name, _ in block.named_parameters()]
    parameters = tuple(p.detach().clone().requires_grad_() for p in block.parameters())
    state = {name: b.clone() for name, b in block.named_buffers()}

    def function(x, *values):
        buffers = {name: b.clone() for name, b in state.items()}
        return torch.func.functional_call(block, dict(zip(names, values)) | buffers, (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("args", [IDENTITY, STRIDED], ids=["identity", "strided"])
@train_and_eval
def test_a_frozen_parameter_has_no_gradient_and_changes_no_other_result(any_backend, train, args):
    block = trio(Residual, *args, train=train).fused
    x = draw(2, 4, 4, 5)
    everything = step(copy.deepcopy(block), x)
    for name in dict(block.named_parameters()):
        frozen = copy.deepcopy(block)
        frozen.get_parameter(name).requires_grad_(False)
        same(step(frozen, x), {k: v for k, v in everything.items() if k != f"d {name}"})


@train_and_eval
@kinds
def test_an_input_that_wants_no_gradient_changes_no_other_gradient(any_backend, kind, train):
    fused = inference_trio(kind).fused.train(train)
    x = images(kind, (2, 6, 7))
    everything = step(copy.deepcopy(fused), x)
    out = fused(x)
    out.backward(incoming_gradient(out))
    gradients = {f"d {name}": p.grad for name, p in fused.named_parameters()}
    same(gradients, {name: everything[name] for name in gradients})
    assert x.grad is None


@kinds
def test_only_the_input_may_want_a_gradient(any_backend, kind):
    fused = inference_trio(kind).fused.train()
    x = images(kind, (2, 6, 7))
    everything = step(copy.deepcopy(fused), x)
    fused.requires_grad_(False)
    assert torch.equal(step(fused, x)["dx"], everything["dx"])


@kinds
def test_only_the_input_may_want_a_gradient_in_evaluation(any_backend, kind):
    """The norms are constants then, and another operator gives the same values."""
    fused = inference_trio(kind, dtype=torch.float64).fused
    x = images(kind, (2, 6, 7))
    everything = step(copy.deepcopy(fused), x)
    fused.requires_grad_(False)
    torch.testing.assert_close(step(fused, x)["dx"], everything["dx"], atol=1e-12, rtol=1e-9)


@kinds
@train_and_eval
def test_a_module_may_run_twice_before_its_backward(any_backend, train, kind):
    t = inference_trio(kind, dtype=torch.float64).each(lambda m: m.train(train))
    a, b = (images(kind, (2, 6, 7), seed=seed).double() for seed in range(2))
    results = []
    for module in (t.fused, t.exact):
        inputs = [x.clone().requires_grad_() for x in (a, b)]
        first, second = module(inputs[0]), module(inputs[1])
        (first.square().sum() + second.sum()).backward()
        results.append([first, second, *(x.grad for x in inputs), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
@pytest.mark.parametrize("second", ["of more pixels", "far from zero"])
@pytest.mark.parametrize("kind", ["norm", "small stem"])
def test_another_batch_in_training_may_come_before_the_backward_of_the_first(kind, second, recorded):
    """Crops of several sizes, say. Backward reads no running statistics, so that they may change."""
    x, other = draw(2, 4, 4, 4, dtype=torch.float64), draw(2, 4, 32, 32, dtype=torch.float64)
    if second == "far from zero":
        other = 50 + 0.01 * x
    results = []
    for cls in (FusedBatchNorm2d, BatchNormAddRelu2d) if kind == "norm" else (FusedSmallStem, SmallStem):
        torch.manual_seed(0)
        module = cls(4) if kind == "norm" else cls(4, 8)
        if kind != "norm":
            module[0].bias = None
        module.double()
        leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        out = module(leaf)
        with torch.set_grad_enabled(recorded):
            more = module(other.contiguous(memory_format=torch.channels_last))
        (out.square().sum() + more.sum()).backward()
        results.append([out, more, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*results)


def test_running_statistics_that_want_a_gradient_are_refused_as_by_eager():
    for cls in (FusedBatchNorm2d, BatchNormAddRelu2d):
        module = cls(4)
        module.running_mean.requires_grad_()
        with pytest.raises(RuntimeError, match="not differentiable"):
            module(draw(2, 4, 4, 4).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["bn1.bias", "bn2.bias", "conv1.bias", "conv2.bias", "conv3.bias"])
def test_a_bias_may_be_stepped_before_backward_which_does_not_read_it(any_backend, name):
    t, results = trio(Residual, 4, 8, True, 2, dtype=torch.float64), []
    for module in (t.fused, t.exact):
        out = module(draw(2, 4, 8, 7, dtype=torch.float64))
        with torch.no_grad():
            module.get_parameter(name).add_(1)
        out.square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*results)


@kinds
def test_an_input_of_inference_mode_is_refused_before_the_statistics_change(any_backend, kind):
    fused = inference_trio(kind).fused.train()
    with torch.inference_mode():
        x = images(kind, (2, 7, 6)).contiguous(memory_format=torch.channels_last)
    before = snapshot(fused)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        fused(x)
    same(snapshot(fused), before)


def test_a_block_may_follow_itself(any_backend):
    t = trio(Residual, 4, 4, dtype=torch.float64)
    assert_exact(Trio(*(nn.Sequential(block, block) for block in t.all)), draw(2, 4, 5, 6))


@kinds
@train_and_eval
def test_two_steps_are_bit_equal_and_write_no_input(any_backend, train, kind):
    fused = inference_trio(kind).fused.train(train)
    x = images(kind, (3, 13, 12))
    before, state = x.clone(), snapshot(fused)
    first = step(fused, x)
    fused.load_state_dict(state)
    same(step(fused, x), first)
    assert torch.equal(x, before)


@kinds
@train_and_eval
@pytest.mark.parametrize("changed", ["out", "x"])
def test_an_in_place_change_of_input_or_output_before_backward_is_detected(any_backend, changed, train, kind):
    for module in inference_trio(kind).each(lambda m: m.train(train)).all[:2]:
        x = images(kind, (2, 7, 6))
        out = module(x)
        with torch.no_grad():
            (out if changed == "out" else x).mul_(1)
        if type(module) is Stem and changed == "out":
            continue  # eager's pool keeps its input and indices, not its output
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@kinds
def test_double_backward_is_an_error_that_names_the_operator(any_backend, kind):
    fused = inference_trio(kind).fused.train()
    x = images(kind, (2, 7, 6)).requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fused_residual::\w+_backward .*double backward .*unfuse.*Residual"):
        dx.square().sum().backward()


@kinds
@train_and_eval
def test_a_graph_is_freed_by_its_backward_as_in_eager(any_backend, train, kind):
    fused = inference_trio(kind).fused.train(train)
    loss = fused(images(kind, (2, 7, 6))).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


# ---- kept for backward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_an_identity_block_keeps_at_most_three_quarters_of_eagers_bytes_for_backward(any_backend, dtype):
    t = trio(Residual, 8, 8, dtype=dtype)
    x = draw(4, 8, 24, 24, dtype=dtype).requires_grad_()
    assert kept_bytes(t.fused, x) <= 0.76 * kept_bytes(t.eager, x)


@pytest.mark.parametrize("args", [(8, 8), (8, 8, True)], ids=["identity", "1x1"])
@train_and_eval
def test_a_block_keeps_its_input_two_convolutions_its_output_and_vectors_for_backward(any_backend, train, args):
    block = trio(Residual, *args, train=train).fused
    x = draw(2, 8, 12, 11).requires_grad_()
    out, tensors = kept(block, x)
    activations = [t for t in tensors if t.numel() == x.numel()]
    vectors = [t for t in tensors if t.numel() != x.numel()]
    assert len(activations) == 4
    storages = {t.untyped_storage().data_ptr() for t in activations}
    assert {x.untyped_storage().data_ptr(), out.untyped_storage().data_ptr()} <= storages
    # the other two are y1 and y2, each with its bias left out
    left = [t for t in activations if t.data_ptr() not in (x.data_ptr(), out.data_ptr())]
    y1 = nn.functional.conv2d(x, block.conv1.weight, None, padding=1)
    assert any(torch.allclose(t, y1, atol=1e-5) for t in left)
    assert all(t.numel() <= 4 * 8 for t in vectors)


def test_a_stem_keeps_at_most_six_tenths_of_eagers_bytes_for_backward(any_backend):
    t = trio(Stem, 1, 8)
    x = draw(4, 1, 48, 48).requires_grad_()
    assert kept_bytes(t.fused, x) <= 0.6 * kept_bytes(t.eager, x)


def test_a_step_adds_no_attribute_to_the_module(any_backend):
    block = trio(Residual, *STRIDED).fused
    before = set(vars(block)) | {name for m in block.modules() for name in vars(m)}
    block(draw(2, 4, 6, 6).requires_grad_()).sum().backward()
    assert before == set(vars(block)) | {name for m in block.modules() for name in vars(m)}
