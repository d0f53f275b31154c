"""Tile configurations of the implicit GEMMs, by operation and kind of product.

The kinds of product, by their operands: "16-bit" are float16 or bfloat16; "tf32" are float32, rounded for tensor cores;
"float32" and "float64" are taken as they are.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache


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

    def __str__(self) -> str:
        return f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}, {self.num_warps} warps, {self.num_stages} stages"


@cache
def parse_config(text: str) -> Config:
    """The inverse of str."""
    return Config(*map(int, re.findall(r"\d+", text)))


# The last one of each table is so small that it is always a candidate. A product needs 16 along every dimension.
_NARROW = (  # for few channels, or few pixels
    Config(64, 32, 64, 4, 4),
    Config(64, 16, 32, 4, 3),
    Config(32, 32, 32, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_FORWARD = (  # none of them spills with prologue and moments, or with shortcut and moments
    Config(128, 64, 32, 4, 4),
    Config(128, 64, 64, 4, 3),  # this one and the next one issue the fewest instructions where K is 64
    Config(256, 64, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(64, 128, 64, 4, 3),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 64, 4, 3),
    *_NARROW,
)
_GRAD_INPUT = (
    Config(128, 64, 64, 4, 3),
    Config(128, 64, 32, 4, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 32, 4, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 128, 64, 4, 4),
    Config(64, 128, 64, 8, 3),
    Config(64, 64, 64, 4, 3),
    Config(256, 64, 32, 8, 3),
    Config(128, 64, 32, 8, 4),  # these two hold little of dout per thread, for the shortcut's mask
    Config(64, 64, 32, 4, 4),
    *_NARROW,
)
_TF32 = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 4, 3),
    Config(64, 128, 32, 4, 3),
    Config(64, 64, 32, 4, 3),
    Config(64, 64, 16, 4, 3),
    Config(128, 32, 32, 4, 3),
    Config(64, 32, 32, 4, 3),
    Config(32, 32, 32, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_FLOAT32 = (  # exact float32: no tensor cores, every thread holds BLOCK_K of its operands in registers
    Config(64, 64, 16, 4, 3),
    Config(64, 32, 16, 4, 3),
    Config(32, 64, 16, 4, 3),
    Config(32, 32, 32, 4, 3),
    Config(32, 32, 16, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_FLOAT64 = (
    Config(64, 32, 16, 4, 2),
    Config(32, 32, 16, 4, 2),
    Config(32, 16, 16, 2, 2),
    Config(16, 16, 16, 2, 2),
)
_PIXELS_REDUCED = (  # rows and columns are channels, the reduction is long
    Config(128, 64, 32, 8, 4),
    Config(128, 64, 64, 8, 3),
    Config(128, 64, 64, 8, 4),
    Config(64, 64, 32, 4, 3),
    Config(64, 64, 32, 4, 5),
    Config(64, 64, 64, 4, 3),
    Config(64, 64, 64, 4, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(64, 32, 64, 4, 3),
    Config(64, 16, 64, 4, 3),
    Config(32, 32, 32, 2, 3),
    Config(16, 16, 16, 2, 2),
)
_SMALL = (Config(64, 64, 16, 4, 2), Config(64, 32, 16, 4, 2), Config(32, 32, 16, 4, 2), Config(16, 16, 16, 4, 2))
# Their prologue gathers the gradients of BLOCK_K windows' four pixels, so there is nothing to pipeline.
_POOLED = (
    Config(64, 64, 16, 4, 1),
    Config(64, 64, 32, 8, 1),
    Config(32, 32, 16, 4, 1),
    Config(16, 16, 16, 4, 1),
)
_POOLED_FLOAT32 = (
    Config(64, 64, 16, 8, 1),
    Config(64, 32, 16, 8, 1),
    Config(32, 32, 16, 8, 1),
    Config(16, 16, 16, 4, 1),
)
_POOLED_FLOAT64 = (Config(32, 32, 16, 4, 1), Config(16, 16, 16, 4, 1))
TABLE: dict[str, dict[str, tuple[Config, ...]]] = {
    "forward": {"16-bit": _FORWARD, "tf32": _TF32, "float32": _FLOAT32, "float64": _FLOAT64},
    "grad_input": {"16-bit": _GRAD_INPUT, "tf32": _TF32, "float32": _FLOAT32, "float64": _FLOAT64[1:]},
    "grad_weight": {"16-bit": _PIXELS_REDUCED, "tf32": _SMALL, "float32": _SMALL, "float64": _SMALL},
    "grad_weight_max_pool": {
        "16-bit": _POOLED,
        "tf32": _POOLED_FLOAT32,
        "float32": _POOLED_FLOAT32,
        "float64": _POOLED_FLOAT64,
    },
}
MOST_ROWS = max(config.BLOCK_M for kinds in TABLE.values() for table in kinds.values() for config in table)
MAX_ACCUMULATORS = 100  # registers that they may fill in a thread where grad-weight takes a whole row of taps at once
