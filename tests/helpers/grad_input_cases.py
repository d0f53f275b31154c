"""Launches of the grad-input convolution beside PyTorch's own: tensors, epilogues, and the results of both."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from resnet.kernels.batch_norm_backward_reduce import NormedShortcut, merge_sums
from resnet.kernels.conv_grad_input import BlockEnd, IdentityGrad, KeptMask, ReluMask, ShortcutGrad, conv_grad_input
from resnet.kernels.host.arguments import accumulator
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning import Config
from tests.helpers.blocks import DTYPES, draw
from tests.helpers.parity import assert_as_exact_as_eager

# A block's end names its branch first, then whether the shortcut of the block that ends has a norm.
BLOCK_ENDS = tuple(
    f"{branch}, block end{normed}" for branch in ("identity", "shortcut") for normed in ("", " of a normed shortcut")
)
MET, MET_END = (f"identity of every other pixel{end}" for end in ("", ", block end"))
EPILOGUES = ("none", "mask", "kept mask", "identity", MET, "shortcut", *BLOCK_ENDS, MET_END)
SUMS = ("sum g", "sum g * xhat", "sum g * zhat")

# So small that shapes of a few pixels and channels have several tiles in every dimension, the last ones ragged.
SMALL_TILES = (Config(32, 16, 32, 4, 2),)


@dataclass
class Case:
    """One launch: its drawn tensors and its epilogue."""

    shape: ConvShape
    dy: Tensor
    weight: Tensor
    epilogue: ReluMask | KeptMask | IdentityGrad | ShortcutGrad | BlockEnd | None

    @staticmethod
    def of(shape: ConvShape, epilogue: str, dtype: torch.dtype, seed: int = 0) -> Case:
        seeds = itertools.count(10 * seed)

        def tensor(*size: int) -> Tensor:
            return draw(*size, seed=next(seeds), dtype=dtype)

        x, y = (shape.N, shape.C, shape.H, shape.W), (shape.N, shape.K, shape.P, shape.Q)
        dy, weight = tensor(*y), tensor(shape.K, shape.C, shape.R, shape.S) / 4

        def normed() -> tuple[Tensor, Tensor]:
            """What a norm takes, and its stats."""
            stats = draw(4, shape.C, seed=next(seeds), dtype=accumulator(dy)[0])
            return tensor(*x), stats

        if epilogue == "mask":
            options = ReluMask(*normed())
        elif epilogue == "kept mask":
            options = KeptMask(tensor(*x))
        elif epilogue in (MET, MET_END):
            options = IdentityGrad(tensor(*x[:2], -(-shape.H // 2), -(-shape.W // 2)), 2)
        elif epilogue.startswith("identity"):
            options = IdentityGrad(tensor(*x))
        elif epilogue.startswith("shortcut"):
            options = ShortcutGrad(tensor(*y), tensor(shape.K, shape.C, 1, 1) / 4)
        else:
            options = None
        if "block end" in epilogue:
            shortcut = NormedShortcut(*normed()) if epilogue.endswith("normed shortcut") else None
            options = BlockEnd(options, tensor(*x), *normed(), shortcut)
        return Case(shape, dy, weight, options)

    @property
    def branch(self) -> IdentityGrad | ShortcutGrad | None:
        """What a second branch adds to dx."""
        options = self.epilogue.branch if isinstance(self.epilogue, BlockEnd) else self.epilogue
        return options if isinstance(options, (IdentityGrad, ShortcutGrad)) else None

    @property
    def added(self) -> Tensor:
        """An identity's g, with zeros at the pixels that it has none for."""
        g, stride = self.branch
        added = g.new_zeros(self.shape.N, self.shape.C, self.shape.H, self.shape.W)
        added[:, :, ::stride, ::stride] = g
        return added

    @property
    def norms(self) -> list[tuple[Tensor, Tensor]]:
        """(input, stats) of each norm with whose xhat g is summed."""
        if isinstance(self.epilogue, ReluMask):
            return [self.epilogue]
        if isinstance(self.epilogue, BlockEnd):
            _, _, y, stats, shortcut = self.epilogue
            return [(y, stats), *([shortcut[:2]] if shortcut else [])]
        return []

    def fused(self, tf32: bool = False) -> list[Tensor]:
        """dx, or g and the sums."""
        result = conv_grad_input(self.dy, self.weight, self.shape, self.epilogue, tf32)
        if not isinstance(result, tuple):
            return [result]
        dx, sums = result
        return [dx, *(merge_sums(sums) if isinstance(self.epilogue, BlockEnd) else sums)]

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by PyTorch in `dtype`, operator by operator."""
        s = self.shape
        dx = grad_input(s, self.weight.to(dtype), self.dy.to(dtype), s.padding)
        if isinstance(self.branch, IdentityGrad):
            dx = dx + self.added.to(dtype)
        if isinstance(self.branch, ShortcutGrad):
            dx = dx + grad_input(s, self.branch.weight.to(dtype), self.branch.g.to(dtype), 0)
        if isinstance(self.epilogue, ReluMask):
            y1, stats = self.epilogue
            scale, shift = (v.view(1, -1, 1, 1).double() for v in stats[2:])
            dx = masked(dx, (y1.double() * scale + shift).to(stats.dtype).to(y1.dtype))
        if isinstance(self.epilogue, KeptMask):
            dx = masked(dx, self.epilogue.a)
        if isinstance(self.epilogue, BlockEnd):
            dx = masked(dx, self.epilogue.out)
        return [dx, *sums_of(dx, self.norms)]


def grad_input(s: ConvShape, weight: Tensor, dy: Tensor, padding: int) -> Tensor:
    return conv2d_input((s.N, s.C, s.H, s.W), weight, dy, s.stride, padding, s.dilation)


def masked(g: Tensor, out: Tensor) -> Tensor:
    return torch.where(out <= 0, 0, g)


def sums_of(g: Tensor, norms: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """sum g and sum g * xhat of each norm, in the type of its statistics; nothing without a norm."""
    sums = []
    for x, stats in norms:
        acc = torch.promote_types(g.dtype, stats.dtype)
        mean, invstd = (v.view(1, -1, 1, 1).to(acc) for v in stats[:2])
        sums.append((g.to(acc) * ((x.to(acc) - mean) * invstd)).sum((0, 2, 3)))
    return [g.to(acc).sum((0, 2, 3)), *sums] if norms else []


def assert_parity(shape: ConvShape, epilogue: str, dtype: torch.dtype) -> None:
    """dx and the sums are as exact as PyTorch's, over enough draws that no single rounding decides."""
    summed = epilogue == "mask" or "block end" in epilogue
    values = shape.C if summed else shape.N * shape.H * shape.W * shape.C
    cases = [Case.of(shape, epilogue, dtype, seed) for seed in range(-(-12 // values))]
    fused, eager, exact = (
        list(zip(*results))
        for results in (
            [case.fused() for case in cases],
            [case.plain(dtype) for case in cases],
            [case.plain(torch.float64) for case in cases],
        )
    )
    assert len(fused) == len(exact)
    for name, *sides in zip(("dx", *SUMS), fused, eager, exact):
        assert_as_exact_as_eager(name, *sides)


# ---- pairwise combinations -------------------------------------------------------------------------------------------

_AXES = {
    "pixels": ((2, 5, 4), (1, 3, 13)),  # N, H, W
    "channels": ((3, 6), (16, 32), (20, 17)),  # C, K
    "kernel": (1, 3, 7),
    "stride": (1, 2, 3),
    "padding": (0, 1, 3),
    "dilation": (1, 2),
    "epilogue": EPILOGUES,
    "dtype": DTYPES,
}


def shape_of(pixels: tuple[int, int, int], channels: tuple[int, int], kernel: int, *geometry: int):
    return ConvShape(*pixels, *channels, kernel, kernel, *geometry)


def is_valid(shape: ConvShape, epilogue: str) -> bool:
    """There are output pixels, a 1x1 shortcut of the same stride has as many, and a stride has no dilation."""
    reached = (shape.H - 1) // shape.stride + 1, (shape.W - 1) // shape.stride + 1
    shortcut = epilogue.startswith("shortcut")
    taken = min(shape.P, shape.Q) >= 1 and 1 in (shape.stride, shape.dilation)
    return taken and (not shortcut or reached == (shape.P, shape.Q))


def pairwise() -> list[tuple[ConvShape, str, torch.dtype]]:
    """Cases in which any two values of two axes meet that may go together. They are the same in every run."""
    everything = [dict(zip(_AXES, values)) for values in itertools.product(*_AXES.values())]
    rng = random.Random(0)
    rng.shuffle(everything)

    def split(values: dict) -> tuple[ConvShape, str, torch.dtype]:
        *geometry, epilogue, dtype = values.values()
        return shape_of(*geometry), epilogue, dtype

    valid = [values for values in everything if is_valid(*split(values)[:2])]
    pairs = [set(itertools.combinations(values.items(), 2)) for values in valid]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        # The best of 40 will do: the best of all would save a case or two.
        some = rng.sample(range(len(valid)), 40)
        best = max(some, key=lambda i: len(pairs[i] & missing))
        if not pairs[best] & missing:
            best = next(i for i in range(len(valid)) if pairs[i] & missing)
        missing -= pairs[best]
        chosen.append(split(valid[best]))
    return chosen


def name_of_case(value: object) -> str:
    if isinstance(value, ConvShape):
        s = value
        return f"{s.N}x{s.H}x{s.W},{s.C}-{s.K},{s.R}x{s.S},stride{s.stride},pad{s.padding},dilation{s.dilation}"
    return str(value).removeprefix("torch.")
