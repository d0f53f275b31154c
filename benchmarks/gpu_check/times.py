"""ResNet-18, its blocks and a published net, as eager PyTorch, torch.compile and fused run them: launched and replayed.

Python launches a step kernel by kernel. A replayed step is a CUDA graph: what the device needs, without the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import resnet
from benchmarks import common
from benchmarks.common import Implementation
from benchmarks.gpu_check.errors import noted
from benchmarks.gpu_check.scale import Scale
from resnet.graphs import capture

Step = Callable[[], object]
CUDNN_BENCHMARK = "cudnn.benchmark"  # cuDNN times its convolutions at the first call, as fused does its own


@dataclass(frozen=True)
class Row:
    """One way to run a net or a block."""

    kind: str  # "eager", "compile" or "fused"
    mode: str = ""  # torch.compile's, the way of the fused module's convolutions, or CUDNN_BENCHMARK for eager
    channels_last: bool = True

    @property
    def name(self) -> str:
        words = [self.kind, self.mode, "" if self.channels_last else "NCHW"]
        return " ".join(word for word in words if word)

    def implementation(self, scale: Scale) -> Implementation:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return Implementation(self.kind, scale.device, scale.dtype, layout)

    def callable(self, module: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`run`, or the module compiled in the row's mode."""
        return common.compiled(module, self.mode) if self.kind == "compile" and self.mode else run

    def scope(self, scale: Scale) -> AbstractContextManager:
        """What the row is built and run in."""
        stack = ExitStack()
        stack.enter_context(self.implementation(scale).scope())
        if self.kind == "fused":
            stack.enter_context(resnet.convolution(self.mode or "auto"))
        if self.mode == CUDNN_BENCHMARK:
            stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.backends.cudnn.benchmark = True
        return stack


ROWS = (  # the first ones first: time may end
    *(Row("fused"), Row("eager"), Row("compile"), Row("compile", "reduce-overhead")),
    *(Row("eager", CUDNN_BENCHMARK), Row("eager", "", False)),
    *(Row("fused", "triton"), Row("fused", "epilogue"), Row("fused", "pytorch")),
)
SLOW_ROWS = (Row("compile", "max-autotune"),)  # a minute or more to compile
BLOCK_ROWS = ROWS[:3]
MODEL_ROWS = ROWS[:4]


# ---- what is timed ---------------------------------------------------------------------------------------------


def net_step(row: Row, scale: Scale, train: bool, model: str | None = None) -> Step:
    """A training step (forward, loss, backward, SGD) of a net, or its inference, on one batch.

    The net is the textbook's ResNet-18, or the `model` of `resnet.published`.
    """
    implementation = row.implementation(scale)
    net, run = common.net(implementation) if model is None else common.published(implementation, model)
    run = row.callable(net, run)
    channels = 1 if model is None else 3
    images = common.activations(implementation, scale.batch, channels, scale.resize, scale.resize)
    if not train:
        net.eval()
        return common.inference(implementation, run, images)
    labels = common.labels(implementation, scale.batch, 10)
    return common.training_step(implementation, net, run, [(images, labels)])


def block_step(row: Row, scale: Scale, shape: tuple[int, int, int, int]) -> Step:
    """Forward and backward of a residual block in training."""
    C, K, stride, size = shape
    implementation = row.implementation(scale)
    block, run = common.residual(implementation, C, K, stride)
    x = common.activations(implementation, scale.block_batch, C, size, size, dtype=scale.dtype)
    return common.forward_backward(implementation, row.callable(block, run), x, block.parameters())


# ---- how it is timed -------------------------------------------------------------------------------------------


def milliseconds(step: Step, scale: Scale) -> tuple[float, float, float]:
    """Per call: the median of the rounds, their 20% and their 80% quantile."""
    for _ in range(3):
        step()
    times = [_round(step, scale) for _ in range(scale.rounds)]
    low, *_, high = statistics.quantiles(times, n=5)
    return statistics.median(times), low, high


def _round(step: Step, scale: Scale) -> float:
    if not scale.on_gpu:
        start = time.perf_counter()
        for _ in range(scale.calls):
            step()
        return 1e3 * (time.perf_counter() - start) / scale.calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(scale.calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / scale.calls


def measured(row: Row, scale: Scale, make: Callable[[], Step]) -> dict[str, object]:
    """Milliseconds of a row's step, launched and replayed, and the bytes at its peak; or the error that it met."""
    result: dict[str, object] = {}
    before = torch.cuda.memory_allocated() if scale.on_gpu else 0  # what an earlier row has left
    try:
        with row.scope(scale):
            start = time.perf_counter()
            step = make()
            step()
            if scale.on_gpu:
                torch.cuda.synchronize()
            result["first_call_seconds"] = time.perf_counter() - start
            result["launched_ms"] = milliseconds(step, scale)
            if scale.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                step()
                result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
                if not row.mode.startswith(("reduce", "max")):  # these are graphs of their own
                    result["replayed_ms"] = milliseconds(capture(step, scale.device)[0], scale)
    except Exception as error:
        result |= noted(error)
    return result


def net_rows(
    rows: Sequence[Row], scale: Scale, model: str | None = None
) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """(name, what measures it), of both cases of each row."""
    for row in rows:
        for train in (True, False):
            make = lambda row=row, train=train: net_step(row, scale, train, model)  # noqa: E731
            name = f"{model or 'ResNet-18'} {'training' if train else 'inference'}, {row.name}"
            yield name, lambda row=row, make=make: measured(row, scale, make)


def block_rows(scale: Scale) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for shape in scale.blocks:
        for row in BLOCK_ROWS:
            make = lambda row=row, shape=shape: block_step(row, scale, shape)  # noqa: E731
            C, K, stride, size = shape
            name = f"block {C}->{K}, stride {stride}, {size}x{size}, {row.name}"
            yield name, lambda row=row, make=make: measured(row, scale, make)
