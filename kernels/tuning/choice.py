"""The choice of a GEMM's tile at its first launch, and what is recorded in place of a choice.

    config = tuning.gemm_config("forward", shape, x, launch, precision="ieee", prologue=True)

The first launch of a key times the 3 tiles that the model ranks first, or with FUSED_RESIDUAL_TUNING=full all of its
candidates, 8 at most. Later launches look the answer up (`memory`). A key holds the operation, the channels and the
window, the type, every switch that the kernel is compiled with, and the number of pixels rounded up to a power of two.
So another batch size is seldom another key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..host.shapes import ConvShape
from . import memory
from .devices import ANY, Device, device_facts
from .model import candidates, gemm
from .table import Config, parse_config

_TIMED = 3  # candidates of a key
_every: Device | None = None


@contextmanager
def every_candidate(like: Device = ANY) -> Iterator[None]:
    """Inside, each launch first runs once with every candidate that a device like this one could time.

    It is for recording launches, so that everything that can be chosen is compiled and counted.
    """
    global _every
    previous, _every = _every, like
    try:
        yield
    finally:
        _every = previous


def state() -> tuple:
    """What a choice depends on beside its key: with an equal state, an equal key has the same choice."""
    return memory.Choices.generation, memory.process_choices.times(), _every


def gemm_config(
    operation: str, shape: ConvShape, x: Tensor, run: Callable[[Config], object], **switches: object
) -> Config:
    """The configuration to launch with; see `gemm` for the arguments.

    Args:
        x: an operand: type and device.
        run: launches once with a configuration, changing nothing that it reads.
    """
    key = gemm(operation, shape, x.dtype, **switches)
    if _every is None:
        name = memory.remembered(key, x.device)
        if name is not None:
            return parse_config(name)
    return best(key, candidates(key, _every or device_facts(x.device)), run, x.device)


def best(key: tuple, candidates: Sequence[Config], run: Callable[[Config], object], device: torch.device) -> Config:
    """The candidate that `memory` remembers for the key, else the fastest of the first ones, as `memory` times them.

    On the CPU it is the first. In `every_candidate` all are run, and it is the first.
    """
    if _every is not None:
        for config in candidates:
            run(config)
        return candidates[0]
    runs = {str(config): partial(run, config) for config in candidates}
    return parse_config(memory.choose(key, runs, device, None if memory.mode == "full" else _TIMED))
