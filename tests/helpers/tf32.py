"""TensorFloat-32 as cuDNN has it: operands are rounded to 11 bits, and products are summed in float32."""

import torch
from torch import Tensor


def as_tf32(t: Tensor) -> Tensor:
    """t, float32 and finite, rounded to 11 bits; ties go away from zero."""
    bits = t.clone().view(torch.int32)
    return (bits + (1 << 12) & -(1 << 13)).view(torch.float32)
