"""Which tile a GEMM is launched with: a table, a model that ranks it, and a choice timed once and remembered.

The command:

    python -m resnet.kernels.tuning list      what is remembered, with the median times
    python -m resnet.kernels.tuning clear     forget all of it
    python -m resnet.kernels.tuning path      where it is
"""

from .choice import best, every_candidate, gemm_config
from .devices import ANY, DEVICES, GFX942, SM_80, SM_90, SM_100, Device
from .model import L2, Epilogue, Gemm, bucket, candidates, gemm
from .table import MAX_ACCUMULATORS, MOST_ROWS, TABLE, Config

__all__ = [
    "ANY",
    "DEVICES",
    "GFX942",
    "L2",
    "MAX_ACCUMULATORS",
    "MOST_ROWS",
    "SM_80",
    "SM_90",
    "SM_100",
    "TABLE",
    "Config",
    "Device",
    "Epilogue",
    "Gemm",
    "best",
    "bucket",
    "candidates",
    "every_candidate",
    "gemm",
    "gemm_config",
]
