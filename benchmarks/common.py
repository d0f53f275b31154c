"""What the suites and `benchmarks.compare` share: implementations, workloads, bytes saved for backward."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet.published
from resnet import FusedResidual, Residual, backend, fuse, resnet18
from resnet.commands import find_device
from resnet.data import Batches, ImageSet

QUICK = os.environ.get("BENCH_QUICK", "") not in ("", "0")  # smaller and fewer: to see that all of it runs
SEED = 0
T = TypeVar("T")

# The residual blocks of ResNet-18 at 96x96: of each stage the identity block, and one that halves height and width.
STAGES = {
    "64@24x24": (64, 64, 24, 1),
    "128@12x12": (128, 128, 12, 1),
    "256@6x6": (256, 256, 6, 1),
    "512@3x3": (512, 512, 3, 1),
    "64->128@24x24": (64, 128, 24, 2),
}


def purpose(doc: str | None) -> str:
    """A command's purpose for its --help, by its module's docstring: without the command, which the usage has."""
    return (doc or "").split("\n", 1)[0].split(": `")[0]


# ---- implementations: what is compared ------------------------------------------------------------------------


KINDS = {"eager": "eager", "compile": "torch.compile", "fused": "fused"}  # and what people call them


@dataclass(frozen=True)
class Implementation:
    """One way to compute a workload: eager, torch.compile of eager, or fused."""

    kind: str  # a key of KINDS
    device: torch.device
    dtype: torch.dtype = torch.float32  # other than float32: under autocast
    memory_format: torch.memory_format = torch.channels_last

    @property
    def backend(self) -> str:
        """What runs the operations that this library fuses: "triton" or "torch"."""
        return "triton" if self.kind == "fused" and self.device.type == "cuda" else "torch"

    @property
    def name(self) -> str:
        """Such as "fused-triton-bfloat16", for a pytest id."""
        parts = [self.kind]
        if self.kind == "fused":
            parts.append(self.backend)
        if self.memory_format == torch.contiguous_format:
            parts.append("nchw")
        if self.device.type == "cuda":
            parts.append(dtype_name(self.dtype))
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Such as "torch.compile" or "eager in NCHW", for a table whose rows have one type."""
        layout = " in NCHW" if self.memory_format == torch.contiguous_format else ""
        return KINDS[self.kind] + layout

    def scope(self) -> AbstractContextManager:
        """The context that it is built and run in: the backend, for as long as it is open."""
        return backend(self.backend) if self.kind == "fused" else nullcontext()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def implementations(device: torch.device) -> list[Implementation]:
    """The implementations that are measured on `device`.

    On a CPU all are float32 and channels_last, and "fused" is the torch backend's. On a GPU each of float32 and
    bfloat16 has eager in NCHW too, and "fused" is the Triton kernels'.
    """
    if device.type == "cpu":
        return [Implementation(kind, device) for kind in KINDS]
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        result.append(Implementation("eager", device, dtype, torch.contiguous_format))
        result += [Implementation(kind, device, dtype) for kind in KINDS]
    return result


def unavailable(implementation: Implementation) -> str | None:
    """Why `implementation` cannot be measured here, or None where it can."""
    if implementation.kind == "compile":
        return compile_unavailable(implementation.device.type)
    if implementation.backend == "triton" and os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        return "TRITON_INTERPRET is set: the interpreter is no measurement"
    return None


@functools.cache
def compile_unavailable(device_type: str) -> str | None:
    """Why torch.compile does not work here, or None where it does: it needs a C++ compiler for a CPU."""
    never_seen = random.random()  # a constant in the code, so that no cache can stand in for the compiler
    try:
        torch.compile(lambda x: torch.relu(x + never_seen), fullgraph=True)(torch.ones(8, device=device_type))
    except Exception as error:  # whatever the compiler, or the search for one, raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        hint = "; on a CPU it needs a C++ compiler such as g++" if device_type == "cpu" else ""
        return f"torch.compile does not work here ({reason[0]}){hint}"
    return None


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """torch.compile of `function` for one shape, as one graph; `mode` is torch.compile's.

    What was compiled before is forgotten: each code object may have but a few graphs, past which torch.compile
    silently runs eager code.
    """
    torch.compiler.reset()
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


# ---- workloads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What a suite times of one implementation, and what is to be noted with the times."""

    run: Callable[[], None]
    group: str  # whose members, one per implementation, are compared
    examples: int  # per call
    title: str | None = None  # names the group in the verdict; without one the group has no line there
    saved: dict[str, int] = field(default_factory=dict)  # bytes saved for backward, by what is counted
    source: str | None = None  # where the data are from


