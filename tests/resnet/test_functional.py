"""`resnet.functional.batch_norm_add_relu` against `resnet.reference.batch_norm_add_relu`, on both backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import resnet
from resnet import reference
from resnet.functional import batch_norm_add_relu
from resnet.kernels.host.tiling import tiling
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, SIXTEEN_BIT, assert_parity, draw, name_of, named, same
from tests.helpers.layouts import LAYOUTS, is_channels_last

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Case:
    """One call: its shape, types and options."""

    shape: tuple[int, int, int, int] = (2, 6, 3, 5)
    dtype: torch.dtype = torch.float32
    vectors: torch.dtype | None = None  # the type of weight, bias and running statistics; None for `dtype`
    training: bool = True
    shortcut: bool = True
    relu: bool = True
    affine: bool = True
    running: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    mean: float = 0.0

    def __str__(self) -> str:
        default = Case()
        changed = [(k, v) for k, v in vars(self).items() if v != getattr(default, k)]
        return ",".join(f"{k}={name_of(v)}" for k, v in changed) or "default"


def tensors(case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    """The tensors of a call, channels_last, and the incoming gradient `dout`."""
    C = case.shape[1]
    vector = {"dtype": case.vectors or case.dtype}
    x = draw(*case.shape, seed=seed) + case.mean
    return {
        "x": x.to(case.dtype),
        "running_mean": draw(C, seed=seed + 10, **vector) if case.running else None,
        "running_var": draw(C, seed=seed + 20, **vector).abs() + 0.5 if case.running else None,
        "weight": draw(C, seed=seed + 30, **vector) if case.affine else None,
        "bias": draw(C, seed=seed + 40, **vector) if case.affine else None,
        "shortcut": draw(*case.shape, seed=seed + 50, dtype=case.dtype) if case.shortcut else None,
        "dout": draw(*case.shape, seed=seed + 60, dtype=case.dtype),
    }


def run(function, case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one call. `given` stays as it is."""
    dout = given["dout"]
    args = {k: v if v is None else v.detach() for k, v in given.items() if k != "dout"}
    args.update({k: args[k].clone() for k in STATISTICS if args[k] is not None})
    wanted = [k for k in ("x", "weight", "bias", "shortcut") if args[k] is not None]
    for k in wanted:
        args[k] = args[k].requires_grad_()
    out = function(**args, training=case.training, momentum=case.momentum, eps=case.eps, relu=case.relu)
    grads = torch.autograd.grad(out, [args[k] for k in wanted], dout)
    result = {"out": out.detach(), **{f"d{k}": grad for k, grad in zip(wanted, grads)}}
    return result | {k: args[k] for k in STATISTICS if args[k] is not None}


def fused(case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return run(batch_norm_add_relu, case, given)


def eager(case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return run(reference.batch_norm_add_relu, case, given)


def exact(case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return eager(case, {k: v if v is None else v.double() for k, v in given.items()})


def assert_case(case: Case, seeds: int = 4) -> None:
    draws = [tensors(case, seed) for seed in range(seeds)]
    assert_parity([(eager(case, given), fused(case, given), exact(case, given)) for given in draws])


# ---- parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("shortcut", [True, False], ids=["add", "alone"])
def test_every_option_in_every_type_is_as_exact_as_eager(any_backend, dtype, training, shortcut, relu):
    assert_case(Case((4, 16, 6, 5), dtype=dtype, training=training, shortcut=shortcut, relu=relu))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 7),
        (4, 1, 1, 1),
        (1, 3, 5, 1),
        (1, 3, 2, 2),
        (1, 6, 1, 9),
        (5, 6, 1, 1),
        (2, 64, 3, 1),
        (1, 64, 4, 5),
        (3, 100, 2, 3),
        (1, 100, 7, 7),
        (3, 70, 13, 11),  # several partials in the reduction, and ragged tiles of rows and of columns
    ],
    ids=name_of,
)
def test_odd_shapes_are_as_exact_as_eager(any_backend, shape, training):
    assert_case(Case(shape, training=training), seeds=2 if shape[1] == 70 else 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 5, 1, 1)], ids=name_of)
