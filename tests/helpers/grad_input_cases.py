"""Launches of the grad-input convolution beside PyTorch's own: tensors, epilogues, and the results of both."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from resnet.kernels.conv_grad_input import IdentityGrad, KeptMask, ReluMask, ShortcutGrad, conv_grad_input
from resnet.kernels.host.launch import accumulator
from resnet.kernels.host.shapes import ConvShape
from resnet.kernels.tuning import Config
from tests.helpers.blocks import DTYPES, draw
from tests.helpers.parity import assert_as_exact_as_eager

EPILOGUES = ("none", "mask", "kept mask", "identity", "shortcut")

# So small that shapes of a few pixels and channels have several tiles in every dimension, the last ones ragged.
SMALL_TILES = (Config(32, 16, 32, 4, 2),)


@dataclass
class Case:
    """One launch: its drawn tensors and its epilogue."""

    shape: ConvShape
    dy: Tensor
    weight: Tensor
    epilogue: ReluMask | KeptMask | IdentityGrad | ShortcutGrad | None

    @staticmethod
    def of(shape: ConvShape, epilogue: str, dtype: torch.dtype, seed: int = 0) -> Case:
        seeds = itertools.count(10 * seed)

        def tensor(*size: int) -> Tensor:
            return draw(*size, seed=next(seeds), dtype=dtype)

        x, y = (shape.N, shape.C, shape.H, shape.W), (shape.N, shape.K, shape.P, shape.Q)
        dy, weight = tensor(*y), tensor(shape.K, shape.C, shape.R, shape.S) / 4
        if epilogue == "mask":
            stats = draw(4, shape.C, seed=next(seeds), dtype=accumulator(dy)[0])
            options = ReluMask(tensor(*x), stats)
        elif epilogue == "kept mask":
            options = KeptMask(tensor(*x))
        elif epilogue == "identity":
            options = IdentityGrad(tensor(*x))
        elif epilogue == "none":
            options = None
        else:
            options = ShortcutGrad(tensor(*y), tensor(shape.K, shape.C, 1, 1) / 4)
        return Case(shape, dy, weight, options)

    def fused(self, tf32: bool = False) -> list[Tensor]:
        """dx, or g and the two sums."""
        result = conv_grad_input(self.dy, self.weight, self.shape, self.epilogue, tf32)
        return [result[0], *result[1]] if isinstance(result, tuple) else [result]

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by PyTorch in `dtype`, operator by operator."""
        s = self.shape
        dx = grad_input(s, self.weight.to(dtype), self.dy.to(dtype), s.padding)
        if isinstance(self.epilogue, ReluMask):
            y1, stats = self.epilogue
            mean, invstd, scale, shift = (v.view(1, -1, 1, 1).double() for v in stats)
            z = (y1.double() * scale + shift).to(stats.dtype).to(y1.dtype)
            acc = torch.promote_types(dtype, stats.dtype)
            g = masked(dx, z).to(acc)
            xhat = (y1.to(acc) - mean.to(acc)) * invstd.to(acc)
            return [g.to(dtype), g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))]
        if isinstance(self.epilogue, KeptMask):
            dx = masked(dx, self.epilogue.a)
        if isinstance(self.epilogue, IdentityGrad):
            dx = dx + self.epilogue.g.to(dtype)
        if isinstance(self.epilogue, ShortcutGrad):
            dx = dx + grad_input(s, self.epilogue.weight.to(dtype), self.epilogue.g.to(dtype), 0)
        return [dx]


def grad_input(s: ConvShape, weight: Tensor, dy: Tensor, padding: int) -> Tensor:
    return conv2d_input((s.N, s.C, s.H, s.W), weight, dy, s.stride, padding, s.dilation)


def masked(g: Tensor, out: Tensor) -> Tensor:
    return torch.where(out <= 0, 0, g)


def assert_parity(shape: ConvShape, epilogue: str, dtype: torch.dtype) -> None:
    """dx and a mask's sums are as exact as PyTorch's, over enough draws that no single rounding decides."""
    values = shape.C if epilogue == "mask" else shape.N * shape.H * shape.W * shape.C
    cases = [Case.of(shape, epilogue, dtype, seed) for seed in range(-(-12 // values))]
    fused, eager, exact = (
        list(zip(*results))
        for results in (
            [case.fused() for case in cases],
            [case.plain(dtype) for case in cases],
            [case.plain(torch.float64) for case in cases],
        )
    )
    for name, *sides in zip(("dx", "sum g", "sum g * xhat"), fused, eager, exact):
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
    shortcut = epilogue == "shortcut"
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
