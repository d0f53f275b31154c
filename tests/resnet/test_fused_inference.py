"""`FusedResidual` and `FusedStem` in inference: results, and what is folded is never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import resnet
from resnet.functional import channels_last
from resnet.torch_backend import inference
from resnet.torch_backend.convolution import KEEP_UP, LAG
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, infer, name_of, same, snapshot
from tests.helpers.fused_cases import FEW, KINDS, MANY, assert_trios_parity, images, inference_trio, kinds
from tests.helpers.layouts import is_channels_last


@pytest.fixture(autouse=True)
def folds_from_few_pixels_on(monkeypatch):
    """On the CPU BatchNorm is folded at these tests' sizes too, but for `FEW` pixels."""
    monkeypatch.setattr(inference, "_FOLDED", 2048)
    monkeypatch.setattr(inference, "_MANY_WINDOWS", 200)
    monkeypatch.setattr(inference, "_LARGE", 200 * 16)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("small stem", "gates")])
@pytest.mark.parametrize("size", [(2, 40, 40), FEW], ids=name_of)
def test_on_a_cpu_batch_norm_is_folded_where_the_map_is_larger_than_the_weight(monkeypatch, kind, size):
    fused = inference_trio(kind).fused.cpu()
    x = images(kind, size).cpu()
    normalized = []
    native_batch_norm = torch.native_batch_norm

    def watched(y, *rest):
        normalized.append(y.shape)
        return native_batch_norm(y, *rest)

    monkeypatch.setattr(torch, "native_batch_norm", watched)
    with resnet.backend("torch"), torch.no_grad():
        fused(x)
    assert bool(normalized) == (size == FEW)


@pytest.mark.parametrize("lag", [False, True], ids=["products keep up", "products lag"])
@pytest.mark.parametrize("kind", ["stem", "grey stem"])
def test_on_a_cpu_a_large_stem_is_pooled_some_images_after_others(monkeypatch, kind, lag):
    monkeypatch.setattr(inference, "limits", lambda: LAG if lag else KEEP_UP)
    monkeypatch.setattr(inference, "_WINDOWS", 2 * 11**2)  # of two images
    pooled = []
    max_pool = torch.max_pool2d

    def watched(y, *rest):
        pooled.append(len(y))
        return max_pool(y, *rest)

    trios = [inference_trio(kind, seed=seed) for seed in range(3)]
    for t in trios:
        t.each(nn.Module.cpu)
    x = images(kind, (5, 21, 22)).cpu()
    with monkeypatch.context() as watching, resnet.backend("torch"), torch.no_grad():
        watching.setattr(torch, "max_pool2d", watched)
        trios[0].fused(x)
    assert pooled == [2, 2, 1]
    with resnet.backend("torch"):
        assert_trios_parity(trios, x.shape, lambda module, x: infer(module, x.cpu()))


@kinds
@pytest.mark.parametrize("size", [MANY, FEW, (1, 1, 1)], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_inference_is_as_exact_as_eager(any_backend, dtype, size, kind):
    trios = [inference_trio(kind, seed=seed, dtype=dtype) for seed in range(3)]
    x = images(kind, size, dtype=dtype)
    assert_trios_parity(trios, x.shape, infer)
    assert is_channels_last(infer(trios[0].fused, x)["out"])


@kinds
@pytest.mark.parametrize("size", [MANY, FEW], ids=name_of)
def test_no_grad_and_inference_mode_give_the_values_of_grad_mode(any_backend, size, kind):
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, size).double()
    recorded = t.fused(x)
    with torch.no_grad():
        plain = t.fused(x)
    with torch.inference_mode():
        inferred = t.fused(x)
    assert recorded.requires_grad and not plain.requires_grad and inferred.is_inference()
    torch.testing.assert_close(plain, recorded.detach())
    torch.testing.assert_close(inferred, recorded.detach())


@kinds
@pytest.mark.parametrize("size", [MANY, FEW], ids=name_of)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_inference_writes_neither_its_input_nor_its_state(any_backend, layout, size, kind):
    fused = inference_trio(kind).fused
    x = images(kind, size)
    x = x.contiguous() if layout == "nchw" else x
    before, state = x.clone(), snapshot(fused)
    with torch.no_grad():
        fused(x)
        fused(x)
    assert torch.equal(x, before)
    same(snapshot(fused), state)


@kinds
def test_inference_does_not_depend_on_earlier_sizes(any_backend, kind):
    fused = inference_trio(kind).fused
    sizes = [(1, 20, 20), (5, 20, 20), (2, 33, 17), FEW, (1, 64, 3)]
    with torch.no_grad():
        fresh = [copy.deepcopy(fused)(images(kind, size)) for size in sizes]
        for order in (sizes, sizes[::-1]):
            for size in order:
                assert torch.equal(fused(images(kind, size)), fresh[sizes.index(size)]), size


