"""Images kept on the training device as uint8, and served in resized batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet.data.augmentation import Augmentation


class Batches:
    """Batches of a set of images that lives, as uint8, on a device; each iteration over it is one epoch.

    Yields (images, labels): images (B, C, resize, resize) of `dtype` in `memory_format`, with values from 0 to 1 (the
    byte / 255 and nothing else, as the textbook's `ToTensor` gives it), resized bilinearly; labels int64 (B,). Both on
    `device`, where all of the work is done.

    With `shuffle`, the order is a function of (seed, epoch) alone, whatever the device, and so is what `augmentation`
    does to each image, before the resizing. `epoch` counts the iterations begun; it may be set.

    Args:
        images: uint8 (N, 28, 28), or any other square size; for images in colour (N, S, S, 3).
        labels: integers (N,).
        batch_size: B; the last batch is smaller where it does not divide N, unless `drop_last` leaves it out.
        resize: height and width of the yielded images, in pixels; at least that of `images`, since bilinear
            interpolation without a filter is sound for enlarging only.

    Raises:
        ValueError: an argument is not as said above; raised before anything is moved.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        device: torch.device | str,
        resize: int = 96,
        dtype: torch.dtype = torch.float32,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or len(shape) < 3 or shape[1] != shape[2] or shape[3:] not in ((), (3,)):
            raise ValueError(f"images: expected uint8 (N, S, S) or (N, S, S, 3), got {images.dtype} {shape}")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels: expected integers ({len(images)},), one per image, got {labels.dtype} {tuple(labels.shape)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if resize < images.shape[1]:
            raise ValueError(f"resize: expected at least the images' own size {images.shape[1]}, got {resize}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if memory_format not in (torch.channels_last, torch.contiguous_format):
            raise ValueError(f"memory_format: expected channels_last or contiguous_format, got {memory_format}")
        self.images = images.to(device)
        self.labels = labels.to(device, torch.int64)
        self.batch_size = batch_size
        self.resize = resize
        self.dtype = dtype
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.memory_format = memory_format
        self.epoch = 0
        self.augmentation = augmentation
        # One row per image, rewritten in place by each epoch: a CUDA graph of `draw` reads them where they are.
        self._chances = torch.zeros(len(images), Augmentation.CHANCES, device=device) if augmentation else None

    @property
    def examples(self) -> int:
        """Images in one epoch: all of them, less what `drop_last` leaves out."""
        n = len(self.images)
        return n - n % self.batch_size if self.drop_last else n

    def __len__(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.draw, self.indices())

    def indices(self) -> Iterator[Tensor]:
        """An epoch as the batches' places in the set, int64 (B,) each, on the device: `draw` makes batches of them."""
        order = self._order(self.epoch)
        if self._chances is not None:
            self._chances.copy_(torch.rand(self._chances.shape, generator=self._generator(self.epoch, 1)))
        self.epoch += 1
        return (index for index in order[: self.examples].split(self.batch_size) if len(index))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.images), device=self.images.device)
        return torch.randperm(len(self.images), generator=self._generator(epoch)).to(self.images.device)

    def _generator(self, *of: int) -> torch.Generator:
        """A generator seeded by `seed` and these numbers; on the CPU, so that all devices get the same values."""
        # Hashed, so that (seed, epoch + 1) is not (seed + 1, epoch).
        state = np.random.SeedSequence([self.seed, *of]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) at these places in the set, as an iteration yields them. Nothing waits for the device."""
        x = self.images[index].float().div_(255)
        if self.augmentation is not None:
            x = self.augmentation(x, self._chances[index])
        is_grey = x.dim() == 3
        x = x.unsqueeze(1) if is_grey else x.permute(0, 3, 1, 2)
        if self.resize != x.shape[-1]:
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        x = x.to(self.dtype)
        if not is_grey:
            x = x.contiguous(memory_format=self.memory_format)
        elif self.memory_format == torch.channels_last:
            # With one channel both formats are one order of bytes; the strides tell operators which is meant, and
            # `contiguous` would leave them, so they are set by moving the axis.
            x = x.squeeze(1).unsqueeze(-1).permute(0, 3, 1, 2)
        return x, self.labels[index]
