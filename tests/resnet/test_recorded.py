"""What tools record of the fused modules consists of PyTorch's operators, has eager's values, and runs without us."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from resnet import (
    BasicBlock,
    FusedBasicBlock,
    FusedResidual,
    FusedSmallStem,
    FusedStem,
    LazyFusedResidual,
    LazyFusedStem,
    LazyResNet18,
    Residual,
    SmallStem,
    Stem,
    reference,
)
from resnet.functional import batch_norm_add_relu
from tests.conftest import DEVICE
from tests.helpers.blocks import FUSED, draw, randomize
from tests.helpers.fused_cases import KINDS, images, inference_trio, kinds, train_and_eval
from tests.helpers.gated import FusedInner, Inner

SIZE = (2, 7, 6)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX"),
]


@pytest.fixture(autouse=True)
def plain_eager(monkeypatch):
    """Eager's own convolution and memory: what the other tests put in their place would be recorded."""
    monkeypatch.setattr(torch.nn.functional, "conv2d", torch.conv2d)  # see tests/conftest.py
    torch.use_deterministic_algorithms(False)


class Operation(nn.Module):
    """The fused operation, or its reference, among a user's own code."""

    def __init__(self, function: Callable[..., Tensor], channels: int):
        super().__init__()
        self.bn, self.function = nn.BatchNorm2d(channels), function

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return self.function(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, x, self.training)


def small_net(block: type[nn.Module]) -> nn.Sequential:
    """ResNet-18's kinds of stages, with few channels."""
    return nn.Sequential(
        block.stem(3, 4), reference.resnet_block(4, 4, 1, first_block=True, block=block), block(4, 6, True, 2)
    )


MODELS = {
    "identity": lambda fused: (FusedResidual if fused else Residual)(3, 3),
    "strided": lambda fused: (FusedResidual if fused else Residual)(3, 5, True, 2),
    "gates": lambda fused: (FusedBasicBlock if fused else BasicBlock)(3, 3, squeeze_excite=True),
    "gates before the last convolution": lambda fused: (FusedInner if fused else Inner)(3, 4),
    "stem": lambda fused: (FusedStem if fused else Stem)(3, 5),
    "small stem": lambda fused: (FusedSmallStem if fused else SmallStem)(3, 5),
    "net": lambda fused: small_net(FusedResidual if fused else Residual),
    "operation": lambda fused: Operation(batch_norm_add_relu if fused else reference.batch_norm_add_relu, 3),
}
models = pytest.mark.parametrize("model", MODELS)


def pair(model: str, train: bool) -> tuple[nn.Module, nn.Module]:
    """(fused, eager) of the same values."""
    fused, eager = MODELS[model](True), MODELS[model](False)
    randomize(eager)
    fused.load_state_dict(eager.state_dict())
    return fused.to(DEVICE).train(train), eager.to(DEVICE).train(train)


