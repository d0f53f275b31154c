"""The registered operators: `torch.library.opcheck` of each with every pair of options, and `torch.compile`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnet import FusedBottleneck, FusedResidual, FusedStem, resnet_block
from resnet.norm import Norm
from resnet.operands import (
    BLOCK_KINDS,
    SQUEEZE_KINDS,
    BatchNormAddReluKept,
    DeepStem,
    DeepStemKept,
    DeepStemOutput,
    Excite,
    ExciteKept,
    KeptConv,
    Pooled,
    Projection,
    Stem,
    StemKept,
    StemOutput,
    Unit,
    block_kind,
    frozen_kind,
    pre_activation_kind,
    pre_activation_operator,
    squeeze_kind,
)
from resnet.schema import pack, unpack
from resnet.torch_backend import inference
from tests.conftest import DEVICE
from tests.helpers.blocks import averaged, draw, randomize, snapshot, step
from tests.helpers.pairs import pairwise

pytestmark = pytest.mark.core

ops = torch.ops.fused_residual


def name_of_options(options: dict) -> str:
    return ",".join(k if v is True else f"{k}={v}" for k, v in options.items() if v is not False) or "none"


def each(**options: tuple):
    """Run the test with cases in which any two options' values meet, and each value meets either backend."""
    rows = []
    for case in pairwise(backend=("torch", "triton"), **options):
        backend = case.pop("backend")
        rows.append(pytest.param(backend, case, id=f"{backend}-{name_of_options(case)}"))
    return pytest.mark.parametrize("any_backend, options", rows, indirect=["any_backend"])


# ---- arguments -------------------------------------------------------------------------------------------------


def vector(C: int, seed: int, grad: bool = False) -> Tensor:
    return draw(C, seed=seed).requires_grad_(grad)


def norm(
    C: int,
    seed: int,
    training: bool,
    affine: bool = True,
    running: bool = True,
    conv_bias: bool = False,
    averaged: bool = False,
) -> Norm:
    count = torch.tensor(3, device=DEVICE)
    return Norm(
        vector(C, seed, grad=True) if affine else None,
        vector(C, seed + 1, grad=True) if affine else None,
        vector(C, seed + 2) if running or not training else None,
        vector(C, seed + 3).abs() + 0.5 if running or not training else None,
        vector(C, seed + 4, grad=True) if conv_bias else None,
        training,
        0.1,
        1e-5,
        count if averaged else None,
        count if training and running and not averaged else None,
    )


def weight(K: int, C: int, size: int, seed: int, grad: bool = True) -> Tensor:
    return draw(K, C, size, size, seed=seed).div_(C * size).requires_grad_(grad)


def cast(weight: Tensor | None, by_autocast: bool) -> tuple[Tensor | None, Tensor | None]:
    """A weight as it is multiplied, and its master of another type where it is a copy."""
    if weight is None or not by_autocast:
        return weight, None
    return weight.detach(), weight.detach().double().requires_grad_(weight.requires_grad)


def backward_arguments(dout: Tensor, kept: tuple, arguments: list, all_needed: bool) -> list:
    """The gradients of all arguments that require one are wanted, or the first one's alone."""
    needs = [isinstance(a, Tensor) and a.requires_grad for a in arguments]
    if not all_needed:
        needs = [i == needs.index(True) for i in range(len(needs))]
    return [dout, *(t.detach() if isinstance(t, Tensor) else t for t in pack(kept)), needs]


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(op, args: list) -> None:
    with torch.autograd.set_multithreading_enabled(False):  # backward in this thread, on its backend
        result = torch.library.opcheck(op.default, tuple(args), test_utils=OPCHECKS)
    assert set(result.values()) == {"SUCCESS"}


# ---- opcheck ---------------------------------------------------------------------------------------------------

BOTH = (True, False)


