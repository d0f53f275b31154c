"""`FusedResidual` and `FusedStem` beside `Residual` and `Stem`: results, state, memory, and what may go wrong."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

import resnet.fused
from resnet import FusedResidual, FusedStem, Residual, Stem
from resnet.torch_backend import inference
from tests.conftest import DEVICE
from tests.helpers.blocks import (  # noqa: F401
    DTYPES,
    HALF,
    Trio,
    assert_parity,
    draw,
    name_of,
    one_thread,
    randomize,
    same,
    snapshot,
    step,
    trio,
)
from tests.helpers.pairs import each_pair

# Of NaN and Inf on purpose, by the interpreter's NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:(triton.runtime.interpreter|numpy)")

IDENTITY, PROJECTED, STRIDED = (4, 4), (4, 6, True), (4, 6, True, 2)
BLOCKS = {"identity": IDENTITY, "1x1": PROJECTED, "1x1 stride 2": STRIDED}
MODES = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "bn1 eval": lambda m: (m.train(), m.bn1.eval()),
    "bn2 eval": lambda m: (m.train(), m.bn2.eval()),
}
blocks = pytest.mark.parametrize("args", BLOCKS.values(), ids=BLOCKS)
modes = pytest.mark.parametrize("mode", MODES)


def assert_trios_parity(trios: list[Trio], shape: tuple[int, ...], **options) -> None:
    dtype = next(trios[0].fused.parameters()).dtype
    draws = [draw(*shape, seed=seed, dtype=dtype) for seed in range(len(trios))]
    assert_parity([tuple(step(m, x) for m in t.all) for t, x in zip(trios, draws)], **options)


def assert_exact(t: Trio, x: Tensor) -> None:
    """A step of a float64 trio gives eager's values: where a few values per channel would leave float32 to luck."""
    expected, got = step(t.exact, x), step(t.fused, x)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


# ---- parity: the block -----------------------------------------------------------------------------------------


@blocks
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_block_is_as_exact_as_eager(any_backend, dtype, mode, args):
    trios = [trio(Residual, *args, seed=seed, dtype=dtype).each(MODES[mode]) for seed in range(4)]
    assert_trios_parity(trios, (4, 4, 7, 6))


@each_pair(indirect=["any_backend"], any_backend=("torch", "triton"), dtype=HALF, mode=tuple(MODES), args=BLOCKS)
def test_a_block_in_half_precision_is_as_exact_as_eager(any_backend, dtype, mode, args):
    """Of values enough: a share of about eps lies within a rounding of zero, and a ReLU lets them through by chance."""
    trios = [trio(Residual, *args, seed=seed, dtype=dtype).each(MODES[mode]) for seed in range(4)]
    assert_trios_parity(trios, (8, 4, 24, 24))


@blocks
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(3, 1, 1), (1, 1, 9), (1, 4, 3), (2, 2, 1), (5, 1, 2)], ids=name_of)
def test_a_block_on_odd_sizes(any_backend, size, train, args):
    n, h, w = size
    assert_exact(trio(Residual, *args, dtype=torch.float64, train=train), draw(n, 4, h, w))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("args", [(1, 1), (3, 3), (1, 5, True, 2), (3, 6, True, 2), (16, 17, True), (6, 1, True, 3)])
def test_a_block_of_odd_channels(any_backend, args, train):
    assert_exact(trio(Residual, *args, dtype=torch.float64, train=train), draw(2, args[0], 5, 7))


def test_a_block_with_a_small_map_of_many_channels(any_backend):
    """Where the CPU's convolution becomes a matrix product."""
    assert_trios_parity([trio(Residual, 128, 128, seed=seed) for seed in range(2)], (2, 128, 3, 3))


@blocks
@modes
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_running_statistics_over_several_batches(any_backend, momentum, mode, args):
    def configure(module):
        MODES[mode](module)
        module.bn1.momentum = module.bn2.momentum = momentum

    t = trio(Residual, *args, dtype=torch.float64).each(configure)
    for seed in range(3):
        assert_exact(t, draw(2, 4, 4, 5, seed=seed))


def replaced_norms(**options):
    """Both BatchNorms anew, with these options."""

    def change(module: nn.Module) -> None:
        training = module.training
        for name in ("bn1", "bn2"):
            bn = nn.BatchNorm2d(getattr(module, name).num_features, **options)
            setattr(module, name, bn.to(DEVICE, module.conv1.weight.dtype).train(training))

    return change


