"""`FusedBatchNorm2d` beside `nn.BatchNorm2d`, the add and `torch.relu`: each mode of the one is one of the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import resnet
from resnet import FusedBatchNorm2d
from tests.conftest import DEVICE
from tests.helpers.blocks import (
    DTYPES,
    SIXTEEN_BIT,
    assert_parity,
    draw,
    incoming_gradient,
    name_of,
    named,
    randomize,
    same,
    saved_and_loaded,
    snapshot,
)
from tests.helpers.fused_cases import BAD_COUNTS, train_and_eval
from tests.helpers.layouts import LAYOUTS, is_channels_last

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),  # in PyTorch's own batch_norm
]

C = 6
SHAPE = (2, C, 3, 5)
added = pytest.mark.parametrize("shortcut", [True, False], ids=["add", "alone"])
with_and_without_relu = pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])


class Eager(nn.Module):
    """What a block does by hand: `nn.BatchNorm2d`, the add, `torch.relu`."""

    def __init__(self, bn: nn.BatchNorm2d, relu: bool = True):
        super().__init__()
        self.bn, self.relu = bn, relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        z = self.bn(x) if shortcut is None else self.bn(x) + shortcut
        return torch.relu(z) if self.relu else z


def norm(dtype: torch.dtype = torch.float32, train: bool = True, seed: int = 0, **options) -> nn.BatchNorm2d:
    """A BatchNorm amid a training run."""
    torch.manual_seed(seed)
    bn = nn.BatchNorm2d(C, **options)
    randomize(bn)
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.fill_(3)
    return bn.to(DEVICE, dtype).train(train)


def pair(relu: bool = True, **options) -> tuple[FusedBatchNorm2d, Eager]:
    """(fused, eager) of the same values."""
    bn = norm(**options)
    return FusedBatchNorm2d.of(copy.deepcopy(bn), relu), Eager(bn, relu)


def step(module: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> dict[str, Tensor]:
    """The output, the gradients of all that wants one, and the buffers, by name: `Eager` names those of its norm."""
    inputs = {"x": x.detach().requires_grad_()}
    if shortcut is not None:
        inputs["shortcut"] = shortcut.detach().requires_grad_()
    out = module(*inputs.values())
    bn = getattr(module, "bn", module)
    wanted = inputs | {name: p for name, p in bn.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), incoming_gradient(out))
    buffers = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    return {"out": out.detach(), **{f"d {name}": g for name, g in zip(wanted, grads)}, **buffers}


def assert_as_exact(
    input: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, shortcut: bool = True, **options
) -> None:
    """Several draws of a step with an input of that type."""
    results = []
    for seed in range(3):
        fused, eager = pair(seed=seed, **options)
        exact = copy.deepcopy(eager).double()
        given = [draw(*shape, seed=seed + 10 * i, dtype=input) for i in range(1 + shortcut)]
        results.append((step(eager, *given), step(fused, *given), step(exact, *(t.double() for t in given))))
    assert_parity(results)


def assert_eagers(fused: nn.Module, eager: nn.Module, steps: int = 2) -> None:
    """Steps of float64 modules give the same values."""
    for seed in range(steps):
        given = [draw(*SHAPE, seed=seed + 10 * i, dtype=torch.float64) for i in range(2)]
        torch.testing.assert_close(step(fused, *given), step(eager, *given), atol=1e-9, rtol=1e-7)


# ---- parity ----------------------------------------------------------------------------------------------------


@added
@with_and_without_relu
def test_each_form_is_as_exact_as_eager(any_backend, relu, shortcut):
    assert_as_exact(relu=relu, shortcut=shortcut)


@train_and_eval
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_each_type_is_as_exact_as_eager(any_backend, dtype, train):
    assert_as_exact(dtype, train=train, dtype=torch.promote_types(dtype, torch.float32))


@train_and_eval
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_parameters_may_be_16_bit_too(any_backend, dtype, train):
    assert_as_exact(dtype, train=train, dtype=dtype)


@train_and_eval
def test_many_pixels_are_as_exact_as_eager(any_backend, train):
    assert_as_exact(shape=(3, C, 14, 13), train=train)  # more than PyTorch's operator is left to sum up on the CPU


# ---- modes -----------------------------------------------------------------------------------------------------

SETTINGS = {
    "default": {},
    "cumulative average": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "large eps": {"eps": 0.1},
    "untracked": {"track_running_stats": False},
    "untracked cumulative average": {"track_running_stats": False, "momentum": None},
    "not affine": {"affine": False},
    "not affine, untracked": {"affine": False, "track_running_stats": False},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@settings
@train_and_eval
def test_any_settings_give_eagers_values_and_buffers_over_several_batches(any_backend, train, options):
    assert_eagers(*pair(dtype=torch.float64, train=train, **options))


CHANGES = {
    "tracked no longer": lambda bn: setattr(bn, "track_running_stats", False),
    "a momentum that is whole": lambda bn: setattr(bn, "momentum", 1),
    "a momentum that is a tensor": lambda bn: setattr(bn, "momentum", torch.tensor(0.7)),
    "an eps that is a tensor": lambda bn: setattr(bn, "eps", torch.tensor(0.3)),
    "without a count": lambda bn: setattr(bn, "num_batches_tracked", None),
    "a cumulative average without a count": lambda bn: (
        setattr(bn, "num_batches_tracked", None),
        setattr(bn, "momentum", None),
    ),
    "without statistics": lambda bn: (setattr(bn, "running_mean", None), setattr(bn, "running_var", None)),
    "frozen weights": lambda bn: bn.requires_grad_(False),
    "a frozen weight": lambda bn: bn.weight.requires_grad_(False),
    "without a weight": lambda bn: bn.register_parameter("weight", None),
    "without a bias": lambda bn: bn.register_parameter("bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
@train_and_eval
def test_what_a_user_changes_later_counts_as_in_eager(any_backend, train, change):
    if DEVICE.type == "cuda" and change == "without a weight":
        pytest.skip("PyTorch's own batch_norm on CUDA has no backward for a bias without a weight")
    fused, eager = pair(dtype=torch.float64, train=train)
    for bn in (fused, eager.bn):
        CHANGES[change](bn)
    assert_eagers(fused, eager, steps=1)


def test_modes_may_alternate(any_backend):
    fused, eager = pair(dtype=torch.float64, momentum=None)
    for train in (True, False, True):
        assert_eagers(fused.train(train), eager.train(train), steps=1)


@pytest.mark.parametrize("momentum", [0.1, None], ids=named("momentum"))
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])  # on a CPU: with a quick look, and with all checks
@with_and_without_relu
def test_each_batch_counts_once_without_gradients_too(any_backend, relu, layout, momentum):
    fused, eager = pair(relu, dtype=torch.float64, momentum=momentum)
    x = LAYOUTS[layout](draw(*SHAPE, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x))
    assert fused.num_batches_tracked == 4
    torch.testing.assert_close(fused.state_dict(), eager.bn.state_dict())


@train_and_eval
@pytest.mark.parametrize("momentum", [0.1, None], ids=named("momentum"))
def test_an_empty_batch_counts_and_leaves_the_statistics(any_backend, momentum, train):
    fused, _ = pair(train=train, momentum=momentum)
    before = snapshot(fused)
    result = step(fused, draw(0, *SHAPE[1:]), draw(0, *SHAPE[1:]))
    assert result["out"].shape == result["d x"].shape == result["d shortcut"].shape == (0, *SHAPE[1:])
    assert not result["d weight"].any() and not result["d bias"].any()
    before["num_batches_tracked"] += train
    same(snapshot(fused), before)


@train_and_eval
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_autocast_takes_the_input_as_it_is(any_backend, dtype, train):
    given = [draw(*SHAPE, seed=seed, dtype=dtype) for seed in range(2)]
    fused, eager = pair(train=train)
    plain = copy.deepcopy(fused)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        result, expected = step(fused, *given), step(eager, *given)
    assert result["out"].dtype == expected["out"].dtype == dtype
    same(result, step(plain, *given))


@train_and_eval
@with_and_without_relu
def test_under_autocast_a_shortcut_may_be_wider_than_what_a_convolution_gave(any_backend, relu, train):
    fused, eager = pair(relu, train=train)
    x, shortcut = draw(*SHAPE, dtype=torch.bfloat16), draw(*SHAPE, seed=1)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        result, expected = step(fused, x, LAYOUTS["nchw"](shortcut)), step(eager, x, shortcut)
        with pytest.raises(ValueError, match="shortcut: expected the input's shape"):
            fused(x, shortcut[:1])
    assert result["out"].dtype == torch.float32 and is_channels_last(result["out"])
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0.02)


# ---- layouts ---------------------------------------------------------------------------------------------------


@train_and_eval
@pytest.mark.parametrize("layout", ["nchw", "sliced channels", "transposed"])
def test_any_layout_gives_the_same_bits_channels_last(any_backend, layout, train):
    fused, _ = pair(train=train)
    twin = copy.deepcopy(fused)
    given = [draw(*SHAPE, seed=seed) for seed in range(2)]
    result = step(fused, *map(LAYOUTS[layout], given))
    same(result, step(twin, *given))
    assert all(is_channels_last(result[name]) for name in ("out", "d x", "d shortcut"))


# ---- an nn.BatchNorm2d -----------------------------------------------------------------------------------------


@settings
def test_the_constructor_is_that_of_batch_norm(options):
    fused, bn = FusedBatchNorm2d(C, **options), nn.BatchNorm2d(C, **options)
    assert isinstance(fused, nn.BatchNorm2d) and fused.relu
    assert list(fused.state_dict()) == list(bn.state_dict())
    same(fused.state_dict(), bn.state_dict())
    fused.load_state_dict(norm(**options).state_dict(), strict=True)
    bn.load_state_dict(fused.state_dict(), strict=True)
    assert FusedBatchNorm2d(C, 1e-3, 0.2, dtype=torch.float64, device="meta", relu=False).weight.is_meta


def test_it_says_what_it_is():
    shown = repr(FusedBatchNorm2d(C, relu=False))
    assert shown == f"Fused{nn.BatchNorm2d(C)!r}"[:-1] + ", relu=False)"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
def test_a_copy_gives_the_same_bits_and_changes_alone(any_backend, duplicate):
    fused, _ = pair(relu=False)
    x, before = draw(*SHAPE), snapshot(fused)
    twin = duplicate(fused)
    result = step(twin, x)
    same(snapshot(fused), before)
    same(step(fused, x), result)


# ---- taking over -----------------------------------------------------------------------------------------------


@settings
def test_taking_over_keeps_tensors_settings_and_mode_and_leaves_the_old_norm(options):
    bn = norm(train=False, **options)
    bn.weight is not None and bn.weight.requires_grad_(False)
    bn.name = "kept"
    before = dict(vars(bn))
    fused = FusedBatchNorm2d.of(bn, relu=False)
    assert type(bn) is nn.BatchNorm2d and vars(bn) == before
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(fused, name) is getattr(bn, name)
    for name in ("training", "momentum", "eps", "affine", "track_running_stats", "num_features", "name"):
        assert getattr(fused, name) == getattr(bn, name)
    assert fused.relu is False and FusedBatchNorm2d.of(bn).relu is True


def test_what_is_registered_later_is_registered_in_one_of_the_two():
    bn = norm()
    fused = FusedBatchNorm2d.of(bn)
    bn.register_forward_hook(lambda *_: 1 / 0)
    bn.weight = None
    fused(draw(*SHAPE))
    assert fused.weight is not None and fused.num_batches_tracked == bn.num_batches_tracked == 4


def test_an_optimizer_that_was_made_before_goes_on(any_backend):
    bn = norm(dtype=torch.float64)
    eager = Eager(copy.deepcopy(bn))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (bn, eager)]
    fused = FusedBatchNorm2d.of(bn)
    for seed in range(2):
        x = draw(*SHAPE, seed=seed, dtype=torch.float64)
        for module, optimizer in zip((fused, eager), optimizers):
            optimizer.zero_grad()
            module(x, x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(bn.state_dict(), eager.bn.state_dict())


class Subclass(nn.BatchNorm2d):
    pass


KINDS = {
    "SyncBatchNorm": (nn.SyncBatchNorm(C), "a SyncBatchNorm, whose statistics are those of all processes"),
    "a lazy one": (nn.LazyBatchNorm2d(), "a LazyBatchNorm2d, .* run a forward pass first"),
    "a subclass": (Subclass(C), "a Subclass$"),
    "another rank": (nn.BatchNorm1d(C), "a BatchNorm1d$"),
    "no norm": (nn.ReLU(), "a ReLU$"),
    "no module": (None, "a NoneType$"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_norm_is_taken_over(kind):
    bn, message = KINDS[kind]
    with pytest.raises(TypeError, match=f"FusedBatchNorm2d.of: expected exactly an nn.BatchNorm2d, got {message}"):
        FusedBatchNorm2d.of(bn)


def own_forward(bn: nn.BatchNorm2d) -> None:
    bn.forward = lambda x: x


WATCHED = {
    "forward_hooks": lambda bn: bn.register_forward_hook(lambda *_: None),
    "forward_pre_hooks": lambda bn: bn.register_forward_pre_hook(lambda *_: None),
    "backward_hooks": lambda bn: bn.register_full_backward_hook(lambda *_: None),
    "state_dict_hooks": lambda bn: bn.register_state_dict_post_hook(lambda *_: None),
    "a forward of its own": own_forward,
    "a forward of its own, compiled": lambda bn: bn.compile(backend="eager"),
}


@pytest.mark.parametrize("what", WATCHED)
def test_a_norm_that_is_watched_or_changed_is_not_taken_over(what):
    bn = norm()
    WATCHED[what](bn)
    with pytest.raises(ValueError, match=f"without hooks or a forward of its own, got one with _?{what.split(',')[0]}"):
        FusedBatchNorm2d.of(bn)


def test_hooks_of_the_module_itself_are_called(any_backend):
    fused, _ = pair()
    x, seen = draw(*SHAPE), []
    fused.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    out = fused(x, x)
    assert seen[0][0] == (x, x) and seen[0][1] is out


# ---- bad input -------------------------------------------------------------------------------------------------

BAD = {
    "no batch axis": (lambda x, s: (x[0],), ValueError, "input: expected 4 axes .* got 3"),
    "two axes": (lambda x, s: (x[:, :, 0, 0],), ValueError, "input: expected 4 axes .* got 2"),
    "no tensor": (lambda x, s: (x.tolist(),), TypeError, "input: expected a tensor, got list"),
    "channels": (lambda x, s: (x[:, :5],), ValueError, "input: expected 6 channels, got 5"),
    "integers": (lambda x, s: (x.int(),), TypeError, "input: expected float16, .* got torch.int32"),
    "type": (lambda x, s: (x.double(),), TypeError, "batch_norm.weight: expected torch.float64, got torch.float32"),
    "device": (lambda x, s: (x.to("meta"),), ValueError, "batch_norm.weight: expected the input's device meta"),
    "one value": (lambda x, s: (x[:1, :, :1, :1],), ValueError, "more than 1 value per channel when training"),
    "shortcut's shape": (lambda x, s: (x, s[:1]), ValueError, "shortcut: expected the input's shape"),
    "shortcut's type": (lambda x, s: (x, s.half()), TypeError, "shortcut: expected .* torch.float32, got"),
    "shortcut's device": (lambda x, s: (x, s.to("meta")), ValueError, "shortcut: expected the input's device"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("momentum", [0.1, None], ids=named("momentum"))
def test_bad_input_is_named_before_anything_changes(any_backend, momentum, bad):
    change, error, message = BAD[bad]
    fused, _ = pair(momentum=momentum)
    before = snapshot(fused)
    with pytest.raises(error, match=message):
        fused(*change(draw(*SHAPE), draw(*SHAPE, seed=1)))
    same(snapshot(fused), before)


@pytest.mark.parametrize("wrong", BAD_COUNTS)
def test_a_count_that_a_cumulative_average_cannot_take_is_refused_before_anything_changes(any_backend, wrong):
    change, error, message = BAD_COUNTS[wrong]
    fused, _ = pair(momentum=None)
    fused.num_batches_tracked = change(fused.num_batches_tracked)
    mean = fused.running_mean.clone()
    with pytest.raises(error, match=f"batch_norm.num_batches_tracked: {message}"):
        fused(draw(*SHAPE))
    assert torch.equal(fused.running_mean, mean)


def test_evaluation_of_one_value_per_channel_is_no_error(any_backend):
    fused, eager = pair(train=False)
    x = draw(1, C, 1, 1)
    torch.testing.assert_close(fused(x), eager(x))


def test_a_norm_without_vectors_takes_any_channels_as_eager_does(any_backend):
    fused, eager = pair(affine=False, track_running_stats=False)
    x = draw(2, 4, 3, 5)
    torch.testing.assert_close(fused(x), eager(x))


# ---- compiled, transformed, recorded ---------------------------------------------------------------------------


class Block(nn.Module):
    """A block by hand that ends in a norm: the fused one, or eager's."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.tensor(1.5, dtype=torch.float64, device=DEVICE)), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * self.scale, x)


