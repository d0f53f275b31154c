"""The passes over an activation that training takes in a residual block, by its shapes: `python -m benchmarks.passes`.

A pass is one tensor of the size of the block's output, read or written once; a tensor of another size is a part of a
pass, or several. Eager PyTorch takes a step for each operator. The fused block takes a launch where a step's tensors
have to be read or written after all, and PyTorch's operators for a pool and for a convolution with groups. Weights,
their gradients and vectors per channel do not count. A strided 1x1 convolution meets every stride-th pixel alone, along
H and W, and only these are read.

The names are those of docs/how-it-works.md: y1, y2, ... are what the convolutions write and ys what the shortcut's
does; p is a pooled x; z is BatchNorm's output, a = ReLU(z), e = z times its gates, of which a map has one; g is the
gradient behind a ReLU; d stands before a gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.common import purpose, saved_bytes
from resnet import (
    BasicBlock,
    Bottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    FusedResidual,
    Residual,
)
from resnet.kernels.host.command import Parser, put, run
from resnet.kernels.host.shapes import ConvShape

if TYPE_CHECKING:  # it takes seconds to import
    from torch._inductor.scheduler import BaseSchedulerNode


@dataclass(frozen=True)
class Block:
    """A kind of block, for any number of channels: those of its narrowest map, on which the others depend."""

    fused: Callable[..., nn.Module]
    eager: Callable[..., nn.Module]
    widths: tuple[int, int]  # the constructor's first arguments, in channels
    stride: int = 1

    def arguments(self, channels: int) -> tuple[int, ...]:
        widths = tuple(width * channels for width in self.widths)
        return widths if self.stride == 1 else (*widths, self.stride)

    def input_shape(self, channels: int, batch: int, size: int) -> tuple[int, int, int, int]:
        return batch, self.widths[0] * channels, size, size


BLOCKS = {
    "textbook": Block(FusedResidual, Residual, (1, 1)),
    "basic": Block(FusedBasicBlock, BasicBlock, (1, 1)),
    "basic-strided": Block(FusedBasicBlock, BasicBlock, (1, 2), 2),
    "bottleneck": Block(FusedBottleneck, Bottleneck, (4, 1)),
    "bottleneck-widening": Block(FusedBottleneck, Bottleneck, (1, 1)),
    "bottleneck-strided": Block(FusedBottleneck, Bottleneck, (4, 2), 2),
    "bottleneck-pooled": Block(*(partial(kind, avg_down=True) for kind in (FusedBottleneck, Bottleneck)), (4, 2), 2),
    "bottleneck-grouped": Block(*(partial(kind, groups=4) for kind in (FusedBottleneck, Bottleneck)), (4, 1)),
    "basic-gated": Block(*(partial(kind, squeeze_excite=True) for kind in (FusedBasicBlock, BasicBlock)), (1, 1)),
    "bottleneck-gated": Block(*(partial(kind, squeeze_excite=True) for kind in (FusedBottleneck, Bottleneck)), (4, 1)),
}


# ---- a block's tensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """An operator of eager PyTorch, or a launch of the fused block, and the activations that it moves."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    kernel: str = ""  # of a launch
    weights: int = 0  # elements of the weights that a launch's convolutions read
    sums: tuple[str, ...] = ()  # the maps of which a launch leaves partial sums for a merge


