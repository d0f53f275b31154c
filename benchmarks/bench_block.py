"""The residual block at the shapes that ResNet-18's stages have for 96x96 images."""

import pytest

from benchmarks import common

BATCH = 4 if common.QUICK else 32


@pytest.fixture(params=common.STAGES)
def block(request, row):
    """(name of the shape, the block, the callable that runs it, its input)."""
    input_channels, channels, size, stride = common.STAGES[request.param]
    batch = BATCH if row.device.type == "cpu" else 256
    module, run = common.residual(row, input_channels, channels, stride)
    return f"block {batch}x{request.param}", module, run, common.activations(row, batch, input_channels, size, size)


def bench_training_forward(measure, row, block):
    name, module, run, x = block
    module.train()
    x.requires_grad_()

    def step():
        with row.autocast():
            run(x)

    measure(step, row, f"{name} training forward", examples=len(x))


def bench_training_forward_backward(measure, row, block):
    name, module, run, x = block
    module.train()
    step = common.forward_backward(row, run, x, module.parameters())
    saved = common.block_saved_bytes(row, module, run, x)
    measure(step, row, f"{name} training forward + backward", examples=len(x), saved_bytes_without_input=saved)


def bench_inference(measure, row, block):
    name, module, run, x = block
    module.eval()
    measure(common.inference(row, run, x), row, f"{name} inference", examples=len(x))
