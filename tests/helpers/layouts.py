"""One tensor in many layouts: the same values, other strides and offsets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "nchw": lambda t: t.contiguous(),
    "sliced pixels": lambda t: F.pad(t, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "sliced channels": lambda t: torch.cat((t, t, t), 1)[:, t.shape[1] : 2 * t.shape[1]],
    "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset": lambda t: (
        torch.cat((t.new_zeros(1), t.permute(0, 2, 3, 1).flatten()))[1:]
        .view(t.shape[0], t.shape[2], t.shape[3], t.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


def is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)
