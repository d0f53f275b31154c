"""Every way in which BatchNorm's passes move activations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import NormedShortcut, batch_norm_backward_reduce
from resnet.kernels.batch_norm_finalize import batch_norm_finalize
from resnet.kernels.batch_norm_statistics import batch_norm_statistics
from resnet.norm import statistics_dtype
from tests.helpers.blocks import draw

EPS = 1e-5


def batch_stats(x: Tensor, *norm: object) -> Tensor:
    """stats (4, C) of x's batch. `norm` is what `batch_norm_finalize` takes besides the partial statistics."""
    return batch_norm_finalize(*batch_norm_statistics(x), *norm)


@dataclass
class Case:
    """Tensors for one launch of any kernel. `out` is drawn like the others, since any mask will do."""

    x: Tensor
    shortcut: Tensor
    dout: Tensor
    out: Tensor
    stats: Tensor
    sums: Tensor
    shortcut_stats: Tensor
    three_sums: Tensor  # those of a norm and of its shortcut's

    @property
    def normed(self) -> NormedShortcut:
        return NormedShortcut(self.shortcut, self.shortcut_stats)

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
        C, acc = shape[1], statistics_dtype(dtype)
        x, shortcut, dout, out = (draw(*shape, seed=seed, dtype=dtype) for seed in range(4))
        vectors = (draw(n, C, seed=seed, dtype=acc) for seed, n in enumerate((4, 2, 4, 3), 4))
        return Case(x, shortcut, dout, out, *vectors)


LAUNCHES: dict[str, Callable[[Case], object]] = {
    "statistics": lambda c: batch_stats(c.x, None, None, None, None, 0.1, EPS),
    "apply": lambda c: batch_norm_add_relu(c.x, c.stats),
    "apply, add": lambda c: batch_norm_add_relu(c.x, c.stats, c.shortcut),
    "apply, add a normed shortcut": lambda c: batch_norm_add_relu(
        c.x, c.stats, c.shortcut, c.shortcut_stats[2], c.shortcut_stats[3]
    ),
    "reduce, mask from out": lambda c: batch_norm_backward_reduce(c.dout, c.x, c.out, c.stats),
    "reduce, mask from out, g stored": lambda c: batch_norm_backward_reduce(
        c.dout, c.x, c.out, c.stats, g=torch.empty_like(c.x)
    ),
    "reduce, mask from x": lambda c: batch_norm_backward_reduce(c.dout, c.x, None, c.stats),
    "reduce, no relu": lambda c: batch_norm_backward_reduce(c.dout, c.x, None, c.stats, relu=False),
    "reduce, normed shortcut": lambda c: batch_norm_backward_reduce(c.dout, c.x, c.out, c.stats, shortcut=c.normed),
    "reduce, normed shortcut, g stored": lambda c: batch_norm_backward_reduce(
        c.dout, c.x, c.out, c.stats, shortcut=c.normed, g=torch.empty_like(c.x)
    ),
    "apply', mask from x": lambda c: batch_norm_backward_apply(c.dout, c.x, c.stats, c.sums),
    "apply', no relu": lambda c: batch_norm_backward_apply(c.dout, c.x, c.stats, c.sums, relu=False),
    "apply', mask from x, add": lambda c: batch_norm_backward_apply(c.dout, c.x, c.stats, c.sums, added=c.shortcut),
    "apply', normed shortcut": lambda c: batch_norm_backward_apply(
        c.dout,
        c.x,
        c.stats,
        c.three_sums,
        relu=False,
        shortcut=c.normed,
        shortcut_sums=c.three_sums,
        dshortcut=torch.empty_like(c.x),
    ),
    "frozen apply', normed shortcut": lambda c: batch_norm_backward_apply(
        c.dout, c.x, c.stats, None, relu=False, shortcut=c.normed, dshortcut=torch.empty_like(c.x)
    ),
    "frozen apply', mask from x": lambda c: batch_norm_backward_apply(c.dout, c.x, c.stats, None),
    "frozen apply', no relu": lambda c: batch_norm_backward_apply(c.dout, c.x, c.stats, None, relu=False),
}