@each(training=BOTH, shortcut=BOTH, affine=BOTH, running=BOTH, conv_bias=BOTH, averaged=BOTH, relu=BOTH)
def test_batch_norm_add_relu_passes_opcheck(any_backend, options):
    shortcut, relu = options["shortcut"], options["relu"]
    settings = {k: v for k, v in options.items() if k not in ("shortcut", "relu")}
    x, skip = (draw(2, 3, 4, 2, seed=seed).requires_grad_() for seed in range(2))
    opcheck(ops.batch_norm_add_relu, [x, skip if shortcut else None, *norm(3, 10, **settings), relu])


@each(training=BOTH, relu=BOTH, shortcut=BOTH, affine=BOTH, conv_bias=BOTH, all_needed=BOTH)
def test_batch_norm_add_relu_backward_passes_opcheck(any_backend, options):
    shortcut, relu = options["shortcut"], options["relu"]
    settings = {k: options[k] for k in ("training", "affine", "conv_bias")}
    dout, x, skip = (draw(2, 3, 4, 2, seed=seed) for seed in range(3))
    # Without a ReLU the shortcut's gradient is dout, which the operator may not return.
    skip = skip.requires_grad_(relu) if shortcut else None
    fields = norm(3, 10, **settings)
    arguments = [x.requires_grad_(), skip, *fields, relu]
    with torch.no_grad():
        out, stats = ops.batch_norm_add_relu(*arguments)
    kept = BatchNormAddReluKept(x, out if relu else None, stats, fields.kept(), relu, shortcut)
    opcheck(ops.batch_norm_add_relu_backward, backward_arguments(dout, kept, arguments, options["all_needed"]))


SIZES = ((9, 7), (2, 5))


@each(training=BOTH, affine=BOTH, running=BOTH, conv_bias=BOTH, averaged=BOTH, cast=BOTH, size=SIZES)
def test_stem_passes_opcheck(any_backend, options):
    settings = {k: v for k, v in options.items() if k not in ("cast", "size")}
    x = draw(2, 2, *options["size"]).requires_grad_()
    conv, master = cast(weight(3, 2, 3, 1), options["cast"])
    opcheck(ops.stem, pack(Stem(x, Unit(conv, (2, 1, 1), norm(3, 10, **settings), master))))


@each(training=BOTH, affine=BOTH, conv_bias=BOTH, cast=BOTH, all_needed=BOTH)
def test_stem_backward_passes_opcheck(any_backend, options):
    x, (conv, master) = draw(2, 2, 9, 7).requires_grad_(), cast(weight(3, 2, 3, 1), options["cast"])
    unit = Unit(conv, (2, 1, 1), norm(3, 10, **{k: options[k] for k in ("training", "affine", "conv_bias")}), master)
    arguments = pack(Stem(x, unit))
    with torch.no_grad():
        output = StemOutput(*ops.stem(*arguments))
    kept = StemKept(x, output, unit.kept())
    dout = draw(*output.out.shape, seed=1)
    opcheck(ops.stem_backward, backward_arguments(dout, kept, arguments, options["all_needed"]))


def deep_stem_arguments(options: dict) -> DeepStem:
    """Those of three convolutions of a few channels each, of which the first one has a stride."""
    settings = {k: options[k] for k in ("affine", "running", "conv_bias", "averaged") if k in options}
    units, C = [], 2
    for i, (K, training) in enumerate(((2, "first"), (3, "first"), (4, "last")), 1):
        conv, master = cast(weight(K, C, 3, i), options["cast"])
        units.append(
            Unit(conv, (2 if i == 1 else 1, 1, 1), norm(K, 10 * i, options[f"{training}_training"], **settings), master)
        )
        C = K
    return DeepStem(draw(2, 2, 9, 7).requires_grad_(), tuple(units))


@each(first_training=BOTH, last_training=BOTH, affine=BOTH, running=BOTH, conv_bias=BOTH, averaged=BOTH, cast=BOTH)
def test_deep_stem_passes_opcheck(any_backend, options):
    opcheck(ops.deep_stem, pack(deep_stem_arguments(options)))


