"""Blocks against float64, with every tile that may be chosen: the error beside eager's own in the same type.

A type and a shape are a process of their own, so that kernels are compiled side by side.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet
from benchmarks.gpu_check.errors import noted
from benchmarks.gpu_check.scale import Scale
from resnet import BasicBlock, Residual, ResNet, Stem, fuse
from resnet.kernels import tuning
from resnet.kernels.host import plan
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning.devices import device_facts

_CANCELLED = ("conv1.bias", "conv2.bias", "0.bias")  # whose gradients are rounding alone where BatchNorm follows
_DTYPES = ("bfloat16", "float16", "float32", "tf32")
_TRAINING, _EVALUATION, _CONSTANT = "training", "evaluation", "norms of constants"
_DEEP_STEM, _CHAIN, _PRE_ACTIVATION = "deep stem", "chain", "pre-activation"
_VARIANTS = {
    "D": {"avg_down": True},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "gated": {"squeeze_excite": True},
}


@dataclass(frozen=True)
class Task:
    shape: tuple[int, int, int, int]  # input channels, channels, stride, height and width
    dtype: str
    mode: str
    # A block or stem of `resnet`, or one of this file. A published block has its width in place of the channels, and
    # after a hyphen one of _VARIANTS, or _CHAIN: three blocks that follow each other, of which the last has the stride.
    kind: str = "Residual"

    @property
    def name(self) -> str:
        C, K, stride, size = self.shape
        kind = "" if self.kind == "Residual" else f"{self.kind} "
        return f"{kind}{C}->{K}, stride {stride}, {size}x{size}, {self.dtype}, {self.mode}"

    def block(self) -> nn.Module:
        """The eager block or stem."""
        C, K, stride, _ = self.shape
        if self.kind == "Residual":
            return Residual(C, K, stride != 1, stride)
        if self.kind == "Stem":
            return Stem(C, K)
        if self.kind == _DEEP_STEM:
            return deep_stem(C, K)
        if self.kind == _PRE_ACTIVATION:
            return PreActivated(C, K, stride)
        name, _, variant = self.kind.partition("-")
        block = getattr(resnet, name)
        if variant == _CHAIN:
            wide = block.expansion * K
            return nn.Sequential(block(C, K), block(wide, K), block(wide, K, stride))
        return block(C, K, stride, **_VARIANTS.get(variant, {}))

    @property
    def is_stem(self) -> bool:
        """Whether it reads images, which want no gradient."""
        return self.kind in ("Stem", _DEEP_STEM)

    @property
    def type(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


class PreActivated(nn.Module):
    """A block with pre-activation, which `fuse` reads."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        projects = (in_channels, stride) != (channels, 1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


def deep_stem(in_channels: int, channels: int) -> nn.Module:
    """The stem of a ResNet-D, in a network that is nothing else."""
    net = ResNet(BasicBlock, depths=(1,), widths=(channels,), num_classes=1, in_channels=in_channels, stem="deep")
    for name in ("layer1", "avgpool", "flatten", "fc"):
        setattr(net, name, nn.Identity())
    return net


def tasks(scale: Scale) -> list[Task]:
    """All shapes in the first type, in the others and with norms of constants a part of them; the other modules."""
    modes = (_TRAINING, _EVALUATION)
    return [
        *(
            Task(shape, dtype, mode)
            for dtype in _DTYPES
            for shape in (scale.blocks if dtype == _DTYPES[0] else scale.blocks[:2])
            for mode in modes
        ),
        *(Task(shape, _DTYPES[0], _CONSTANT) for shape in scale.blocks[:2]),
        *(
            Task(tuple(shape), _DTYPES[0], mode, kind)
            for kind, *shape in scale.others
            for mode in (*modes, *[_CONSTANT] * ("-" in kind))
        ),
    ]


def checks(scale: Scale, seconds_left: Callable[[], float]) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """(name, what waits for its result). All of them run from the first one on."""
    planned = tasks(scale)
    workers = max(1, min(len(planned), (os.cpu_count() or 1) - 1))
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(check, (task, scale)) for task in planned]
        for task, result in zip(planned, waiting, strict=True):
            yield task.name, lambda result=result: _waited(result, max(1.0, seconds_left()))


def _waited(result: AsyncResult, seconds: float) -> dict[str, object]:
    result.wait(seconds)
    if not result.ready():
        raise TimeoutError(f"no result in another {seconds:.0f} s: it takes long, or its process has ended")
    return result.get()