@dataclass(frozen=True)
class Chain:
    """The convolutions of a block: those of its units, one after the other, and the shortcut's with a BatchNorm."""

    units: tuple[ConvShape, ...]
    shortcut: ConvShape | None  # None: the identity
    pooled: bool = False  # whether the shortcut's reads a pooled x
    grouped: frozenset[int] = frozenset()  # the units with groups, by number
    gated: bool = False  # whether squeeze-and-excitation follows the last norm

    @staticmethod
    def of(block: nn.Module, shape: Sequence[int]) -> Chain:
        """The chain of a fused block on an input of `shape` (N, C, H, W)."""
        N, _, H, W = shape
        parts, units, height, width = block._parts(), [], H, W
        for part in parts.units:
            units.append(_shape(part.conv, N, height, width))
            height, width = units[-1].P, units[-1].Q
        shortcut = parts.shortcut
        if shortcut is not None and shortcut.bn is None:
            raise ValueError("the passes of a shortcut without a BatchNorm are not counted")
        if parts.gate is not None and parts.gate.shortcut is not None:
            raise ValueError("the passes of a shortcut beside gates are not counted, but for the identity's")
        if parts.pool is not None:
            H, W = height, width
        return Chain(
            tuple(units),
            None if shortcut is None else _shape(shortcut.conv, N, H, W),
            parts.pool is not None,
            frozenset(i for i, part in enumerate(parts.units, 1) if part.conv.groups > 1),
            parts.gate is not None,
        )

    @property
    def met(self) -> str:
        """The pixels of x that the shortcut's convolution meets: all of them without a stride; or p."""
        if self.pooled:
            return "p"
        return "x" if self.shortcut.stride == 1 else f"x[::{self.shortcut.stride}]"

    @cached_property
    def maps(self) -> dict[str, int]:
        """Elements of the forward's tensors, by name."""
        first, last = self.units[0], _output(self.units[-1])
        maps = {"x": first.N * first.C * first.H * first.W, "out": last, "s": last, "g": last}
        maps |= {f"y{i}": _output(unit) for i, unit in enumerate(self.units, 1)}
        if self.shortcut is not None:
            maps["ys"] = _output(self.shortcut)
            maps[self.met] = self.shortcut.M * self.shortcut.C  # its window is 1x1
        return maps

    def elements(self, *names: str) -> int:
        """Of tensors: a gradient is as large as what it belongs to; z, a, e and g of a unit are as large as its y."""
        found = 0
        for name in names:
            name = name.removeprefix("d")
            found += self.maps[name if name in self.maps else "y" + name[1:]]
        return found

    def passes(self, *steps: Step) -> float:
        """In elements of the block's output."""
        return sum(self.elements(*step.reads, *step.writes) for step in steps) / self.maps["out"]


def _shape(conv: nn.Conv2d, N: int, H: int, W: int) -> ConvShape:
    window = *conv.kernel_size, conv.stride[0], conv.padding[0], conv.dilation[0]
    return ConvShape(N, H, W, conv.in_channels, conv.out_channels, *window)


def _output(conv: ConvShape) -> int:
    return conv.M * conv.K


def _weight(conv: ConvShape) -> int:
    return conv.K * conv.R * conv.S * conv.C


# ---- what eager PyTorch does -------------------------------------------------------------------------------------

POOL, POOL_BACKWARD = Step("average pool", ("x",), ("p",)), Step("average pool'", ("dp",), ("dx",))


def eager_forward(chain: Chain) -> Iterator[Step]:
    last = len(chain.units)
    for i in range(1, last + 1):
        yield from _eager_unit(f"conv{i}", f"bn{i}", f"a{i - 1}" if i > 1 else "x", str(i))
        if i < last:
            yield Step("ReLU", (f"z{i}",), (f"a{i}",))
    if chain.pooled:
        yield POOL
    if chain.shortcut is not None:
        yield from _eager_unit("shortcut's convolution", "its norm", chain.met, "s")
    z = f"z{last}"
    if chain.gated:
        z = f"e{last}"
        yield Step("squeeze", (f"z{last}",))
        yield Step("gates", (f"z{last}",), (z,))
    yield Step("add", (z, "x" if chain.shortcut is None else "zs"), ("s",))
    yield Step("ReLU", ("s",), ("out",))


def _eager_unit(conv: str, norm: str, x: str, index: str) -> Iterator[Step]:
    y, z = f"y{index}", f"z{index}"
    yield Step(conv, (x,), (y,))
    yield Step(f"{norm}: statistics", (y,))
    yield Step(f"{norm}: apply", (y,), (z,))


def eager_backward(chain: Chain) -> Iterator[Step]:
    last = len(chain.units)
    yield Step("ReLU'", ("dout", "out"), ("g",))
    if chain.gated:
        z, product = f"z{last}", f"e{last}"
        yield Step("gates'", ("g",), (f"d{z}",))
        yield Step("the gates' gradient: product", ("g", z), (product,))
        yield Step("the gates' gradient: sum", (product,))
        yield Step("squeeze', added", (f"d{z}",), (f"d{z}",))
    for i in range(last, 0, -1):
        g, a = "g" if i == last and not chain.gated else f"dz{i}", f"a{i - 1}" if i > 1 else "x"
        yield from _eager_unit_backward(f"conv{i}", f"bn{i}", g, str(i), a, f"d{a}")
        if i > 1:
            yield Step("ReLU'", (f"d{a}", a), (f"dz{i - 1}",))
    shortcut = "g"
    if chain.shortcut is not None:
        shortcut = "dp" if chain.pooled else "dx"
        yield from _eager_unit_backward("shortcut's convolution", "its norm", "g", "s", chain.met, shortcut)
    if chain.pooled:
        yield POOL_BACKWARD
        shortcut = "dx"
    yield Step("add of the shortcut's gradient", ("dx", shortcut), ("dx",))