@blocks
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [{"track_running_stats": False}, {"affine": False}, {"affine": False, "track_running_stats": False}, {"eps": 0.1}],
    ids=name_of,
)
def test_other_settings_of_batch_norm(any_backend, options, train, args):
    t = trio(Residual, *args, dtype=torch.float64, train=train).each(replaced_norms(**options))
    x = draw(2, 4, 5, 6)
    assert_exact(t, x)
    with torch.no_grad():
        torch.testing.assert_close(t.each(nn.Module.eval).fused(x.double()), t.exact(x.double()))


def test_statistics_may_stop_being_tracked(any_backend):
    """`track_running_stats` set to False afterwards: training leaves the buffers, evaluation still uses them."""

    def change(module):
        module.bn1.track_running_stats = module.bn2.track_running_stats = False

    t = trio(Residual, 4, 4, dtype=torch.float64).each(change)
    before = snapshot(t.fused)
    x = draw(2, 4, 5, 6)
    assert_exact(t, x)
    same(snapshot(t.fused), before)
    assert_exact(t.each(nn.Module.eval), x)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("names", [("conv1", "conv2"), ("conv1", "conv2", "conv3"), ("conv3",)], ids=name_of)
def test_convolutions_without_bias(any_backend, names, train):
    def change(module):
        for name in names:
            getattr(module, name).bias = None

    t = trio(Residual, *STRIDED, dtype=torch.float64, train=train).each(change)
    x = draw(2, 4, 5, 6)
    assert_exact(t, x)
    if not train:
        with torch.no_grad():
            torch.testing.assert_close(t.fused(x.double()), t.exact(x.double()))