@each(first_training=BOTH, last_training=BOTH, affine=BOTH, conv_bias=BOTH, cast=BOTH, all_needed=BOTH)
def test_deep_stem_backward_passes_opcheck(any_backend, options):
    arguments = deep_stem_arguments(options)
    flat = pack(arguments)
    with torch.no_grad():
        output = unpack(DeepStemOutput, ops.deep_stem(*flat))
    kept = DeepStemKept(arguments.x, output, tuple(unit.kept() for unit in arguments.units))
    dout = draw(*output.out.shape, seed=1)
    opcheck(ops.deep_stem_backward, backward_arguments(dout, kept, flat, options["all_needed"]))


@each(affine=BOTH, conv_bias=BOTH)
def test_deep_stem_inference_passes_opcheck(any_backend, options):
    frozen = {"first_training": False, "last_training": False, "cast": False}
    with torch.no_grad():
        arguments = pack(deep_stem_arguments({**options, **frozen}))
        opcheck(ops.deep_stem_inference, [a.detach() if isinstance(a, Tensor) else a for a in arguments])


BLOCKS = ("identity", "1x1", "1x1, stride 2", "normed", "normed, stride 2", "pooled, stride 2")  # shortcuts
WINDOWS = ("plain", "groups", "dilation")  # of the 3x3 convolutions that keep their channels
NORMS = {"first_training": BOTH, "last_training": BOTH, "affine": BOTH, "conv_bias": BOTH}


def block_arguments(options: dict) -> tuple:
    """The arguments of a block of 2 or 3 units, as its kind describes them."""
    units, shortcut, by_autocast = options["units"], options["block"], options.get("cast", False)
    pooled, stride = shortcut.startswith("pooled"), 2 if shortcut.endswith("2") else 1
    normed = pooled or shortcut.startswith("normed")
    settings = {k: options[k] for k in ("affine", "running", "conv_bias", "averaged") if k in options}
    C, K = (3, 3) if shortcut == "identity" else (2, 3)

    def unit(K: int, C: int, size: int, stride: int, seed: int, training: bool) -> Unit:
        window = options.get("window") if size == 3 and C == K else "plain"
        dilation = 2 if window == "dilation" else 1
        conv, master = cast(weight(K, 1 if window == "groups" else C, size, seed), by_autocast)
        geometry = stride, size // 2 * dilation, dilation
        return Unit(conv, geometry, norm(K, 10 * seed, training, **settings), master)

    first, last = options["first_training"], options["last_training"]
    chain = [(3, stride), (3, 1)] if units == 2 else [(1, 1), (3, stride), (1, 1)]
    parts = [
        unit(K, C if i == 0 else K, size, s, i + 1, first if i < units - 1 else last)
        for i, (size, s) in enumerate(chain)
    ]
    if normed:
        projection = unit(K, C, 1, 1 if pooled else stride, 7, first)
    else:
        conv, master = cast(None if shortcut == "identity" else weight(K, C, 1, 7), by_autocast)
        bias = None if conv is None else vector(K, 4, grad=True)
        projection = Projection(conv, bias, (stride, 0, 1), master)
    x, *read = draw(2, C, 4, 3).requires_grad_(), *[Pooled(draw(2, C, 2, 2), 2, 2)] * pooled
    return block_kind(units, normed, pooled).arguments(x, tuple(parts), projection, *read)


def kind_of(arguments: tuple, kind=block_kind):
    _, units, shortcut, *pooled = arguments
    return kind(len(units), isinstance(shortcut, Unit), pooled != [])


@each(units=(2, 3), block=BLOCKS, window=WINDOWS, running=BOTH, averaged=BOTH, cast=BOTH, **NORMS)
def test_a_block_passes_opcheck(any_backend, options):
    arguments = block_arguments(options)
    opcheck(getattr(ops, kind_of(arguments).name), pack(arguments))


