"""The residual block at the shapes that ResNet-18's stages have for 96x96 images."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks import common, turns
from benchmarks.common import Implementation, Workload

BATCH = 4 if common.QUICK else 32

of_every_shape = pytest.mark.parametrize("shape", common.STAGES)


@dataclass(frozen=True)
class Block:
    """A block of one shape, the callable that runs it, and its input."""

    shape: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    x: Tensor

    @property
    def group(self) -> str:
        return f"block {len(self.x)}x{self.shape}"

    def title(self, mode: str) -> str | None:
        """Identity blocks have one: they are most of a net's."""
        input_channels, channels, _, stride = common.STAGES[self.shape]
        return f"block {self.shape} {mode}" if stride == 1 and input_channels == channels else None


def block(implementation: Implementation, shape: str) -> Block:
    input_channels, channels, size, stride = common.STAGES[shape]
    batch = BATCH if implementation.device.type == "cpu" else 256
    module, run = common.residual(implementation, input_channels, channels, stride)
    return Block(shape, module, run, common.activations(implementation, batch, input_channels, size, size))


@of_every_shape
def bench_training_forward(measure, shape):
    def build(implementation: Implementation) -> Workload:
        b = block(implementation, shape)
        b.module.train()
        b.x.requires_grad_()

        def step() -> None:
            with implementation.autocast():
                b.run(b.x)

        return Workload(step, f"{b.group} training forward", len(b.x))

    measure(build)


@of_every_shape
def bench_training_forward_backward(measure, shape):
    def build(implementation: Implementation) -> Workload:
        b = block(implementation, shape)
        b.module.train()
        step = common.forward_backward(implementation, b.run, b.x, b.module.parameters())
        saved = common.block_saved_bytes(implementation, b.module, b.run, b.x)
        return Workload(
            step,
            f"{b.group} training forward + backward",
            len(b.x),
            title=b.title("training"),
            saved={"saved_bytes_without_input": saved},
        )

    measure(build)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the host's time is part of a step's")
@pytest.mark.benchmark(timer=turns.HostClock(torch.cuda.synchronize), disable_gc=True)
def bench_training_host(measure):
    """What the host needs to queue a step, however long the GPU takes for it."""

    def build(implementation: Implementation) -> Workload:
        b = block(implementation, "64@24x24")
        step = common.forward_backward(implementation, b.run, b.x, b.module.train().parameters())
        return Workload(step, f"{b.group} training forward + backward, host", len(b.x))

    measure(build, calls=4)  # so few that the queue never fills, where the host would wait for the GPU


@of_every_shape
def bench_inference(measure, shape):
    def build(implementation: Implementation) -> Workload:
        b = block(implementation, shape)
        b.module.eval()
        run = common.inference(implementation, b.run, b.x)
        return Workload(run, f"{b.group} inference", len(b.x), title=b.title("inference"))

    measure(build)