def test_evaluation_of_one_value_per_channel_is_as_exact_as_eager(any_backend, shape, dtype):
    assert_case(Case(shape, dtype=dtype, training=False))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("vectors", ["float32", "same"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=name_of)
def test_parameters_of_a_16_bit_input_are_of_its_type_or_float32(any_backend, dtype, vectors, training):
    case = Case((4, 16, 5, 5), dtype=dtype, vectors=torch.float32 if vectors == "float32" else None, training=training)
    result = fused(case, tensors(case))
    assert result["out"].dtype == result["dx"].dtype == result["dshortcut"].dtype == dtype
    assert result["dweight"].dtype == result["dbias"].dtype == result["running_mean"].dtype == case.vectors or dtype
    assert_case(case)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("present", ["weight", "bias", "neither"])
def test_weight_and_bias_may_be_absent(any_backend, present, training):
    if DEVICE.type == "cuda" and present == "bias":
        pytest.skip("PyTorch's own batch_norm on CUDA has no backward for a bias without a weight")
    case = Case(training=training, affine=present != "neither")
    draws = [tensors(case, seed) for seed in range(4)]
    for given in draws:
        for name in {"weight", "bias"} - {present}:
            given[name] = None
    assert_parity([(eager(case, given), fused(case, given), exact(case, given)) for given in draws])


# ---- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0], ids=named("momentum"))
def test_running_statistics_move_by_the_momentum(any_backend, momentum, dtype):
    assert_case(Case((2, 5, 4, 3), dtype=dtype, vectors=torch.promote_types(dtype, torch.float32), momentum=momentum))


def test_running_statistics_hold_the_unbiased_variance(any_backend):
    case = Case((1, 3, 2, 1), momentum=1.0)  # two values, whose unbiased variance is twice the biased one
    given = tensors(case)
    result = fused(case, given)
    torch.testing.assert_close(result["running_var"], given["x"].var((0, 2, 3), unbiased=True))
    torch.testing.assert_close(result["running_mean"], given["x"].mean((0, 2, 3)))


def test_evaluation_leaves_the_running_statistics(any_backend):
    case = Case(training=False)
    given = tensors(case)
    result = fused(case, given)
    for name in STATISTICS:
        assert torch.equal(result[name], given[name])


@pytest.mark.parametrize("shortcut", [True, False], ids=["add", "alone"])
def test_training_without_running_statistics_is_as_exact_as_eager_and_changes_no_input(any_backend, shortcut):
    case = Case((3, 6, 4, 4), running=False, shortcut=shortcut)
    given = tensors(case)
    before = {k: v.clone() for k, v in given.items() if v is not None}
    fused(case, given)
    same({k: given[k] for k in before}, before)
    assert_case(case)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5], ids=named("eps"))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eps_is_added_to_the_variance(any_backend, eps, training):
    assert_case(Case(eps=eps, training=training))


