"""ResNet-18 on Fashion-MNIST's images, enlarged to 96x96 as the textbook does."""

from benchmarks import common

RESIZE = 32 if common.QUICK else 96
BATCH = 8 if common.QUICK else 32
COUNT = 4  # batches, drawn before the clock runs


def bench_training_step(measure, row, data):
    batch = BATCH if row.device.type == "cpu" else 256
    module, run = common.net(row)
    batches = common.images(row, data, batch, COUNT, RESIZE)
    saved = common.module_saved_bytes(row, module, run, batches[0][0])
    step = common.training_step(row, module, run, batches)
    group = f"resnet18 training step {batch}x{RESIZE}x{RESIZE}"
    measure(step, row, group, examples=batch, saved_bytes=saved, data=data.source)


def bench_inference(measure, row, data):
    batch = BATCH if row.device.type == "cpu" else 256
    module, run = common.net(row)
    module.eval()
    x, _ = common.images(row, data, batch, 1, RESIZE)[0]
    group = f"resnet18 inference {batch}x{RESIZE}x{RESIZE}"
    measure(common.inference(row, run, x), row, group, examples=batch, data=data.source)
