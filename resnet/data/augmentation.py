"""Random changes to a batch of images, as arithmetic on the device that a CUDA graph can replay."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Shifts an image by up to `shift` pixels along each axis, mirrors every second one, and hides a square.

    A function of the images and of chances: numbers from 0 to 1, drawn elsewhere. So nothing here has a state.
    """

    shift: int = 0  # zeros enter at the edge: a crop of the image padded by so many pixels
    flip: bool = False  # left to right, half of the images
    erase: int = 0  # side of the square, in pixels, which gets one random grey level; 0: none

    CHANCES: ClassVar[int] = 6  # per image

    def __call__(self, images: Tensor, chances: Tensor) -> Tensor:
        """images (B, S, S) or (B, S, S, C), each changed as its row of `chances` (B, CHANCES) says."""
        channels = images.dim() - 3  # axes of them
        down, right, mirror, top, left, grey = chances.unbind(1)
        places = torch.arange(images.shape[1], device=images.device)
        rows = _choice(down, 2 * self.shift + 1) + places
        columns = torch.where((mirror < 0.5)[:, None], places.flip(0), places) if self.flip else places
        columns = _choice(right, 2 * self.shift + 1) + columns
        image = torch.arange(len(images), device=images.device)
        padded = F.pad(images, channels * (0, 0) + 4 * (self.shift,))
        cropped = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
        if not self.erase:
            return cropped
        starts = len(places) - self.erase + 1
        hidden = self._covers(places, _choice(top, starts))[:, :, None]
        hidden = hidden & self._covers(places, _choice(left, starts))[:, None, :]
        hidden, grey = (x.view(*x.shape, *(cropped.dim() - x.dim()) * (1,)) for x in (hidden, grey))
        return torch.where(hidden, grey, cropped)

    def _covers(self, places: Tensor, start: Tensor) -> Tensor:
        """(B, S): which places along an axis the square covers."""
        return (places >= start) & (places < start + self.erase)


def _choice(chance: Tensor, n: int) -> Tensor:
    """One of 0 ... n - 1 for each chance from [0, 1), as a column."""
    return (chance * n).long()[:, None]
