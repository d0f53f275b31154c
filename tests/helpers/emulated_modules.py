"""Modules beside their eager reference, the fused one's launches emulated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import resnet
from tests.helpers.blocks import Trio, step


def compare(
    emulate: Callable,
    modules: Trio,
    x: Tensor,
    run: Callable[[nn.Module, Tensor], dict[str, Tensor]] = step,
    **options,
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], list[str]]:
    """(eager, fused, exact), what `run` gives for each of `modules`; and the kernels that were launched, in order.

    `options` are the emulator's.
    """
    with emulate(x.dtype, **options) as reports, resnet.backend("triton"):
        fused = run(modules.fused, x)
    return (run(modules.eager, x), fused, run(modules.exact, x)), [report.name for report in reports]
