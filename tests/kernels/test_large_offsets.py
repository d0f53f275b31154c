"""Tensors beyond 2^31 elements take 64-bit offsets: the launches' own addresses, without the memory.

The tensors are on the device `meta`, the kernels interpreted under the sanitizer. Of each launch the last program runs:
what it accesses of every large tensor lies beyond element 2^31, and is the tensor's end unless the program is a long
reduction. An offset that wraps at 32 bits leaves the tensor or falls short of that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from resnet.kernels.batch_norm_add_relu import batch_norm_add_relu
from resnet.kernels.batch_norm_backward_apply import batch_norm_backward_apply
from resnet.kernels.batch_norm_backward_reduce import NormedShortcut, batch_norm_backward_reduce, merge_sums
from resnet.kernels.batch_norm_excite import batch_norm_excite
from resnet.kernels.batch_norm_excite_backward import batch_norm_excite_backward
from resnet.kernels.batch_norm_finalize import batch_norm_finalize
from resnet.kernels.batch_norm_max_pool import batch_norm_max_pool
from resnet.kernels.batch_norm_max_pool_backward import (
    batch_norm_max_pool_backward_apply,
    batch_norm_max_pool_backward_reduce,
)
from resnet.kernels.batch_norm_squeeze import batch_norm_squeeze
from resnet.kernels.batch_norm_squeeze_backward import (
    batch_norm_squeeze_backward_apply,
    batch_norm_squeeze_backward_reduce,
)
from resnet.kernels.conv_forward import Shortcut, conv_forward
from resnet.kernels.conv_grad_input import BlockEnd, IdentityGrad, ReluMask, ShortcutGrad, conv_grad_input
from resnet.kernels.conv_grad_weight import conv_grad_weight
from resnet.kernels.conv_grad_weight_max_pool import conv_grad_weight_max_pool
from resnet.kernels.host.shapes import ConvShape
from tests.helpers.batch_norm_launches import batch_stats
from tests.helpers.sanitizer import READS, WRITES, Grid, Program, watching

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled, not interpreted"),
]

LARGE = 2**31
# Loads and stores of a launch that are looked at: all of a tile's, the first steps of a long reduction
_ACCESSES = 120


def activation(N: int, C: int, H: int, W: int) -> Tensor:
    return torch.empty((N, C, H, W), dtype=torch.float16, device="meta", memory_format=torch.channels_last)


def vectors(rows: int, C: int) -> Tensor:
    return torch.empty((rows, C), device="meta")


C = 64
X = activation(LARGE // C + 20_000_003, C, 1, 1)
STATS, SUMS = vectors(4, C), vectors(2, C)
# pooled to a quarter of its pixels, which is large too
Y = activation(4 * LARGE // C // 1024 + 20_003, C, 32, 32)
POOLED = activation(Y.shape[0], C, 16, 16)
TAP = torch.empty_like(POOLED, dtype=torch.uint8)
# squeeze-and-excitation, of images that are one tile
MAPS = activation(LARGE // C // 16 + 1_000_003, C, 4, 4)
GATE = torch.empty(MAPS.shape[:2], dtype=torch.float16, device="meta")
LINK = torch.empty((3, *MAPS.shape[:2]), device="meta")
# convolutions
IMAGES = activation(LARGE // C // 1024 + 20_003, C, 32, 32)
WEIGHT = activation(C, C, 3, 3)
POINTWISE = activation(C, C, 1, 1)
CONV = ConvShape(IMAGES.shape[0], 32, 32, C, C, 3, 3, 1, 1)
PIXELS = activation(Y.shape[0], 1, 64, 64)  # of which Y is the stem's 7x7 convolution with stride 2

# One line a launcher: whatever it launches is checked.
LAUNCHERS: dict[str, Callable[[], object]] = {
    "statistics": lambda: batch_stats(X, None, None, None, None, 0.1, 1e-5),
    "apply": lambda: batch_norm_add_relu(X, STATS, X),
    "backward reduce": lambda: batch_norm_backward_reduce(X, X, X, STATS, g=torch.empty_like(X)),
    "backward apply": lambda: batch_norm_backward_apply(X, X, STATS, SUMS),
    "pool": lambda: batch_norm_max_pool(Y, STATS),
    "pool, backward reduce": lambda: batch_norm_max_pool_backward_reduce(POOLED, Y, POOLED, TAP, STATS),
    "pool, backward apply": lambda: batch_norm_max_pool_backward_apply(POOLED, Y, POOLED, TAP, STATS, SUMS),
    "squeeze": lambda: batch_norm_squeeze(MAPS, STATS),
    "excite": lambda: batch_norm_excite(MAPS, STATS, GATE, MAPS),
    "excite, backward": lambda: batch_norm_excite_backward(MAPS, MAPS, MAPS, STATS, GATE),
    "squeeze, backward apply": lambda: batch_norm_squeeze_backward_apply(MAPS, MAPS, STATS, LINK, GATE, SUMS),
    "convolution": lambda: conv_forward(IMAGES, WEIGHT, 1, 1, stats=STATS, skip=IMAGES, moments=True),
    "convolution with shortcut": lambda: conv_forward(IMAGES, WEIGHT, 1, 1, shortcut=Shortcut(POINTWISE, None)),
    "grad-input behind a ReLU": lambda: conv_grad_input(IMAGES, WEIGHT, CONV, ReluMask(IMAGES, STATS)),
    "grad-input beside an identity": lambda: conv_grad_input(IMAGES, WEIGHT, CONV, IdentityGrad(IMAGES)),
    "grad-input beside a 1x1": lambda: conv_grad_input(IMAGES, WEIGHT, CONV, ShortcutGrad(IMAGES, POINTWISE)),
    "grad-input to a block's end beside an identity": lambda: conv_grad_input(
        IMAGES, WEIGHT, CONV, BlockEnd(IdentityGrad(IMAGES), IMAGES, IMAGES, STATS, NormedShortcut(IMAGES, STATS))
    ),
    "grad-input to a block's end beside a 1x1": lambda: conv_grad_input(
        IMAGES, WEIGHT, CONV, BlockEnd(ShortcutGrad(IMAGES, POINTWISE), IMAGES, IMAGES, STATS)
    ),
    "grad-weight": lambda: conv_grad_weight(IMAGES, IMAGES, (3, 3), 1, 1),
    "grad-weight of an activation": lambda: conv_grad_weight(IMAGES, IMAGES, (3, 3), 1, 1, stats=STATS),
    "grad-weight of the stem": lambda: conv_grad_weight_max_pool(
        POOLED, POOLED, TAP, Y, STATS, SUMS, PIXELS, (7, 7), 2, 3
    ),
}


def last(grid: Grid) -> list[Program]:
    return [(grid[0] - 1, grid[1] - 1, grid[2] - 1)]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_last_program_accesses_the_end_of_every_large_tensor(name):
    with watching(last, _ACCESSES) as launches:
        LAUNCHERS[name]()
    checked = 0
    for launch in launches:
        for argument in launch.arguments:
            numel = argument.tensor.numel()
            for verb in (READS, WRITES) if numel > LARGE else ():
                elements = launch.accessed(argument.name, verb)
                if elements.size:
                    checked += 1
                    assert elements[0] >= LARGE and elements[-1] < numel, (launch.kernel, argument.name)
                    if launch.left:  # not a reduction cut short
                        assert elements[-1] == numel - 1, (launch.kernel, argument.name)
                if verb == WRITES:  # whole rows, without a gap
                    expected = elements[:1] + np.arange(elements.size)
                    assert np.array_equal(elements, expected), (launch.kernel, argument.name)
    assert checked, f"{name} accessed no tensor of more than 2^31 elements"


def test_planes_of_images_and_channels_may_have_2_to_the_31_elements_each():
    """As many images as pixels: what squeeze and excitation hand over is large too."""
    plane = X.numel()
    gate, link = torch.empty(X.shape[:2], dtype=X.dtype, device="meta"), torch.empty((3, *X.shape[:2]), device="meta")
    with watching(last, _ACCESSES) as launches:
        batch_norm_squeeze(X, STATS, relu=True)
        batch_norm_excite_backward(X, X, X, STATS, gate)
        batch_norm_squeeze_backward_apply(X, X, STATS, link, gate, SUMS)
        batch_norm_squeeze_backward_reduce(link, link, gate, X)
    squeeze, excite, apply, reduce = launches
    ends = np.arange(plane - C, plane) + plane * np.arange(3)[:, None]  # of the last image
    assert np.array_equal(squeeze.accessed("link", WRITES), ends.ravel())
    assert np.array_equal(excite.accessed("link", WRITES), ends.ravel())
    assert np.array_equal(apply.accessed("dlink", READS), ends[2])
    # A reduction over all images, of which the first steps ran
    assert np.unique(reduce.accessed("dlink", READS) // plane).tolist() == [0, 1, 2]
    assert np.unique(reduce.accessed("link", READS) // plane).tolist() == [0, 1]


def test_partials_of_2_to_the_31_elements_each_are_merged():
    plane = 2**31
    partial = torch.empty((3, plane // C, C), device="meta")
    with watching(last, _ACCESSES) as launches:
        merge_sums(partial)
        batch_norm_finalize(partial, 64, 64 * plane // C, None, None, None, None, 0.1, 1e-5)
    reads = [launch.accessed("partial", READS) for launch in launches if launch.arguments[0].tensor is partial]
    assert len(reads) == 2
    for elements in reads:
        assert np.unique(elements // plane).tolist() == [0, 1, 2] and elements[-1] == 3 * plane - 1


def test_a_program_of_a_reduction_reads_no_further_than_offsets_of_32_bits_reach():
    wide = 2**16
    x = activation(2**16, wide, 1, 1)
    with watching(lambda grid: [(0, 0, 0)], 10**9) as launches:
        batch_norm_backward_reduce(x, x, None, vectors(4, wide))
    elements = launches[0].accessed("x", READS)
    assert elements[0] == 0 and 2**30 < elements[-1] < 2**31


def test_the_partial_sums_of_a_block_s_end_may_be_2_to_the_31_elements_each():
    """A plane has a row for each tile of pixels, and of pixels there are almost 2^31 here."""
    shape = ConvShape(2**21 - 8, 32, 32, 8 * C, C, 1, 1, 1, 0)
    x, weight = activation(shape.N, shape.C, 32, 32), activation(shape.K, shape.C, 1, 1)
    stats = vectors(4, shape.C)
    end = BlockEnd(IdentityGrad(x), x, x, stats, NormedShortcut(x, stats))
    with watching(last, _ACCESSES) as launches:
        _, partial = conv_grad_input(activation(shape.N, shape.K, 32, 32), weight, shape, end)
    (launch,) = launches
    plane, written = partial[0].numel(), launch.accessed("partial", WRITES)
    assert launch.left and partial.shape[0] == 3 and plane > LARGE
    ends = np.arange(plane - written.size // 3, plane) + plane * np.arange(3)[:, None]
    assert np.array_equal(written, ends.ravel())
