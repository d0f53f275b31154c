"""ResNet-18 on Fashion-MNIST's images, enlarged to 96x96 as the textbook does."""

from benchmarks import common
from benchmarks.common import Implementation, Workload

RESIZE = 32 if common.QUICK else 96
BATCH = 8 if common.QUICK else 32
COUNT = 4  # batches, drawn before the clock runs


def batch_size(implementation: Implementation) -> int:
    return BATCH if implementation.device.type == "cpu" else 256


def bench_training_step(measure, data):
    def build(implementation: Implementation) -> Workload:
        batch = batch_size(implementation)
        module, run = common.net(implementation)
        batches = common.images(implementation, data, batch, COUNT, RESIZE)
        saved = common.module_saved_bytes(implementation, module, run, batches[0][0])
        return Workload(
            common.training_step(implementation, module, run, batches),
            f"resnet18 training step {batch}x{RESIZE}x{RESIZE}",
            batch,
            title="ResNet-18 training",
            saved={"saved_bytes": saved},
            source=data.source,
        )

    measure(build)


def bench_inference(measure, data):
    def build(implementation: Implementation) -> Workload:
        batch = batch_size(implementation)
        module, run = common.net(implementation)
        module.eval()
        x, _ = common.images(implementation, data, batch, 1, RESIZE)[0]
        return Workload(
            common.inference(implementation, run, x),
            f"resnet18 inference {batch}x{RESIZE}x{RESIZE}",
            batch,
            title="ResNet-18 inference",
            source=data.source,
        )

    measure(build)