def residual(
    implementation: Implementation, input_channels: int, channels: int, stride: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(block, the callable that runs it): the implementation's residual block; all have the same weights.

    The shortcut is a 1x1 convolution where the shape changes.
    """
    arguments = (input_channels, channels, stride != 1 or input_channels != channels, stride)
    return _module(implementation, lambda block: block(*arguments))


def net(implementation: Implementation) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(ResNet-18 for Fashion-MNIST, the callable that runs it): all implementations have the same weights."""
    return _module(implementation, lambda block: resnet18(block=block))


def published(implementation: Implementation, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(the net of `resnet.published`, the callable that runs it): all implementations have the same weights."""
    module = seeded(getattr(resnet.published, name))
    if implementation.kind == "fused":
        fuse(module)
    return _placed(implementation, module)


def _module(
    implementation: Implementation, build: Callable[[type[nn.Module]], nn.Module]
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = seeded(lambda: build(Residual))
    if implementation.kind == "fused":
        eager, module = module, build(FusedResidual)
        module.load_state_dict(eager.state_dict())
    return _placed(implementation, module)


def seeded(build: Callable[[], T]) -> T:
    """What `build` gives, drawn on the CPU as in every run; the process's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


def _placed(implementation: Implementation, module: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = module.to(implementation.device, memory_format=implementation.memory_format)
    return module, compiled(module) if implementation.kind == "compile" else module


def activations(
    implementation: Implementation, *shape: int, seed: int = SEED, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What a ReLU might have put out: a half of it zeros. (N, C, H, W) in the implementation's memory format."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu_()
    return x.to(implementation.device, dtype).contiguous(memory_format=implementation.memory_format)


def labels(implementation: Implementation, batch_size: int, classes: int) -> Tensor:
    """A class for each image, (batch_size,); the same for every implementation."""
    return seeded(lambda: torch.randint(classes, (batch_size,))).to(implementation.device)


def images(
    implementation: Implementation, data: ImageSet, batch_size: int, count: int, resize: int
) -> list[tuple[Tensor, Tensor]]:
    """The first `count` whole batches of the shuffled training images, fewer where there are not so many.

    Images (batch_size, 1, resize, resize) in the implementation's memory format, labels (batch_size,); the same values
    for every implementation.
    """
    batches = Batches(
        data.train_images,
        data.train_labels,
        batch_size,
        device="cpu",  # a few batches are wanted on the implementation's device, not the whole set
        resize=resize,
        shuffle=True,
        seed=SEED,
        drop_last=True,
        memory_format=implementation.memory_format,
    )
    return [(x.to(implementation.device), y.to(implementation.device)) for _, (x, y) in zip(range(count), batches)]


def forward_backward(
    implementation: Implementation, run: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]
) -> Callable[[], None]:
    """A function without arguments: forward and backward of `run(x)` in training, gradients for x and parameters.

    The incoming gradient has out's shape, type and layout, and the same values for every implementation. No optimizer.
    """
    x = x.detach().requires_grad_()
    leaves = [x, *parameters]
    with implementation.autocast():
        out = run(x).detach()
    dout = torch.empty_like(out).copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED)))

    def step() -> None:
        with implementation.autocast():
            out = run(x)
        torch.autograd.backward(out, dout, inputs=leaves)
        for leaf in leaves:
            leaf.grad = None

    return step


def training_step(
    implementation: Implementation,
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> Callable[[], None]:
    """A function without arguments: one training step (forward, loss, backward, SGD) on the next of `batches`."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    endless = itertools.cycle(batches)

    def step() -> None:
        x, labels = next(endless)
        with implementation.autocast():
            loss = F.cross_entropy(run(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(implementation: Implementation, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A function without arguments: `run(x)` without a graph."""

    def step() -> None:
        with torch.inference_mode(), implementation.autocast():
            run(x)

    return step


# ---- bytes saved for backward ---------------------------------------------------------------------------------


def saved_bytes(function: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that autograd saves for backward while `function()` runs, and returns its output.

    Each storage counts once and in full, since that is the memory that a saved view keeps. Storages of the tensors in
    `exclude` (parameters, say, which exist anyway) do not count. What an autograd function keeps other than by
    `save_for_backward` is not seen.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    for tensor in exclude:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    size = sum(storage.nbytes() for storage in saved.values())
    del output
    return size


def module_saved_bytes(
    implementation: Implementation, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> int:
    """`saved_bytes` of `run(x)` in training, without the module's parameters and buffers. x counts where it is kept."""
    module.train()
    with implementation.autocast():
        return saved_bytes(lambda: run(x), exclude=[*module.parameters(), *module.buffers()])


def block_saved_bytes(
    implementation: Implementation, block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> int:
    """The block's own share of `module_saved_bytes`: without its input, which is the output of the block before it."""
    block.train()
    x = x.detach().requires_grad_()  # as inside a net, where the input's gradient is wanted
    with implementation.autocast():
        return saved_bytes(lambda: run(x), exclude=[*block.parameters(), *block.buffers(), x])


# ---- where it was measured ------------------------------------------------------------------------------------


def current_device(name: str) -> torch.device:
    """The device that --device names, from now on the current one: there a clock's events are recorded."""
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA A100-SXM4-80GB", or the CPU's model with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """The device and the versions that a measurement depends on."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
