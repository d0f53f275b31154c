"""relu(batch_norm(x) + shortcut), the operators between a block's convolutions, as one fused operation and as three."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Implementation, Workload
from resnet.functional import batch_norm_add_relu
from resnet.reference import batch_norm_add_relu as eager_batch_norm_add_relu

SHAPES = {"64@24x24": (64, 24), "512@3x3": (512, 3)}  # channels, height and width: ResNet-18's first and last stage
BATCH = 4 if common.QUICK else 32

of_every_shape = pytest.mark.parametrize("shape", SHAPES)


@dataclass(frozen=True)
class Operation:
    """The operation of one shape, and its arguments."""

    run: Callable[[Tensor, Tensor, bool], Tensor]  # of x, shortcut, training
    x: Tensor
    shortcut: Tensor
    parameters: tuple[Tensor, ...]  # weight and bias

    @property
    def group(self) -> str:
        batch, channels, height, width = self.x.shape
        return f"batch_norm_add_relu {batch}x{channels}@{height}x{width}"


def operation(implementation: Implementation, shape: str) -> Operation:
    channels, size = SHAPES[shape]
    batch = BATCH if implementation.device.type == "cpu" else 256
    x, shortcut = (
        common.activations(implementation, batch, channels, size, size, seed=s, dtype=implementation.dtype)
        for s in (0, 1)
    )
    drawn = common.seeded(lambda: [torch.rand(channels) for _ in range(2)])
    weight, bias = (values.to(implementation.device).requires_grad_() for values in drawn)
    mean, var = (fill(channels, device=implementation.device) for fill in (torch.zeros, torch.ones))
    function = batch_norm_add_relu if implementation.kind == "fused" else eager_batch_norm_add_relu
    if implementation.kind == "compile":
        function = common.compiled(function)

    def run(x: Tensor, shortcut: Tensor, training: bool) -> Tensor:
        return function(x, mean, var, weight, bias, shortcut, training)

    return Operation(run, x, shortcut, (weight, bias))


@of_every_shape
def bench_training_forward(measure, shape):
    def build(implementation: Implementation) -> Workload:
        op = operation(implementation, shape)
        op.x.requires_grad_()
        op.shortcut.requires_grad_()
        return Workload(lambda: op.run(op.x, op.shortcut, True), f"{op.group} training forward", len(op.x))

    measure(build)


@of_every_shape
def bench_training_forward_backward(measure, shape):
    def build(implementation: Implementation) -> Workload:
        op = operation(implementation, shape)
        op.shortcut.requires_grad_()
        leaves = [op.shortcut, *op.parameters]
        step = common.forward_backward(implementation, lambda x: op.run(x, op.shortcut, True), op.x, leaves)
        op.x.requires_grad_()
        # What the operation adds to what its neighbours keep: without x and the shortcut, which others made.
        saved = common.saved_bytes(lambda: op.run(op.x, op.shortcut, True), exclude=[op.x, *leaves])
        return Workload(
            step,
            f"{op.group} training forward + backward",
            len(op.x),
            title=f"BN+add+ReLU {shape} training",
            saved={"saved_bytes_without_inputs": saved},
        )

    measure(build)


@of_every_shape
def bench_inference(measure, shape):
    def build(implementation: Implementation) -> Workload:
        op = operation(implementation, shape)
        run = common.inference(implementation, lambda x: op.run(x, op.shortcut, False), op.x)
        return Workload(run, f"{op.group} inference", len(op.x), title=f"BN+add+ReLU {shape} inference")

    measure(build)