@each(units=(2, 3), block=BLOCKS, window=WINDOWS, cast=BOTH, all_needed=BOTH, **NORMS)
def test_the_backward_of_a_block_passes_opcheck(any_backend, options):
    arguments = block_arguments(options)
    kind, flat = kind_of(arguments), pack(arguments)
    with torch.no_grad():
        output = unpack(kind.output, getattr(ops, kind.name)(*flat))
    x, units, shortcut, *pooled = arguments
    kept = kind.kept(x, output, tuple(unit.kept() for unit in units), shortcut.kept(), *pooled)
    dout = draw(*output.out.shape, seed=5)
    op = getattr(ops, f"{kind.name}_backward")
    opcheck(op, backward_arguments(dout, kept, flat, options["all_needed"]))


def frozen_arguments(options: dict) -> tuple:
    """Those of a block with norms of constants: gradients of x and the weights alone, if of these."""
    arguments = block_arguments({**options, "first_training": False, "last_training": False})
    flat = [a.detach() if isinstance(a, Tensor) and a.dim() == 1 else a for a in pack(arguments)]
    return unpack(type(arguments), flat)


@each(units=(2, 3), block=BLOCKS, window=WINDOWS, affine=BOTH, conv_bias=BOTH, cast=BOTH)
def test_a_block_with_norms_of_constants_passes_opcheck(any_backend, options):
    arguments = frozen_arguments(options)
    opcheck(getattr(ops, f"{kind_of(arguments).name}_frozen"), pack(arguments))


@each(units=(2, 3), block=BLOCKS, window=WINDOWS, affine=BOTH, conv_bias=BOTH, cast=BOTH, all_needed=BOTH)
def test_the_backward_of_a_block_with_norms_of_constants_passes_opcheck(any_backend, options):
    arguments = frozen_arguments(options)
    kind, flat = kind_of(arguments, frozen_kind), pack(arguments)
    with torch.no_grad():
        output = unpack(kind.output, getattr(ops, kind.name)(*flat))
    x, units, shortcut, *pooled = arguments
    convs = tuple(KeptConv(unit.weight, unit.geometry, unit.master) for unit in units)
    projection = Projection(shortcut.weight, None, shortcut.geometry, shortcut.master)
    kept = kind.kept(x, output, convs, projection, *pooled)
    dout = draw(*output.out.shape, seed=5)
    op = getattr(ops, f"{kind.name}_backward")
    opcheck(op, backward_arguments(dout, kept, flat, options["all_needed"]))


@each(units=(2, 3), block=BLOCKS, window=WINDOWS, affine=BOTH, conv_bias=BOTH)
def test_inference_of_a_block_passes_opcheck(any_backend, options):
    frozen = {"first_training": False, "last_training": False}
    arguments = block_arguments({**options, **frozen})
    with torch.no_grad():
        flat = [a.detach() if isinstance(a, Tensor) else a for a in pack(arguments)]
        opcheck(getattr(ops, f"{kind_of(arguments).name}_inference"), flat)


def squeeze_arguments(options: dict) -> tuple:
    """The arguments of a chain up to its squeeze: those of a block without a shortcut, which may be added later."""
    x, units, *_ = block_arguments({**options, "block": "identity" if options["added"] else "1x1, stride 2"})
    return squeeze_kind(options["units"]).arguments(x, units, options["relu"], options["added"])


def link_of(N: int, K: int, seed: int) -> Tensor:
    return draw(3 * N, K, seed=seed).view(3, N, K)


@each(units=(2, 3), window=WINDOWS, relu=BOTH, added=BOTH, running=BOTH, averaged=BOTH, cast=BOTH, **NORMS)
def test_squeeze_passes_opcheck(any_backend, options):
    arguments = squeeze_arguments(options)
    opcheck(getattr(ops, squeeze_kind(options["units"]).name), pack(arguments))


@each(units=(2, 3), window=WINDOWS, relu=BOTH, added=BOTH, cast=BOTH, all_needed=BOTH, **NORMS)
def test_squeeze_backward_passes_opcheck(any_backend, options):
    arguments, kind = squeeze_arguments(options), squeeze_kind(options["units"])
    flat, (x, units, relu, added) = pack(arguments), arguments
    with torch.no_grad():
        output = unpack(kind.output, getattr(ops, kind.name)(*flat))
    ys, stats = (*output.ys, output.y), (*output.inner_stats, output.stats)
    kept = kind.kept(x, ys, stats, output.link, tuple(unit.kept() for unit in units), relu, added)
    dy, *rest = backward_arguments(draw(*output.y.shape, seed=5), kept, flat, options["all_needed"])
    dpooled, dlink = draw(*output.pooled.shape, seed=6), link_of(*output.pooled.shape, seed=7)
    opcheck(getattr(ops, f"{kind.name}_backward"), [dy, dpooled, dlink, *rest])


