"""What bounds the launches of an identity block in training, without a GPU: `python -m benchmarks.roofline`.

    memory     each byte of a tensor moved once, over the memory's bandwidth
    L2         each byte that the warps ask for, over what the processors get of the L2 cache
    issue      warp instructions (of PTX), over four a clock and processor
    tensor     multiply-adds, over the tensor cores' rate
    shared     wavefronts of loads and stores, over one a clock and processor

The optional module `ptxsim` executes the compiled code and counts; the rates are `kernels.tuning`'s. The largest of the
five is a lower bound of a launch's time on a device that it fills: modelled, not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

import resnet
from resnet import FusedResidual
from resnet.kernels import tuning
from resnet.kernels.host.command import Parser

DEVICES = {80: tuning.SM_80, 90: tuning.SM_90}


@dataclass(frozen=True)
class BlockLaunch:
    """One of an identity block's that moves activations, and how many it has to move: what a perfect cache leaves."""

    name: str
    kernel: str
    passes: int


LAUNCHES = (
    BlockLaunch("conv1 + statistics", "conv_forward_kernel", 2),
    BlockLaunch("bn1 + ReLU + conv2 + statistics", "conv_forward_kernel", 2),
    BlockLaunch("bn2 + add + ReLU", "apply_kernel", 3),
    BlockLaunch("ReLU', bn2 reduce", "backward_reduce_kernel", 3),
    BlockLaunch("bn2 apply'", "backward_apply_kernel", 4),
    BlockLaunch("conv2 grad-input + ReLU' + bn1 reduce", "grad_input_kernel", 3),
    BlockLaunch("conv2 grad-weight, bn1 + ReLU recomputed", "conv_grad_weight_kernel", 2),
    BlockLaunch("bn1 apply'", "backward_apply_kernel", 3),
    BlockLaunch("conv1 grad-input + shortcut's gradient", "grad_input_kernel", 4),
    BlockLaunch("conv1 grad-weight", "conv_grad_weight_kernel", 2),
)
MERGES = ("finalize_kernel", "backward_finalize_kernel", "merge_splits_kernel")  # of per-channel or weight size
SECTOR = 32  # bytes
PRODUCTS = 16 * 8 * 16  # multiply-adds of a tensor-core instruction as the emulator counts them, in float16 or bfloat16


@dataclass(frozen=True)
class Counted:
    """What one launch did: bytes, and instructions of warps."""

    kernel: str
    unique: int  # bytes, without weights and the partial results of their gradients: neither grows with the batch
    requested: int  # bytes
    instructions: int
    products: int  # on tensor cores, of 16x8x16
    wavefronts: int  # of shared memory

    @staticmethod
    def of(report: Any, weight: int) -> Counted:
        unique = report.dram_bytes
        if report.name == "conv_grad_weight_kernel":  # it writes nothing but partial results
            unique = SECTOR * report.unique_read_sectors
        elif report.name in ("conv_forward_kernel", "grad_input_kernel"):
            unique -= weight
        requested = SECTOR * (report.gld_sectors + report.gst_sectors)
        wavefronts = report.sld_wavefronts + report.sst_wavefronts
        return Counted(report.name, unique, requested, sum(report.instr.values()), report.mma, wavefronts)

    def clocks(self, device: tuning.Device) -> dict[str, float]:
        """Clocks that the whole device takes, by what could bound the launch."""
        return {
            "memory": self.unique * device.clock / device.bandwidth,
            "L2": self.requested / (device.processors * tuning.L2),
            "issue": self.instructions / (device.processors * 4),
            "tensor": self.products * PRODUCTS / (device.processors * device.products),
            "shared": self.wavefronts / device.processors,
        }


def step(shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Forward and backward of an identity block on (N, C, H, W) by the Triton kernels; gives its weights' bytes."""
    torch.manual_seed(0)
    block = FusedResidual(shape[1], shape[1]).to(dtype)
    x, dout = (torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    with resnet.backend("triton"), resnet.convolution("triton"):
        block(x.requires_grad_()).backward(dout)
    return block.conv1.weight.nbytes


def counted(reports: Sequence[Any], weight: int) -> list[Counted]:
    """What the launches of LAUNCHES did, from the emulator's reports of a `step`."""
    return [Counted.of(report, weight) for report in reports if report.name not in MERGES]


def emulated(arch: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Counted]:
    """A `step` as compiled for sm_<arch>, counted."""
    import ptxsim

    with ptxsim.capture(arch=arch) as captured:
        weight = step(shape, dtype)
    return counted(captured.reports, weight)


def table(by_arch: dict[int, list[Counted]], activation: int) -> Iterator[str]:
    """Markdown, a line a launch: the larger of the architectures' bytes, and what bounds it, over its memory's time."""
    devices = [f"sm_{arch}" for arch in by_arch]
    yield f"| launch | unique | requested | instructions per product, {' / '.join(devices)} | {' | '.join(devices)} |"
    yield "| --- " * (4 + len(devices)) + "|"
    for launch, *counts in zip(LAUNCHES, *by_arch.values(), strict=True):
        unique, requested = (max(getattr(c, f) for c in counts) / activation for f in ("unique", "requested"))
        per = " / ".join(f"{c.instructions / c.products:.1f}" if c.products else "-" for c in counts)
        bounds = [bound(c.clocks(DEVICES[arch])) for arch, c in zip(by_arch, counts)]
        yield f"| {launch.name} | {unique:.2f} of {launch.passes} | {requested:.1f} | {per} | {' | '.join(bounds)} |"
    sums = []
    for arch, launches in by_arch.items():
        clocks = [c.clocks(DEVICES[arch]) for c in launches]
        sums.append(f"{sum(max(c.values()) for c in clocks) / sum(c['memory'] for c in clocks):.2f}")
    unique = max(sum(c.unique for c in launches) for launches in by_arch.values()) / activation
    yield f"| **sum** | {unique:.2f} of {sum(launch.passes for launch in LAUNCHES)} | | | {' | '.join(sums)} |"


def bound(clocks: dict[str, float]) -> str:
    """Such as "issue 1.8": the largest, over the memory's."""
    name = max(clocks, key=clocks.get)
    return f"{name} {clocks[name] / clocks['memory']:.2f}"


def positive(text: str) -> int:
    """An argument: a whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=positive, default=64)
    parser.add_argument("--size", type=positive, default=24, help="pixels of the activations' height and width")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("ptxsim") is None:
        parser.error("needs the optional module ptxsim, which executes compiled kernels on the CPU")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, kernels would not be compiled: unset it")
    shape = args.batch, args.channels, args.size, args.size
    by_arch = {arch: emulated(arch, shape, getattr(torch, args.dtype)) for arch in DEVICES}
    print(*table(by_arch, 2 * math.prod(shape)), sep="\n")


if __name__ == "__main__":
    main()
