"""relu(batch_norm(x) + shortcut), the operators between a block's convolutions, as one fused operation and as three."""

import pytest
import torch

from benchmarks import common
from resnet.functional import batch_norm_add_relu
from resnet.reference import batch_norm_add_relu as eager_batch_norm_add_relu

SHAPES = {"64@24x24": (64, 24), "512@3x3": (512, 3)}  # channels, height and width: ResNet-18's first and last stage
BATCH = 4 if common.QUICK else 32


@pytest.fixture(params=SHAPES)
def operation(request, row):
    """(name of the shape, function of (x, shortcut, training), x, shortcut, weight and bias)."""
    channels, size = SHAPES[request.param]
    batch = BATCH if row.device.type == "cpu" else 256
    x, shortcut = (common.activations(row, batch, channels, size, size, seed=s, dtype=row.dtype) for s in (0, 1))
    weight, bias = (torch.rand(channels, device=row.device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device=row.device), torch.ones(channels, device=row.device)
    function = batch_norm_add_relu if row.implementation == "fused" else eager_batch_norm_add_relu
    if row.implementation == "compile":
        function = common.compiled(function)

    def run(x, shortcut, training):
        return function(x, mean, var, weight, bias, shortcut, training)

    return f"batch_norm_add_relu {batch}x{request.param}", run, x, shortcut, (weight, bias)


def bench_training_forward(measure, row, operation):
    name, run, x, shortcut, _ = operation
    x.requires_grad_()
    shortcut.requires_grad_()
    measure(lambda: run(x, shortcut, True), row, f"{name} training forward", examples=len(x))


def bench_training_forward_backward(measure, row, operation):
    name, run, x, shortcut, parameters = operation
    shortcut.requires_grad_()
    step = common.forward_backward(row, lambda x: run(x, shortcut, True), x, [shortcut, *parameters])
    x.requires_grad_()
    # What the operation adds to what its neighbours keep: without x and the shortcut, which others made.
    saved = common.saved_bytes(lambda: run(x, shortcut, True), exclude=[x, shortcut, *parameters])
    measure(step, row, f"{name} training forward + backward", examples=len(x), saved_bytes_without_inputs=saved)


def bench_inference(measure, row, operation):
    name, run, x, shortcut, _ = operation
    measure(common.inference(row, lambda x: run(x, shortcut, False), x), row, f"{name} inference", examples=len(x))