def excite_arguments(options: dict) -> Excite:
    y, gate = draw(2, 3, 4, 5).requires_grad_(), draw(2, 3, seed=2).requires_grad_()
    shortcut = draw(2, 3, 4, 5, seed=3).requires_grad_() if options.get("shortcut") else None
    stats, link = draw(4, 3, seed=1), link_of(2, 3, seed=4).requires_grad_()
    return Excite(y, stats, link, gate, shortcut, options["inner_relu"], options["relu"])


@each(shortcut=BOTH, inner_relu=BOTH, relu=BOTH)
def test_excite_passes_opcheck(any_backend, options):
    opcheck(ops.excite, pack(excite_arguments(options)))


@each(inner_relu=BOTH, relu=BOTH, all_needed=BOTH)
def test_excite_backward_passes_opcheck(any_backend, options):
    arguments = excite_arguments(options)
    with torch.no_grad():
        out = ops.excite(*pack(arguments)) if options["relu"] else None
    y, stats, _, gate, _, inner_relu, _ = arguments
    # Without a ReLU at the end y's gradient is dout itself; the shortcut's is y's or dout.
    given = arguments._replace(y=y if options["relu"] else y.detach(), shortcut=None)
    kept = ExciteKept(y, out, stats, gate, inner_relu)
    dout = draw(2, 3, 4, 5, seed=5)
    opcheck(ops.excite_backward, backward_arguments(dout, kept, pack(given), options["all_needed"]))


@each(affine=BOTH, conv_bias=BOTH, geometry=((3, 1, 1), (7, 2, 3), (1, 2, 0)), folds=BOTH, C=(1, 2))
def test_stem_inference_passes_opcheck(any_backend, monkeypatch, options):
    (size, *geometry), C = options["geometry"], options["C"]
    if options["folds"]:  # on a CPU, as it does for more pixels
        monkeypatch.setattr(inference, "_FOLDED", 0)
        monkeypatch.setattr(inference, "_MANY_WINDOWS", 0)
    x = draw(2, C, 30, 25)
    with torch.no_grad():
        fields = norm(3, 10, False, options["affine"], True, options["conv_bias"])
        unit = Unit(weight(3, C, size, 1, grad=False), (*geometry, 1), fields)
        opcheck(ops.stem_inference, pack(Stem(x, unit)))


SHORTCUTS = ("identity", "activated", "activated, stride 2", "of x", "of x, stride 2")


def pre_activation_arguments(options: dict) -> tuple:
    """Those of a block with pre-activation: of one whose last unit has no norm, behind a norm of x."""
    block, *stride = options["shortcut"].split(", ")
    block = "identity" if block == "identity" else ", ".join(["1x1", *stride])
    x, units, shortcut = block_arguments({**options, "block": block})
    *chain, last = units
    training = options["first_training"]
    settings = {k: options[k] for k in ("affine", "running", "averaged") if k in options}
    first = norm(x.shape[1], 50, training, conv_bias=False, **settings)
    bias = vector(last.weight.shape[0], 60, grad=True) if options["conv_bias"] else None
    conv = Projection(last.weight, bias, last.geometry, last.master)
    activated = options["shortcut"].startswith("activated")
    return pre_activation_kind(len(units)).arguments(x, first, tuple(chain), conv, shortcut, activated)


@each(units=(2, 3), shortcut=SHORTCUTS, window=WINDOWS, running=BOTH, averaged=BOTH, cast=BOTH, **NORMS)
def test_pre_activation_block_passes_opcheck(any_backend, options):
    opcheck(getattr(ops, pre_activation_operator(options["units"])), pack(pre_activation_arguments(options)))