def check(task: Task, scale: Scale) -> dict[str, object]:
    """The worst error of any tile over eager's, and where it was; or a note of what was raised.

    Not the error itself: not every one of Triton's comes out of another process.
    """
    try:
        return _check(task, scale)
    except Exception as error:
        return noted(error)


def _check(task: Task, scale: Scale) -> dict[str, object]:
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if task.dtype == "tf32" else "ieee"
    C, K, stride, size = task.shape
    eager = task.block()
    fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    if not fuse(fused).fused:
        raise RuntimeError(f"nothing of {task.name} was fused")
    x = torch.randn(scale.block_batch, C, size, size).relu().to(task.type)
    K *= getattr(eager[-1] if task.kind.endswith(_CHAIN) else eager, "expansion", 1)
    dout = torch.randn(scale.block_batch, K, -(-size // stride), -(-size // stride)).to(task.type)
    expected, own = (_results(block, x, dout, task, scale) for block in (exact, eager))
    allowed = {name: 2.5 * _error(own[name], value) + 4 * _eps(task.type) for name, value in expected.items()}
    worst, index, most = (0.0, "", ""), 0, 1
    state = copy.deepcopy(fused.state_dict())
    while index < most:
        fused.load_state_dict(state)
        way = resnet.convolution("triton")
        with resnet.backend("triton" if scale.on_gpu else "torch"), way, candidate(index) as used:
            got = _results(fused, x, dout, task, scale)
        most = max((count for _, count in used.values()), default=1)
        index += 1
        for name, value in expected.items():
            share = _error(got[name], value) / allowed[name]
            if not share <= worst[0]:  # NaN is the worst
                tiles = "; ".join(f"{key.operation} {tile}" for key, (tile, _) in used.items())
                worst = (math.inf if math.isnan(share) else share, name, tiles)
    return {"passed": worst[0] <= 1, "tiles": most, "share_of_allowed": worst[0], "of": worst[1], "with": worst[2]}


def _results(block: nn.Module, x: Tensor, dout: Tensor, task: Task, scale: Scale) -> dict[str, Tensor]:
    """Output, gradients and running statistics; in evaluation the output alone."""
    block = block.to(scale.device, memory_format=torch.channels_last).train(task.mode == _TRAINING)
    wants_grads = task.mode != _EVALUATION
    for parameter in block.parameters():
        parameter.requires_grad_(task.mode != _CONSTANT or parameter.dim() > 1)
    exact = next(block.parameters()).dtype == torch.float64
    cast = not exact and task.type in (torch.float16, torch.bfloat16)
    dtype = torch.float64 if exact else task.type
    x = x.to(scale.device, dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(wants_grads and not task.is_stem)
    with (
        torch.autocast(scale.device.type, task.type) if cast else nullcontext(),
        nullcontext() if wants_grads else torch.no_grad(),
    ):
        out = block(x)
    if not wants_grads:
        return {"out": out}
    leaves = {name: leaf for name, leaf in (("dx", x), *block.named_parameters()) if leaf.requires_grad}
    grads = torch.autograd.grad(out, tuple(leaves.values()), dout.to(scale.device, out.dtype))
    found = {"out": out.detach()}
    found |= {name: grad for name, grad in zip(leaves, grads, strict=True) if not name.endswith(_CANCELLED)}
    return found | {name: value.clone() for name, value in block.named_buffers() if value.is_floating_point()}


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@contextmanager
def candidate(index: int) -> Iterator[dict[tuning.Gemm, tuple[str, int]]]:
    """Inside, each product takes its candidate of this index, counted round. Gives (tile, candidates) by product."""
    used: dict[tuning.Gemm, tuple[str, int]] = {}

    def config(operation: str, shape: ConvShape, x: Tensor, run: Callable, **switches: object) -> tuning.Config:
        key = tuning.gemm(operation, shape, x.dtype, **switches)
        found = tuning.candidates(key, device_facts(x.device))
        chosen = found[index % len(found)]
        used[key] = str(chosen), len(found)
        return chosen

    original, tuning.gemm_config = tuning.gemm_config, config
    plan.forget()  # a plan holds the tiles that it was recorded with
    try:
        yield used
    finally:
        tuning.gemm_config = original
        plan.forget()
