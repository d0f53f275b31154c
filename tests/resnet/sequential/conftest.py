"""What the tests of chains of blocks count, and what they run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import resnet
from resnet.kernels import batch_norm_backward_reduce as reduce
from resnet.kernels.host import launcher


@pytest.fixture
def reduced(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of each map that a pass of its own has read for the sums of a norm's backward."""
    shapes, launch = [], reduce.launch

    def recorded(kernel, grid, dout, *arguments, **options):
        if kernel is reduce.backward_reduce_kernel:
            shapes.append(tuple(dout.shape))
        return launch(kernel, grid, dout, *arguments, **options)

    monkeypatch.setattr(reduce, "launch", recorded)
    monkeypatch.setattr(launcher, "is_plain", lambda: False)  # a replay would not come by
    return shapes


@pytest.fixture
def on_kernels() -> Iterator[None]:
    """The kernels, but for the convolutions, which the interpreter is slow in."""
    with resnet.backend("triton"), resnet.convolution("pytorch"):
        yield