@pytest.mark.parametrize("mean", [1e3, 1e4], ids=named("mean"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_the_variance_keeps_its_digits_at_a_large_mean(any_backend, dtype, mean):
    """Rounding a mean to its type costs eps * mean / 2. Sums of squares would cost eps * mean ** 2."""
    case = Case((4, 6, 16, 10), dtype=dtype, mean=mean, momentum=1.0)  # 640 rows: several partials
    given = tensors(case)
    var = given["x"].double().var((0, 2, 3))
    bound = torch.finfo(dtype).eps * mean
    torch.testing.assert_close(fused(case, given)["running_var"].double(), var, rtol=bound, atol=0)


def skip_pytorchs_own_on_cuda(backend: str) -> None:
    if backend == "torch" and DEVICE.type == "cuda":
        pytest.skip("PyTorch's statistics on CUDA, which the torch backend takes, lose digits at a large mean")


@pytest.mark.parametrize("mean", [1.0, 100.0, 1e4], ids=named("mean"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_results_at_a_large_mean_are_as_exact_as_eager(any_backend, dtype, mean):
    skip_pytorchs_own_on_cuda(any_backend)
    # There is no ReLU, since at such a mean a rounding of the input moves the output across zero.
    assert_case(Case((4, 6, 16, 10), dtype=dtype, vectors=torch.float32, mean=mean, relu=False), seeds=3)


def test_a_constant_channel_has_no_variance(any_backend):
    skip_pytorchs_own_on_cuda(any_backend)
    case = Case((2, 4, 3, 5), momentum=1.0, shortcut=False)
    given = tensors(case) | {"x": torch.full(case.shape, 4096.0, device=DEVICE)}
    running_var = fused(case, given)["running_var"]
    assert torch.equal(running_var, torch.zeros_like(running_var))


# ---- NaN and Inf -----------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("where", ["x", "shortcut", "weight", "bias", "running_mean", "running_var", "dout"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_reach_what_they_reach_in_eager(any_backend, value, where, relu, training):
    if abs(value) == INF and (where == "weight" or (training and where == "x")):
        skip_pytorchs_own_on_cuda(any_backend)  # and give NaN for an infinite mean, Inf for NaN of an infinite weight
    case = Case((2, 4, 3, 3), relu=relu, training=training)
    given = tensors(case)
    given[where][(1, 2, 0, 1) if given[where].dim() == 4 else 1] = value
    # The CPU's eager also works with a scale and a shift. CUDA's subtracts the mean first, so of an infinite weight or
    # statistic it makes Inf where their difference is NaN.
    expected = eager(case, {name: t.cpu() for name, t in given.items()})
    on_cpu = {name: t.cpu() for name, t in fused(case, given).items()}
    torch.testing.assert_close(on_cpu, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_nan_output_passes_its_gradient(any_backend, dtype):
    case = Case((2, 4, 3, 3), dtype=dtype, training=False)
    given = tensors(case)
    given["shortcut"][1, 2, 0, 1] = NAN
    result = fused(case, given)
    assert result["out"].isnan().nonzero().tolist() == [[1, 2, 0, 1]]
    assert result["dshortcut"][1, 2, 0, 1] == given["dout"][1, 2, 0, 1]


def test_values_beyond_float16_become_infinite(any_backend):
    case = Case((2, 4, 3, 3), dtype=torch.float16, vectors=torch.float32, training=False)
    given = tensors(case)
    given["weight"] *= 1e5
    got, expected = fused(case, given)["out"], eager(case, given)["out"]
    assert expected.isinf().any()
    assert torch.equal(got.isinf(), expected.isinf())


def test_an_output_of_zero_passes_no_gradient(any_backend):
    case = Case(training=False)
    given = tensors(case) | {"shortcut": torch.zeros(case.shape, device=DEVICE)}
    given["weight"].zero_()
    given["bias"].zero_()
    result = fused(case, given)
    assert torch.equal(result["dshortcut"], torch.zeros_like(result["dshortcut"]))


# ---- layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["x", "shortcut", "both"])
def test_any_layout_of_input_and_shortcut_gives_the_same_bits_channels_last(any_backend, layout, where):
    case = Case((2, 6, 3, 5))
    given = tensors(case)
    names = ("x", "shortcut") if where == "both" else (where,)
    laid = given | {name: LAYOUTS[layout](given[name]) for name in names}
    assert all(torch.equal(laid[name], given[name]) for name in names)
    result = fused(case, laid)
    if DEVICE.type == "cuda" and layout == "offset":  # compiled for other alignments, a kernel sums in another order
        torch.testing.assert_close(result, fused(case, given))
    else:
        same(result, fused(case, given))
    assert all(is_channels_last(result[name]) for name in ("out", "dx", "dshortcut"))


@pytest.mark.parametrize("stride", [2, 0])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_weight_and_bias_may_be_views_with_strides(any_backend, training, stride):
    x = draw(2, 4, 3, 3)
    values = draw(2, 7, seed=1)
    views = [v.as_strided((4,), (stride,)) for v in values.abs() + 1]
    running = draw(4, seed=2), draw(4, seed=3).abs() + 1
    got = batch_norm_add_relu(x, *(r.clone() for r in running), *views, training=training)
    dense = [v.clone(memory_format=torch.contiguous_format) for v in views]
    torch.testing.assert_close(got, reference.batch_norm_add_relu(x, *running, *dense, training=training))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_any_layout_of_the_incoming_gradient_gives_the_same_bits(any_backend, layout, relu):
    case = Case((2, 6, 3, 5), relu=relu)
    given = tensors(case)
    same(fused(case, given | {"dout": LAYOUTS[layout](given["dout"])}), fused(case, given))


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("along", ["all", "pixels", "batch", "channels"])
def test_an_expanded_incoming_gradient_gives_the_bits_of_a_dense_one(any_backend, along, relu):
    case = Case((2, 6, 3, 5), relu=relu)
    given = tensors(case)
    part = {"all": (1, 1, 1, 1), "pixels": (2, 6, 1, 1), "batch": (1, 6, 3, 5), "channels": (2, 1, 3, 5)}[along]
    dout = draw(*part).expand(case.shape)
    assert 0 in dout.stride()
    same(fused(case, given | {"dout": dout}), fused(case, given | {"dout": dout.clone()}))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_sum_of_the_output_can_be_differentiated(any_backend, training):
    case = Case(training=training)
    given = tensors(case)
    gradients = []
    for function in (batch_norm_add_relu, reference.batch_norm_add_relu):
        args = {k: v.clone() for k, v in given.items() if k != "dout"}
        wanted = [args[k].requires_grad_() for k in ("x", "weight", "bias", "shortcut")]
        function(**args, training=training).sum().backward()
        gradients.append([t.grad for t in wanted])
    torch.testing.assert_close(*gradients)


def test_an_expanded_input_and_shortcut_give_the_bits_of_dense_ones(any_backend):
    case = Case((2, 6, 3, 5))
    given = tensors(case)
    laid = given | {"x": draw(1, 6, 3, 5).expand(case.shape), "shortcut": draw(2, 6, 1, 1).expand(case.shape)}
    same(fused(case, laid), fused(case, laid | {k: laid[k].clone() for k in ("x", "shortcut")}))


def test_one_tensor_may_be_input_and_shortcut(any_backend):
    """Its gradient is the sum of both, and it is not written."""
    case = Case()
    results = []
    for function in (batch_norm_add_relu, reference.batch_norm_add_relu):
        given = tensors(case)
        x = given["x"].clone().requires_grad_()
        out = function(x, None, None, given["weight"], given["bias"], x, training=True)
        (dx,) = torch.autograd.grad(out, x, given["dout"])
        assert torch.equal(x, given["x"])
        results.append((out, dx))
    torch.testing.assert_close(*results)


# ---- what a call leaves alone, and what it detects -------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_inputs_are_never_written(any_backend, layout, training):
    case = Case(training=training)
    given = {k: LAYOUTS[layout](v) if v.dim() == 4 else v for k, v in tensors(case).items()}
    before = {k: v.clone() for k, v in given.items()}
    versions = {k: v._version for k, v in given.items()}
    fused(case, given)
    same(given, before)
    assert {k: v._version for k, v in given.items()} == versions


def test_two_calls_are_bit_equal(any_backend):
    case = Case((4, 37, 12, 11))  # 528 rows: several partials
    given = tensors(case)
    assert tiling(4 * 12 * 11, 37).partials > 1
    same(fused(case, given), fused(case, given))


@pytest.mark.parametrize(
    ("changed", "shortcut"),
    [("out", True), ("out", False), ("x", True), ("x", False), ("weight", True), ("shortcut", True)],
    ids=["out", "out, alone", "x", "x, alone", "weight", "shortcut"],
)
def test_an_in_place_change_is_detected_as_in_eager(any_backend, changed, shortcut):
    outcomes = []
    for function in (batch_norm_add_relu, reference.batch_norm_add_relu):
        given = {k: v.clone() for k, v in tensors(Case(shortcut=shortcut)).items() if v is not None}
        dout = given.pop("dout")
        for k in ("x", "weight"):
            given[k].requires_grad_()
        given["out"] = function(**given, training=True)
        with torch.no_grad():
            given[changed].mul_(1)
        try:
            given["out"].backward(dout)
            outcomes.append("nothing")
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcomes.append("detected")
    assert outcomes[0] == outcomes[1] == ("nothing" if changed == "shortcut" else "detected")


def test_without_a_relu_the_output_may_be_changed_in_place(any_backend):
    given = tensors(Case())
    x = given["x"].requires_grad_()
    out = batch_norm_add_relu(x, None, None, shortcut=given["shortcut"], training=True, relu=False)
    (expected,) = torch.autograd.grad(2 * out, x, given["dout"], retain_graph=True)
    (got,) = torch.autograd.grad(out.mul_(2), x, given["dout"])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", ["x", "shortcut", "weight", "bias"])
def test_a_gradient_wanted_alone_is_bit_equal_to_that_wanted_with_all_others(any_backend, wanted):
    case = Case()
    given = tensors(case)
    args = {k: v.clone() for k, v in given.items() if k != "dout"}
    args[wanted].requires_grad_()
    out = batch_norm_add_relu(**args, training=True)
    (got,) = torch.autograd.grad(out, args[wanted], given["dout"])
    assert torch.equal(got, fused(case, given)[f"d{wanted}"])


def test_nothing_is_recorded_where_nothing_wants_a_gradient(any_backend):
    given = tensors(Case())
    given.pop("dout")
    assert not batch_norm_add_relu(**given, training=True).requires_grad
    given["x"].requires_grad_()
    with torch.no_grad():
        assert not batch_norm_add_relu(**given, training=True).requires_grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (0, 1, 1, 1)], ids=name_of)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(any_backend, shape, training):
    case = Case(shape, training=training)
    given = tensors(case)
    result = fused(case, given)
    assert result["out"].shape == result["dx"].shape == result["dshortcut"].shape == shape
    for name in ("dweight", "dbias"):
        assert torch.equal(result[name], torch.zeros_like(given["weight"]))
    for name in STATISTICS:
        assert torch.equal(result[name], given[name])


# ---- derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("shortcut", [True, False], ids=["add", "alone"])
def test_gradients_are_the_numerical_derivatives(any_backend, shortcut, relu, training):
    case = Case((2, 2, 2, 3), dtype=torch.float64, shortcut=shortcut, relu=relu, training=training)
    given = tensors(case)
    names = [k for k in ("x", "weight", "bias", "shortcut") if given[k] is not None]

    def function(*values):
        statistics = {k: given[k].clone() for k in STATISTICS}
        return batch_norm_add_relu(**dict(zip(names, values)), **statistics, training=training, relu=relu)

    # An evaluation is several launches, so with the interpreter fast_mode takes a few random directions instead of all.
    inputs = tuple(given[k].requires_grad_() for k in names)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=any_backend == "triton")


def recorded_gradient(function: Callable, given: dict, training: bool) -> tuple[Tensor, Tensor]:
    """x, and the gradient of out's square sum in x, recorded."""
    x = given["x"].detach().requires_grad_()
    out = function(x, given["running_mean"].clone(), given["running_var"].clone(), given["weight"], training=training)
    return x, torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_through_the_kernels_is_refused_by_name(training):
    with resnet.backend("triton"):
        _, dx = recorded_gradient(batch_norm_add_relu, tensors(Case()), training)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match=r"batch_norm_add_relu_backward .*double backward .*unfuse.*Residual"):
        dx.sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_through_pytorchs_operators_is_as_exact_as_eager(training):
    given = {k: v if v is None else v.double() for k, v in tensors(Case()).items()}
    second = []
    for function in (batch_norm_add_relu, reference.batch_norm_add_relu):
        with resnet.backend("torch"):
            x, dx = recorded_gradient(function, given, training)
            second.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*second)


