"""The fused operations on the Triton kernels. Same functions as `torch_backend`."""

from resnet.kernels.host.launcher import active_driver
from resnet.triton_backend.batch_norm import backward as batch_norm_add_relu_backward
from resnet.triton_backend.batch_norm import forward as batch_norm_add_relu
from resnet.triton_backend.block import block_backward, block_forward, block_inference
from resnet.triton_backend.frozen import frozen_block_backward, frozen_block_forward
from resnet.triton_backend.plans import run
from resnet.triton_backend.pre_activation import (
    pre_activation_backward,
    pre_activation_forward,
    pre_activation_inference,
)
from resnet.triton_backend.squeeze_excite import excite_backward, excite_forward, squeeze_backward, squeeze_forward
from resnet.triton_backend.stem import (
    deep_stem_backward,
    deep_stem_forward,
    deep_stem_inference,
    stem_backward,
    stem_forward,
    stem_inference,
)

LINKS_BLOCKS = True  # see `torch_backend`

__all__ = [
    "active_driver",
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
    "excite_forward",
    "excite_backward",
]
