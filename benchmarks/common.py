"""What the suites and `benchmarks.compare` share: rows, workloads, clocks, and bytes saved for backward."""

from __future__ import annotations

import functools
import itertools
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet import FusedResidual, Residual, backend, resnet18
from resnet.data import Batches, FashionMNIST

QUICK = os.environ.get("BENCH_QUICK", "") not in ("", "0")  # smaller and fewer: to see that all of it runs
SEED = 0

# The residual blocks of ResNet-18 at 96x96: of each stage the identity block, and one that halves height and width.
STAGES = {
    "64@24x24": (64, 64, 24, 1),
    "128@12x12": (128, 128, 12, 1),
    "256@6x6": (256, 256, 6, 1),
    "512@3x3": (512, 512, 3, 1),
    "64->128@24x24": (64, 128, 24, 2),
}


# ---- rows: what is compared -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One implementation of a workload: "eager", "compile" (torch.compile of eager) or "fused"."""

    implementation: str
    device: torch.device
    dtype: torch.dtype = torch.float32  # other than float32: under autocast
    memory_format: torch.memory_format = torch.channels_last

    @property
    def backend(self) -> str:
        """What runs the operations that this library fuses: "triton" or "torch"."""
        return "triton" if self.implementation == "fused" and self.device.type == "cuda" else "torch"

    @property
    def name(self) -> str:
        parts = [self.implementation]
        if self.implementation == "fused":
            parts.append(self.backend)
        if self.memory_format == torch.contiguous_format:
            parts.append("nchw")
        if self.device.type == "cuda":
            parts.append(str(self.dtype).removeprefix("torch."))
        return "-".join(parts)

    def scope(self) -> AbstractContextManager:
        """The context that the row is built and run in: the backend, for as long as it is open."""
        return backend(self.backend) if self.implementation == "fused" else nullcontext()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def rows(device: torch.device) -> list[Row]:
    """The rows that are measured on `device`.

    On a CPU all are float32 and channels_last, and "fused" is the torch backend's. On a GPU each of float32 and
    bfloat16 has eager in NCHW too, and "fused" is the Triton kernels'.
    """
    if device.type == "cpu":
        return [Row(implementation, device) for implementation in ("eager", "compile", "fused")]
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        result.append(Row("eager", device, dtype, torch.contiguous_format))
        result += [Row(implementation, device, dtype) for implementation in ("eager", "compile", "fused")]
    return result


def unavailable(row: Row) -> str | None:
    """Why `row` cannot be measured here, or None where it can."""
    if row.implementation == "compile":
        return compile_unavailable(row.device.type)
    if row.backend == "triton" and os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
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


def compiled(function: Callable) -> Callable:
    """torch.compile of `function` for one shape, as one graph.

    What was compiled before is forgotten: each code object may have but a few graphs, past which torch.compile
    silently runs eager code.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


# ---- workloads ------------------------------------------------------------------------------------------------


def residual(row: Row, input_channels: int, channels: int, stride: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(block, the callable that runs it): the row's residual block; every row has the same weights.

    The shortcut is a 1x1 convolution where the shape changes.
    """
    arguments = (input_channels, channels, stride != 1 or input_channels != channels, stride)
    return _module(row, lambda block: block(*arguments))


def net(row: Row) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(ResNet-18 for Fashion-MNIST, the callable that runs it): every row has the same weights."""
    return _module(row, lambda block: resnet18(block=block))


def _module(row: Row, build: Callable[[type[nn.Module]], nn.Module]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = build(Residual)
    if row.implementation == "fused":
        eager, module = module, build(FusedResidual)
        module.load_state_dict(eager.state_dict())
    module = module.to(row.device, memory_format=row.memory_format)
    return module, compiled(module) if row.implementation == "compile" else module


def activations(row: Row, *shape: int, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a ReLU might have put out: a half of it zeros. (N, C, H, W) in the row's memory format."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu_()
    return x.to(row.device, dtype).contiguous(memory_format=row.memory_format)


def images(row: Row, data: FashionMNIST, batch_size: int, count: int, resize: int) -> list[tuple[Tensor, Tensor]]:
    """The first `count` whole batches of the shuffled training images, fewer where there are not so many.

    The same for every row: images (batch_size, 1, resize, resize) in the row's memory format, labels (batch_size,).
    """
    batches = Batches(
        data.train_images,
        data.train_labels,
        batch_size,
        device="cpu",  # a few batches are wanted on the row's device, not the whole set
        resize=resize,
        shuffle=True,
        seed=SEED,
        drop_last=True,
        memory_format=row.memory_format,
    )
    return [(x.to(row.device), y.to(row.device)) for _, (x, y) in zip(range(count), batches)]


def forward_backward(
    row: Row, run: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]
) -> Callable[[], None]:
    """A function without arguments: forward and backward of `run(x)` in training, gradients for x and parameters.

    The incoming gradient has out's shape, type and layout, and the same values for every row. No optimizer.
    """
    x = x.detach().requires_grad_()
    leaves = [x, *parameters]
    with row.autocast():
        out = run(x).detach()
    dout = torch.empty_like(out).copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED)))

    def step() -> None:
        with row.autocast():
            out = run(x)
        torch.autograd.backward(out, dout, inputs=leaves)
        for leaf in leaves:
            leaf.grad = None

    return step


def training_step(
    row: Row, module: nn.Module, run: Callable[[Tensor], Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    """A function without arguments: one training step (forward, loss, backward, SGD) on the next of `batches`."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    endless = itertools.cycle(batches)

    def step() -> None:
        x, labels = next(endless)
        with row.autocast():
            loss = F.cross_entropy(run(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(row: Row, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A function without arguments: `run(x)` without a graph."""

    def step() -> None:
        with torch.inference_mode(), row.autocast():
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


def module_saved_bytes(row: Row, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """`saved_bytes` of `run(x)` in training, without the module's parameters and buffers. x counts where it is kept."""
    module.train()
    with row.autocast():
        return saved_bytes(lambda: run(x), exclude=[*module.parameters(), *module.buffers()])


def block_saved_bytes(row: Row, block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The block's own share of `module_saved_bytes`: without its input, which is the output of the block before it."""
    block.train()
    x = x.detach().requires_grad_()  # as inside a net, where the input's gradient is wanted
    with row.autocast():
        return saved_bytes(lambda: run(x), exclude=[*block.parameters(), *block.buffers(), x])


# ---- clocks ---------------------------------------------------------------------------------------------------


class CudaClock:
    """Seconds on the GPU's clock: a CUDA event behind all work queued so far. Each reading waits for that work."""

    __name__ = "CudaClock"  # pytest-benchmark prints a timer's name

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:  # summed up here, since the float32 of one long interval would not resolve a kernel
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def clock(device: torch.device) -> Callable[[], float]:
    """A clock for work on `device`, in seconds."""
    return CudaClock() if device.type == "cuda" else time.perf_counter


def timed(function: Callable[[], None], calls: int, now: Callable[[], float]) -> float:
    """Seconds per call, over `calls` calls."""
    start = now()
    for _ in range(calls):
        function()
    return (now() - start) / calls


def calls_lasting(seconds: float, function: Callable[[], None], now: Callable[[], float]) -> int:
    """How many calls last about `seconds`, from 1 to 200: on a busy machine the next call may take 100 times as long.

    Runs `function` three times, so that it is warm afterwards.
    """
    timed(function, 1, now)
    return min(200, max(1, math.ceil(seconds / max(timed(function, 2, now), 1e-7))))


# ---- where it was measured ------------------------------------------------------------------------------------


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
