"""Tile configurations of the implicit GEMMs, and which of them a launch uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Config:
    """A GEMM's tile: BLOCK_M rows by BLOCK_N columns, BLOCK_K of the reduction per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return asdict(self)


def best(key: tuple, candidates: Sequence[Config], run: Callable[[Config], object], device: torch.device) -> Config:
    """The candidate to launch with: the first one until something is timed."""
    return candidates[0]