# ---- parity: the stem ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(3, 1, 1), (2, 1, 9), (2, 5, 2), (1, 8, 8)], ids=name_of)
def test_a_stem_on_odd_sizes(any_backend, size, train):
    n, h, w = size
    assert_exact(trio(Stem, 3, 4, dtype=torch.float64, train=train), draw(n, 3, h, w))


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=name_of
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_stem_with_other_settings_of_batch_norm(any_backend, train, options):
    def change(module):
        module[1] = nn.BatchNorm2d(4, **options).to(DEVICE, module[0].weight.dtype).train(train)

    t = trio(Stem, 3, 4, dtype=torch.float64, train=train).each(change)
    for seed in range(2):
        assert_exact(t, draw(2, 3, 10, 9, seed=seed))


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0])
def test_ties_in_a_stems_pool_go_where_eager_sends_them(any_backend, value):
    """Constant images: every window of the pool is one tie, above zero, below it or at it."""

    def change(stem):
        nn.init.constant_(stem[0].weight, 0.0)
        nn.init.constant_(stem[0].bias, value)
        stem[1].running_mean.zero_()
        nn.init.ones_(stem[1].weight)
        nn.init.zeros_(stem[1].bias)

    t = trio(Stem, 1, 3, dtype=torch.float64, train=False).each(change)
    assert_exact(t, draw(2, 1, 9, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_nan_and_inf_pass_a_stem_as_eager(any_backend, train, value):
    t = trio(Stem, 1, 3, train=train)
    x = draw(2, 1, 20, 21)
    x[1, 0, 10, 5] = value
    expected, got = step(t.eager, x), step(t.fused, x)
    for name in expected:
        if name == "d 0.bias" and train:
            continue  # exact zeros where eager's gradient is a sum with NaN
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        torch.testing.assert_close(t.fused.eval()(x), t.eager.eval()(x), rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- inference -------------------------------------------------------------------------------------------------

KINDS = {
    "identity": (Residual, 16, 16),
    "strided": (Residual, 8, 16, True, 2),
    "stem": (Stem, 8, 16),
    "grey stem": (Stem, 1, 16),  # on the CPU a product of windows
}
kinds = pytest.mark.parametrize("kind", KINDS)
MANY = (2, 24, 20)  # enough pixels for the CPU to fold BatchNorm into the convolution
FEW = (2, 5, 6)


def inference_trio(kind: str, **options) -> Trio:
    return trio(*KINDS[kind], train=False, **options)


def images(kind: str, size: tuple[int, int, int] = MANY, **options) -> Tensor:
    n, h, w = size
    return draw(n, KINDS[kind][1], h, w, **options)


@kinds
@pytest.mark.parametrize("size", [MANY, FEW, (1, 1, 1)], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_inference_is_as_exact_as_eager(any_backend, dtype, size, kind):
    results = []
    for seed in range(3):
        t = inference_trio(kind, seed=seed, dtype=dtype)
        x = images(kind, size, seed=seed, dtype=dtype)
        with torch.no_grad():
            results.append(tuple({"out": m(x.double() if m is t.exact else x)} for m in t.all))
    assert_parity(results)
    assert all(is_channels_last(fused["out"]) for _, fused, _ in results)


@kinds
@pytest.mark.parametrize("size", [MANY, FEW], ids=name_of)
def test_no_grad_and_inference_mode_give_what_grad_mode_gives(any_backend, size, kind):
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
def test_inference_never_writes_its_input_or_state(any_backend, layout, size, kind):
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
def test_nan_and_inf_pass_inference_as_eager(any_backend, value, size, kind):
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


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in STATE.items() for name in names])
@pytest.mark.parametrize("change", PARAMETER_CHANGES)
def test_a_changed_weight_is_never_read_stale(any_backend, change, kind, name):
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


def test_no_change_of_a_single_value_can_hide():
    """Every value of one filter in turn, by a thousandth: outputs move with it, to within some roundings of theirs."""
    fused = inference_trio("identity").fused.cpu()
    x = images("identity").cpu()
    values = fused.conv1.weight.data[0]
    with torch.no_grad(), resnet.backend("torch"):
        for index in torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).tolist():
            fused(x)
            values[tuple(index)] += 3e-5
            # A copy has another weight tensor, to which nothing folded can belong.
            torch.testing.assert_close(fused(x), copy.deepcopy(fused)(x), rtol=0, atol=1e-5)


@kinds
def test_a_loaded_state_dict_is_used(any_backend, kind):
    t, other = inference_trio(kind), inference_trio(kind, seed=1)
    x = images(kind)
    with torch.no_grad():
        t.fused(x)
        t.fused.load_state_dict(other.eager.state_dict())
        assert torch.equal(t.fused(x), copy.deepcopy(other.fused)(x))


@kinds
def test_optimizer_steps_are_seen(any_backend, kind):
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
def test_training_steps_that_move_only_running_statistics_are_seen(any_backend, kind):
    fused = inference_trio(kind).fused
    x = images(kind)
    with torch.no_grad():
        before = fused(x)
        fused.train()(x)
        after = fused.eval()(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(fused)(x))


def test_a_changed_eps_is_seen(any_backend):
    fused = inference_trio("identity").fused
    x = images("identity")
    with torch.no_grad():
        fused(x)
        fused.bn1.eps = fused.bn2.eps = 0.5
        assert torch.equal(fused(x), copy.deepcopy(fused)(x))


def test_one_weight_may_serve_two_blocks(any_backend):
    """Tied convolutions under different BatchNorms: what was folded for one is not taken for the other."""
    a, b = (inference_trio("identity", seed=seed) for seed in range(2))
    for x, y in ((a.fused, b.fused), (a.eager, b.eager)):
        y.conv1, y.conv2 = x.conv1, x.conv2
    x = images("identity")
    with torch.no_grad():
        for _ in range(2):
            for t in (a, b):
                torch.testing.assert_close(t.fused(x), t.eager(x), rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_of_a_module_that_is_gone():
    before = len(inference._cache)
    fused = inference_trio("identity").fused.cpu()
    with torch.no_grad():
        fused(images("identity").cpu())
    assert len(inference._cache) > before
    del fused
    assert len(inference._cache) == before


# ---- state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "args"), [*((Residual, args) for args in BLOCKS.values()), (Stem, (1, 4))], ids=[*BLOCKS, "stem"]
)
def test_state_dicts_are_the_same_and_load_strictly_both_ways(kind, args):
    fused_kind = {Residual: FusedResidual, Stem: FusedStem}[kind]
    eager, fused = kind(*args), fused_kind(*args)
    randomize(eager)
    assert [(k, v.shape, v.dtype) for k, v in eager.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in fused.state_dict().items()
    ]
    assert [n for n, _ in eager.named_parameters()] == [n for n, _ in fused.named_parameters()]
    fused.load_state_dict(eager.state_dict(), strict=True)
    same(snapshot(fused), snapshot(eager))
    back = kind(*args)
    back.load_state_dict(fused.state_dict(), strict=True)
    same(snapshot(back), snapshot(eager))


def test_first_weights_are_those_of_eager():
    blocks = []
    for kind in (Residual, FusedResidual):
        torch.manual_seed(3)
        blocks.append(kind(*STRIDED).state_dict())
    same(*blocks)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_checkpoint_with_nchw_weights_is_read_right(any_backend, train, assign):
    trios = [trio(Residual, *STRIDED, seed=seed, train=train) for seed in range(3)]
    for t in trios:
        t.fused.load_state_dict(copy.deepcopy(t.eager.state_dict()), assign=assign, strict=True)
        assert t.fused.conv1.weight.is_contiguous() == assign, "the layout that this test is about"
    assert_trios_parity(trios, (2, 4, 6, 5))
    x = draw(2, 4, 30, 25)
    with torch.no_grad():
        t = trios[0].each(nn.Module.eval)
        torch.testing.assert_close(t.fused(x), t.eager(x), rtol=1e-4, atol=1e-5)


def _pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(any_backend, duplicate, kind):
    fused = inference_trio(kind).fused
    x = images(kind)
    with torch.no_grad():
        before = fused(x)  # fills what may be kept between calls
        twin = duplicate(fused)
        assert type(twin) is type(fused)
        assert torch.equal(twin(x), before)
        for p in twin.parameters():
            p.mul_(-0.7)
        assert not torch.equal(twin(x), before)
        assert torch.equal(fused(x), before)
    same(step(duplicate(fused).train(), x), step(copy.deepcopy(fused).train(), x))


# ---- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "strided", "stem"])
def test_conv_biases_before_batch_norm_have_exact_zeros_in_training(any_backend, kind):
    fused = inference_trio(kind).fused.train()
    result = step(fused, images(kind, (2, 6, 7)))
    for name in ("d 0.bias",) if kind == "stem" else ("d conv1.bias", "d conv2.bias"):
        assert torch.equal(result[name], torch.zeros_like(result[name]))


@pytest.mark.parametrize("kind", ["identity", "strided", "stem"])
def test_conv_biases_have_eagers_gradients_in_evaluation(any_backend, kind):
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, (2, 6, 7))
    expected, got = step(t.exact, x), step(t.fused, x)
    for name in ("d 0.bias",) if kind == "stem" else ("d conv1.bias", "d conv2.bias"):
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("args", [IDENTITY, STRIDED], ids=["identity", "strided"])
def test_gradients_are_derivatives(any_backend, args, mode):
    """In float64, of the input and all parameters. Fast: projected on random directions."""
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
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_frozen_parameter_has_no_gradient_and_changes_no_other(any_backend, train, args):
    block = trio(Residual, *args, train=train).fused
    x = draw(2, 4, 4, 5)
    state = snapshot(block)
    everything = step(block, x)
    for name, parameter in block.named_parameters():
        block.load_state_dict(state)
        parameter.requires_grad_(False)
        rest = step(block, x)
        assert f"d {name}" not in rest
        same(rest, {k: v for k, v in everything.items() if k != f"d {name}"})
        parameter.requires_grad_()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_without_gradient_changes_no_other(any_backend, kind, train):
    fused = inference_trio(kind).fused.train(train)
    state = snapshot(fused)
    x = images(kind, (2, 6, 7))
    everything = step(fused, x)
    fused.load_state_dict(state)
    out = fused(x)
    out.backward(draw(*out.shape, seed=7, dtype=torch.bfloat16).to(out.dtype))
    same(
        {f"d {n}": p.grad for n, p in fused.named_parameters()}, {k: v for k, v in everything.items() if k[:2] == "d "}
    )
    assert x.grad is None


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_input_may_want_a_gradient(any_backend, kind, train):
    fused = inference_trio(kind).fused.train(train)
    state = snapshot(fused)
    x = images(kind, (2, 6, 7))
    everything = step(fused, x)
    fused.load_state_dict(state)
    fused.requires_grad_(False)
    assert torch.equal(step(fused, x)["dx"], everything["dx"])


