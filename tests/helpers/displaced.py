"""Tensors at far addresses, for kernels whose offsets have to be of 64 bits."""

from __future__ import annotations

from torch import Tensor


class Displaced:
    """A tensor that stands where its last rows do in a far larger one: only offsets of 64 bits find them there."""

    def __init__(self, tensor: Tensor, elements: int):
        self._tensor, self._elements = tensor, elements
        self.dtype, self.device, self.shape, self.stride = tensor.dtype, tensor.device, tensor.shape, tensor.stride
        self.numel, self.element_size, self.untyped_storage = tensor.numel, tensor.element_size, tensor.untyped_storage

    def data_ptr(self) -> int:
        return self._tensor.data_ptr() - self._elements * self._tensor.element_size()
