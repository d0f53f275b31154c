"""The lazy fused modules beside the code of d2l.ai's current edition, which is written out here as its book has it."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet import (
    FusedResidual,
    FusedStem,
    LazyFusedResidual,
    LazyFusedStem,
    LazyResNet18,
    Residual,
    resnet18,
)
from tests.conftest import DEVICE
from tests.helpers.blocks import draw, name_of, same, saved_and_loaded, snapshot, step

# ---- d2l.ai 1.0, chapter 8.6 -----------------------------------------------------------------------------------


class BookResidual(nn.Module):
    def __init__(self, num_channels, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.LazyConv2d(num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.LazyBatchNorm2d()
        self.bn2 = nn.LazyBatchNorm2d()

    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class BookResNet18(nn.Module):
    """The book's ResNet and ResNet18 in one, without `d2l.Classifier`."""

    def b1(self, channels=64):
        return nn.Sequential(
            nn.LazyConv2d(channels, kernel_size=7, stride=2, padding=3),
            nn.LazyBatchNorm2d(),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )

    def block(self, num_residuals, num_channels, first_block=False):
        blk = []
        for i in range(num_residuals):
            if i == 0 and not first_block:
                blk.append(BookResidual(num_channels, use_1x1conv=True, strides=2))
            else:
                blk.append(BookResidual(num_channels))
        return nn.Sequential(*blk)

    def __init__(self, num_classes=10, arch=((2, 64), (2, 128), (2, 256), (2, 512))):
        super().__init__()
        self.net = nn.Sequential(self.b1())
        for i, b in enumerate(arch):
            self.net.add_module(f"b{i + 2}", self.block(*b, first_block=(i == 0)))
        self.net.add_module(
            "last", nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.LazyLinear(num_classes))
        )

    def forward(self, X):
        return self.net(X)


def init_cnn(module):
    """`d2l.init_cnn`."""
    if type(module) is nn.Linear or type(module) is nn.Conv2d:
        nn.init.xavier_uniform_(module.weight)


# ---- pairs of the book's module and the fused one --------------------------------------------------------------


def book_stem(channels: int) -> nn.Sequential:
    return BookResNet18.b1(None, channels)