@each(units=(2, 3), shortcut=SHORTCUTS, window=WINDOWS, cast=BOTH, all_needed=BOTH, **NORMS)
def test_pre_activation_block_backward_passes_opcheck(any_backend, options):
    arguments, kind = pre_activation_arguments(options), pre_activation_kind(options["units"])
    flat, (x, first, units, *others) = pack(arguments), arguments
    with torch.no_grad():
        output = unpack(kind.output, getattr(ops, kind.name)(*flat))
    kept = kind.kept(x, output.ys, output.stats, first.kept(), tuple(unit.kept() for unit in units), *others)
    dout = draw(*output.out.shape, seed=5)
    opcheck(getattr(ops, f"{kind.name}_backward"), backward_arguments(dout, kept, flat, options["all_needed"]))


@each(units=(2, 3), shortcut=SHORTCUTS, window=WINDOWS, affine=BOTH, conv_bias=BOTH)
def test_pre_activation_block_inference_passes_opcheck(any_backend, options):
    arguments = pre_activation_arguments({**options, "first_training": False, "last_training": False})
    with torch.no_grad():
        flat = [a.detach() if isinstance(a, Tensor) else a for a in pack(arguments)]
        opcheck(getattr(ops, f"{pre_activation_operator(options['units'])}_inference"), flat)


def test_every_registered_operator_has_an_opcheck_here():
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas()]
    registered = {name.removeprefix("fused_residual::") for name in schemas if name.startswith("fused_residual::")}
    tests = [name.removeprefix("test_") for name in globals() if name.endswith("_passes_opcheck")]
    named = {name.removesuffix("_passes_opcheck") for name in tests if "a_block" not in name}
    blocks = {kind.name for kind in BLOCK_KINDS}
    named |= {name.replace("squeeze", kind.name) for kind in SQUEEZE_KINDS for name in named if "squeeze" in name}
    named -= {"squeeze", "squeeze_backward"}
    pre_activation = {name for name in named if name.startswith("pre_activation_block")}
    named -= pre_activation
    named |= {name.replace("block", f"block_{count}") for count in (2, 3) for name in pre_activation}
    ends = ("", "_backward", "_inference", "_frozen", "_frozen_backward")
    assert registered == named | {f"{block}{end}" for block in blocks for end in ends}


# ---- versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [FusedResidual(3, 3), FusedStem(3, 4)], ids=["block", "stem"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_update_of_running_statistics_counts_as_a_write(any_backend, module, grad):
    module = copy.deepcopy(module).to(DEVICE)
    running = [b for name, b in module.named_buffers() if "running" in name]
    x = draw(2, 3, 6, 6)
    versions = [b._version for b in running]
    with torch.set_grad_enabled(grad):
        module(x)
    assert all(b._version > v for b, v in zip(running, versions))
    versions = [b._version for b in running]
    with torch.set_grad_enabled(grad):
        module.eval()(x)
    assert [b._version for b in running] == versions


# ---- torch.compile ---------------------------------------------------------------------------------------------

MODULES = {
    "identity block": lambda: FusedResidual(3, 3),
    "1x1 block": lambda: FusedResidual(3, 6, use_1x1conv=True, strides=2),
    "bottleneck": lambda: FusedBottleneck(3, 2, 2),
    "stem": lambda: FusedStem(3, 4),
}