def _eager_unit_backward(conv: str, norm: str, g: str, index: str, x: str, dx: str) -> Iterator[Step]:
    y, dy = f"y{index}", f"dy{index}"
    yield Step(f"{norm}': sums", (g, y))
    yield Step(f"{norm}': apply", (g, y), (dy,))
    yield Step(f"{conv} grad-weight", (dy, x))
    yield Step(f"{conv} grad-input", (dy,), (dx,))


# ---- what the fused block launches -------------------------------------------------------------------------------

CONV, GRAD_INPUT, GRAD_WEIGHT = "conv_forward_kernel", "grad_input_kernel", "conv_grad_weight_kernel"
STATISTICS, APPLY = "statistics_kernel", "apply_kernel"
SQUEEZE, SQUEEZE_BACKWARD = "squeeze_kernel", "squeeze_backward_apply_kernel"
EXCITE, EXCITE_BACKWARD = "excite_kernel", "excite_backward_kernel"
BACKWARD_REDUCE, BACKWARD_APPLY = "backward_reduce_kernel", "backward_apply_kernel"


def fused_forward(chain: Chain) -> Iterator[Step]:
    """The launches of `triton_backend.block_forward`, without merges. What is PyTorch's has no kernel's name.

    The first convolution has no groups.
    """
    (first, *rest), shortcut, last = chain.units, chain.shortcut, len(chain.units)
    if chain.pooled:
        yield POOL
    # The shortcut's convolution reads what conv1 has read, in its launch, where both have the same rows and columns.
    rides = shortcut is not None and (shortcut.stride, shortcut.K) == (first.stride, first.K)
    if rides and not chain.pooled:
        weights = _weight(first) + _weight(shortcut)
        yield Step("conv1, shortcut's convolution + statistics", ("x",), ("y1", "ys"), CONV, weights, ("y1", "ys"))
    else:
        yield Step("conv1 + statistics", ("x",), ("y1",), CONV, _weight(first), ("y1",))
        if shortcut is not None:
            name = "shortcut's convolution + statistics"
            yield Step(name, (chain.met,), ("ys",), CONV, _weight(shortcut), ("ys",))
    for i, unit in enumerate(rest, 2):
        if i in chain.grouped:
            yield Step(f"bn{i - 1} + ReLU", (f"y{i - 1}",), (f"a{i - 1}",), APPLY)
            yield Step(f"conv{i}", (f"a{i - 1}",), (f"y{i}",))
            yield Step(f"statistics of y{i}", (f"y{i}",), (), STATISTICS, sums=(f"y{i}",))
            continue
        name = f"bn{i - 1} + ReLU + conv{i} + statistics"
        yield Step(name, (f"y{i - 1}",), (f"y{i}",), CONV, _weight(unit), (f"y{i}",))
    if chain.gated:
        yield Step("squeeze", (f"y{last}",), (), SQUEEZE, sums=(f"y{last}",))
        yield Step(f"bn{last} + gates + add + ReLU", (f"y{last}", "x"), ("out",), EXCITE)
        return
    name = f"bn{last} + add + ReLU" if shortcut is None else f"bn{last} + shortcut's norm + add + ReLU"
    yield Step(name, (f"y{last}", "x" if shortcut is None else "ys"), ("out",), APPLY)


