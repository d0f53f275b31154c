"""What a module's forward pass keeps for its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kept(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and what its backward keeps: one tensor per storage, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    tensors: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage().data_ptr()
        if storage not in parameters and (storage not in tensors or t.numel() > tensors[storage].numel()):
            tensors[storage] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    return out, list(tensors.values())


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """The bytes that a backward pass keeps, without those of the parameters and of x."""
    storages = [t.untyped_storage() for t in kept(module, x)[1]]
    return sum(s.nbytes() for s in storages if s.data_ptr() != x.untyped_storage().data_ptr())