@kinds
@pytest.mark.parametrize("size", [MANY, FEW], ids=name_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_pass_inference_as_in_eager(any_backend, value, size, kind):
    t = inference_trio(kind)
    x = images(kind, size)
    x[1, -1, 3, 4] = value
    with torch.no_grad():
        expected = t.eager(x)
        assert expected.isnan().any() or expected.isinf().any()
        assert expected.isfinite().any()
        torch.testing.assert_close(t.fused(x), expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def _write_through_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] *= -0.5


PARAMETER_CHANGES = {
    "in place": lambda p: p.mul_(-0.5),
    "in place through .data": lambda p: p.data.mul_(-0.5),
    "a new .data": lambda p: setattr(p, "data", p.data * -0.5),
    "through a view": lambda p: p.data.view_as(p.data).select(0, 0).mul_(-0.5),
    "a single value": lambda p: p.data.view(-1)[:1].add_(0.1) if p.dim() == 1 else p.data[0, 0, 0, 0].add_(0.1),
    "through numpy": _write_through_numpy,
}
STATE = {
    "identity": ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.running_mean", "bn2.running_var", "conv2.weight"],
    "strided": ["conv3.weight", "conv3.bias", "bn2.bias", "bn2.running_mean"],
    "stem": ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"],
    "grey stem": ["0.weight"],
}


WAYS = [("identity", name, change) for name in ("conv1.weight", "bn1.running_mean") for change in PARAMETER_CHANGES]
WAYS += [(kind, name, "in place") for kind, names in STATE.items() for name in names]


@pytest.mark.parametrize(("kind", "name", "change"), dict.fromkeys(WAYS))
def test_inference_sees_every_way_to_change_a_weight(any_backend, change, kind, name):
    if change == "through numpy" and DEVICE.type != "cpu":
        pytest.skip("numpy shares no memory with the GPU")
    fused = inference_trio(kind).fused
    x = images(kind)
    value = dict([*fused.named_parameters(), *fused.named_buffers()])[name]
    with torch.no_grad():
        if "running_var" in name:
            value.copy_(value.abs() + 2)
        before = fused(x)
        PARAMETER_CHANGES[change](value)
        if "running_var" in name:
            value.abs_()
        after = fused(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(fused)(x))


@kinds
def test_inference_uses_a_loaded_state_dict(any_backend, kind):
    t, other = inference_trio(kind), inference_trio(kind, seed=1)
    x = images(kind)
    with torch.no_grad():
        t.fused(x)
        t.fused.load_state_dict(other.eager.state_dict())
        assert torch.equal(t.fused(x), copy.deepcopy(other.fused)(x))


@kinds
def test_inference_sees_optimizer_steps(any_backend, kind):
    fused = inference_trio(kind).fused
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    x = images(kind)
    for _ in range(3):
        with torch.no_grad():
            before = fused(x)
        fused.train()
        fused(x).square().mean().backward()
        optimizer.step()
        fused.eval()
        with torch.no_grad():
            after = fused(x)
            assert not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(fused)(x))


@kinds
def test_inference_sees_running_statistics_that_training_moved(any_backend, kind):
    fused = inference_trio(kind).fused
    x = images(kind)
    with torch.no_grad():
        before = fused(x)
        fused.train()(x)
        after = fused.eval()(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(fused)(x))


def test_inference_sees_a_changed_eps(any_backend):
    fused = inference_trio("identity").fused
    x = images("identity")
    with torch.no_grad():
        fused(x)
        fused.bn1.eps = fused.bn2.eps = 0.5
        assert torch.equal(fused(x), copy.deepcopy(fused)(x))


def test_blocks_that_share_weights_keep_their_own_batch_norms(any_backend):
    a, b = (inference_trio("identity", seed=seed) for seed in range(2))
    for x, y in ((a.fused, b.fused), (a.eager, b.eager)):
        y.conv1, y.conv2 = x.conv1, x.conv2
    x = images("identity")
    with torch.no_grad():
        for _ in range(2):
            for t in (a, b):
                torch.testing.assert_close(t.fused(x), t.eager(x), rtol=1e-4, atol=1e-4)


def first_conv_and_norm(module: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return (module[0], module[1]) if isinstance(module, nn.Sequential) else (module.conv1, module.bn1)


@kinds
@pytest.mark.parametrize("size", [(2, 40, 40), FEW], ids=name_of)
def test_a_scaled_weight_that_would_overflow_gives_eagers_values(any_backend, kind, size):
    @torch.no_grad()
    def change(module: nn.Module) -> None:
        conv, bn = first_conv_and_norm(module)
        conv.weight *= 1e30
        bn.weight *= 1e15
        bn.running_mean.zero_()
        bn.bias.zero_()

    t = inference_trio(kind).each(change)
    x = 1e-30 * images(kind, size)
    got, expected = infer(t.fused, x)["out"], infer(t.eager, x)["out"]
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@kinds
@pytest.mark.parametrize("size", [(2, 40, 40), FEW], ids=name_of)
def test_an_infinite_weight_meets_no_padding(any_backend, kind, size):
    """Where a window's tap lies in the padding, it leaves the values alone."""

    @torch.no_grad()
    def change(module: nn.Module) -> None:
        first_conv_and_norm(module)[0].weight[3, 0, 0, 0] = torch.inf

    t = inference_trio(kind).each(change)
    x = images(kind, size).abs() + 0.1
    got, expected, nhwc = (infer(*call)["out"] for call in ((t.fused, x), (t.eager, x), (t.eager, channels_last(x))))
    expected[got.isnan() & nhwc.isnan()] = torch.nan  # oneDNN's convolution of NHWC may multiply padding, with AVX-512
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