def fused_backward(chain: Chain) -> Iterator[Step]:
    """The launches of `triton_backend.block_backward`, without merges. What is PyTorch's has no kernel's name."""
    shortcut, last = chain.shortcut, len(chain.units)
    y, also = f"y{last}", "" if shortcut is None else ", shortcut's too"
    z, dz = ((), ()) if shortcut is None else (("ys",), ("dys",))
    if chain.gated:
        yield Step("ReLU', gates', sums of each image", ("dout", "out", y), ("g",), EXCITE_BACKWARD, sums=(y,))
        yield Step(f"gates', squeeze', bn{last} apply'", ("g", y), (f"d{y}",), SQUEEZE_BACKWARD)
    else:
        yield Step(f"ReLU', bn{last} reduce{also}", ("dout", "out", y, *z), ("g",), BACKWARD_REDUCE, sums=(y, *z))
        yield Step(f"bn{last} apply'{also}", ("g", y, *z), (f"d{y}", *dz), BACKWARD_APPLY)
    for i in range(last, 1, -1):
        y, dy, g, weight = f"y{i - 1}", f"dy{i}", f"g{i - 1}", _weight(chain.units[i - 1])
        if i in chain.grouped:
            g, a = f"da{i - 1}", f"a{i - 1}"
            yield Step(f"conv{i} grad-input", (dy,), (g,))
            yield Step(f"ReLU', bn{i - 1} reduce", (g, y), (), BACKWARD_REDUCE, sums=(y,))
            yield Step(f"bn{i - 1} + ReLU", (y,), (a,), APPLY)
            yield Step(f"conv{i} grad-weight", (dy, a))
        else:
            name = f"conv{i} grad-input + ReLU' + bn{i - 1} reduce"
            yield Step(name, (dy, y), (g,), GRAD_INPUT, weight, (y,))
            yield Step(f"conv{i} grad-weight, bn{i - 1} + ReLU recomputed", (dy, y), (), GRAD_WEIGHT)
        yield Step(f"bn{i - 1} apply'", (g, y), (f"d{y}",), BACKWARD_APPLY)
    yield from _fused_input_gradient(chain)
    yield Step("conv1 grad-weight", ("dy1", "x"), (), GRAD_WEIGHT)
    if shortcut is not None:
        yield Step("shortcut's grad-weight", ("dys", chain.met), (), GRAD_WEIGHT)


def _fused_input_gradient(chain: Chain) -> Iterator[Step]:
    first, shortcut = chain.units[0], chain.shortcut
    name, weight = "conv1 grad-input + shortcut's gradient", _weight(first)
    if shortcut is None:
        yield Step(name, ("dy1", "g"), ("dx",), GRAD_INPUT, weight)
    elif chain.pooled:
        yield Step("shortcut's grad-input", ("dys",), ("dp",), GRAD_INPUT, _weight(shortcut))
        yield POOL_BACKWARD
        yield Step(name, ("dy1", "dx"), ("dx",), GRAD_INPUT, weight)
    elif shortcut.stride == first.stride:
        yield Step(name, ("dy1", "dys"), ("dx",), GRAD_INPUT, weight + _weight(shortcut))
    else:  # another grid of pixels, so a launch of its own, for those that it meets
        met = f"d{chain.met}"
        yield Step("shortcut's grad-input", ("dys",), (met,), GRAD_INPUT, _weight(shortcut))
        yield Step(name, ("dy1", met), ("dx",), GRAD_INPUT, weight)


def fused(chain: Chain) -> tuple[Step, ...]:
    return *fused_forward(chain), *fused_backward(chain)


def launches(chain: Chain) -> list[Step]:
    """The steps of `fused` that are launches of this library's kernels."""
    return [step for step in fused(chain) if step.kernel]


def eager(chain: Chain) -> tuple[Step, ...]:
    return *eager_forward(chain), *eager_backward(chain)


# ---- what torch.compile schedules --------------------------------------------------------------------------------


def compiled(block: Block) -> tuple[float, float]:
    """The passes of forward and backward that TorchInductor counts in its own schedule, here that for a CPU.

    To it a convolution's backward is one node. It is two products, each of which reads dy.
    """
    torch._dynamo.reset()
    module = block.eager(*block.arguments(_NARROW)).to(memory_format=torch.channels_last)
    x = torch.randn(block.input_shape(_NARROW, _MANY, SIZE)).contiguous(memory_format=torch.channels_last)
    with _scheduled(max(weight.nbytes for weight in module.parameters())) as moved:
        out = torch.compile(module)(x.requires_grad_())
        forward = sum(moved)
        out.backward(torch.randn_like(out))
    return forward / out.nbytes, (sum(moved) - forward) / out.nbytes


_NARROW, _MANY = 16, 64  # channels and images: a weight is smaller than any activation's mask of a byte per element


@contextmanager
def _scheduled(largest_weight: int) -> Iterator[list[int]]:
    """The bytes of activations that each node moves of what is compiled inside."""
    from torch._functorch import config as functorch  # here, since TorchInductor takes seconds to import
    from torch._inductor import config as inductor
    from torch._inductor.graph import GraphLowering

    moved: list[int] = []
    compile_to_module = GraphLowering._compile_to_module

    def noted(graph: GraphLowering) -> object:
        module = compile_to_module(graph)
        moved.extend(_moved(node, largest_weight) for node in graph.scheduler.nodes)
        return module

    GraphLowering._compile_to_module = noted
    try:
        with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            yield moved
    finally:
        GraphLowering._compile_to_module = compile_to_module