# ---- bad input -------------------------------------------------------------------------------------------------


def _meta(t: Tensor) -> Tensor:
    return t.to("meta")


BAD = {
    "no batch axis": ({"x": lambda t: t[0]}, ValueError, r"input: expected 4 axes \(N, .*, got 3: shape \(6, 3, 5\)"),
    "five axes": ({"x": lambda t: t[None]}, ValueError, "input: expected 4 axes .* got 5"),
    "a scalar": ({"x": lambda t: t.sum()}, ValueError, r"input: expected 4 axes .* got 0: shape \(\)"),
    "a list": ({"x": lambda t: t.tolist()}, TypeError, "input: expected a tensor, got list"),
    "integers": ({"x": lambda t: t.int()}, TypeError, "input: expected float16, .* got torch.int32"),
    "complex": ({"x": lambda t: t.cfloat()}, TypeError, "input: expected float16, .* got torch.complex64"),
    "height 0": ({"x": lambda t: t[:, :, :0]}, ValueError, "input: expected height and width of at least 1"),
    "channels of the vectors": ({"x": lambda t: t[:, :5]}, ValueError, r"weight: expected shape \(5,\), got \(6,\)"),
    "weight a list": ({"weight": Tensor.tolist}, TypeError, "batch_norm.weight: expected a tensor, got list"),
    "bias a number": ({"bias": lambda t: 1.0}, TypeError, "batch_norm.bias: expected a tensor, got float"),
    "mean a list": ({"running_mean": Tensor.tolist}, TypeError, "batch_norm.running_mean: expected a tensor, got list"),
    "weight's length": ({"weight": lambda t: t[:1]}, ValueError, r"weight: expected shape \(6,\), got \(1,\)"),
    "bias's rank": ({"bias": lambda t: t[None]}, ValueError, r"bias: expected shape \(6,\), got \(1, 6\)"),
    "mean's length": ({"running_mean": lambda t: t[:5]}, ValueError, r"running_mean: expected shape \(6,\)"),
    "variance's length": ({"running_var": lambda t: t[:5]}, ValueError, r"running_var: expected shape \(6,\)"),
    "weight's type": ({"weight": Tensor.double}, TypeError, "weight: expected torch.float32, got torch.float64"),
    "bias's type": ({"bias": Tensor.half}, TypeError, "bias: expected torch.float32, got torch.float16"),
    "mean's type": ({"running_mean": Tensor.long}, TypeError, "running_mean: expected torch.float32, got torch.int64"),
    "variance's type": ({"running_var": Tensor.double}, TypeError, "running_var: expected torch.float32, got"),
    "mixed 16-bit types": (
        {"x": Tensor.half, "shortcut": Tensor.half, "weight": Tensor.bfloat16},
        TypeError,
        "weight: expected torch.float16 or torch.float32, got torch.bfloat16",
    ),
    "weight's device": ({"weight": _meta}, ValueError, "weight: expected the input's device .* got meta"),
    "variance's device": ({"running_var": _meta}, ValueError, "running_var: expected the input's device .* got meta"),
    "mean without variance": ({"running_var": lambda t: None}, ValueError, "running_mean and running_var both"),
    "variance without mean": ({"running_mean": lambda t: None}, ValueError, "running_mean and running_var both"),
    "shortcut's shape": ({"shortcut": lambda t: t[:, :, :1]}, ValueError, r"shortcut: expected .* \(2, 6, 3, 5\)"),
    "shortcut to broadcast": ({"shortcut": lambda t: t[:1]}, ValueError, "shortcut: expected the input's shape"),
    "shortcut's channels": ({"shortcut": lambda t: t[:, :5]}, ValueError, "shortcut: expected 6 channels, got 5"),
    "shortcut's rank": ({"shortcut": lambda t: t[0]}, ValueError, "shortcut: expected 4 axes"),
    "shortcut's type": ({"shortcut": Tensor.half}, TypeError, "shortcut: expected .* torch.float32, got torch.float16"),
    "shortcut's device": ({"shortcut": _meta}, ValueError, "shortcut: expected the input's device .* got meta"),
    "shortcut a number": ({"shortcut": lambda t: 1.0}, TypeError, "shortcut: expected a tensor, got float"),
    "one value per channel": (
        {"x": lambda t: t[:1, :, :1, :1], "shortcut": lambda t: None},
        ValueError,
        r"expected more than 1 value per channel when training, got input size \(1, 6, 1, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named_before_anything_changes(any_backend, bad):
    changes, error, message = BAD[bad]
    given = tensors(Case())
    given.pop("dout")
    for name, change in changes.items():
        given[name] = change(given[name])
    kept = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.device.type != "meta"}
    before = {k: v.clone() for k, v in kept.items()}
    with pytest.raises(error, match=message):
        batch_norm_add_relu(**given, training=True)
    same(kept, before)


@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1e-3, True), (-2.0, False)])
def test_an_eps_that_pytorch_refuses_is_refused_before_anything_changes(any_backend, eps, training):
    x, running = draw(2, 3, 4, 4), (torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match=f"batch_norm.eps: expected a number .*, got {eps}"):
        batch_norm_add_relu(x, *running, training=training, eps=eps)
    assert torch.equal(running[0], torch.zeros_like(running[0]))
    assert batch_norm_add_relu(x, *running, eps=0.0).isfinite().all()


@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1], torch.ones(2), torch.ones((), requires_grad=True)], ids=repr)
def test_a_setting_that_is_no_number_is_named_before_anything_changes(any_backend, name, value):
    x, running = draw(2, 3, 4, 4), (torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(TypeError, match=f"batch_norm.{name}: expected a number, got {type(value).__name__}"):
        batch_norm_add_relu(x, *running, training=True, **{name: value})
    assert torch.equal(running[0], torch.zeros_like(running[0]))


def test_evaluation_needs_running_statistics(any_backend):
    with pytest.raises(ValueError, match="expected running_mean and running_var, since training is False, got None"):
        batch_norm_add_relu(draw(2, 3, 4, 4), None, None, training=False)
