"""What bounds the launches of a residual block in training, without a GPU: `python -m benchmarks.roofline`.

    memory     each byte of a tensor moved once, over the memory's bandwidth
    L2         each byte that the warps ask for, over what the processors get of the L2 cache
    issue      warp instructions (of PTX), over four a clock and processor
    tensor     multiply-adds, over the tensor cores' rate
    shared     wavefronts of loads and stores, over one a clock and processor

The optional module `ptxsim` executes the compiled code and counts; the launches that move activations, and what they
have to move, are `benchmarks.passes`'s; the rates are `kernels.tuning`'s. The largest of the five is a lower bound of a
launch's time on a device that it fills: modelled, not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

import resnet
from benchmarks.common import purpose
from benchmarks.passes import BLOCKS, GRAD_WEIGHT, Block, Chain, launches, number
from resnet.kernels import tuning
from resnet.kernels.host.command import Parser

DEVICES = {80: tuning.SM_80, 90: tuning.SM_90}
# Of per-channel or weight size.
MERGES = (
    "finalize_kernel",
    "backward_finalize_kernel",
    "merge_images_kernel",
    "squeeze_backward_reduce_kernel",
    "merge_splits_kernel",
)
SECTOR = 32  # bytes
PRODUCTS = 16 * 8 * 16  # multiply-adds of a tensor-core instruction as the emulator counts them, in float16 or bfloat16


@dataclass(frozen=True)
class Counted:
    """What one launch did: bytes, and instructions of warps.

    Weights, and the partial results of their gradients, are left out of what is moved: neither grows with the batch.
    """

    kernel: str
    read: int  # bytes, each once
    written: int  # bytes, each once
    requested: int  # bytes
    instructions: int
    products: int  # on tensor cores, of 16x8x16
    wavefronts: int  # of shared memory

    @staticmethod
    def of(report: Any, weights: int) -> Counted:
        read = SECTOR * report.unique_read_sectors - weights
        written = 0 if report.name == GRAD_WEIGHT else SECTOR * report.unique_write_sectors
        requested = SECTOR * (report.gld_sectors + report.gst_sectors)
        wavefronts = report.sld_wavefronts + report.sst_wavefronts
        return Counted(report.name, read, written, requested, sum(report.instr.values()), report.mma, wavefronts)

    @property
    def unique(self) -> int:
        return self.read + self.written

    def clocks(self, device: tuning.Device) -> dict[str, float]:
        """Clocks that the whole device takes, by what could bound the launch."""
        return {
            "memory": self.unique * device.clock / device.bandwidth,
            "L2": self.requested / (device.processors * tuning.L2),
            "issue": self.instructions / (device.processors * 4),
            "tensor": self.products * PRODUCTS / (device.processors * device.products),
            "shared": self.wavefronts / device.processors,
        }


def step(block: Block, shape: Sequence[int], channels: int, dtype: torch.dtype) -> Chain:
    """Forward and backward of a block on (N, C, H, W) by the Triton kernels; gives its convolutions."""
    torch.manual_seed(0)
    module = block.fused(*block.arguments(channels)).to(dtype)
    with resnet.backend("triton"), resnet.convolution("triton"):
        out = module(drawn(shape, dtype).requires_grad_())
        out.backward(drawn(out.shape, dtype))
    return Chain.of(module, shape)


def drawn(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def counted(reports: Sequence[Any], chain: Chain, dtype: torch.dtype) -> list[Counted]:
    """What the launches that `passes.launches` names did, from the emulator's reports of a `step`."""
    moving = [report for report in reports if report.name not in MERGES]
    return [
        Counted.of(report, dtype.itemsize * step.weights) for report, step in zip(moving, launches(chain), strict=True)
    ]


def emulated(
    arch: int, block: Block, shape: Sequence[int], channels: int, dtype: torch.dtype
) -> tuple[Chain, list[Counted]]:
    """A `step` as compiled for sm_<arch>, counted."""
    import ptxsim

    # Where some programs of a batch multiply and others do not, the emulator has no product of sm_90 for them together.
    with ptxsim.capture(arch=arch, batch=1 if arch == 90 else None) as captured:
        chain = step(block, shape, channels, dtype)
    return chain, counted(captured.reports, chain, dtype)


def table(chain: Chain, by_arch: dict[int, list[Counted]], itemsize: int) -> Iterator[str]:
    """Markdown, a line a launch: the larger of the architectures' bytes, and what bounds it, over its memory's time."""
    steps, activation = launches(chain), itemsize * chain.maps["out"]
    devices = [f"sm_{arch}" for arch in by_arch]
    yield f"| launch | unique | requested | instructions per product, {' / '.join(devices)} | {' | '.join(devices)} |"
    yield "| --- " * (4 + len(devices)) + "|"
    for launch, *counts in zip(steps, *by_arch.values(), strict=True):
        unique, requested = (max(getattr(c, f) for c in counts) / activation for f in ("unique", "requested"))
        per = " / ".join(f"{c.instructions / c.products:.1f}" if c.products else "-" for c in counts)
        bounds = " | ".join(bound(c.clocks(DEVICES[arch])) for arch, c in zip(by_arch, counts))
        passes = number(chain.passes(launch))
        yield f"| {launch.name} | {unique:.2f} of {passes} | {requested:.1f} | {per} | {bounds} |"
    sums = []
    for arch, counts in by_arch.items():
        clocks = [c.clocks(DEVICES[arch]) for c in counts]
        sums.append(f"{sum(max(c.values()) for c in clocks) / sum(c['memory'] for c in clocks):.2f}")
    unique = max(sum(c.unique for c in counts) for counts in by_arch.values()) / activation
    yield f"| **sum** | {unique:.2f} of {number(chain.passes(*steps))} | | | {' | '.join(sums)} |"


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
    parser = Parser(prog="python -m benchmarks.roofline", description=purpose(__doc__))
    parser.add_argument("--block", choices=BLOCKS, default="textbook")
    parser.add_argument("--channels", type=positive, default=64, help="of the block's narrowest map")
    parser.add_argument("--size", type=positive, default=24, help="pixels of the input's height and width")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("ptxsim") is None:
        parser.error("needs the optional module ptxsim, which executes compiled kernels on the CPU")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, kernels would not be compiled: unset it")
    block, dtype = BLOCKS[args.block], getattr(torch, args.dtype)
    shape = block.input_shape(args.channels, args.batch, args.size)
    by_arch = {}
    for arch in DEVICES:
        chain, by_arch[arch] = emulated(arch, block, shape, args.channels, dtype)
    print(*table(chain, by_arch, dtype.itemsize), sep="\n")


if __name__ == "__main__":
    main()