@kinds
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_module_used_twice_before_its_backward(any_backend, train, kind):
    t = inference_trio(kind, dtype=torch.float64).each(lambda m: m.train(train))
    a, b = (images(kind, (2, 6, 7), seed=seed).double() for seed in range(2))
    results = []
    for module in (t.fused, t.exact):
        inputs = [x.clone().requires_grad_() for x in (a, b)]
        first, second = module(inputs[0]), module(inputs[1])
        (first.square().sum() + second.sum()).backward()
        results.append([first, second, *(x.grad for x in inputs), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


def test_a_block_may_follow_itself(any_backend):
    t = trio(Residual, 4, 4, dtype=torch.float64)
    assert_same_as_exact(t, lambda m, x: m(m(x)), draw(2, 4, 5, 6))


def assert_same_as_exact(t: Trio, function, x: Tensor) -> None:
    results = []
    for module in (t.fused, t.exact):
        leaf = x.double().requires_grad_()
        out = function(module, leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), (leaf, *module.parameters()))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("incoming", ["sum", "nchw", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_incoming_gradient(any_backend, kind, incoming):
    fused = inference_trio(kind).fused.train()
    x = images(kind, (2, 7, 6)).requires_grad_()
    out = fused(x)
    dout = draw(*out.shape, seed=3)
    dout = {
        "sum": lambda: torch.ones((), device=DEVICE).expand(out.shape),
        "nchw": dout.contiguous,
        "sliced": lambda: torch.cat((dout, dout), 3)[..., : dout.shape[3]],
        "transposed": lambda: dout.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: dout[:, :, :1, :1].expand(out.shape),
    }[incoming]()
    leaves = (x, *fused.parameters())
    got = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    dense = torch.empty_like(out, memory_format=torch.channels_last).copy_(dout)
    same(dict(enumerate(got)), dict(enumerate(torch.autograd.grad(out, leaves, dense))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced", "transposed"])
def test_any_input_layout_gives_the_same_bits_and_channels_last(any_backend, layout, train, kind):
    fused = inference_trio(kind).fused.train(train)
    x = images(kind, (2, 7, 6))
    laid = {
        "channels_last": lambda: x,
        "nchw": x.contiguous,
        "sliced": lambda: torch.cat((x, x), 2)[:, :, : x.shape[2]],
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]()
    state = snapshot(fused)
    got = step(fused, laid)
    fused.load_state_dict(state)
    same(got, step(fused, x))
    assert is_channels_last(got["out"])
    if "stem" not in kind:
        assert is_channels_last(got["dx"])


def test_conv_weights_are_held_channels_last():
    for module in (FusedResidual(*STRIDED), FusedStem(3, 4)):
        assert all(is_channels_last(p) for p in module.parameters() if p.dim() == 4)
        module.load_state_dict({k: v.contiguous() for k, v in module.state_dict().items()})
        assert all(is_channels_last(p) for p in module.parameters() if p.dim() == 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_two_steps_are_bit_equal_and_write_no_input(any_backend, train, kind):
    fused = inference_trio(kind).fused.train(train)
    x = images(kind, (3, 13, 12))
    before, state = x.clone(), snapshot(fused)
    first = step(fused, x)
    fused.load_state_dict(state)
    same(step(fused, x), first)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("changed", ["out", "x"])
def test_an_in_place_change_before_backward_is_detected(any_backend, changed, train, kind):
    for module in inference_trio(kind).each(lambda m: m.train(train)).all[:2]:
        x = images(kind, (2, 7, 6))
        out = module(x)
        with torch.no_grad():
            (out if changed == "out" else x).mul_(1)
        if "stem" in kind and changed == "out" and isinstance(module, Stem) and not isinstance(module, FusedStem):
            continue  # eager's pool keeps its input and indices, not its output
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_refused_by_name(any_backend, kind):
    fused = inference_trio(kind).fused.train()
    x = images(kind, (2, 7, 6)).requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fused_residual::\w+_backward .*double backward .*not supported.*Residual"):
        dx.square().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_graph_is_freed_by_its_backward_as_in_eager(any_backend, train, kind):
    fused = inference_trio(kind).fused.train(train)
    loss = fused(images(kind, (2, 7, 6))).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_an_empty_batch_does_what_eager_does(any_backend, train, kind):
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


def test_no_grad_in_training_still_updates_the_statistics(any_backend):
    t = trio(Residual, *STRIDED, dtype=torch.float64)
    x = draw(2, 4, 5, 6).double()
    with torch.no_grad():
        torch.testing.assert_close(t.fused(x), t.exact(x))
    torch.testing.assert_close(snapshot(t.fused), snapshot(t.exact))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("args", [IDENTITY, STRIDED], ids=["identity", "strided"])
def test_nan_and_inf_pass_a_frozen_block_as_eager(any_backend, args, value):
    t = trio(Residual, *args, train=False)
    x = draw(2, 4, 9, 9)
    x[1, 2, 4, 4] = value
    got, expected = step(t.fused, x), step(t.eager, x)
    assert expected["out"].isfinite().any() and not expected["out"].isfinite().all()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- autocast --------------------------------------------------------------------------------------------------


def with_weights_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose convolutions have weights of `dtype`; all else stays as it is."""
    module = copy.deepcopy(module)
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.to(dtype)
    return module


def assert_autocast_casts(fused: nn.Module, eager: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Bit-equal to a module whose input and convolution weights were cast by hand, in the types that eager gives."""

    def autocast(call):
        with torch.autocast(DEVICE.type, dtype):
            return call()

    by_hand = step(with_weights_in(fused, dtype), x)
    got, types = step(fused, x, autocast), step(eager, x, autocast)
    assert got["out"].dtype == dtype
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in types.items()}
    same(got, {name: value.to(got[name].dtype) for name, value in by_hand.items()})


@kinds
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_autocast_casts_input_and_convolution_weights_alone(any_backend, dtype, train, kind):
    t = inference_trio(kind).each(lambda m: m.train(train))
    assert_autocast_casts(t.fused, t.eager, images(kind, (2, 6, 7)), dtype)


@kinds
def test_inference_under_autocast(any_backend, kind):
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


def test_a_chain_of_blocks_under_autocast(any_backend):
    """Half-precision activations between blocks, float32 parameters."""
    first, second = trio(Residual, *STRIDED), trio(Residual, 6, 6, seed=1)
    eager, fused, _ = (nn.Sequential(a, b) for a, b in zip(first.all, second.all))
    assert_autocast_casts(fused, eager, draw(2, 4, 7, 6), torch.bfloat16)


# ---- kept for backward -----------------------------------------------------------------------------------------


def kept(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and what its backward keeps: one tensor per storage, the parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    tensors: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage().data_ptr()
        if storage not in parameters and (storage not in tensors or t.numel() > tensors[storage].numel()):
            tensors[storage] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    return out, list(tensors.values())


def nbytes(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def without(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
    return [t for t in tensors if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_an_identity_block_keeps_at_most_three_quarters_of_eagers_bytes(any_backend, dtype):
    t = trio(Residual, 8, 8, dtype=dtype)
    x = draw(4, 8, 24, 24, dtype=dtype).requires_grad_()
    fused, eager = (nbytes(without(kept(m, x)[1], x)) for m in (t.fused, t.eager))
    assert fused <= 0.76 * eager


@pytest.mark.parametrize("args", [(8, 8), (8, 8, True)], ids=["identity", "1x1"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_block_keeps_its_input_two_convolutions_its_output_and_vectors(any_backend, train, args):
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


def test_a_stem_keeps_at_most_six_tenths_of_eagers_bytes(any_backend):
    t = trio(Stem, 1, 8)
    x = draw(4, 1, 48, 48).requires_grad_()
    fused, eager = (nbytes(without(kept(m, x)[1], x)) for m in (t.fused, t.eager))
    assert fused <= 0.6 * eager


def test_nothing_is_kept_in_the_module(any_backend):
    block = trio(Residual, *STRIDED).fused
    before = set(vars(block)) | {name for m in block.modules() for name in vars(m)}
    block(draw(2, 4, 6, 6).requires_grad_()).sum().backward()
    assert before == set(vars(block)) | {name for m in block.modules() for name in vars(m)}


# ---- what cannot be fused --------------------------------------------------------------------------------------


@pytest.fixture
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(resnet.fused, "_warned", set())


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(module: nn.Module, name: str) -> None:
    module.get_submodule(name).register_forward_hook(lambda m, args, out: out * 1.5)


def _pre_hooked(module: nn.Module, name: str) -> None:
    module.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))


def _grad_hooked(module: nn.Module, name: str) -> None:
    module.get_submodule(name).register_full_backward_hook(lambda m, grads, _: tuple(2 * g for g in grads))


def _replace(name: str, make):
    def change(module: nn.Module) -> None:
        old = module.get_submodule(name)
        torch.manual_seed(5)
        new = make(old).to(next(module.parameters())).train(module.training)
        setattr(module, name, new)

    return change


def _grouped(old: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, groups=2)


UNFUSABLE = {
    "SyncBatchNorm": (nn.SyncBatchNorm.convert_sync_batchnorm, "bn1 is a SyncBatchNorm, not a BatchNorm2d"),
    "a subclass": (_replace("bn2", lambda old: Doubled(old.num_features)), "bn2 is a Doubled, not a BatchNorm2d"),
    "GroupNorm": (_replace("bn1", lambda old: nn.GroupNorm(2, old.num_features)), "bn1 is a GroupNorm"),
    "Identity": (_replace("bn2", lambda old: nn.Identity()), "bn2 is a Identity, not a BatchNorm2d"),
    "a forward hook": (lambda m: _hooked(m, "conv2"), "conv2 has hooks"),
    "a forward pre-hook": (lambda m: _pre_hooked(m, "bn1"), "bn1 has hooks"),
    "a backward hook": (lambda m: _grad_hooked(m, "conv1"), "conv1 has hooks"),
    "a parametrisation": (
        lambda m: nn.utils.parametrizations.weight_norm(m.conv1) and None,
        "conv1 is a ParametrizedConv2d, not a Conv2d",
    ),
    "groups": (_replace("conv2", _grouped), "conv2.groups is 2, not 1"),
    "dilation": (
        _replace("conv2", lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3, padding=2, dilation=2)),
        r"conv2.padding is \(2, 2\), not \(1, 1\)",
    ),
    "circular padding": (lambda m: setattr(m.conv1, "padding_mode", "circular"), "conv1.padding_mode is circular"),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reason", UNFUSABLE)
def test_what_cannot_be_fused_runs_as_eager_with_one_warning(any_backend, no_warning_yet, reason, train):
    change, message = UNFUSABLE[reason]
    t = trio(Residual, 4, 4, dtype=torch.float64, train=train)
    fused, eager = (change(m) or m for m in (t.fused, t.exact))
    if reason == "circular padding":
        for m in (fused, eager):
            m.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    x = draw(2, 4, 5, 6)
    with pytest.warns(UserWarning, match=f"FusedResidual runs PyTorch's operators one by one: {message}"):
        got = step(fused, x)
    for name, value in step(eager, x).items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fused(x.double()), eager(x.double()))


STEM_CHANGES = {
    "a hook": (lambda m: _hooked(m, "2"), "2 has hooks"),
    "another activation": (lambda m: m.__setitem__(2, nn.GELU()), "2 is a GELU, not a ReLU"),
    "another pool": (lambda m: m.__setitem__(3, nn.AvgPool2d(3, 2, 1)), "3 is a AvgPool2d, not a MaxPool2d"),
    "another window": (lambda m: m.__setitem__(3, nn.MaxPool2d(2)), "3.kernel_size is 2, not 3"),
    "ceil mode": (lambda m: setattr(m[3], "ceil_mode", True), "3.ceil_mode is True"),
    "groups": (
        lambda m: m.__setitem__(0, nn.Conv2d(2, 4, 7, 2, 3, groups=2).double().to(DEVICE)),
        "0.groups is 2, not 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", STEM_CHANGES)
def test_a_changed_stem_runs_as_eager_with_one_warning(any_backend, no_warning_yet, reason):
    change, message = STEM_CHANGES[reason]
    t = trio(Stem, 2, 4, dtype=torch.float64)
    for m in (t.fused, t.exact):
        torch.manual_seed(5)
        change(m)
    x = draw(2, 2, 13, 12)
    with pytest.warns(UserWarning, match=f"FusedStem runs PyTorch's operators one by one: {message}"):
        got = step(t.fused, x)
    for name, value in step(t.exact, x).items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.fused(x.double())


def test_a_removed_hook_lets_it_fuse_again(no_warning_yet):
    block = FusedResidual(3, 3)
    handle = block.bn1.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="bn1 has hooks"):
        block(torch.rand(2, 3, 4, 4))
    handle.remove()
    assert "ResidualBlock" in type(block(torch.rand(2, 3, 4, 4)).grad_fn).__name__


def test_a_stem_of_another_kernel_is_fused_too(any_backend):
    def change(stem):
        torch.manual_seed(5)
        stem[0] = nn.Conv2d(3, 4, 3, stride=1, padding=1).to(DEVICE, stem[0].weight.dtype)

    t = trio(Stem, 3, 4, dtype=torch.float64).each(change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(t, draw(2, 3, 7, 6))


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "got"),
    [
        ((3, 6), "3 -> 6 channels, strides 1"),
        ((3, 3, False, 2), "3 -> 3 channels, strides 2"),
        ((6, 3, False, 2), "6 -> 3"),
    ],
)
def test_an_identity_shortcut_that_cannot_match_is_refused_by_the_constructor(args, got):
    with pytest.raises(ValueError, match=f"identity shortcut .* got {got}.*use_1x1conv=True"):
        FusedResidual(*args)


BAD_INPUT = {
    "no batch axis": (lambda x: x[0], ValueError, r"input: expected 4 axes .* got 3: shape \(4, 6, 5\)"),
    "five axes": (lambda x: x[None], ValueError, "input: expected 4 axes .* got 5"),
    "other channels": (lambda x: x[:, :3], ValueError, r"input: expected 4 channels, got 3: shape \(2, 3, 6, 5\)"),
    "height 0": (lambda x: x[:, :, :0], ValueError, "input: expected height and width of at least 1"),
    "integers": (lambda x: x.long(), TypeError, "input: expected float16, .* got torch.int64"),
    "another type": (lambda x: x.double(), TypeError, "weight: expected .* torch.float64, got torch.float32"),
    "half precision": (lambda x: x.half(), TypeError, "weight: expected .* torch.float16, got torch.float32"),
    "another device": (lambda x: x.to("meta"), ValueError, "weight: expected the input's device meta, got "),
    "an array": (lambda x: x.cpu().numpy(), TypeError, "input: expected a tensor, got ndarray"),
}  # fmt: skip


def assert_refused(module: nn.Module, x, error: type[Exception], message: str) -> None:
    """In both modes, with and without gradients; nothing in the module has changed."""
    before = snapshot(module)
    with pytest.raises(error, match=message):
        module(x)
    same(snapshot(module), before)


@pytest.mark.parametrize("bad", BAD_INPUT)
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("kind", [IDENTITY, STRIDED, "stem"], ids=["identity", "strided", "stem"])
def test_bad_input_is_named_before_anything_changes(any_backend, kind, mode, bad):
    change, error, message = BAD_INPUT[bad]
    t = trio(Stem, 4, 5) if kind == "stem" else trio(Residual, *kind)
    with torch.set_grad_enabled(mode != "no_grad"):
        assert_refused(t.fused.train(mode == "train"), change(draw(2, 4, 6, 5)), error, message)


@pytest.mark.parametrize(
    ("args", "shape", "modes"),
    [
        (IDENTITY, (1, 4, 1, 1), "train"),
        (STRIDED, (1, 4, 2, 2), "train"),
        (IDENTITY, (1, 4, 1, 1), "bn1 eval"),
        (IDENTITY, (1, 4, 1, 1), "bn2 eval"),
    ],
)
def test_one_value_per_channel_is_refused_in_training(any_backend, args, shape, modes):
    block = trio(Residual, *args).each(MODES[modes]).fused
    message = r"bn[12]: expected more than 1 value per channel when training, got input size \(1, \d, 1, 1\)"
    assert_refused(block, draw(*shape), ValueError, message)
    block.eval()(draw(*shape))


def test_one_value_per_channel_is_refused_by_a_stem(any_backend):
    stem = trio(Stem, 3, 4).fused
    assert_refused(stem, draw(1, 3, 2, 1), ValueError, r"1: expected more than 1 value .* \(1, 4, 1, 1\)")
    stem.eval()(draw(1, 3, 2, 1))


def _set(path: str, make):
    def change(block: nn.Module) -> None:
        name, field = path.split(".")
        module = block.get_submodule(name)
        value = make(getattr(module, field))
        if field in module._parameters and value is not None:
            value = nn.Parameter(value)
        setattr(module, field, value)

    return change


BAD_MODULES = {
    "bn1.weight's length": (_set("bn1.weight", lambda t: t.detach()[:3]), ValueError, r"bn1.weight: expected sh"),
    "bn2.bias's type": (_set("bn2.bias", lambda t: t.detach().double()), TypeError, "bn2.bias: expected torch.float32"),
    "bn2.running_var missing": (_set("bn2.running_var", lambda t: None), ValueError, "bn2: .* both or neither"),
    "bn2.running_mean's length": (_set("bn2.running_mean", lambda t: t[:1]), ValueError, r"bn2.running_mean: exp"),
    "bn2 on another device": (lambda m: m.bn2.to("meta"), ValueError, "bn2.weight: expected the input's device"),
    "conv2.weight's type": (_set("conv2.weight", lambda t: t.detach().double()), TypeError, "conv2.weight: expected"),
    "conv2.bias's type": (_set("conv2.bias", lambda t: t.detach().double()), TypeError, "bn2.conv_bias: expected"),
    "conv2.weight's shape": (_set("conv2.weight", lambda t: t.detach()[:3]), ValueError, "conv2.weight: expected"),
    "conv3.bias's type": (_set("conv3.bias", lambda t: t.detach().double()), TypeError, "conv3.bias: expected"),
    "conv3.bias's length": (_set("conv3.bias", lambda t: t.detach()[:1]), ValueError, "conv3.bias: expected"),
    "conv3 on another device": (lambda m: m.conv3.to("meta"), ValueError, "conv3.weight: expected the input's device"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_MODULES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_bad_parameter_is_named_before_anything_changes(any_backend, train, bad):
    change, error, message = BAD_MODULES[bad]
    block = trio(Residual, 4, 4, True, train=train).fused
    change(block)
    kept = {k: v for k, v in block.state_dict().items() if v.device.type != "meta"}
    before = {k: v.clone() for k, v in kept.items()}
    with pytest.raises(error, match=message):
        block(draw(2, 4, 5, 6))
    same(kept, before)