def _moved(node: BaseSchedulerNode, largest_weight: int) -> int:
    """Bytes of activations that a node reads and writes."""
    reads, writes = (node.get_read_write_buffer_accesses(reads, not reads) for reads in (True, False))
    accesses = [*reads.items(), *writes.items()]
    if getattr(node.node, "op_overload", None) is torch.ops.aten.convolution_backward.default:
        dy = node.node.inputs[0].get_name()
        accesses.append((dy, reads[dy]))
    return sum(size for _, size in accesses if size > largest_weight)


# ---- the table ---------------------------------------------------------------------------------------------------

CHANNELS, BATCH, SIZE, DTYPE = 64, 8, 24, torch.float16  # the ratios depend on the kind of block, hardly on these


def kept(block: nn.Module, x: Tensor) -> int:
    """Bytes that a step keeps for backward, without x, which the block before keeps anyway, and the parameters."""
    return saved_bytes(lambda: block(x), exclude=[*block.parameters(), *block.buffers(), x])


def table() -> Iterator[str]:
    """Markdown, a line a block."""
    yield "| block | convolutions | passes, eager | passes, fused | bytes kept, eager | bytes kept, fused |"
    yield "| --- " * 6 + "|"
    for name, block in BLOCKS.items():
        modules = [kind(*block.arguments(CHANNELS)).to(DTYPE) for kind in (block.eager, block.fused)]
        x = torch.randn(block.input_shape(CHANNELS, BATCH, SIZE)).to(DTYPE)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        chain = Chain.of(modules[1], x.shape)
        passes = (
            summed(*(chain.passes(*half(chain)) for half in halves))
            for halves in ((eager_forward, eager_backward), (fused_forward, fused_backward))
        )
        bytes_kept = (f"{kept(module, x):,}" for module in modules)
        yield "| " + " | ".join((name, described(chain), *passes, *bytes_kept)) + " |"


def compiled_table(names: Iterable[str] = BLOCKS) -> Iterator[str]:
    """Markdown, a line a block: what `compiled` finds."""
    yield "| block | passes, torch.compile |"
    yield "| --- " * 2 + "|"
    for name in names:
        yield f"| {name} | {summed(*(round(half, 2) for half in compiled(BLOCKS[name])))} |"


def summed(*passes: float) -> str:
    """Such as "17 + 27 = 44"."""
    return f"{' + '.join(map(number, passes))} = {number(sum(passes))}"


def steps(chain: Chain) -> Iterator[str]:
    """Markdown, a line for each step of eager PyTorch, then for each launch of the fused block."""
    yield "| step | reads → writes | passes |"
    yield "| --- " * 3 + "|"
    for name, found in (("eager", eager(chain)), ("fused", fused(chain))):
        for step in found:
            moved = " → ".join(filter(None, (", ".join(step.reads), ", ".join(step.writes))))
            yield f"| {step.name} | {moved} | {number(chain.passes(step))} |"
        yield f"| **sum, {name}** | | {number(chain.passes(*found))} |"


def described(chain: Chain) -> str:
    """Such as "64 → 64 → 64, identity"."""
    widths = " → ".join(str(width) for width in (chain.units[0].C, *(unit.K for unit in chain.units)))
    stride = math.prod(unit.stride for unit in chain.units)
    shortcut = "identity" if chain.shortcut is None else "normed 1x1, pooled" if chain.pooled else "normed 1x1"
    also = ", groups" * bool(chain.grouped) + ", gates" * chain.gated
    return widths + f", stride {stride}" * (stride > 1) + also + f", {shortcut}"


def number(passes: float) -> str:
    """Without the decimals that are zero."""
    return f"{passes:.6g}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.passes", description=purpose(__doc__))
    parser.add_argument("--block", choices=BLOCKS, help="each of its steps, in place of all blocks' sums")
    parser.add_argument("--compile", action="store_true", help="those of torch.compile, which takes a minute")
    arguments = parser.parse_args(argv)
    return run(parser, lambda: _show(arguments.block, arguments.compile))


def _show(name: str | None, compiled: bool) -> int:
    if compiled:
        lines = compiled_table(BLOCKS if name is None else [name])
    elif name is None:
        lines = table()
    else:
        block = BLOCKS[name]
        module, shape = block.fused(*block.arguments(CHANNELS)), block.input_shape(CHANNELS, BATCH, SIZE)
        lines = steps(Chain.of(module, shape))
    put("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