KINDS: dict[str, tuple[Callable, Callable, type, tuple]] = {
    "identity": (BookResidual, LazyFusedResidual, FusedResidual, (4,)),
    "1x1": (BookResidual, LazyFusedResidual, FusedResidual, (6, True)),
    "1x1 stride 2": (BookResidual, LazyFusedResidual, FusedResidual, (6, True, 2)),
    "stem": (book_stem, LazyFusedStem, FusedStem, (6,)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
LAZY = (nn.LazyConv2d, nn.LazyBatchNorm2d)


def book(kind: str) -> nn.Module:
    module, _, _, args = KINDS[kind]
    return module(*args).to(DEVICE)


def lazy(kind: str) -> nn.Module:
    _, module, _, args = KINDS[kind]
    return module(*args).to(DEVICE)


def images(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return draw(3, 4, 9, 10, seed=seed, dtype=dtype)


def children(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]


def is_lazy(module: nn.Module) -> bool:
    assert children(module)
    return all(type(m) in LAZY and m.has_uninitialized_params() for m in children(module))


def is_initialised(module: nn.Module) -> bool:
    assert children(module)
    return all(type(m) in (nn.Conv2d, nn.BatchNorm2d) for m in children(module))


def conv_weights(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.dim() == 4]


def sizes(module: nn.Module) -> list[tuple[int, ...]]:
    """What its children say of their channels."""
    return [
        (m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else (m.num_features,) for m in children(module)
    ]


def step_of_new(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """`step`, of a module whose parameters have no type yet to bring the input to."""
    x = x.detach().requires_grad_()
    out = module(x)
    dout = draw(*out.shape, seed=7, dtype=torch.bfloat16).to(out.dtype)
    dx, *grads = torch.autograd.grad(out, (x, *module.parameters()), dout)
    gradients = {f"d {name}": grad for (name, _), grad in zip(module.named_parameters(), grads)}
    return {"out": out.detach(), "dx": dx, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---- the dry run -----------------------------------------------------------------------------------------------


@kinds
def test_children_are_lazy_until_the_first_forward(any_backend, kind):
    module = lazy(kind)
    assert is_lazy(module)
    module(images())
    assert is_initialised(module)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in book(kind).named_modules()]


@kinds
def test_the_first_forward_makes_a_fused_module_of_it(any_backend, kind):
    """As PyTorch's lazy modules become the plain ones; no hook is left that would keep anything from being fused."""
    module = lazy(kind)
    assert isinstance(module, KINDS[kind][2])
    first = module(images())
    assert type(module) is KINDS[kind][2]
    assert not any(m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in module.modules())
    for out in (first, module(images())):
        assert isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction), "PyTorch's operators ran"


@kinds
def test_the_first_step_has_the_bits_of_a_fused_module_of_the_same_weights(any_backend, kind):
    _, _, fused_kind, args = KINDS[kind]
    modules = []
    for make in (lambda: fused_kind(4, *args), lambda: lazy(kind)):
        torch.manual_seed(1)
        with DEVICE:  # both draw their weights there
            modules.append(make())
        modules.append(step_of_new(modules[-1], images()))
    fused, expected, module, got = modules
    same(got, expected)
    same(snapshot(module), snapshot(fused))
    assert sizes(module) == sizes(fused)


@kinds
def test_a_seed_gives_the_books_weights_and_next_random_numbers(any_backend, kind):
    weights, after = [], []
    for make in (book, lazy):
        torch.manual_seed(3)
        module = make(kind)
        module(images())
        weights.append(parameters_of(module))
        after.append(torch.rand(4))
    same(*weights)
    assert torch.equal(*after)


@kinds
def test_a_dry_run_in_training_counts_its_batch_once(any_backend, kind):
    """Statistics and counters as the book's, after the first batch and after the next."""
    modules = []
    for make in (book, lazy):
        torch.manual_seed(3)
        modules.append(make(kind).double())
        modules[-1](images(torch.float64))
    for batches in (1, 2):
        expected, got = (dict(module.named_buffers()) for module in modules)
        torch.testing.assert_close(got, expected)
        assert {int(b) for name, b in got.items() if name.endswith("num_batches_tracked")} == {batches}
        for module in modules:
            module(images(torch.float64, seed=1))


@kinds
def test_a_dry_run_in_evaluation_leaves_the_statistics_as_they_begin(any_backend, kind):
    module = lazy(kind).eval()
    module(images())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, torch.full_like(buffer, name.endswith("var"))), name


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,  # the book's module could not be trained after this one
    "autocast": lambda: torch.autocast(DEVICE.type, torch.bfloat16),
}


@kinds
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_dry_run_in_any_mode_gives_the_same_parameters_to_train(any_backend, train, context, kind):
    torch.manual_seed(3)
    plain = lazy(kind)
    plain(images())
    torch.manual_seed(3)
    module = lazy(kind).train(train)
    with CONTEXTS[context]():
        module(images())
    same(parameters_of(module), parameters_of(plain))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()(images()).square().sum().backward()
    optimizer.step()
    before = parameters_of(plain)
    for name, p in parameters_of(module).items():
        cancelled = name in ("conv1.bias", "conv2.bias", "0.bias")  # by the BatchNorm behind it
        assert torch.equal(p, before[name]) == cancelled, name


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
def test_the_type_is_chosen_before_the_dry_run(any_backend, dtype, kind):
    module = lazy(kind).to(dtype)
    out = module(images(dtype))
    assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {dtype} == {out.dtype}


@kinds
def test_a_dry_run_on_meta_infers_shapes_alone(kind):
    with torch.device("meta"):
        module = KINDS[kind][1](*KINDS[kind][3])
    expected = book(kind)(images())
    assert module(images().to("meta")).shape == expected.shape
    assert is_initialised(module)
    assert all(t.device.type == "meta" for t in module.state_dict().values())
    module.to_empty(device=DEVICE)
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    assert module(images()).isfinite().all()


@kinds
def test_conv_weights_are_laid_out_as_pytorch_does_after_the_dry_run(kind):
    module = lazy(kind)
    module(images())
    assert all(w.is_contiguous() for w in conv_weights(module))


def test_the_input_may_be_named():
    assert lazy("1x1")(X=images()).shape == book("1x1")(X=images()).shape


@kinds
def test_an_empty_batch_will_do_for_a_dry_run(any_backend, kind):
    module, reference = lazy(kind), book(kind)
    assert module(images()[:0]).shape == reference(images())[:0].shape
    assert is_initialised(module)


# ---- state -----------------------------------------------------------------------------------------------------


def trained(kind: str, make: Callable[[str], nn.Module]) -> nn.Module:
    """A module with statistics and weights that are no beginner's."""
    torch.manual_seed(5)
    module = make(kind)
    module(images())
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


@kinds
@pytest.mark.parametrize("dry_run", [False, True], ids=["lazy", "initialised"])
@pytest.mark.parametrize("source", [book, lazy], ids=["the book's", "fused"])
def test_a_state_dict_loads_strictly_into_either_before_and_after_its_dry_run(any_backend, source, dry_run, kind):
    state = trained(kind, source).state_dict()
    outputs = []
    for make in (book, lazy):
        module = make(kind)
        if dry_run:
            module(images())
        assert list(module.state_dict()) == list(state)
        module.load_state_dict(state, strict=True)
        same(snapshot(module), state)
        outputs.append(module.double().eval()(images(torch.float64)))
    torch.testing.assert_close(outputs[1], outputs[0])


@kinds
def test_a_loaded_module_becomes_what_a_dry_run_makes_and_draws_nothing(any_backend, kind):
    """PyTorch's lazy children, filled by load_state_dict, would count 0 input channels for ever."""
    reference = trained(kind, lazy)
    module = lazy(kind)
    module.load_state_dict(reference.state_dict())
    torch.manual_seed(3)
    random = torch.get_rng_state()
    same(step_of_new(module, images()), step(reference, images()))
    assert torch.equal(torch.get_rng_state(), random)
    assert type(module) is type(reference) and is_initialised(module)
    assert sizes(module) == sizes(reference)


def test_loaded_groups_count_all_their_channels(any_backend):
    modules = [lazy("identity"), lazy("identity")]
    for module in modules:
        module.conv2 = nn.LazyConv2d(4, 3, padding=1, groups=2)
        module.to(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules[0](images())
        modules[1].load_state_dict(modules[0].state_dict())
        modules[1](images())
    assert sizes(modules[0]) == sizes(modules[1])


def test_a_part_of_a_state_dict_leaves_the_rest_to_the_dry_run(any_backend):
    part = {n: v for n, v in trained("1x1", book).state_dict().items() if n.startswith(("conv2", "bn1"))}
    module = lazy("1x1").eval()
    module.load_state_dict(part, strict=False)
    assert module(images()).isfinite().all()
    same({n: v for n, v in snapshot(module).items() if n in part}, part)
    assert sizes(module) == sizes(trained("1x1", lazy))


@kinds
def test_a_state_dict_of_a_module_before_its_dry_run_has_the_books_keys_and_no_values(kind):
    state = lazy(kind).state_dict()
    assert list(state) == list(book(kind).state_dict())
    assert all(torch.nn.parameter.is_lazy(v) or n.endswith("num_batches_tracked") for n, v in state.items())


@kinds
def test_a_pickle_of_a_module_before_its_dry_run_is_lazy_and_independent(any_backend, kind):
    module = lazy(kind)
    twin = saved_and_loaded(module)
    assert type(twin) is type(module) and is_lazy(twin)
    twin.to(DEVICE)(images())
    assert is_initialised(twin) and is_lazy(module)


@kinds
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
def test_a_copy_after_the_dry_run_is_equal_and_independent(any_backend, duplicate, kind):
    module = lazy(kind)
    module(images())
    twin = duplicate(module)
    same(step(twin, images()), step(copy.deepcopy(module), images()))
    before = snapshot(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(-0.7)
    same(snapshot(module), before)


@kinds
def test_parameters_stay_the_objects_that_an_optimizer_was_given(any_backend, kind):
    """So an optimizer made too early trains as well."""
    module = lazy(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(images()).square().sum().backward()
    before = parameters_of(module)
    optimizer.step()
    assert not any(torch.equal(p, before[n]) for n, p in module.named_parameters() if n.endswith("weight"))


# ---- what is done to modules -----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dry_run", [True, False], ids=["after a dry run", "as the dry run"])
def test_torch_compile_in_one_graph(kind, dry_run):
    x = images(torch.float64)
    module, reference = lazy(kind).double(), book(kind).double()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    expected = [reference(x), reference(x)]
    torch.manual_seed(3)
    got = [module(x) if dry_run else compiled(x), compiled(x)]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(snapshot(module), snapshot(reference))
    assert type(module) is KINDS[kind][2] and is_initialised(module)


@kinds
def test_apply_initialises_after_the_dry_run_and_not_before(any_backend, kind):
    """As the book's `init_cnn`, which knows a plain convolution alone."""
    module = lazy(kind).apply(init_cnn)
    assert is_lazy(module)
    module(images())
    before = parameters_of(module)
    module.apply(init_cnn)
    after = parameters_of(module)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {n for n, p in after.items() if p.dim() == 4}
    reference = book(kind)
    reference.load_state_dict(module.state_dict())
    x = images(torch.float64)
    torch.testing.assert_close(module.double().eval()(x), reference.double().eval()(x))


@kinds
def test_hooks_of_the_module_are_called_in_the_dry_run_too(any_backend, kind):
    module, calls = lazy(kind), []
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_forward_hook(lambda m, args, out: out * 2)
    module.register_full_backward_hook(lambda m, grads, _: calls.append("backward"))
    torch.manual_seed(3)
    out = module(images().requires_grad_())
    out.sum().backward()
    assert calls == ["before", "backward"]
    torch.manual_seed(3)
    torch.testing.assert_close(out, 2 * lazy(kind)(images()))


NUMBERS = itertools.count()


def unwarned(module: LazyFusedResidual) -> LazyFusedResidual:
    """To become a class of its own: a warning that `FusedResidual` has given before is given for this one too."""
    module.cls_to_become = type(f"Fused{next(NUMBERS)}", (FusedResidual,), {})
    return module


def _hooked(module: nn.Module) -> None:
    module.bn1.register_forward_hook(lambda m, args, out: out * 1.5)


def _separable(name: str) -> Callable[[nn.Module], None]:
    """Of a width that only its own forward shows."""
    return lambda m: setattr(m, name, nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.LazyConv2d(4, 1)))


def _circular(module: nn.Module) -> None:
    module.conv2 = nn.LazyConv2d(4, 3, padding=1, padding_mode="circular")


CHANGES = {
    "a hook of a child": (_hooked, "bn1 has hooks"),
    "GroupNorm": (lambda m: setattr(m, "bn1", nn.GroupNorm(2, 4)), "bn1 is a GroupNorm"),
    "circular padding": (_circular, "conv2.padding_mode is circular"),
    "a first convolution of two": (_separable("conv1"), "conv1 is a Sequential"),
    "a second convolution of two": (_separable("conv2"), "conv2 is a Sequential"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_fused_runs_as_the_books_from_the_first_forward(any_backend, change):
    apply, message = CHANGES[change]
    x = images(torch.float64)
    modules = book("identity"), unwarned(lazy("identity"))
    outputs = []
    with pytest.warns(UserWarning, match=rf"Fused\d+ runs PyTorch's operators one by one: {message}"):
        for module in modules:
            apply(module)
            module.to(DEVICE, torch.float64)
            torch.manual_seed(3)
            outputs.append([module(x), module(x)])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*map(snapshot, modules))


# ---- bad input -------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "channels of an identity": ("identity", lambda x: x[:, :3], ValueError, "3 -> 4 channels, strides 1; pass use_1x1"),
    "rank": ("1x1", lambda x: x[0], ValueError, r"input: expected 4 axes \(N, C, H, W\), got 3"),
    "no tensor": ("1x1", lambda x: x.tolist(), TypeError, "input: expected a tensor, got list"),
    "integers": ("identity", lambda x: x.int(), TypeError, "input: expected float16, .*, got torch.int32"),
    "rank of a stem's": ("stem", lambda x: x[0, 0], ValueError, "input: expected 4 axes .*, got 2"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_before_anything_is_initialised(any_backend, case):
    kind, change, error, message = BAD_INPUT[case]
    module = lazy(kind)
    random = torch.get_rng_state()
    with pytest.raises(error, match=message):
        module(change(images()))
    assert type(module) is KINDS[kind][1] and is_lazy(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert module(images()).isfinite().all()


def test_strides_of_an_identity_shortcut_are_refused_by_the_constructor():
    with pytest.raises(ValueError, match="4 -> 4 channels, strides 2; pass use_1x1conv=True"):
        LazyFusedResidual(4, strides=2)


@pytest.mark.parametrize("make", [lambda: LazyFusedResidual(64, 128), lambda: resnet18(block=LazyFusedResidual)])
def test_a_call_with_the_earlier_editions_signature_is_refused(make):
    with pytest.raises(TypeError, match=r"use_1x1conv: expected a bool, got \d+; .* input's channels are inferred"):
        make()


def test_a_state_dict_of_another_width_is_named_in_forward(any_backend):
    module = LazyFusedResidual(5).to(DEVICE)
    module.load_state_dict(trained("identity", book).state_dict())
    with pytest.raises(ValueError, match=r"identity shortcut needs .* got 4 -> 5 channels"):
        module(images())


def test_a_whole_state_dict_of_another_width_counts_as_in_the_books_block(any_backend):
    """PyTorch's convolutions ask for weights that fit together, and not for the width that they were made with."""
    module, expected = LazyFusedResidual(5, True).to(DEVICE), trained("1x1", book)
    module.load_state_dict(expected.state_dict())
    torch.testing.assert_close(module.eval()(images()), expected.eval()(images()))


def test_other_channels_than_those_that_were_loaded_are_named(any_backend):
    module = lazy("1x1")
    module.load_state_dict(trained("1x1", book).state_dict())
    with pytest.raises(ValueError, match="input: expected 4 channels, got 3"):
        module(images()[:, :3])


# ---- the net ---------------------------------------------------------------------------------------------------


def test_the_net_has_the_books_keys():
    keys = list(LazyResNet18().state_dict())
    assert keys == list(BookResNet18().state_dict())
    assert {"net.0.0.weight", "net.b2.0.conv1.weight", "net.b3.0.conv3.bias", "net.last.2.weight"} <= set(keys)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_net_is_the_books(channels):
    """Weights of a seed, a training step, and the state strictly both ways, initialised or not."""
    x = draw(4, channels, 48, 40, dtype=torch.float64)
    nets = []
    for make in (BookResNet18, LazyResNet18):
        torch.manual_seed(3)
        nets.append(make(num_classes=7).to(DEVICE).double())
        nets[-1](x)
    expected, net = nets
    same(parameters_of(net), parameters_of(expected))
    torch.testing.assert_close(step(net, x), step(expected, x))
    for source, make in ((expected, LazyResNet18), (net, BookResNet18)):
        twin = make(num_classes=7).to(DEVICE).double()
        twin.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(twin.eval()(x), source.eval()(x))
        source.load_state_dict(twin.state_dict(), strict=True)


def test_the_net_is_fused_throughout():
    net = LazyResNet18().to(DEVICE)
    net(draw(2, 1, 33, 40))
    assert [type(m) for m in net.modules() if isinstance(m, Residual)] == [FusedResidual] * 8
    assert type(net.net[0]) is FusedStem


def test_weights_are_those_of_resnet18_under_other_names():
    """So a checkpoint of one edition's net is the other's with its keys renamed in order."""
    net, earlier = LazyResNet18(), resnet18(in_channels=1)
    net.load_state_dict(dict(zip(net.state_dict(), earlier.state_dict().values())), strict=True)
    x = draw(2, 1, 40, 33).cpu()
    torch.testing.assert_close(net.eval()(x), earlier.eval()(x), atol=1e-4, rtol=1e-4)