@pytest.fixture(autouse=True)
def forget_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(module: nn.Module, x: Tensor, compiler: str) -> None:
    """A compiled copy of a module does the same as a plain one: in training, with frozen statistics, in inference."""
    randomize(module)
    module.to(DEVICE)
    plain, compiled = copy.deepcopy(module), torch.compile(module, fullgraph=True, backend=compiler)
    for mode in ("train", "train", "eval"):
        plain.train(mode == "train")
        module.train(mode == "train")
        expected = step(plain, x)
        got = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x).items()}
        torch.testing.assert_close(got, expected, msg=lambda m, mode=mode: f"{mode}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize(
    ("any_backend", "module"),
    [("triton", "identity block"), ("torch", "1x1 block"), ("torch", "bottleneck"), ("triton", "stem")],
    indirect=["any_backend"],
)
def test_a_module_compiled_in_one_graph_equals_uncompiled(any_backend, module):
    """Each module on one backend: the graph is the same for both."""
    assert_compiles(MODULES[module](), draw(2, 3, 7, 6), "aot_eager")


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev"])
@pytest.mark.parametrize("module", ["identity block", "stem"])
def test_a_transform_of_a_module_is_compiled_as_pytorchs_operators(module, transform):
    module, x = MODULES[module]().double().eval(), draw(2, 3, 7, 6, dtype=torch.float64)
    transformed = {
        "grad": lambda x: torch.func.grad(lambda x: module(x).square().sum())(x),
        "vmap": lambda x: torch.func.vmap(lambda x: module(x[None])[0])(x),
        "jacrev": lambda x: torch.func.jacrev(lambda x: module(x).sum((1, 2, 3)))(x),
    }[transform]
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(transformed, backend="aot_eager")(x), transformed(x))


@pytest.mark.parametrize("module", ["stem", "1x1 block"])
def test_a_compiled_module_counts_the_batches_of_a_cumulative_average(module):
    module = MODULES[module]()
    averaged(module)
    assert_compiles(module, draw(2, 3, 7, 6), "aot_eager")


def small_net() -> nn.Sequential:
    return nn.Sequential(
        FusedStem(1, 4),
        resnet_block(4, 4, 1, first_block=True, block=FusedResidual),
        resnet_block(4, 6, 1, block=FusedResidual),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


@pytest.mark.usefixtures("inductor")
def test_a_net_compiled_by_inductor_equals_uncompiled():
    """On one backend: the graph that Inductor builds from is the same for both."""
    assert_compiles(small_net(), draw(2, 1, 16, 17), "inductor")


CHANGES_AFTER_COMPILATION = {
    "evaluation": lambda m: m.eval(),
    "eps": lambda m: setattr(m.bn1, "eps", 1.0),
    "momentum": lambda m: setattr(m.bn1, "momentum", 0.5),
    "a cumulative average": lambda m: setattr(m.bn2, "momentum", None),
    "no statistics of its own": lambda m: setattr(m.bn2, "track_running_stats", False),
    "a forward of its own": lambda m: setattr(m.conv1, "forward", torch.zeros_like),
    "a norm's forward of its own": lambda m: setattr(m.bn2, "forward", torch.zeros_like),
    "a convolution of its own": lambda m: setattr(m.conv2, "_conv_forward", lambda x, weight, bias: x),
    "another module": lambda m: setattr(m, "bn1", nn.Identity()),
    "another weight": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight.detach().flip(3))),
    "a frozen weight": lambda m: m.conv2.weight.requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore:.*runs PyTorch's operators one by one")
@pytest.mark.parametrize("change", CHANGES_AFTER_COMPILATION.values(), ids=CHANGES_AFTER_COMPILATION)
def test_a_compiled_block_follows_a_change_of_its_modules(change):
    block = FusedResidual(3, 3).to(DEVICE)
    plain, x = copy.deepcopy(block), draw(2, 3, 7, 6)
    compiled = torch.compile(block, backend="eager")
    for call, module in ((compiled, block), (plain, plain)):
        for _ in range(2):
            call(x)
        change(module)
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(snapshot(block), snapshot(plain))


def test_a_compiled_block_takes_other_batch_sizes(any_backend):
    block = FusedResidual(3, 3).to(DEVICE)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 5, 3):
        x = draw(n, 3, 4, 5, seed=n)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("module", MODULES)
def test_a_compiled_module_keeps_the_fused_operator(module):
    called = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(MODULES[module]().to(DEVICE), fullgraph=True, backend=keep)(draw(2, 3, 7, 6))
    assert sum("fused_residual" in name for name in called) == 1
    assert not any("conv2d" in name for name in called)
