"""Fused modules in CUDA graphs: PyTorch's own callables, torch.compile's, and a whole training step."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from resnet import FusedResidual, FusedStem, Residual, Stem, resnet18
from resnet.graphs import Graphed, capture
from tests.conftest import DEVICE
from tests.helpers.blocks import Trio, averaged, draw, named, snapshot, trio
from tests.helpers.fused_cases import IDENTITY, STRIDED

CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
MODULES = {"block": (Residual, *IDENTITY), "strided block": (Residual, *STRIDED), "stem": (Stem, 4, 4)}
modules = pytest.mark.parametrize("args", MODULES.values(), ids=MODULES)


def assert_steps_agree(t: Trio, run, seeds: range) -> None:
    """Outputs, gradients and buffers of `run`, which stands for t.fused, are those of eager, step by step."""
    for seed in seeds:
        values = draw(2, 4, 6, 6, seed=seed, dtype=torch.float64)
        results = []
        for call, module in ((run, t.fused), (t.exact, t.exact)):
            x = values.clone().requires_grad_()
            module.zero_grad()
            out = call(x)
            out.square().sum().backward()
            results.append((out.detach().clone(), x.grad, [p.grad.clone() for p in module.parameters()]))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(snapshot(t.fused), snapshot(t.exact))


@CUDA
@modules
@pytest.mark.parametrize("momentum", [0.1, None], ids=named("momentum"))
def test_make_graphed_callables_trains_a_module_as_eager(any_backend, args, momentum):
    t = trio(*args, dtype=torch.float64)
    if momentum is None:
        t.each(averaged)
    x = draw(2, 4, 6, 6, dtype=torch.float64).requires_grad_()
    for _ in range(2):  # what is chosen and compiled at a first call cannot be captured
        t.fused(x).sum().backward()
    graphed = torch.cuda.make_graphed_callables(t.fused, (x,))
    t.exact.load_state_dict(t.fused.state_dict())  # its warm-up moves the running statistics, as it does an eager net's
    assert_steps_agree(t, graphed, range(3))


@CUDA
def test_make_graphed_callables_of_a_net_evaluates_launched_by_python(any_backend):
    """The callables are of the mode that they were captured in; in the other one the module runs as it is."""
    net = resnet18(block=FusedResidual).to(DEVICE)
    images = torch.rand(2, 1, 33, 33, device=DEVICE)
    net(images).sum().backward()
    graphed = torch.cuda.make_graphed_callables(net, (images,))
    graphed.eval()
    with torch.no_grad():
        got = graphed(images)
        expected = resnet18(block=Residual).to(DEVICE)
        expected.load_state_dict(net.state_dict())
        torch.testing.assert_close(got, expected.eval()(images), rtol=1e-3, atol=1e-3)


@CUDA
@modules
def test_reduce_overhead_trains_a_module_as_eager(any_backend, args):
    t = trio(*args, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(t.fused, mode="reduce-overhead", fullgraph=True)

    def run(x):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    assert_steps_agree(t, run, range(5))  # the first runs record, the later ones replay


@CUDA
@pytest.mark.parametrize("kind", [FusedResidual, FusedStem], ids=["block", "stem"])
def test_reduce_overhead_evaluates_a_module_as_eager(any_backend, kind):
    module = kind(4, 4).to(DEVICE).eval()
    torch.compiler.reset()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):
            x = draw(2, 4, 6, 6, seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), module(x))


@CUDA
def test_a_captured_step_trains_as_a_launched_one(any_backend):
    """Forward, loss, backward, momentum and statistics; the learning rate is a tensor that changes between replays."""

    def training(seed: int):
        torch.manual_seed(seed)
        net = nn.Sequential(FusedStem(1, 8), FusedResidual(8, 16, True, 2), nn.Flatten(), nn.LazyLinear(5)).to(DEVICE)
        net(torch.rand(2, 1, 12, 12, device=DEVICE))
        lr = torch.tensor(0.05, device=DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, fused=True)

        def step(x):
            loss = nn.functional.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return (loss.detach(),)

        return net, lr, optimizer, step

    labels = torch.randint(5, (4,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    example = draw(4, 1, 12, 12)
    (launched, lr1, opt1, step), (replayed, lr2, opt2, other) = training(0), training(0)
    for _ in range(2):
        step(example), other(example)
    graphed = Graphed(other, example)
    replayed.load_state_dict(launched.state_dict())
    for ours, theirs in zip(opt2.state.values(), opt1.state.values()):
        ours["momentum_buffer"].copy_(theirs["momentum_buffer"])
    for seed, rate in enumerate((0.05, 0.05, 0.01, 0.002)):
        lr1.fill_(rate), lr2.fill_(rate)
        x = draw(4, 1, 12, 12, seed=seed)
        torch.testing.assert_close(graphed(x)[0], step(x)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(snapshot(replayed), snapshot(launched), rtol=1e-3, atol=1e-4)


@pytest.fixture
def streams(monkeypatch) -> SimpleNamespace:
    """CUDA's streams and graphs as far as which device and stream are current; capturing fails."""

    def stream_of(device: str) -> SimpleNamespace:
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    state = SimpleNamespace(current=stream_of("cuda:0"), waited_for=[])

    @contextmanager
    def stream(chosen):
        before, state.current = state.current, chosen
        try:
            yield
        finally:
            state.current = before

    class Graph:
        def __init__(self, graph, stream):
            self.stream = stream

        def __enter__(self):
            state.waited_for.append(state.current.device)
            state.current = self.stream

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    monkeypatch.setattr(torch.cuda, "Stream", stream_of)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    return state


def test_a_capture_that_fails_leaves_the_stream_that_was_current_and_other_devices_alone(streams):
    before = streams.current
    with pytest.raises(RuntimeError, match="during capture"):
        capture(lambda: (), "cuda:1")
    assert streams.current is before
    assert streams.waited_for == ["cuda:1"]
