"""The fused operations on PyTorch's own operators, in as few passes as they allow: what runs on the CPU."""

from collections.abc import Callable, Sequence

from resnet.torch_backend.batch_norm import backward as batch_norm_add_relu_backward
from resnet.torch_backend.batch_norm import forward as batch_norm_add_relu
from resnet.torch_backend.block import block_backward, block_forward, block_inference
from resnet.torch_backend.frozen import frozen_block_backward, frozen_block_forward
from resnet.torch_backend.inference import stem_inference
from resnet.torch_backend.pre_activation import (
    pre_activation_backward,
    pre_activation_forward,
    pre_activation_inference,
)
from resnet.torch_backend.squeeze_excite import (
    excite_backward,
    excite_forward,
    excite_inference,
    squeeze_backward,
    squeeze_forward,
    squeeze_inference,
)
from resnet.torch_backend.stem import (
    deep_stem_backward,
    deep_stem_forward,
    deep_stem_inference,
    stem_backward,
    stem_forward,
)

LINKS_BLOCKS = False  # whether `block_backward` takes a `BlockBefore`, and sums from the block after


def run(function: Callable[..., list], arguments: Sequence, known: object = None) -> list:
    """function(*arguments), which gives a list of tensors. The Triton backend may replay what an earlier call did."""
    return function(*arguments)


__all__ = [
    "run",
    "batch_norm_add_relu",
    "batch_norm_add_relu_backward",
    "block_forward",
    "block_backward",
    "block_inference",
    "frozen_block_forward",
    "frozen_block_backward",
    "pre_activation_forward",
    "pre_activation_backward",
    "pre_activation_inference",
    "stem_forward",
    "stem_backward",
    "stem_inference",
    "deep_stem_forward",
    "deep_stem_backward",
    "deep_stem_inference",
    "squeeze_forward",
    "squeeze_backward",
    "squeeze_inference",
    "excite_forward",
    "excite_backward",
    "excite_inference",
]