def blocks(**options) -> tuple[Block, Block]:
    fused, eager = pair(dtype=torch.float64, **options)
    return Block(fused), Block(eager)


@pytest.mark.parametrize(
    ("train", "momentum"), [(True, 0.1), (True, None), (False, 0.1)], ids=["train", "train, cumulative", "eval"]
)
def test_a_compiled_block_is_one_graph_with_the_fused_operator(train, momentum):
    fused, eager = blocks(train=train, momentum=momentum)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=keep)
    for seed in range(2):
        x = draw(*SHAPE, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(fused.norm.state_dict(), eager.norm.bn.state_dict())
    assert len(graphs) == 1 and "fused_residual.batch_norm_add_relu" in graphs[0].code


def test_a_compiled_step_has_eagers_gradients():
    fused, eager = blocks()
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = draw(*SHAPE, dtype=torch.float64)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (compiled, eager)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(fused.norm.state_dict(), eager.norm.bn.state_dict())


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {"scale": module.scale.detach() + 1}


TRANSFORMS = {
    "jvp": lambda m, x: jvp(m, (x,), (torch.ones_like(x),)),
    "grad": lambda m, x: grad(lambda p: functional_call(m, p, (x,)).square().sum())(parameters(m)),
    "gradients of each image": lambda m, x: vmap(grad(lambda x: m(x[None]).square().sum()))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_gives_eagers_values(any_backend, transform):
    fused, eager = blocks(train=False)
    x = draw(*SHAPE, dtype=torch.float64)
    torch.testing.assert_close(transform(fused, x), transform(eager, x))


@train_and_eval
def test_dual_tensors_have_eagers_tangent(any_backend, train):
    x, tangents = draw(*SHAPE, dtype=torch.float64), []
    for module in blocks(train=train):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.square()))).tangent)
    torch.testing.assert_close(*tangents)