class NodePaths(torch.fx.Tracer):
    """As torchvision's feature extractor traces: it wants to know from which module each node comes."""

    def __init__(self):
        super().__init__()
        self.paths: list[str] = []

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        self.paths.append(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


TOOLS = {
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "script": lambda m, x: torch.jit.script(m),
    "trace": lambda m, x: torch.jit.trace(m, x),
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "strict export": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
    "make_fx": lambda m, x: make_fx(m)(x),
    "make_fx before dispatch": lambda m, x: make_fx(m, pre_dispatch=True)(x),
}
NAMELESS = ("make_fx", "make_fx before dispatch")  # they number what they hold


def operators(recorded: nn.Module) -> list[str]:
    """The operators that a recorded model calls, in order."""
    if isinstance(recorded, torch.jit.ScriptModule):
        return [node.kind() for node in recorded.inlined_graph.nodes()]
    graphs = [module.graph for module in recorded.modules() if isinstance(module, torch.fx.GraphModule)]
    return [str(node.target).replace(batch_norm_add_relu.__module__, "") for graph in graphs for node in graph.nodes]


@models
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@train_and_eval
def test_a_recorded_model_calls_what_eagers_calls_and_gives_its_values(tool, model, train, grad):
    fused, eager = pair(model, train)
    if tool == "script" and model == "operation":
        pytest.skip("a function that is an attribute: see the test of a scripted function")
    x, before = draw(3, 3, 9, 8), [type(m) for m in fused.modules()]
    with torch.set_grad_enabled(grad):
        recorded, expected = (TOOLS[tool](copy.deepcopy(m), x) for m in (fused, eager))
        assert operators(recorded) == operators(expected)
        assert not any("fused_residual" in name for name in operators(recorded))
        torch.testing.assert_close(recorded(x), expected(x))
    state, wanted = recorded.state_dict(), expected.state_dict()
    torch.testing.assert_close(list(state.values()), list(wanted.values()))
    if tool not in NAMELESS:
        assert list(state) == list(wanted)
    assert [type(m) for m in fused.modules()] == before


def test_recording_leaves_a_net_as_it_was():
    """torch.jit.script puts what a `__prepare_scriptable__` returns into the net itself."""
    net, _ = pair("net", train=False)
    kinds_before = [type(m) for m in net.modules()]
    for tool in TOOLS.values():
        tool(net, draw(2, 3, 9, 8))
    assert [type(m) for m in net.modules()] == kinds_before


def test_a_scripted_function_that_calls_the_operation_runs_the_references(any_backend):
    x, mean, var = draw(2, 3, 4, 5), torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    scripted = torch.jit.script(batch_norm_add_relu)
    torch.testing.assert_close(scripted(x, mean, var), reference.batch_norm_add_relu(x, mean, var))


def test_the_operation_of_a_proxy_is_recorded_whichever_argument_it_is():
    x, mean, var = draw(2, 3, 4, 5), torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    recorded = torch.fx.symbolic_trace(lambda skip: batch_norm_add_relu(x, mean, var, shortcut=skip))
    torch.testing.assert_close(recorded(x), reference.batch_norm_add_relu(x, mean, var, shortcut=x))


@models
def test_a_tracer_that_asks_for_paths_finds_eagers(model):
    paths = []
    for module in pair(model, train=False):
        tracer = NodePaths()
        tracer.trace(module)
        paths.append(tracer.paths)
    assert paths[0] == paths[1]


@pytest.mark.parametrize("make", [lambda: LazyFusedResidual(5, True, 2), lambda: LazyFusedStem(5), LazyResNet18])
class TestLazyModules:
    def test_after_the_dry_run_are_recorded_as_others(self, make):
        module, x = make().to(DEVICE).eval(), draw(2, 3, 33, 34)
        expected = module(x)
        for tool in TOOLS.values():
            recorded = tool(module, x)
            assert not any("fused_residual" in name for name in operators(recorded))
            torch.testing.assert_close(recorded(x), expected, rtol=1e-3, atol=1e-3)

    def test_are_traced_by_fx_before_the_dry_run_as_lazy_modules_of_pytorch(self, make):
        module, x = nn.Sequential(make()).to(DEVICE).eval(), draw(2, 3, 33, 34)
        recorded = torch.fx.symbolic_trace(module)
        out = recorded(x)
        torch.testing.assert_close(module(x), out, rtol=1e-3, atol=1e-3)

    def test_are_not_scripted_before_the_dry_run(self, make):
        with pytest.raises(RuntimeError, match=r"LazyFused\w+ has uninitialized parameters; run a forward pass first"):
            torch.jit.script(make())


WITHOUT_US = """
import sys, torch
sys.modules["resnet"] = None  # an import of it fails
load = {
    "export": lambda file: torch.export.load(file).module(),
    "fx": lambda file: torch.load(file, weights_only=False),
    "script": torch.jit.load,
    "trace": torch.jit.load,
}
x = torch.load("x.pt")
torch.save({name: load[name](name + ".pt2") (x).detach() for name in load}, "out.pt")
"""


def test_recorded_models_run_where_this_library_is_not_installed(tmp_path: Path):
    fused, eager = (m.cpu() for m in pair("net", train=False))
    x = draw(2, 3, 17, 16).cpu()
    torch.export.save(torch.export.export(fused, (x,)), tmp_path / "export.pt2")
    torch.save(torch.fx.symbolic_trace(fused), tmp_path / "fx.pt2")
    torch.jit.script(fused).save(tmp_path / "script.pt2")
    torch.jit.trace(fused, x).save(tmp_path / "trace.pt2")
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_US], cwd=tmp_path, check=True, timeout=300)
    outputs = torch.load(tmp_path / "out.pt")
    assert set(outputs) == {"export", "fx", "script", "trace"}
    for got in outputs.values():
        torch.testing.assert_close(got, eager(x).detach())


@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "export"])
@models
def test_onnx_holds_onnxs_operators_alone(tmp_path, model, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    files = []
    for name, module in zip(("fused", "eager"), pair(model, train=False)):
        file = tmp_path / f"{name}.onnx"
        torch.onnx.export(module, (draw(2, 3, 9, 8),), file, dynamo=dynamo)
        files.append([(node.op_type, node.domain) for node in onnx.load(file).graph.node])
    assert files[0] == files[1] and {domain for _, domain in files[0]} == {""}


# ---- modes -------------------------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """A mode that notes the names of the operators."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@kinds
@train_and_eval
def test_a_dispatch_mode_sees_the_fused_operator_and_eagers_values(any_backend, kind, train):
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, SIZE, dtype=torch.float64)
    for module in t.all:
        module.train(train)
    t.fused(x)  # what is known of the arguments would let it go past the dispatcher
    t.exact(x)
    with Watched() as mode:
        torch.testing.assert_close(t.fused(x), t.exact(x), atol=1e-9, rtol=1e-7)
    assert any("fused_residual" in name for name in mode.names)


@kinds
@train_and_eval
def test_meta_and_fake_tensors_have_eagers_shapes(kind, train):
    make, *args = KINDS[kind]
    options = args.pop() if isinstance(args[-1], dict) else {}
    shapes = []
    for module in (make, FUSED[make]):
        x = images(kind, SIZE).to("meta")
        with torch.device("meta"):
            shapes.append(module(*args, **options).train(train)(x).shape)
        with FakeTensorMode():
            built = module(*args, **options).train(train)
            out = built(torch.empty(x.shape))
            out.sum().backward()
            shapes += [out.shape, *[p.grad.shape for p in built.parameters()]]
    half = len(shapes) // 2
    assert shapes[:half] == shapes[half:]
