"""Every way in which the kernels of squeeze-and-excitation move activations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet.kernels.batch_norm_excite import batch_norm_excite
from resnet.kernels.batch_norm_excite_backward import batch_norm_excite_backward
from resnet.kernels.batch_norm_squeeze import LINK, batch_norm_squeeze
from resnet.kernels.batch_norm_squeeze_backward import (
    batch_norm_squeeze_backward_apply,
    batch_norm_squeeze_backward_reduce,
)
from resnet.norm import statistics_dtype
from tests.helpers.blocks import draw


@dataclass
class Case:
    """Tensors for one launch of any kernel. `out` and the links are drawn too, since any mask and sums will do."""

    y: Tensor
    shortcut: Tensor
    dout: Tensor
    out: Tensor
    gate: Tensor
    dpooled: Tensor
    stats: Tensor
    sums: Tensor
    link: Tensor
    dlink: Tensor

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
        (N, C), acc = shape[:2], statistics_dtype(dtype)
        activations = (draw(*shape, seed=seed, dtype=dtype) for seed in range(4))
        factors = (draw(N, C, seed=seed, dtype=dtype) for seed in (4, 5))
        vectors = (draw(n, C, seed=seed, dtype=acc) for seed, n in ((6, 4), (7, 2)))
        links = (draw(LINK, N, C, seed=seed, dtype=acc) for seed in (8, 9))
        return Case(*activations, *factors, *vectors, *links)


LAUNCHES: dict[str, Callable[[Case], object]] = {
    "squeeze": lambda c: batch_norm_squeeze(c.y, c.stats),
    "squeeze, relu": lambda c: batch_norm_squeeze(c.y, c.stats, relu=True),
    "excite": lambda c: batch_norm_excite(c.y, c.stats, c.gate, relu=False),
    "excite, both relus": lambda c: batch_norm_excite(c.y, c.stats, c.gate, inner_relu=True),
    "excite, add": lambda c: batch_norm_excite(c.y, c.stats, c.gate, c.shortcut),
    "excite, inner relu, add": lambda c: batch_norm_excite(c.y, c.stats, c.gate, c.shortcut, inner_relu=True),
    "excite'": lambda c: batch_norm_excite_backward(c.dout, c.y, c.out, c.stats, c.gate),
    "excite', both relus": lambda c: batch_norm_excite_backward(c.dout, c.y, c.out, c.stats, c.gate, inner_relu=True),
    "excite', inner relu": lambda c: batch_norm_excite_backward(c.dout, c.y, None, c.stats, c.gate, inner_relu=True),
    "excite', no relu": lambda c: batch_norm_excite_backward(c.dout, c.y, None, c.stats, c.gate),
    "sums": lambda c: batch_norm_squeeze_backward_reduce(
        c.dlink, c.link, c.dpooled, c.y, *(torch.empty_like(c.sums[0]) for _ in range(3))
    ),
    "squeeze'": lambda c: batch_norm_squeeze_backward_apply(c.dout, c.y, c.stats, c.dlink, c.dpooled, c.sums),
    "squeeze', relu": lambda c: batch_norm_squeeze_backward_apply(
        c.dout, c.y, c.stats, c.dlink, c.dpooled, c.sums, relu=True
    ),
    "frozen squeeze'": lambda c: batch_norm_squeeze_backward_apply(c.dout, c.y, c.stats, c.dlink, c.dpooled, None),
    "frozen squeeze', relu": lambda c: batch_norm_squeeze_backward_apply(
        c.dout, c.y, c.stats, c.dlink, c.dpooled, None, relu=True
    ),
}