def operators(recorded: nn.Module) -> list[str]:
    if isinstance(recorded, torch.jit.ScriptModule):
        return [node.kind() for node in recorded.inlined_graph.nodes() if node.kind().startswith(("aten", "fused"))]
    return [str(node.target) for node in recorded.graph.nodes if node.op == "call_function"]


TOOLS = {
    "trace": torch.jit.trace,
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "make_fx": lambda m, x: make_fx(m)(x),
}


@pytest.mark.parametrize("tool", TOOLS)
@train_and_eval
def test_what_is_recorded_calls_what_eagers_calls_and_gives_its_values(tool, train):
    x, recorded = draw(*SHAPE, dtype=torch.float64), []
    torch.use_deterministic_algorithms(False)  # else eager fills what it allocates, and that is recorded
    for module in blocks(train=train):
        recorded.append(TOOLS[tool](module, x))
    assert operators(recorded[0]) == operators(recorded[1])
    torch.testing.assert_close(recorded[0](x), recorded[1](x))
    torch.testing.assert_close(*(list(m.state_dict().values()) for m in recorded))


@settings
@train_and_eval
def test_a_scripted_block_gives_eagers_values_in_each_setting(train, options):
    fused, eager = blocks(train=train, **options)
    scripted = torch.jit.script(fused)
    assert not any("fused_residual" in name for name in operators(scripted))
    for seed in range(2):
        x = draw(*SHAPE, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(scripted(x), eager(x))
    torch.testing.assert_close(list(scripted.state_dict().values()), list(eager.state_dict().values()))


def test_fx_sees_one_node_that_follows_the_mode(any_backend):
    fused, eager = blocks(momentum=None)
    recorded = torch.fx.symbolic_trace(fused)
    assert [node.target for node in recorded.graph.nodes if node.op == "call_module"] == ["norm"]
    assert fused.norm.num_batches_tracked == 3, "recording counts no batch"
    x = draw(*SHAPE, dtype=torch.float64)
    for train in (True, False):
        torch.testing.assert_close(recorded.train(train)(x), eager.train(train)(x))
    torch.testing.assert_close(fused.norm.state_dict(), eager.norm.bn.state_dict())


@train_and_eval
def test_double_backward_through_the_kernels_is_refused_by_name(train):
    fused, _ = pair(train=train)
    x = draw(*SHAPE).requires_grad_()
    with resnet.backend("triton"):
        (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"batch_norm_add_relu_backward .*double backward"):
        dx.sum().backward()


@train_and_eval
def test_double_backward_through_pytorchs_operators_has_eagers_values(train):
    second = []
    for module in blocks(train=train):
        x = draw(*SHAPE, dtype=torch.float64).requires_grad_()
        with resnet.backend("torch"):
            (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            second.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*second)
